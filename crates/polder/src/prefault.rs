//! Prefault: memory mapped for a guest before it touches it.
//!
//! It is a method of the root that the vCPU's translations begin at, and the type of the pages
//! names the space: [`Gfn`] for guest-physical addresses, [`Lpn`](polder_units::Lpn) for linear
//! ones where a guest's page tables are shadowed, [`L2Gfn`](polder_units::L2Gfn) for those of a
//! guest's guest. Whether one of these runs is nowhere asked.

use kvm_ioctls::VcpuFd;
use polder_engine::VmId;
use polder_linux::Errno;
use polder_units::{AddressSpace, Frame, FrameRange, Gfn, GfnRange, GuestPage, PageCount};

use crate::host::failed;
use crate::{Error, MachineVcpu, Memory};

/// How many pages are held against operations, and slots against change, at once: 2 MiB, from one
/// multiple of it to the next, so that each can be mapped as one page.
const AT_ONCE: u64 = 512;

/// How often in a row a guest's tables may change under the look at them.
const CHANGES: u32 = 1000;

/// A vCPU to map memory for, as its host knows it.
#[derive(Clone, Copy, Debug)]
pub enum Vcpu<'a> {
    /// One of KVM's.
    Kvm(&'a VcpuFd),
    /// One of the simulated machine.
    Machine(&'a MachineVcpu),
}

impl<'a> From<&'a VcpuFd> for Vcpu<'a> {
    fn from(vcpu: &'a VcpuFd) -> Self {
        Self::Kvm(vcpu)
    }
}

impl<'a> From<&'a MachineVcpu> for Vcpu<'a> {
    fn from(vcpu: &'a MachineVcpu) -> Self {
        Self::Machine(vcpu)
    }
}

/// How far a prefault came. It is at least one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Prefaulted<P: Frame = Gfn> {
    /// The pages that were done, from the first on.
    pub done: FrameRange<P>,
    /// How many of these were left out, because the guest's own tables do not map them, or say that
    /// they were never used: a mapping would hide the first use from the guest. None of
    /// guest-physical pages.
    pub skipped: PageCount,
    /// Those after them, if it stopped early: a call for them goes on, or says what is in the way.
    pub left: Option<FrameRange<P>>,
}

/// Pages of a space, by their numbers: what is left of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Span {
    pub(crate) space: AddressSpace,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// What one hold of pages, and slots, came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Came {
    /// The number of the first page that is not done.
    pub(crate) end: u64,
    pub(crate) skipped: u64,
}

