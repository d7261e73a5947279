//! What a case stands on: memory of its host, a guest on it, and touches of it.

mod bound;
mod ops;
mod ranges;
mod touches;
mod visibility;

use std::sync::atomic::{AtomicBool, Ordering};

use polder::kvm::{self, GuestMemfd, kvm_create_guest_memfd};
use polder::units::{Geometry, Level, PageIndex, PageRange};
use polder::{Builder, Error, HostKind, Memory, PageSize, Platform, Slot};
use polder_require::Facility;

pub use self::bound::Bound;
pub(crate) use self::ops::{check, convert, fill, probe, zero};
pub(crate) use self::ranges::{Scale, all, count, each_of, gfn, gfns, page, pages};
pub(crate) use self::touches::{
    all_are, byte, bytes, holds, put, put_all, raw_touch, seeded, touch,
};
pub(crate) use self::visibility::{facts, keeps, share_all, to};
use crate::host::{Guest, Host, Inside, Trouble, Way};
use crate::{Ran, Skipped};

/// A host, in the words of the cases.
#[derive(Clone, Copy)]
pub struct World<'a>(&'a dyn Host);

/// Where a case's memory begins in its guest, unless it says otherwise: at 5 GiB, which is aligned
/// to every level, and past the hole for devices.
pub(crate) const BASE: u64 = 0x14_0000;

impl<'a> World<'a> {
    /// The world of a host.
    pub fn new(host: &'a dyn Host) -> Self {
        Self(host)
    }

    /// Which host.
    pub fn kind(&self) -> HostKind {
        self.0.kind()
    }

    /// Builds memory of the host; that it is refused is the case's affair.
    ///
    /// # Errors
    /// [`Skipped`] where this machine lacks what the host needs.
    pub fn try_build(&self, builder: Builder) -> Result<Result<Memory, Error>, Skipped> {
        self.build_on(builder.platform(self.0.platform()))
    }

    fn build_on(&self, builder: Builder) -> Result<Result<Memory, Error>, Skipped> {
        let built = builder.host(self.0.kind()).build();
        if let Ok(memory) = &built {
            self.0.prepare(memory);
        }
        match built.as_ref().err().and_then(|error| self.0.missing(error)) {
            Some(skipped) => Err(skipped),
            None => Ok(built),
        }
    }

