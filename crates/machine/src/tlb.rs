//! TLBs: what a CPU remembers of a page table, right or not.
//!
//! Direct-mapped by page number; one entry covers one 4 KiB page, as where a CPU breaks a larger
//! mapping up, and knows the level of the mapping it was cut from. A flush of any page of a mapping
//! drops what was cut from all of it, as INVLPG does (AMD APM volume 2, section 5.5.2). Nothing
//! else drops an entry but another page in its place: a changed page table does not.

use alloc::vec::Vec;
use core::hash::{Hash, Hasher};

use polder_units::{Geometry, Level, Pfn};

use crate::table::index;

/// No page has this number.
const NOTHING: u64 = u64::MAX;

/// The bit that tells a private page's number from the same shared one: the guest's C-bit, which
/// is part of the address that the TLB compares.
const PRIVATE: u64 = 1 << 62;

/// Where the number of a root stands in a tag: what is remembered of one root is no other's, as by
/// PCID and ASID. That of the direct one is 0.
const ROOT_SHIFT: u32 = 58;
const ROOT: u64 = 3 << ROOT_SHIFT;

/// The number under which a TLB knows page `page` of what root `root` of its vCPU translates.
pub(crate) const fn guest_tag(page: u64, private: bool, root: u64) -> u64 {
    let tag = page | root << ROOT_SHIFT;
    if private { tag | PRIVATE } else { tag }
}

#[derive(Clone, Copy)]
struct Cached {
    tag: u64,
    pfn: Pfn,
    level: Level,
    writable: bool,
}

/// A translation, as a page-table walk found it.
#[derive(Clone, Copy)]
pub(crate) struct Translation {
    pub(crate) pfn: Pfn,
    pub(crate) level: Level,
    pub(crate) writable: bool,
}

/// One CPU's TLB. Its hash is of what it remembers: an entry's place follows from its page.
#[derive(Clone)]
pub(crate) struct Tlb {
    entries: Vec<Cached>,
    /// How many entries are cut from mappings larger than 4K.
    large: usize,
    /// How many entries are of another root than the direct one.
    indirect: usize,
}

impl Tlb {
    /// A TLB of `entries` entries, a power of two.
    pub(crate) fn new(entries: u32) -> Self {
        let nothing =
            Cached { tag: NOTHING, pfn: Pfn::from(0), level: Level::Size4K, writable: false };
        Self { entries: alloc::vec![nothing; entries as usize], large: 0, indirect: 0 }
    }

    fn slot(&self, tag: u64) -> usize {
        index(tag & !(PRIVATE | ROOT)) & (self.entries.len() - 1)
    }

    /// The frame that the TLB says page `tag` is in, if it may be written or `write` is not asked.
    #[inline]
    pub(crate) fn hit(&self, tag: u64, write: bool) -> Option<Pfn> {
        let cached = self.entries.get(self.slot(tag))?;
        (cached.tag == tag && (cached.writable || !write)).then_some(cached.pfn)
    }

    /// Remembers a translation.
    pub(crate) fn fill(&mut self, tag: u64, translation: Translation) {
        let Translation { pfn, level, writable } = translation;
        let slot = self.slot(tag);
        self.drop_entry(slot);
        self.large += usize::from(level != Level::Size4K);
        self.indirect += usize::from(tag & ROOT != 0);
        self.entries[slot] = Cached { tag, pfn, level, writable };
    }

    fn drop_entry(&mut self, slot: usize) {
        let cached = &mut self.entries[slot];
        if cached.tag != NOTHING && cached.level != Level::Size4K {
            self.large -= 1;
        }
        if cached.tag != NOTHING && cached.tag & ROOT != 0 {
            self.indirect -= 1;
        }
        *cached = Cached { tag: NOTHING, pfn: Pfn::from(0), level: Level::Size4K, writable: false };
    }

    /// Forgets the pages `[start..end)` and every page of a mapping that one of them is part of.
    pub(crate) fn flush(&mut self, start: u64, end: u64, geometry: Geometry) {
        let few = end.saturating_sub(start) < self.entries.len() as u64;
        if few && self.large == 0 {
            for number in start..end {
                let slot = self.slot(number);
                if self.entries[slot].tag & !PRIVATE == number {
                    self.drop_entry(slot);
                }
            }
            return;
        }
        for slot in 0..self.entries.len() {
            let cached = self.entries[slot];
            let pages = geometry.pages(cached.level).get();
            let first = cached.tag & !PRIVATE & !(pages - 1);
            if cached.tag != NOTHING && first < end && start < first + pages {
                self.drop_entry(slot);
            }
        }
    }

    /// Forgets whatever leads to a frame, at whichever page: a flush by what stage 2 or the IOMMU
    /// translates to.
    pub(crate) fn forget_frame(&mut self, pfn: Pfn) {
        for slot in 0..self.entries.len() {
            let cached = self.entries[slot];
            if cached.tag != NOTHING && cached.pfn == pfn {
                self.drop_entry(slot);
            }
        }
    }

