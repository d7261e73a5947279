//! Host `guest_memfd`: the kernel keeps private pages; shared ones lie in a memfd.
//!
//! ```text
//!                guest_memfd       memfd: guest view   host view          trusted view
//! who            KVM's slots       KVM's slots         device models      Polder alone
//! shared page    not shown         mapped by faults    mapped by answers  mapped by use
//! private page   mapped by faults  not shown           poisoned if touched never used
//! ```
//! Which of the two a guest frame shows is the frame's attribute (`KVM_SET_MEMORY_ATTRIBUTES`),
//! set here for every frame that a page is bound at. A page exists on one side at most: a
//! conversion frees it on both, when all frames are told, so that the guest finds zeros. The host
//! view is watched as on host `memfd`: a stray touch of a private page is denied, and no page of
//! the memfd comes into being by it.
//!
//! # Holes
//! - While a conversion is under way, a guest that uses the pages nevertheless may have one made
//!   on the side that they come to; it is freed at the conversion's end. If the conversion fails
//!   it stays, until the next one of that page.
//! - The host can't read or write a guest_memfd whose pages are private, and no userfaultfd
//!   watches one (Linux 7.3): private contents are brought by the guest, and none can be owed.
//! - What the VMM's process has as descriptor it can use: free private pages, not read them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use polder_engine::{RangeSet, Response, Slot, Step, View as ViewKind, Visibility, VmId};
use polder_linux::{
    Continued, Errno, GuestMemfd, KvmSlot, Memfd, PrivateMemory, Userfault, View, set_private,
};
use polder_units::{Gfn, GfnRange, Level, PAGE_SIZE, PageCount, PageIndex, PageRange};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::memfd::{failed, missing};
use super::{Host, HostKind, Vm};
use crate::Error;

pub(crate) struct GuestMemfdHost {
    memfd: Arc<Memfd>,
    trusted: View,
    guest: Userfault,
    host: Userfault,
    /// Held while attributes or slots change: a slot that appears meanwhile would miss a change.
    /// No thread that answers touches takes it.
    state: Mutex<State>,
    nudge: OwnedFd,
}

struct State {
    vms: BTreeMap<VmId, Arc<VmFd>>,
    /// The guest_memfd and its VM, from the first bind on.
    owner: Option<Owner>,
    slots: BTreeMap<Slot, Bound>,
    /// Pages that the kernel is told are shared.
    shared: RangeSet,
    /// Pages in quarantine: for the kernel they are shared, and poison.
    cut: RangeSet,
}

#[derive(Clone)]
struct Owner {
    id: VmId,
    vm: Arc<VmFd>,
    guest_memfd: Arc<GuestMemfd>,
}

/// A slot, and what it shows. KVM's slot goes first, then the attributes of its frames.
struct Bound {
    slot: KvmSlot,
    gfn: Gfn,
    pages: PageRange,
}

impl Bound {
    /// The guest frames of those of `range` that it shows.
    fn gfns(&self, range: PageRange) -> Option<GfnRange> {
        gfns(self.gfn, self.pages, range)
    }
}

/// The guest frames of those pages of `range` that are bound, `pages` from `gfn` on.
fn gfns(gfn: Gfn, pages: PageRange, range: PageRange) -> Option<GfnRange> {
    let start = range.start().get().max(pages.start().get());
    let end = range.end().min(pages.end());
    let count = end.checked_sub(start).filter(|count| *count > 0)?;
    let first = gfn.get() + (start - pages.start().get());
    GfnRange::between(first, first + count)
}

impl State {
    /// Tells the kernel what pages are, at every frame that shows one.
    fn set(&self, range: PageRange, to: Visibility) -> Result<(), Error> {
        let Some(owner) = &self.owner else { return Ok(()) };
        let private = to == Visibility::Private;
        for gfns in self.slots.values().filter_map(|bound| bound.gfns(range)) {
            set_private(&owner.vm, gfns, private)?;
        }
        Ok(())
    }

    /// Makes pages private or shared for the kernel, but for those in quarantine.
    fn protect(&mut self, range: PageRange, to: Visibility) -> Result<(), Error> {
        for part in outside(&self.cut, range) {
            self.set(part, to)?;
            match to {
                Visibility::Private => self.shared.remove(part),
                Visibility::Shared => self.shared.insert(part),
            }
        }
        Ok(())
    }

    /// The guest_memfd for a VM; made for the first VM that asks.
    fn owner(&mut self, id: VmId, pages: PageCount) -> Result<Owner, Error> {
        match &self.owner {
            Some(owner) if owner.id == id => Ok(owner.clone()),
            Some(owner) => Err(Error::OneVm { owner: owner.id, vm: id }),
            None => {
                let vm = Arc::clone(self.vms.get(&id).expect("a VM that was attached"));
                let guest_memfd = Arc::new(GuestMemfd::new(&vm, pages)?);
                Ok(self.owner.insert(Owner { id, vm, guest_memfd }).clone())
            }
        }
    }
}

