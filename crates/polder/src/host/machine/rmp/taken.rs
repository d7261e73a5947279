//! What was unassigned, so that it can be given back as it was.
//!
//! The engine says no more than which pages were the operation's (`Step::Reassign`); which of them
//! were assigned, and at which guest frames, only the RMP knew. What is noted of pages counts until
//! they are assigned by a conversion, unassigned again, or freed.

use std::collections::BTreeMap;

use polder_machine::{RmpFail, RmpSize, RmpUpdate};
use polder_units::{Gfn, Level, PageIndex, PageRange};

use super::{Found, MachineHost, Next};
use crate::Error;

/// The entries that were taken away, by the first page of the 2M that each lies in.
#[derive(Default)]
pub(super) struct Taken(BTreeMap<PageIndex, Vec<Entry>>);

#[derive(Clone, Copy)]
struct Entry {
    /// One page, or those of a large entry.
    pages: PageRange,
    /// Where its guest saw the first.
    gfn: Gfn,
}

impl Entry {
    fn is_large(&self) -> bool {
        self.pages != PageRange::one(self.pages.start())
    }
}

impl MachineHost {
    /// Notes that the entry of `pages` was taken away, if it was.
    pub(super) fn note_taken(&self, taken: Result<(), RmpFail>, pages: PageRange, found: &Found) {
        if taken.is_ok() {
            let around = PageRange::enclosing(pages.start(), Level::Size2M, found.geometry);
            let entry = Entry { pages, gfn: found.entry.gfn };
            self.rmp().taken.lock().0.entry(around.start()).or_default().push(entry);
        }
    }

    /// Forgets what was taken of a range: it is no longer what its pages go back to.
    pub(in super::super) fn forget_taken(&self, range: PageRange) {
        let Some(rmp) = &self.rmp else { return };
        let geometry = self.lock().geometry();
        let first = PageRange::enclosing(range.start(), Level::Size2M, geometry).start();
        let mut taken = rmp.taken.lock();
        let mut empty = Vec::new();
        for (&at, entries) in taken.0.range_mut(first..) {
            if at.get() >= range.end() {
                break;
            }
            entries.retain(|entry| !entry.pages.overlaps(range));
            empty.extend(entries.is_empty().then_some(at));
        }
        for at in empty {
            taken.0.remove(&at);
        }
    }

    /// Gives back what was taken of a range, which lies in one 2M page, at the level and the guest
    /// frames that it had.
    pub(in super::super) fn reassign(&self, range: PageRange) -> Result<(), Error> {
        let geometry = self.lock().geometry();
        let around = PageRange::enclosing(range.start(), Level::Size2M, geometry);
        let taken = self.rmp().taken.lock().0.get(&around.start()).cloned().unwrap_or_default();
        for entry in taken {
            if let Some(part) = entry.pages.intersection(range) {
                self.each(part, |page| self.reassign_at(page, entry, part))?;
            }
        }
        Ok(())
    }

    fn reassign_at(&self, page: PageIndex, entry: Entry, part: PageRange) -> Result<Next, Error> {
        let owner = self.owner().expect("it was assigned to the owner");
        let machine = &mut *self.lock();
        let Some(found) = Found::at(machine, self, page)? else { return Ok(Next::On(1)) };
        if found.entry.assigned {
            return Ok(Next::On(found.left()));
        }
        // The rest of a large entry is in quarantine if this is a part of it.
        let (size, pages) = match entry.is_large() && part == entry.pages {
            true => (RmpSize::Size2M, entry.pages),
            false => (RmpSize::Size4K, PageRange::one(page)),
        };
        // Somebody may have touched it while it was nobody's.
        if let Some(again) = self.cut_off(machine, pages)? {
            return Ok(again);
        }
        let into = page.checked_sub(entry.pages.start());
        let gfn = into.and_then(|into| entry.gfn.checked_add(into)).expect("its guest saw it");
        let private = RmpUpdate::private(owner.asid, gfn, size);
        Next::after(machine.rmpupdate(found.pfn, private), pages.count().get(), page)
    }
}
