//! Host `memfd`: one memfd, three views.
//!
//! ```text
//!              guest view          host view             trusted view
//! who          KVM's slots         device models         Polder alone
//! shared page  mapped by faults    mapped by answers     mapped by use
//! private page mapped by faults    poisoned when touched mapped by use
//! watched      while owed          always                never
//! ```
//! Guest and host see the same page of the memfd: a conversion moves no byte. What it changes is
//! whether the page is in the host view, which a userfaultfd watches: unmapping a page there makes
//! the next touch a question to the engine.
//!
//! # Holes
//! The VMM's process has all three views, `/proc/self/mem` and the descriptor; a reference that
//! the kernel took through the host view before a conversion (`vmsplice`, direct I/O in flight)
//! can't be seen from here. This guards against bugs and stray pointers, not a hostile VMM.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use polder_engine::pool::PoolCounts;
use polder_engine::{FolioCounts, Slot, Step, VmId};
use polder_linux::{Errno, HugetlbPool, KvmSlot, can_pre_fault};
use polder_units::{Geometry, Gfn, GfnRange, Level, PageCount, PageIndex, PageRange};

use super::views::{MemfdViews, Views};
use super::{Host, HostKind, Shown, Vm, map_ahead};
use crate::dirty::Marks;
use crate::sync::Mutex;
use crate::{Error, PageSize, Vcpu};

pub(crate) struct MemfdHost {
    views: MemfdViews,
    vms: Mutex<BTreeMap<VmId, Arc<VmFd>>>,
    slots: Mutex<Slots>,
    size: PageSize,
}

#[derive(Default)]
struct Slots {
    bound: BTreeMap<(VmId, Slot), Bound>,
    /// Each logs what is written to it, and so does one that is bound.
    log: bool,
}

/// A slot, and the first page that it shows.
struct Bound {
    slot: KvmSlot,
    first: PageIndex,
}

impl MemfdHost {
    /// An object of `pages` pages; `owed` if its contents are still to come.
    pub(crate) fn new(pages: PageCount, owed: bool, size: PageSize) -> Result<Self, Error> {
        let views = MemfdViews::new("polder", pages, owed, size)?;
        Ok(Self { views, vms: Mutex::default(), slots: Mutex::default(), size })
    }

    /// What KVM's slots show, for tests that look without a guest.
    #[cfg(test)]
    pub(crate) fn guest_view(&self) -> Arc<polder_linux::View> {
        Arc::clone(self.views.guest_view())
    }
}

/// Says what to do where a slot's log can't be had.
fn no_log(source: polder_linux::Error) -> Error {
    match source.errno {
        Errno::NXIO => Error::NotOffered {
            what: "this VM has a dirty ring, by which KVM tells of writes, and so no dirty log",
            way_out: "do not enable KVM_CAP_DIRTY_LOG_RING on a VM whose memory is logged",
        },
        _ => source.into(),
    }
}

impl Host for MemfdHost {
    fn take(&self, step: Step) -> Result<(), Error> {
        match step {
            Step::UnmapHost(range) => self.views.unmap_host(range),
            Step::Free(range) => self.views.free(range),
            Step::Quarantine(range) => self.views.quarantine(range),
            // A guest's mapping is right for private and shared alike, and nothing but the host
            // view enforces the difference; references from outside are not to be seen; a page
            // that was written is ready.
            Step::UnmapGuest(_) | Step::CheckReferences(_) => Ok(()),
            Step::Protect(..) | Step::Publish(_) => Ok(()),
            Step::PrepareSplit(_)
            | Step::SplitFolio(_)
            | Step::MergeFolio(_)
            | Step::ReleaseTables(_) => unreachable!("this host splits no folios"),
            Step::Assign(_)
            | Step::Unassign(_)
            | Step::Reassign(_)
            | Step::Smash(_)
            | Step::Merge(_)
            | Step::Thaw(_) => {
                unreachable!("there is no memory of an SNP guest on this host")
            }
            Step::Move(range) => self.views.collapse(range),
            Step::Launch(_) | Step::MapDma(..) | Step::UnmapDma(..) => {
                unreachable!("not offered on this host, or the driver's own: {step}")
            }
        }
    }

    fn has_to_take(&self, step: Step) -> bool {
        use Step::{CheckReferences, Protect, Publish, UnmapGuest};
        !matches!(step, UnmapGuest(_) | CheckReferences(_) | Protect(..) | Publish(_))
    }