/// The runs of `range` that are not in `set`.
fn outside(set: &RangeSet, range: PageRange) -> Vec<PageRange> {
    let mut outside = Vec::new();
    let mut next = range.start().get();
    for run in set.runs() {
        if next >= range.end() {
            break;
        }
        outside.extend(PageRange::between(next, run.start().get().min(range.end())));
        next = next.max(run.end());
    }
    outside.extend(PageRange::between(next, range.end()));
    outside
}

impl GuestMemfdHost {
    /// An object of `pages` pages; refused if its contents are `owed`.
    pub(crate) fn new(pages: PageCount, owed: bool) -> Result<Self, Error> {
        if owed {
            return Err(Error::NotOffered {
                what: "contents can't be owed on host guest_memfd: no kernel lets a userfaultfd \
                       watch a guest_memfd, or the host write its private pages",
                way_out: "have the guest copy them from shared pages, or use --host memfd",
            });
        }
        let memfd = Arc::new(Memfd::new("polder-shared", pages)?);
        let trusted = View::new(&memfd)?;
        let guest = Userfault::new(Arc::new(View::new(&memfd)?)).map_err(missing)?;
        let host = Userfault::new(Arc::new(View::new(&memfd)?)).map_err(missing)?;
        let all = PageRange::between(0, pages.get()).expect("an object has pages");
        host.watch(all).map_err(missing)?;
        let nudge = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| failed("eventfd", errno))?;
        let state = State {
            vms: BTreeMap::new(),
            owner: None,
            slots: BTreeMap::new(),
            shared: RangeSet::default(),
            cut: RangeSet::default(),
        };
        Ok(Self { memfd, trusted, guest, host, state: Mutex::new(state), nudge })
    }

    fn watched(&self, view: ViewKind) -> &Userfault {
        match view {
            ViewKind::Guest => &self.guest,
            ViewKind::Host => &self.host,
        }
    }

    fn guest_memfd(&self) -> Option<Arc<GuestMemfd>> {
        self.state.lock().owner.as_ref().map(|owner| Arc::clone(&owner.guest_memfd))
    }

    /// Makes the kernel treat pages as what they become. Here, and in [`Self::free`], is where an
    /// ioctl of a future kernel that converts a guest_memfd in place would go: it would take the
    /// place of the attributes and of the second pool, `free` would free nothing at a conversion,
    /// and the engine would be told `in_place`, so that contents can be kept.
    fn protect(&self, range: PageRange, to: Visibility) -> Result<(), Error> {
        self.state.lock().protect(range, to)
    }

    /// Frees pages on both sides: on the one that they are on for their contents, on the other for
    /// what a guest may have had made there amid a conversion.
    fn free(&self, range: PageRange) -> Result<(), Error> {
        self.memfd.punch_hole(range)?;
        if let Some(guest_memfd) = self.guest_memfd() {
            guest_memfd.punch_hole(range)?;
        }
        // Markers survive that.
        self.host.view().zap(range)?;
        Ok(self.guest.view().zap(range)?)
    }

    /// Takes pages out of all views for good. A guest_memfd has no poison: the guest is shown the
    /// shared side, where there is a marker.
    fn quarantine(&self, range: PageRange) -> Result<(), Error> {
        let mut state = self.state.lock();
        self.guest.watch(range)?;
        for watched in [&self.guest, &self.host] {
            watched.view().zap(range)?;
            watched.poison(range)?;
        }
        state.cut.insert(range);
        state.set(range, Visibility::Shared)
    }
}

impl Host for GuestMemfdHost {
    fn take(&self, step: Step) -> Result<(), Error> {
        match step {
            Step::UnmapHost(range) => self.host.view().zap(range)?,
            Step::Protect(range, to) => self.protect(range, to)?,
            Step::Free(range) => self.free(range)?,
            Step::Quarantine(range) => self.quarantine(range)?,
            // The kernel takes frames from the guest when it is told what they become; references
            // from outside are to the shared side, which is freed; nothing is ever owed.
            Step::UnmapGuest(_) | Step::CheckReferences(_) | Step::Publish(_) => {}
        }
        Ok(())
    }

    fn answer(&self, view: ViewKind, response: Response, range: PageRange) -> Result<(), Error> {
        let watched = self.watched(view);
        match response {
            Response::Poison => Ok(watched.poison(range)?),
            Response::Map => {
                let mut left = Some(range);
                while let Some(rest) = left {
                    let Continued::Missing(page) = watched.resume(rest)? else { break };
                    left = PageRange::between(page.get(), rest.end());
                    self.trusted.populate(left.unwrap_or(rest))?;
                }
                Ok(())
            }
        }
    }

    fn wake(&self, view: ViewKind, range: PageRange) {
        // It fails only for a range that isn't watched: then nobody waits there.
        let _ = self.watched(view).wake(range);
    }

