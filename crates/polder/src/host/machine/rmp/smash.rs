//! Large entries become small ones: before a part of one is taken, and on a fault for its size.

use polder_machine::RmpFail;
use polder_units::{Gfn, GfnRange, Level, PageIndex, PageRange};

use super::{Found, Next};
use crate::Error;
use crate::host::Smashed;
use crate::host::machine::{MachineHost, refused};

impl MachineHost {
    /// Smashes the large entries of a range.
    pub(in super::super) fn smash_all(&self, range: PageRange) -> Result<(), Error> {
        self.each(range, |page| {
            let machine = &mut *self.lock();
            let Some(found) = Found::at(machine, self, page)? else { return Ok(Next::On(1)) };
            if !found.is_large() {
                return Ok(Next::On(1));
            }
            Next::after(machine.psmash(found.head()), found.left(), page)
        })
    }

    /// Solves a fault for its size: as [`smash_all`](Self::smash_all), for one guest frame, then
    /// takes the 2M page out of stage 2, so that it is mapped anew at the size that the RMP has.
    /// Only if the frame still shows a page of `within`, which nobody else is at work on.
    pub(in super::super) fn smash_at(
        &self,
        vm: polder_machine::VmId,
        gfn: Gfn,
        within: PageRange,
    ) -> Result<Smashed, Error> {
        let bound = self.lock().bound(vm, gfn).ok();
        let Some(page) = bound.map(|bound| bound.page).filter(|&page| within.contains(page)) else {
            return Ok(Smashed::Spurious);
        };
        #[cfg(feature = "plant")]
        if self.bug() == Some(polder_engine::Bug::ForgottenSmash) {
            return Ok(Smashed::Spurious);
        }
        let found = Found::at(&self.lock(), self, page)?;
        let smashed = self.smash_found(page, found)?;
        let mut machine = self.lock();
        let around = GfnRange::enclosing(gfn, Level::Size2M, machine.geometry());
        machine.tdp_zap(vm, around).map_err(refused)?;
        Ok(smashed)
    }

    /// Smashes what was found in a look: a step of its own, as on the processor.
    pub(super) fn smash_found(
        &self,
        page: PageIndex,
        found: Option<Found>,
    ) -> Result<Smashed, Error> {
        let Some(found) = found.filter(Found::is_large) else { return Ok(Smashed::Spurious) };
        let machine = &mut *self.lock();
        match machine.psmash(found.head()) {
            Ok(()) => Ok(Smashed::Done),
            Err(RmpFail::InUse) => Ok(Smashed::Busy),
            Err(fail) => match Found::at(machine, self, page)? {
                Some(now) if now.is_large() => Err(Error::Rmp { page, fail }),
                _ => Ok(Smashed::Raced),
            },
        }
    }
}
