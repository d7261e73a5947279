//! Pages become their guest's: by large entries where they fit.

use std::sync::atomic::Ordering;

#[cfg(feature = "plant")]
use polder_engine::NotLarge;
use polder_engine::{LargeRmpEntry, can_install_large_rmp_entry};
use polder_machine::{Machine, RmpSize, RmpUpdate};
use polder_units::{Gfn, Level, PageIndex, PageRange, Pfn};

use super::{Found, Next, frames};
use crate::Error;
use crate::host::machine::{MachineHost, refused};

impl MachineHost {
    pub(in super::super) fn assign(&self, range: PageRange) -> Result<(), Error> {
        self.forget_taken(range);
        self.each(range, |page| self.assign_at(page, range))
    }

    /// Assigns a page that is about to be mapped, with others of its folio if they are `within`
    /// what is answered for.
    pub(in super::super) fn assign_for(
        &self,
        page: PageIndex,
        within: PageRange,
    ) -> Result<(), Error> {
        self.each(PageRange::one(page), |page| self.assign_at(page, within))
    }

    /// Has the firmware take a page, which the host has written, for its guest, which has not
    /// begun.
    pub(in super::super) fn launch_at(&self, page: PageIndex) -> Result<(), Error> {
        self.each(PageRange::one(page), |page| {
            let machine = &mut *self.lock();
            let found = Found::at(machine, self, page)?;
            let gfns = self.gfns_of(machine, PageRange::one(page));
            let (Some(owner), Some(found), Some(gfns)) = (self.owner(), found, gfns) else {
                return Err(Error::NotOffered {
                    what: "what is put onto an SNP guest's private pages is encrypted for where the \
                           guest sees them, and it does not see these",
                    way_out: "bind the pages first",
                });
            };
            if let Some(again) = self.cut_off(machine, PageRange::one(page))? {
                return Ok(again);
            }
            let small = RmpUpdate::private(owner.asid, gfns.start(), RmpSize::Size4K);
            let update = RmpUpdate { immutable: true, ..small };
            if let Err(fail) = machine.rmpupdate(found.pfn, update) {
                return Next::after(Err(fail), 1, page);
            }
            let launched = machine.launch_update(found.pfn);
            launched.map_err(|fail| Error::Firmware { page, fail })?;
            Ok(Next::On(1))
        })
    }

    fn assign_at(&self, page: PageIndex, within: PageRange) -> Result<Next, Error> {
        let Some(owner) = self.owner() else { return Ok(Next::On(1)) };
        let machine = &mut *self.lock();
        let Some(found) = Found::at(machine, self, page)? else { return Ok(Next::On(1)) };
        let shown = self.gfns_of(machine, PageRange::one(page));
        let Some(gfns) = shown else { return Ok(Next::On(1)) };
        let (gfn, entry) = (gfns.start(), found.entry);
        if entry.asid == Some(owner.asid) && entry.gfn == gfn {
            // An RMPUPDATE would take what the guest has validated.
            return Ok(Next::On(found.left()));
        }
        if found.is_large() {
            // It is for where the page was seen before.
            return Next::after(machine.psmash(found.head()), 0, page);
        }
        if let Some((head, at)) = self.large(machine, &found, (page, gfn), within) {
            let all = PageRange::enclosing(page, Level::Size2M, found.geometry);
            if let Some(again) = self.cut_off(machine, all)? {
                return Ok(again);
            }
            let large = RmpUpdate::private(owner.asid, at, RmpSize::Size2M);
            let updated = machine.rmpupdate(head, large);
            self.rmp().large.fetch_add(u64::from(updated.is_ok()), Ordering::Relaxed);
            return Next::after(updated, found.pages() - found.offset(), page);
        }
        if let Some(again) = self.cut_off(machine, PageRange::one(page))? {
            return Ok(again);
        }
        let small = RmpUpdate::private(owner.asid, gfn, RmpSize::Size4K);
        Next::after(machine.rmpupdate(found.pfn, small), 1, page)
    }

    /// Cuts every process off from pages that are about to be assigned, and looks for references,
    /// under the folio's lock, which the kernel's own faults need. Steps before have done so too,
    /// but no claim keeps another process that has the file mapped from touching it again, and the
    /// RMP is not asked about what a TLB has. Who refers to the pages may soon not.
    pub(super) fn cut_off(
        &self,
        machine: &mut Machine,
        pages: PageRange,
    ) -> Result<Option<Next>, Error> {
        machine.zap_object(self.object, pages).map_err(refused)?;
        machine.flush_object(self.object, pages).map_err(refused)?;
        let referenced = self.referenced_on(machine, pages)?;
        Ok(referenced.map(|refusal| Next::Again(refusal.into())))
    }

    /// The first frame and guest frame of the 2M page around a page, if it gets a large entry.
    fn large(
        &self,
        machine: &Machine,
        found: &Found,
        (page, gfn): (PageIndex, Gfn),
        within: PageRange,
    ) -> Option<(Pfn, Gfn)> {
        let around = PageRange::enclosing(page, Level::Size2M, found.geometry);
        let offset = page.get() - around.start().get();
        let frame = Pfn::new(found.pfn.get().checked_sub(offset)?)?;
        let gfn = Gfn::new(gfn.get().checked_sub(offset)?)?;
        let is_assigned = |pfn| machine.rmp_entry(pfn).is_none_or(|entry| entry.assigned);
        let mut frames = frames(frame, around.count());
        let entry = LargeRmpEntry {
            folio: found.folio,
            page: around.start(),
            frame,
            gfn,
            bound: self.gfns_of(machine, around).is_some(),
            within,
            unassigned: found.folio > Level::Size4K && !frames.any(is_assigned),
        };
        let can = can_install_large_rmp_entry(&entry, found.geometry);
        #[cfg(feature = "plant")]
        let can = match (can, self.bug()) {
            (Err(NotLarge::Gfn), Some(polder_engine::Bug::MisalignedLarge)) => Ok(()),
            (can, _) => can,
        };
        can.is_ok().then_some((frame, gfn))
    }
}
