//! Stage 2 of the machine's VMs: what is mapped for a fault, and ahead of one.
//!
//! A page is mapped as large as folio, binding, answer and RMP allow (INV-5). A private page that
//! its guest has not been given yet is given first (`rmp.rs`), also where it never was converted.

use polder_engine::{GuestAccess, Refusal, Visibility, VmId};
use polder_linux::Errno;
use polder_machine::{Bound, Machine, Resolved, RmpFail};
use polder_units::{GfnRange, Level, PageIndex, PageRange};

use super::{MachineHost, refused};
use crate::host::failed;
use crate::{Error, Vcpu};

/// How often a page that is shown ahead is tried again because others are at work on it.
const SHOW_RETRIES: u32 = 1000;

/// How an attempt to map a page in stage 2 went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tried {
    /// At this level.
    Mapped(Level),
    /// The frame shows something else by now.
    Moved,
    /// Something was zapped since the page was found, its RMP entry is in use, or its folio locked.
    Later,
}

impl MachineHost {
    /// Maps the largest page around a frame in stage 2 that lies in `within` as a whole, once.
    ///
    /// # Errors
    /// No memory; [`Refusal::Referenced`] by whom a private page can't be taken; [`Error::Rmp`].
    pub(super) fn map(
        &self,
        id: VmId,
        access: GuestAccess,
        within: PageRange,
    ) -> Result<Tried, Error> {
        let GuestAccess { gfn, visibility } = access;
        let vm = self.vm(id).ok_or(Error::NoSuchVm)?;
        // Where the slot has gone or moved since the answer was given, the answer is not for what
        // the frame shows now: the guest faults again. The claim holds the pages, not the slot.
        let is_ours = |bound: Result<Bound, polder_machine::Error>| {
            bound.ok().map(|bound| bound.page).filter(|&page| within.contains(page))
        };
        let mut machine = self.lock();
        let Some(page) = is_ours(machine.bound(vm, gfn)) else { return Ok(Tried::Moved) };
        // No more memory is taken than the touch needs: the folio decides how much is mapped.
        self.allocate(&mut machine, PageRange::one(page))?;
        drop(machine);
        if self.is_snp() && visibility == Visibility::Private {
            match self.assign_for(page, within) {
                // Somebody else is at work on entry or folio.
                Err(Error::Rmp { fail: RmpFail::InUse, .. }) => return Ok(Tried::Later),
                Err(Error::Refused(Refusal::Referenced { references: 0, .. })) => {
                    return Ok(Tried::Later);
                }
                given => given?,
            }
        }
        let Ok(resolved) = self.lock().tdp_resolve(vm, gfn) else { return Ok(Tried::Moved) };
        let Some(page) = is_ours(Ok(resolved.bound())) else { return Ok(Tried::Moved) };
        let mut machine = self.lock();
        let level = self.level(&machine, (&resolved, page), visibility, within);
        match machine.tdp_map(&resolved, level, true) {
            Ok(level) => Ok(Tried::Mapped(level)),
            Err(polder_machine::Error::Stale { .. }) => Ok(Tried::Later),
            Err(error) => Err(refused(error)),
        }
    }

    /// The largest level at which what was resolved can be mapped (INV-5).
    fn level(
        &self,
        machine: &Machine,
        (resolved, page): (&Resolved, PageIndex),
        visibility: Visibility,
        within: PageRange,
    ) -> Level {
        let geometry = machine.geometry();
        let fits = |&level: &Level| {
            level <= resolved.largest()
                && within.contains_range(PageRange::enclosing(page, level, geometry))
                // A shared page has no entry to say a size.
                && (visibility == Visibility::Shared || self.rmp_allows(machine, resolved, level))
        };
        Level::ALL.into_iter().rfind(fits).unwrap_or(Level::Size4K)
    }

    /// Maps frames, all of one kind, ahead of their first touches. Returns the frame at which it
    /// stopped: after the last, or at one that could not be mapped though others before it were.
    ///
    /// # Errors
    /// Of the first frame: as [`map`](Self::map); `EAGAIN` where it shows something else by now, or
    /// others are at work on it for long; [`Error::Interrupted`] by a kick.
    pub(super) fn show_all(
        &self,
        (id, vcpu): (VmId, Vcpu<'_>),
        (gfns, visibility): (GfnRange, Visibility),
        within: PageRange,
    ) -> Result<u64, Error> {
        let geometry = self.lock().geometry();
        let mut next = gfns.start().get();
        while let Some(rest) = GfnRange::between(next, gfns.end()) {
            let gfn = rest.start();
            match self.show_one((id, vcpu), GuestAccess { gfn, visibility }, within) {
                Ok(level) => next = GfnRange::enclosing(gfn, level, geometry).end(),
                Err(error) if gfn == gfns.start() => return Err(error),
                Err(_) => return Ok(next),
            }
        }
        Ok(gfns.end())
    }

    /// Maps the page around a frame, however often it takes within reason. At which level.
    fn show_one(
        &self,
        (id, vcpu): (VmId, Vcpu<'_>),
        access: GuestAccess,
        within: PageRange,
    ) -> Result<Level, Error> {
        for _ in 0..SHOW_RETRIES {
            if matches!(vcpu, Vcpu::Machine(vcpu) if vcpu.is_kicked()) {
                return Err(Error::Interrupted);
            }
            match self.map(id, access, within)? {
                Tried::Mapped(level) => return Ok(level),
                Tried::Later => crate::sync::yield_now(),
                Tried::Moved => break,
            }
        }
        Err(failed("a prefault of stage 2", Errno::AGAIN))
    }
}