    /// Memory of `pages` pages, private and whole.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn memory(&self, pages: u64) -> Result<Memory, Skipped> {
        self.build(self.builder(pages))
    }

    /// The same for a platform that the case is about.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn memory_for(&self, platform: Platform, pages: u64) -> Result<Memory, Skipped> {
        let built = self.build_on(self.builder(pages).platform(platform))?;
        Ok(built.expect("memory of a sensible size"))
    }

    /// The same for a platform that tells private accesses of a guest from shared ones: the
    /// column's, or else the software-protected one.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn memory_apart(&self, pages: u64) -> Result<Memory, Skipped> {
        match self.0.platform() {
            Platform::Plain => self.memory_for(Platform::SwProtected, pages),
            platform => self.memory_for(platform, pages),
        }
    }

    /// Memory whose contents are owed: private, where private pages can be owed.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn owed(&self, pages: u64) -> Result<Memory, Skipped> {
        let builder = self.builder(pages).owed();
        let private = self.0.platform().host_fills_private();
        self.build(if private { builder } else { builder.shared() })
    }

    /// Memory of so many pages, of what the host's is made of: of whole huge pages where it is of
    /// those, which may be more.
    pub fn builder(&self, pages: u64) -> Builder {
        let size = self.0.page_size();
        let whole = size.reserved().map_or(1, |level| Geometry::X86_64.pages(level).get());
        Memory::builder(count(pages.next_multiple_of(whole))).page_size(size)
    }

    /// The pages that the host's view shows together, or not at all.
    pub fn granules(&self) -> Scale {
        match (self.0.page_size().reserved(), self.0.kind()) {
            (Some(level), HostKind::Memfd | HostKind::GuestMemfd) => Scale::of(level),
            _ => Scale::of(Level::Size4K),
        }
    }

    /// The pages that memory is made of.
    pub fn folios(&self) -> Scale {
        Scale::of(match self.0.page_size() {
            PageSize::Small => Level::Size4K,
            PageSize::Thp | PageSize::Huge2M => Level::Size2M,
            PageSize::Huge1G => Level::Size1G,
        })
    }

    /// How often a row tries what takes luck to be met. Huge pages take the road that 4K pages
    /// take, whose column tries it `times` times.
    pub fn rounds(&self, times: u64) -> u64 {
        match self.0.page_size() {
            PageSize::Small => times,
            PageSize::Thp | PageSize::Huge2M => times.div_ceil(10),
            PageSize::Huge1G => times.div_ceil(100),
        }
    }

    fn build(&self, builder: Builder) -> Result<Memory, Skipped> {
        Ok(self.try_build(builder)?.expect("memory of a sensible size"))
    }

    /// A VM without memory.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn guest(&self) -> Result<Box<dyn Guest>, Skipped> {
        self.0.guest()
    }

    /// A VM in which all of `memory` is bound, from 5 GiB on, by slot 0.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn bound(&self, memory: Memory) -> Result<Bound, Skipped> {
        let guest = self.0.guest()?;
        let vm = guest.attach(&memory);
        memory.bind(vm, Slot(0), gfn(BASE), all(&memory)).expect("a VM's first slot");
        Ok(Bound { memory, vm, guest })
    }

    /// A VM without memory, and the kernel's interface to what it is to have.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn kernel(&self) -> Result<(kvm::Vm, Box<dyn Guest>), Skipped> {
        let guest = self.0.guest()?;
        Ok((kvm::Vm::new(guest.fd(), self.0.kind(), self.0.platform()), guest))
    }

    /// A guest_memfd, by the kernel's interface.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn guest_memfd(&self, vm: &kvm::Vm, size: u64, flags: u64) -> Result<GuestMemfd, Skipped> {
        let args = kvm_create_guest_memfd { size, flags, ..Default::default() };
        match vm.create_guest_memfd(args) {
            Ok(memfd) => Ok(memfd),
            Err(failed) => {
                let lacks = failed.why.as_ref().and_then(|why| self.0.missing(why));
                Err(lacks.unwrap_or_else(|| panic!("{failed}")))
            }
        }
    }

    /// Calls `run`, while the host is in trouble. Returns what it returned.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn in_trouble<T: Send>(
        &self,
        trouble: Trouble,
        run: impl Fn() -> T + Sync,
    ) -> Result<T, Skipped> {
        let mut returned = None;
        self.0.in_trouble(trouble, &mut || returned = Some(run()))?;
        Ok(returned.expect("the host calls it"))
    }

    /// Nothing, where it can be told of each page whether it takes up memory.
    ///
    /// # Errors
    /// [`Skipped`]: the pages of a guest_memfd are told of by `cachestat`.
    pub fn existing_is_told(&self, memory: &Memory) -> Result<(), Skipped> {
        match memory.resident() {
            Err(Error::Host(error)) if error.call == "cachestat" => {
                Err(Skipped { facility: Facility::Cachestat, why: error.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// [`Host::mapped`].
    pub fn mapped(&self, memory: &Memory, range: PageRange) -> Vec<PageIndex> {
        self.0.mapped(memory, range)
    }

    /// [`Host::taken`].
    pub fn taken(&self, memory: &Memory) -> u64 {
        self.0.taken(memory)
    }

    /// [`Host::inherited`].
    pub fn inherited(&self, memory: &Memory) -> Vec<String> {
        self.0.inherited(memory)
    }

    /// [`Host::reaches`].
    pub fn reaches(&self, way: Way) -> bool {
        self.0.reaches(way)
    }

    /// [`Host::inside`], where the case applies only to hosts that have it.
    pub fn inside(&self) -> &dyn Inside {
        self.0.inside().expect("a host without it declares the case not applicable")
    }
}

/// Does two things at once. Both end, or the cell hangs and fails for that.
pub(crate) fn meanwhile<A: Send, B>(
    one: impl FnOnce() -> A + Send,
    other: impl FnOnce() -> B,
) -> (A, B) {
    std::thread::scope(|scope| {
        let one = scope.spawn(one);
        let other = other();
        match one.join() {
            Ok(one) => (one, other),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The end of a case that has passed.
pub(crate) const PASSED: Ran = Ok(());

/// Ends other threads, also where this one panics.
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
