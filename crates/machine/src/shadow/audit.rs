//! What has to add up of the shadow pages.

use alloc::collections::BTreeMap;

use polder_units::{Gfn, Level};

use super::{At, Entry, ShadowMmu};
use crate::guest_table::{GuestMemory, Pte, page_level};

impl ShadowMmu {
    /// The first guest frame at which something does not add up: an entry in sync that its guest's
    /// table does not have so, a mapping without its way back, a count of tracked frames, a frame
    /// that is tracked and mapped writable.
    pub(crate) fn audit(&self, memory: &GuestMemory<'_>) -> Option<Gfn> {
        let mut tracked: BTreeMap<u64, u32> = BTreeMap::new();
        for (key, page) in &self.pages {
            if !key.direct && !page.unsync {
                *tracked.entry(key.gfn).or_insert(0) += 1;
            }
            for (index, entry) in &page.entries {
                if !self.is_right((*key, *index), entry, memory) {
                    return Gfn::new(key.gfn);
                }
            }
        }
        if tracked != self.tracked {
            let all = tracked.iter().chain(&self.tracked);
            let differs = |(gfn, _): &(&u64, &u32)| tracked.get(gfn) != self.tracked.get(gfn);
            return all.into_iter().find(differs).and_then(|(gfn, _)| Gfn::new(*gfn));
        }
        None
    }

    fn is_right(&self, (key, index): At, entry: &Entry, memory: &GuestMemory<'_>) -> bool {
        let page = self.pages.get(&key);
        let pte = match (key.direct || page.is_some_and(|page| page.unsync), Gfn::new(key.gfn)) {
            (false, Some(table)) => memory.entry(table, index).ok(),
            _ => None,
        };
        let shadows = !key.direct && page.is_some_and(|page| !page.unsync);
        match entry {
            Entry::Table(child) => {
                let parent =
                    self.pages.get(child).is_some_and(|it| it.parents.contains(&(key, index)));
                let table = pte.is_some_and(|pte| {
                    let is_table = !pte.has(Pte::LARGE) && pte.gfn().get() == child.gfn;
                    pte.has(Pte::PRESENT | Pte::USER) && (child.direct || is_table)
                });
                parent && (!shadows || table)
            }
            Entry::Leaf(leaf) => {
                let Some(level) = page_level(key.level) else { return false };
                let back = self.rmap[level as usize].get(&leaf.gfn.get());
                let pages = self.geometry.pages(level).get();
                let in_tracked = self.tracks_in(leaf.gfn.get(), leaf.gfn.get() + pages);
                let may = !in_tracked || (level == Level::Size4K && !leaf.writable);
                let says = pte.is_some_and(|pte| {
                    let writes = !leaf.writable || pte.has(Pte::WRITABLE | Pte::DIRTY);
                    let used = pte.has(Pte::PRESENT | Pte::USER | Pte::ACCESSED);
                    used && writes && pte.gfn() == leaf.gfn
                });
                back.is_some_and(|at| at.contains(&(key, index))) && may && (!shadows || says)
            }
        }
    }
}