    fn drop_if(&mut self, wanted: impl Fn(u64) -> bool) {
        for slot in 0..self.entries.len() {
            let tag = self.entries[slot].tag;
            if tag != NOTHING && wanted(tag) {
                self.drop_entry(slot);
            }
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.drop_if(|_| true);
    }

    /// Forgets what is of other roots than the direct one: by its numbers nobody can tell which
    /// guest frame a page is.
    pub(crate) fn flush_indirect(&mut self) {
        if self.indirect > 0 {
            self.drop_if(|tag| tag & ROOT != 0);
        }
    }

    /// Forgets what is of a root.
    pub(crate) fn flush_root(&mut self, root: u64) {
        if root == 0 || self.indirect > 0 {
            self.drop_if(|tag| (tag & ROOT) >> ROOT_SHIFT == root);
        }
    }

    /// Forgets page `page` of a root, and the pages of the large mapping that it is part of.
    pub(crate) fn flush_page(&mut self, root: u64, page: u64, geometry: Geometry) {
        for slot in 0..self.entries.len() {
            let Cached { tag, level, .. } = self.entries[slot];
            let first = tag & !(PRIVATE | ROOT) & !(geometry.pages(level).get() - 1);
            let here = first <= page && page < first + geometry.pages(level).get();
            if tag != NOTHING && (tag & ROOT) >> ROOT_SHIFT == root && here {
                self.drop_entry(slot);
            }
        }
    }

    /// What it remembers of the direct root: page number, whether it is the private one, and
    /// translation, in no order that means anything.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, bool, Translation)> {
        self.of_all()
            .filter(|(root, ..)| *root == 0)
            .map(|(_, page, private, it)| (page, private, it))
    }

    /// What it remembers of other roots: the root's tag, page number, and translation.
    pub(crate) fn iter_indirect(&self) -> impl Iterator<Item = (u64, u64, Translation)> {
        self.of_all().filter(|(root, ..)| *root != 0).map(|(root, page, _, it)| (root, page, it))
    }

    fn of_all(&self) -> impl Iterator<Item = (u64, u64, bool, Translation)> {
        let filled = self.entries.iter().filter(|cached| cached.tag != NOTHING);
        filled.map(|Cached { tag, pfn, level, writable }| {
            let translation = Translation { pfn: *pfn, level: *level, writable: *writable };
            let root = (tag & ROOT) >> ROOT_SHIFT;
            (root, tag & !(PRIVATE | ROOT), tag & PRIVATE != 0, translation)
        })
    }
}

impl Hash for Tlb {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for Cached { tag, pfn, level, writable } in &self.entries {
            if *tag != NOTHING {
                tag.hash(state);
                ((pfn.get() << 3) | ((*level as u64) << 1) | u64::from(*writable)).hash(state);
            }
        }
        NOTHING.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translation(pfn: u32, level: Level) -> Translation {
        Translation { pfn: pfn.into(), level, writable: true }
    }

    #[test]
    fn a_flush_of_one_page_drops_all_of_its_large_mapping() {
        let geometry = Geometry::new(4, 4).unwrap();
        let mut tlb = Tlb::new(8);
        tlb.fill(4, translation(0, Level::Size2M));
        tlb.fill(5, translation(1, Level::Size2M));
        tlb.fill(0, translation(9, Level::Size4K));
        tlb.flush(7, 8, geometry);
        assert_eq!((tlb.hit(4, false), tlb.hit(5, false)), (None, None));
        assert_eq!(tlb.hit(0, false), Some(Pfn::from(9)));
        assert_eq!(tlb.large, 0);
    }

    #[test]
    fn private_and_shared_are_two_pages_that_one_flush_drops() {
        let mut tlb = Tlb::new(4);
        tlb.fill(guest_tag(1, true, 0), translation(3, Level::Size4K));
        assert_eq!(tlb.hit(guest_tag(1, false, 0), false), None);
        assert_eq!(tlb.hit(guest_tag(1, true, 0), true), Some(Pfn::from(3)));
        tlb.flush(1, 2, Geometry::X86_64);
        assert_eq!(tlb.hit(guest_tag(1, true, 0), false), None);
    }

    #[test]
    fn what_is_of_one_root_is_no_others() {
        let geometry = Geometry::new(4, 4).unwrap();
        let mut tlb = Tlb::new(8);
        let tag = |page, root| guest_tag(page, false, root);
        tlb.fill(tag(1, 1), translation(3, Level::Size4K));
        tlb.fill(tag(2, 2), translation(4, Level::Size4K));
        tlb.fill(tag(5, 0), translation(5, Level::Size4K));
        assert_eq!((tlb.hit(tag(1, 0), false), tlb.hit(tag(1, 2), false)), (None, None));
        tlb.flush(0, 8, geometry);
        assert_eq!(tlb.hit(tag(5, 0), false), None, "a flush of guest frames is the direct root's");
        tlb.flush_page(1, 2, geometry);
        assert_eq!(tlb.iter_indirect().count(), 2, "page 2 is the other root's");
        tlb.flush_root(2);
        assert_eq!(tlb.hit(tag(1, 1), false), Some(Pfn::from(3)));
        tlb.flush_indirect();
        assert_eq!((tlb.indirect, tlb.iter_indirect().count()), (0, 0));
    }

    #[test]
    fn a_read_only_translation_is_no_hit_for_a_write() {
        let mut tlb = Tlb::new(1);
        tlb.fill(7, Translation { writable: false, ..translation(3, Level::Size4K) });
        assert_eq!((tlb.hit(7, true), tlb.hit(7, false)), (None, Some(Pfn::from(3))));
    }
}