impl Memory {
    /// Maps pages for a vCPU before its guest touches them, as reads by the guest would: private
    /// pages as private, shared ones as shared; nothing is copied or called accessed. It may be
    /// called before the guest runs and while it runs, also for several vCPUs at once. How much
    /// is mapped is the host's affair: see `docs/prefault.md`.
    ///
    /// Like `KVM_PRE_FAULT_MEMORY` (Linux `Documentation/virt/kvm/api.rst`) it succeeds if any page
    /// was done. Pages of which an operation is under way are waited for, as a guest would.
    ///
    /// KVM does one thing at a time for a vCPU: a call for one that is in its guest waits for its
    /// next exit, and [`Memory::bind`], [`Memory::unbind`] and what changes those pages wait
    /// meanwhile. So call from the thread that runs the vCPU, or for one that is not running.
    ///
    /// # Errors
    /// What stands before the first page: [`Refusal::NoSlot`] (`ENOENT`), [`Refusal::Owed`],
    /// [`Refusal::SourceFailed`], [`Refusal::Quarantined`]; [`Error::OtherRoot`] (`EOPNOTSUPP`) if
    /// the vCPU's root translates other addresses; [`Error::Interrupted`] (`EINTR`) by a
    /// signal or a kick; [`Error::WrongVcpu`]; [`Error::NotOffered`]; [`Error::Host`], by `EAGAIN`
    /// where others were at work on the page for long; of an SNP guest's private page that it was
    /// not given yet, [`Refusal::Referenced`].
    ///
    /// [`Refusal::NoSlot`]: crate::Refusal::NoSlot
    /// [`Refusal::Owed`]: crate::Refusal::Owed
    /// [`Refusal::SourceFailed`]: crate::Refusal::SourceFailed
    /// [`Refusal::Referenced`]: crate::Refusal::Referenced
    /// [`Refusal::Quarantined`]: crate::Refusal::Quarantined
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, GfnRange, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let vcpu = memory.machine_vcpu(vm)?;
    /// let frames = GfnRange::between(0x108, 0x118).unwrap();
    /// let done = memory.prefault(vm, &vcpu, frames)?;
    /// assert_eq!((done.done.count().get(), done.left.map(|left| left.count().get())), (8, Some(8)));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn prefault<'a, P: GuestPage>(
        &self,
        vm: VmId,
        vcpu: impl Into<Vcpu<'a>>,
        pages: FrameRange<P>,
    ) -> Result<Prefaulted<P>, Error> {
        let vcpu = vcpu.into();
        self.check_vcpu(vm, vcpu)?;
        let (start, end) = (pages.start().get(), pages.end());
        let came = self.prefault_span((vm, vcpu), Span { space: P::SPACE, start, end })?;
        Ok(Prefaulted {
            done: FrameRange::between(start, came.end).expect("it would have failed"),
            skipped: PageCount::new(came.skipped).expect("a part of the range"),
            left: FrameRange::between(came.end, end),
        })
    }

    /// Maps guest frames wherever the guest's page tables, as they are now, show them: for a vCPU
    /// whose root translates other addresses than guest-physical ones. `skipped` counts frames that
    /// show nowhere.
    ///
    /// All of the guest's tables are walked to find them: that costs by what the guest has mapped,
    /// not by what is asked for, some 10 ns an entry. It is tried for 2^24 entries, 64 GiB of small
    /// pages. Where the root translates guest-physical addresses it is [`Memory::prefault`].
    ///
    /// # Errors
    /// As [`Memory::prefault`]; [`Error::NotOffered`] where tables have more entries.
    pub fn prefault_reverse<'a>(
        &self,
        vm: VmId,
        vcpu: impl Into<Vcpu<'a>>,
        gfns: GfnRange,
    ) -> Result<Prefaulted, Error> {
        let vcpu = vcpu.into();
        self.check_vcpu(vm, vcpu)?;
        let (space, aliases) = self.driver.host.aliases(vcpu, gfns)?;
        let mut next = gfns.start().get();
        let mut skipped = 0;
        while let Some(now) = GfnRange::between(next, gfns.end().min(next + AT_ONCE)) {
            let (mut end, mut failed, mut shown) = (now.end(), None, Vec::new());
            for (page, all) in &aliases {
                let Some(part) = all.intersection(now) else { continue };
                let first = page + (part.start().get() - all.start().get());
                let span = Span { space, start: first, end: first + part.count().get() };
                let done = match self.prefault_span((vm, vcpu), span) {
                    Ok(came) => came.end - first,
                    Err(error) => {
                        failed = failed.or(Some(error));
                        0
                    }
                };
                end = end.min(if done < part.count().get() {
                    part.start().get() + done
                } else {
                    end
                });
                shown.push(part);
            }
            let done = now.start().get()..end;
            let hidden = |gfn: &Gfn| !shown.iter().any(|part| part.contains(*gfn));
            let frames = now.frames().filter(|gfn| done.contains(&gfn.get()));
            skipped += frames.filter(hidden).count() as u64;
            next = end;
            match failed {
                Some(error) if next == gfns.start().get() => return Err(error),
                _ if next < now.end() => break,
                _ => {}
            }
        }
        let done = GfnRange::between(gfns.start().get(), next);
        Ok(Prefaulted {
            done: done.expect("it would have failed"),
            skipped: PageCount::new(skipped).expect("a part of the range"),
            left: GfnRange::between(next, gfns.end()),
        })
    }

    fn check_vcpu(&self, vm: VmId, vcpu: Vcpu<'_>) -> Result<(), Error> {
        match (vcpu, self.driver.host.machine()) {
            (Vcpu::Kvm(_), None) => Ok(()),
            (Vcpu::Machine(vcpu), Some(_)) if vcpu.is_of(&self.driver, vm) => Ok(()),
            _ => Err(Error::WrongVcpu),
        }
    }

    /// Does as much of a span as can be; at least one page.
    fn prefault_span(&self, of: (VmId, Vcpu<'_>), span: Span) -> Result<Came, Error> {
        let (mut one_by_one, mut changes) = (false, 0);
        let mut came = Came { end: span.start, skipped: 0 };
        while came.end < span.end {
            let now = Span { start: came.end, ..span };
            let most = if one_by_one { 1 } else { AT_ONCE - now.start % AT_ONCE };
            let stopped = match of.1 {
                Vcpu::Machine(vcpu) if vcpu.is_kicked() => Err((Error::Interrupted, false)),
                _ => {
                    let _unchanged = self.slots.keep(&self.driver);
                    self.driver.prefault(of, now, most)
                }
            };
            match stopped {
                // The guest has changed its tables, or one of them was brought in.
                Ok(now) if now.end == came.end && changes < CHANGES => changes += 1,
                Ok(now) if now.end == came.end => {
                    let busy =
                        failed("a prefault of a guest that changes its tables", Errno::AGAIN);
                    return stopped_at(span, came, busy);
                }
                Ok(now) => {
                    changes = 0;
                    came = Came { end: now.end, skipped: came.skipped + now.skipped };
                }
                // Some of them may be done: one by one it shows how many.
                Err((error, true)) if error != Error::Interrupted => one_by_one = true,
                Err((error, _)) => return stopped_at(span, came, error),
            }
        }
        Ok(came)
    }
}

/// An error before the first page is told, and after it how far it came.
fn stopped_at(span: Span, came: Came, error: Error) -> Result<Came, Error> {
    if came.end == span.start { Err(error) } else { Ok(came) }
}