    fn views(&self) -> &dyn Views {
        &self.views
    }

    fn attach(&self, id: VmId, vm: Vm) -> Result<(), Error> {
        let Vm::Kvm(vm) = vm else {
            return Err(Error::WrongVm { host: HostKind::Memfd });
        };
        self.vms.lock().insert(id, vm);
        Ok(())
    }

    fn bind(&self, vm: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error> {
        let fd = self.vms.lock().get(&vm).map(Arc::clone).ok_or(Error::NoSuchVm)?;
        let mut slots = self.slots.lock();
        let make = if slots.log { KvmSlot::logging } else { KvmSlot::new };
        let made = make(&fd, slot.0, gfn, self.views.guest_view(), pages)?;
        slots.bound.insert((vm, slot), Bound { slot: made, first: pages.start() });
        Ok(())
    }

    fn unbind(&self, vm: VmId, slot: Slot) -> Result<(), Error> {
        let mut slots = self.slots.lock();
        if let Some(bound) = slots.bound.get_mut(&(vm, slot)) {
            bound.slot.delete()?;
            slots.bound.remove(&(vm, slot));
        }
        Ok(())
    }

    fn log_dirty(&self, on: bool) -> Result<(), Error> {
        let Slots { bound, log } = &mut *self.slots.lock();
        let start = |it: &mut Bound| {
            it.slot.log_dirty(true)?;
            // What was written so far is not asked for; but whether it can be taken.
            it.slot.take_dirty(|_| ())
        };
        let started = if on { bound.values_mut().try_for_each(start) } else { Ok(()) };
        *log = on && started.is_ok();
        if *log {
            return Ok(());
        }
        let stop = |done: Result<_, _>, it: &mut Bound| done.and(it.slot.log_dirty(false));
        let stopped = bound.values_mut().fold(Ok(()), stop);
        started.map_err(no_log)?;
        Ok(stopped?)
    }

    fn take_dirty(&self, into: &Marks) -> Result<(), Error> {
        let slots = self.slots.lock();
        for Bound { slot, first } in slots.bound.values() {
            slot.take_dirty(|words| into.note_words(*first, words)).map_err(no_log)?;
        }
        Ok(())
    }

    fn show(
        &self,
        _: VmId,
        _: Vcpu<'_>,
        shown: Shown,
        range: PageRange,
    ) -> Result<(u64, u64), Error> {
        self.views.show(range)?;
        Ok((shown.gfns.end(), 0))
    }

    /// KVM touches the guest view: where a page was lost there since (a discard, reclaim), and that
    /// view is watched, it waits for an answer. What it maps is what a guest's touch would have it
    /// map; that it is not late is KVM's affair (`mmu_invalidate_retry_gfn()`).
    fn shown(&self, vm: VmId, vcpu: Vcpu<'_>, gfns: GfnRange) -> Result<u64, Error> {
        let fd = self.vms.lock().get(&vm).map(Arc::clone).ok_or(Error::NoSuchVm)?;
        // Without TDP the guest's own tables say what stage 2 maps where: the first touch costs a
        // fault of KVM's, whose answer is in the guest view.
        if can_pre_fault(&fd) { map_ahead(vcpu, gfns) } else { Ok(gfns.end()) }
    }

    fn lock_memory(&self) -> Result<(), Error> {
        Ok(self.views.guest_view().lock()?)
    }

    fn settle(&self, failed: &[PageRange]) -> Result<(), Error> {
        self.views.settle(failed)
    }

    fn existing(&self) -> Result<Vec<PageRange>, Error> {
        self.views.existing()
    }

    fn levels(&self) -> Option<FolioCounts> {
        // Which of the transparent ones are in one piece the kernel alone knows.
        (self.size == PageSize::Thp).then(|| {
            let of_2m = self.views.mapped_huge().unwrap_or(PageCount::ZERO).get();
            FolioCounts {
                size_4k: self.views.pages().get() - of_2m,
                size_2m: of_2m / Geometry::X86_64.pages(Level::Size2M).get(),
                size_1g: 0,
            }
        })
    }

    fn pool(&self) -> Option<PoolCounts> {
        let HugetlbPool { total, free, reserved } = HugetlbPool::read(self.size.reserved()?)?;
        // A page that somebody pins is neither free nor told of.
        Some(PoolCounts { total, free, reserved, pending: 0 })
    }

    fn in_pieces(&self) -> Result<Vec<PageRange>, Error> {
        self.views.in_pieces()
    }
}
