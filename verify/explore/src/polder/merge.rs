//! Merging RMP entries: `polder/src/host/machine/rmp/merge.rs`.

use polder_machine::{RmpEntry, RmpFail, RmpSize, RmpUpdate};
use polder_units::{Level, PageIndex, PageRange, Pfn};

use super::act::{Act, Done};
use super::kept::ASID;
use super::rmp::{Found, Part, frames};
use super::{Slip, World};
use crate::system::Violation;

/// The parts of a merge: a look, a zap, an entry frozen each, the firmware, an entry thawed each.
const ZAP: u8 = 1;
const FREEZE: u8 = 2;

impl World {
    fn count(range: PageRange) -> u8 {
        u8::try_from(range.count().get()).unwrap_or(u8::MAX)
    }

    /// The frame that a part of a merge is about, if it freezes one.
    fn frozen_by(&self, range: PageRange, part: u8) -> Option<Pfn> {
        let at = part.checked_sub(FREEZE).filter(|&at| at < Self::count(range))?;
        let head = self.found(range.start())?.pfn;
        frames(head, range.count().get()).nth(at.into())
    }

    pub(super) fn merge_is_blocked(&self, range: PageRange, part: u8) -> bool {
        self.frozen_by(range, part).is_some_and(|pfn| self.in_use(pfn, RmpSize::Size4K))
    }

    /// One part of a merge.
    pub(super) fn perform_merge(&mut self, range: PageRange, part: u8) -> Result<Part, Violation> {
        let firmware = FREEZE + Self::count(range);
        if part == 0 {
            if self.mergeable(range).is_none() {
                self.say(|| "the entries do not agree, or are one".into());
                return Ok(Part::Last);
            }
            let zaps = !self.setup.slips(Slip::MergedUnzapped);
            return Ok(Part::Then(if zaps { ZAP } else { FREEZE }));
        }
        if part == ZAP {
            self.act(Act::ZapGuest(range)).well();
            return Ok(Part::Then(FREEZE));
        }
        if let Some(pfn) = self.frozen_by(range, part) {
            return match self.freeze(pfn) {
                Ok(()) => Ok(Part::Then(part + 1)),
                Err(fail) => {
                    let what = format!("the hardware does not let pfn {pfn} be frozen: {fail}");
                    Err(Violation::new("INV-9", what))
                }
            };
        }
        if part == firmware {
            let head = self.found(range.start()).map(|found| found.pfn).expect("it has memory");
            return match self.act(Act::Unsmash(head)) {
                Done::Well => Ok(Part::Last),
                _ => Ok(Part::Then(firmware + 1)),
            };
        }
        self.perform_thaw(range, part - firmware - 1, firmware + 1)
    }

    /// The first part of taking back what a merge has frozen, after it could not freeze one more.
    pub(super) fn thaw_from(range: PageRange) -> u8 {
        FREEZE + Self::count(range) + 1
    }

    /// Takes one entry back from the firmware.
    pub(super) fn perform_thaw(
        &mut self,
        range: PageRange,
        at: u8,
        before: u8,
    ) -> Result<Part, Violation> {
        let page = PageIndex::from(u32::try_from(range.start().get()).unwrap_or(0) + u32::from(at));
        if let Some(found) = self.found(page).filter(|found| found.entry.immutable) {
            let pfn = if found.is_large() { found.head() } else { found.pfn };
            let reclaimed = self.act(Act::Reclaim(pfn, found.entry.size));
            if !reclaimed.is_well() {
                return Err(Violation::new("INV-9", format!("pfn {pfn} stays the firmware's")));
            }
        }
        let more = at + 1 < Self::count(range);
        Ok(if more { Part::Then(before + at + 1) } else { Part::Last })
    }

    fn freeze(&mut self, pfn: Pfn) -> Result<(), RmpFail> {
        let entry = self.machine.machine.rmp_entry(pfn).expect("the rmp covers all frames");
        let RmpEntry { assigned, size, gfn, asid, .. } = entry;
        let update = RmpUpdate { assigned, size, immutable: true, gfn, asid };
        match self.act(Act::Rmpupdate(pfn, update)) {
            Done::Rmp(fail) => Err(fail),
            _ => Ok(()),
        }
    }

    /// The first frame of a 2M page whose 4K entries can be merged.
    fn mergeable(&self, range: PageRange) -> Option<Pfn> {
        let found: Vec<Found> = range.frames().filter_map(|page| self.found(page)).collect();
        if !found.iter().any(|found| found.entry.assigned && !found.is_large()) {
            return None;
        }
        let first = found.first()?;
        let gfns = self.shown(range)?;
        let gfn = gfns.start();
        let pages = self.setup.geometry.pages(Level::Size2M);
        let expected = RmpEntry {
            assigned: true,
            size: RmpSize::Size4K,
            immutable: false,
            gfn,
            asid: Some(ASID),
            vmsa: false,
            validated: first.entry.validated,
        };
        let at = frames(first.pfn, range.count().get()).zip(gfns.frames());
        let one = first.folio > Level::Size4K && first.offset() == 0 && gfn.is_multiple_of(pages);
        let whole = found.len() as u64 == range.count().get();
        let agree = found.iter().zip(at).all(|(found, (pfn, gfn))| {
            found.pfn == pfn && found.entry == RmpEntry { gfn, ..expected }
        });
        (one && whole && agree).then_some(first.pfn)
    }
}