    fn touches(
        &self,
        into: &mut Vec<(ViewKind, PageIndex)>,
        at_most: Option<Duration>,
    ) -> Result<(), Error> {
        let mut wait = [self.guest.as_fd(), self.host.as_fd(), self.nudge.as_fd()]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let at_most = at_most.and_then(|time| Timespec::try_from(time).ok());
        match poll(&mut wait, at_most.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed("poll", errno)),
        }
        // Reading an eventfd empties it; that it is empty already is no error.
        let _ = rustix::io::read(&self.nudge, &mut [0u8; 8]);
        let mut touches = Vec::new();
        for view in [ViewKind::Guest, ViewKind::Host] {
            self.watched(view).touches(&mut touches)?;
            into.extend(touches.drain(..).map(|touch| (view, touch.page)));
        }
        Ok(())
    }

    fn nudge(&self) {
        // It fails only when the counter is about to overflow: then the reader is awake.
        let _ = rustix::io::write(&self.nudge, &1u64.to_ne_bytes());
    }

    fn attach(&self, id: VmId, vm: Vm) -> Result<(), Error> {
        let Vm::Kvm(vm) = vm else {
            return Err(Error::WrongVm { host: HostKind::GuestMemfd });
        };
        let offered = PrivateMemory::of(&vm);
        if !offered.guest_memfd || !offered.attributes {
            return Err(Error::NotOffered {
                what: "this VM has no private memory: KVM offers it with TDP (EPT or NPT), to VMs \
                       of a protected type",
                way_out: "make the VM of type KVM_X86_SW_PROTECTED_VM on a kernel with \
                          CONFIG_KVM_SW_PROTECTED_VM and TDP, or use --host memfd",
            });
        }
        self.state.lock().vms.insert(id, vm);
        Ok(())
    }

    fn bind(&self, vm: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error> {
        let mut state = self.state.lock();
        let owner = state.owner(vm, self.memfd.pages())?;
        let all = gfns(gfn, pages, pages).ok_or(failed("KVM_SET_MEMORY_ATTRIBUTES", Errno::INVAL));
        // The guest has no slot yet, and so sees none of it happen.
        set_private(&owner.vm, all?, true)?;
        let shared = state.shared.runs().chain(state.cut.runs());
        for gfns in shared.filter_map(|run| gfns(gfn, pages, run)) {
            set_private(&owner.vm, gfns, false)?;
        }
        let sides = (&owner.guest_memfd, self.guest.view());
        let made = KvmSlot::with_guest_memfd(&owner.vm, slot.0, gfn, sides, pages)?;
        state.slots.insert(slot, Bound { slot: made, gfn, pages });
        Ok(())
    }

    fn unbind(&self, _: VmId, slot: Slot) {
        let mut state = self.state.lock();
        let Some(Bound { slot, gfn, pages }) = state.slots.remove(&slot) else { return };
        drop(slot);
        if let (Some(owner), Some(gfns)) = (&state.owner, gfns(gfn, pages, pages)) {
            // Without a slot an attribute shows nothing, and the next bind sets its own.
            let _ = set_private(&owner.vm, gfns, false);
        }
    }

    fn map_guest(&self, _: VmId, _: Gfn, _: Level, _: PageRange) -> Result<(), Error> {
        // KVM maps what a frame's attribute says.
        Ok(())
    }

    fn settle(&self, _: &[PageRange]) -> Result<(), Error> {
        // Nothing was ever owed.
        Ok(())
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        Ok(self.trusted.read(offset, into)?)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        Ok(self.trusted.write(offset, from)?)
    }

    fn touch_read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        Ok(self.host.view().read(offset, into)?)
    }

    fn touch_write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        Ok(self.host.view().write(offset, from)?)
    }

    fn touch_from(&self, file: BorrowedFd<'_>, offset: u64, count: usize) -> Result<usize, Error> {
        Ok(self.host.view().read_from(file, offset, count)?)
    }

    fn host_view(&self) -> Option<*mut u8> {
        Some(self.host.view().as_ptr())
    }

    fn guest_page(&self, address: usize) -> Option<PageIndex> {
        PageIndex::new(self.guest.view().offset_of(address)? / PAGE_SIZE)
    }

    fn existing(&self) -> Result<Vec<PageRange>, Error> {
        let mut existing = RangeSet::default();
        self.memfd.existing()?.into_iter().for_each(|run| existing.insert(run));
        let private = self.guest_memfd().map(|guest_memfd| guest_memfd.existing());
        match private.transpose() {
            Ok(runs) => runs.into_iter().flatten().for_each(|run| existing.insert(run)),
            // A kernel that can't count the pages of a guest_memfd leaves the shared ones.
            Err(error) if error.errno == Errno::NOSYS => {}
            Err(error) => return Err(error.into()),
        }
        Ok(existing.runs().collect())
    }

    fn resident(&self) -> Result<PageCount, Error> {
        let mut pages = self.memfd.existing()?;
        if let Some(guest_memfd) = self.guest_memfd() {
            pages.extend(guest_memfd.existing()?);
        }
        Ok(total(&pages))
    }
}

/// How many pages runs are of, counted as often as they occur.
fn total(runs: &[PageRange]) -> PageCount {
    let total = runs.iter().fold(0u64, |sum, run| sum.saturating_add(run.count().get()));
    PageCount::new(total).unwrap_or(PageCount::ZERO)
}
