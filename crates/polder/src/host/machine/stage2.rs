//! Stage 2 of the machine's VMs: what is mapped for a fault, and ahead of one.

use polder_engine::{GuestAccess, Visibility, VmId};
use polder_linux::Errno;
use polder_machine::RmpFail;
use polder_units::{GfnRange, Level, PageRange};

use super::{MachineHost, refused};
use crate::Error;
use crate::host::failed;

/// How an attempt to map a page in stage 2 went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tried {
    Mapped,
    /// The frame shows something else by now.
    Moved,
    /// Something was zapped since the page was found, or its RMP entry is in use.
    Later,
}

impl MachineHost {
    /// Maps the page of `level` around `gfn` in stage 2, once.
    pub(super) fn map(
        &self,
        id: VmId,
        access: GuestAccess,
        level: Level,
        range: PageRange,
    ) -> Result<Tried, Error> {
        let GuestAccess { gfn, visibility } = access;
        let vm = self.vm(id).expect("a VM that was attached");
        // Where the slot has gone or moved since the answer was given, the answer is not for what
        // the frame shows now: the guest faults again. The claim holds the pages, not the slot.
        let is_ours = |bound: Result<polder_machine::Bound, polder_machine::Error>| {
            bound.ok().map(|bound| bound.page).filter(|&page| range.contains(page))
        };
        let mut machine = self.lock();
        let Some(page) = is_ours(machine.bound(vm, gfn)) else { return Ok(Tried::Moved) };
        // No more memory is taken than the touch needs: the folio decides how much is mapped.
        self.allocate(&mut machine, PageRange::one(page))?;
        drop(machine);
        if self.rmp.is_some() && visibility == Visibility::Private {
            match self.assign_for(page, range) {
                // Somebody else is at work on the entry.
                Err(Error::Rmp { fail: RmpFail::InUse, .. }) => return Ok(Tried::Later),
                assigned => assigned?,
            }
        }
        let Ok(resolved) = self.lock().tdp_resolve(vm, gfn) else { return Ok(Tried::Moved) };
        if is_ours(Ok(resolved.bound())).is_none() {
            return Ok(Tried::Moved);
        }
        let mut machine = self.lock();
        let level = level.min(resolved.largest());
        // Never above what the RMP has (INV-5). A shared page has no entry to say a size.
        let entry = machine.rmp_entry(resolved.pfn()).filter(|entry| entry.assigned);
        let level = entry.map_or(level, |entry| level.min(entry.size.level()));
        match machine.tdp_map(&resolved, level, true) {
            Ok(_) => Ok(Tried::Mapped),
            Err(polder_machine::Error::Stale { .. }) => Ok(Tried::Later),
            Err(error) => Err(refused(error)),
        }
    }

    /// Maps frames, all of one kind, ahead of their first touches. Returns the frame at which it
    /// stopped.
    pub(super) fn show_all(
        &self,
        id: VmId,
        (gfns, visibility): (GfnRange, Visibility),
        range: PageRange,
    ) -> Result<u64, Error> {
        for (gfn, page) in gfns.frames().zip(range.frames()) {
            let (access, page) = (GuestAccess { gfn, visibility }, PageRange::one(page));
            loop {
                match self.map(id, access, Level::Size4K, page)? {
                    Tried::Mapped => break,
                    Tried::Later => std::thread::yield_now(),
                    Tried::Moved => return Err(failed("a prefault of stage 2", Errno::AGAIN)),
                }
            }
        }
        Ok(gfns.end())
    }
}
