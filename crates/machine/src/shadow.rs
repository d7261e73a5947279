//! The shadow MMU: what hardware walks in place of page tables that lie in guest memory.
//!
//! As arch/x86/kvm/mmu/mmu.c has it. A shadow page stands for one table of the guest's
//! (*indirect*), or for a part of a large page of the guest's that is mapped smaller (*direct*);
//! which it is, at which level, and whether the way there let writes through is its *role*. A guest
//! frame can have several.
//!
//! Here is how a page is found, mapped and dropped. Who takes memory away finds what maps it by the
//! rmap (`shadow/rmap.rs`); what a guest writes to its tables is tracked (`shadow/sync.rs`); what
//! has to add up is in `shadow/audit.rs`.
//!
//! # Holes
//! Shadow pages go when nothing leads to them; their number has no limit (`n_max_mmu_pages`). A
//! table that the host writes to is not noticed, as on KVM: zap it, and it is read again.

mod audit;
mod rmap;
mod sync;

use alloc::collections::{BTreeMap, BTreeSet};

use polder_units::{Frame, Geometry, Gfn, Level, Pfn};

use crate::guest_table::{
    GuestMemory, Pte, Step, TOP, Walk, index_at, page_level, shift_at, table_level,
};
use crate::table::Table;
use crate::vm::TdpEntry;

/// Whose shadow a page is, and how one came there. Ordered by the guest frame.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Key {
    gfn: u64,
    level: u8,
    direct: bool,
    /// Every entry above let writes through.
    writable: bool,
}

impl Key {
    const fn top(table: Gfn) -> Self {
        Self { gfn: table.get(), level: TOP, direct: false, writable: true }
    }
}

/// A page mapped by an entry of a shadow page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Leaf {
    /// Of the first page that it covers.
    pub(crate) gfn: Gfn,
    pub(crate) pfn: Pfn,
    pub(crate) writable: bool,
    pub(crate) accessed: bool,
    pub(crate) dirty: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Entry {
    Table(Key),
    Leaf(Leaf),
}

#[derive(Clone, Default, Hash)]
struct Page {
    entries: BTreeMap<u16, Entry>,
    /// The entries that lead here.
    parents: BTreeSet<(Key, u16)>,
    unsync: bool,
}

/// Where an entry is: in which page, at which index.
pub(crate) type At = (Key, u16);

/// What was found of a page: where, at which level, and what.
pub(crate) struct FoundLeaf {
    pub(crate) at: At,
    pub(crate) level: Level,
    pub(crate) leaf: Leaf,
}

/// Whether TLBs have to be flushed of what was dropped.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Flush(pub(crate) bool);

/// A frame of a large page that lies in the address space as a whole.
fn frame<F: Frame>(number: u64) -> F {
    match F::new(number) {
        Some(frame) => frame,
        None => unreachable!("it is below a frame that there is"),
    }
}

impl Flush {
    pub(crate) const NO: Self = Self(false);

    fn and(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

/// Every shadow page of a VM.
#[derive(Clone, Hash)]
pub(crate) struct ShadowMmu {
    geometry: Geometry,
    pages: BTreeMap<Key, Page>,
    /// By the level of the mapping and its first guest frame.
    rmap: [BTreeMap<u64, BTreeSet<At>>; 3],
    /// How many shadow pages in sync a guest frame has.
    tracked: BTreeMap<u64, u32>,
    /// By how many vCPUs a top table is loaded.
    loaded: BTreeMap<u64, u32>,
}

/// A page to be mapped.
#[derive(Clone, Copy)]
pub(crate) struct NewLeaf {
    /// The largest level to map it at.
    pub(crate) level: Level,
    /// The frame of the page itself.
    pub(crate) pfn: Pfn,
    pub(crate) writable: bool,
    /// Of the entry: that it was used, and written to.
    pub(crate) used: (bool, bool),
}

impl ShadowMmu {
    pub(crate) fn new(geometry: Geometry) -> Self {
        let (pages, tracked, loaded) = Default::default();
        Self { geometry, pages, rmap: Default::default(), tracked, loaded }
    }

    /// A vCPU has this root from now on.
    pub(crate) fn load(&mut self, table: Gfn) {
        *self.loaded.entry(table.get()).or_insert(0) += 1;
    }

    /// A vCPU no longer has this root.
    pub(crate) fn unload(&mut self, table: Gfn) -> Flush {
        if let Some(count) = self.loaded.get_mut(&table.get()) {
            *count -= 1;
            if *count == 0 {
                self.loaded.remove(&table.get());
                return self.free(Key::top(table));
            }
        }
        Flush::NO
    }

    /// What maps page `page` of the space that the tables from `root` on translate.
    pub(crate) fn find(&self, root: Gfn, page: u64) -> Option<FoundLeaf> {
        let mut key = Key::top(root);
        loop {
            let index = index_at(self.geometry, page, key.level);
            match *self.pages.get(&key)?.entries.get(&index)? {
                Entry::Table(child) => key = child,
                Entry::Leaf(leaf) => {
                    let level = page_level(key.level)?;
                    return Some(FoundLeaf { at: (key, index), level, leaf });
                }
            }
        }
    }

    pub(crate) fn leaf_mut(&mut self, (key, index): At) -> Option<&mut Leaf> {
        match self.pages.get_mut(&key)?.entries.get_mut(&index)? {
            Entry::Leaf(leaf) => Some(leaf),
            Entry::Table(_) => None,
        }
    }

    /// Maps a page as a walk found it, and says at which level: shadow pages are made on the way,
    /// and their tables tracked.
    pub(crate) fn map(
        &mut self,
        (root, page): (Gfn, u64),
        walk: &Walk,
        new: NewLeaf,
        memory: &GuestMemory<'_>,
        tdp: &mut Table<TdpEntry>,
    ) -> (Level, Flush) {
        let geometry = self.geometry;
        let (target, own) = (table_level(new.level), table_level(walk.level));
        let mut flush = self.make(Key::top(root), tdp);
        let mut key = Key::top(root);
        for level in (target + 1..=TOP).rev() {
            let index = index_at(geometry, page, level);
            let step = walk.steps().find(|step| step.level == level && level > own);
            let child = match step {
                Some(Step { entry, .. }) => Key {
                    gfn: entry.gfn().get(),
                    level: level - 1,
                    direct: false,
                    writable: key.writable && entry.has(Pte::WRITABLE),
                },
                None => Key {
                    gfn: walk.gfn.get() & !((1 << shift_at(geometry, level)) - 1),
                    level: level - 1,
                    direct: true,
                    writable: walk.writable() && walk.dirty(),
                },
            };
            flush.and(self.link((key, index), child, memory, tdp));
            key = child;
        }
        let pages = geometry.pages(new.level).get();
        let offset = walk.gfn.get() & (pages - 1);
        let first = walk.gfn.get() - offset;
        // Tables that were shadowed on the way may lie in the very page.
        let tracked = self.tracks_in(first, first + pages);
        if let (true, Some(level)) = (tracked, new.level.smaller()) {
            let (level, smaller) =
                self.map((root, page), walk, NewLeaf { level, ..new }, memory, tdp);
            flush.and(smaller);
            return (level, flush);
        }
        let (accessed, dirty) = new.used;
        let leaf = Leaf {
            gfn: frame(first),
            pfn: frame(new.pfn.get() - offset),
            writable: new.writable && !tracked,
            accessed,
            dirty,
        };
        let at = (key, index_at(geometry, page, target));
        flush.and(self.set_leaf(at, new.level, leaf));
        (new.level, flush)
    }

    fn set_leaf(&mut self, (key, index): At, level: Level, mut leaf: Leaf) -> Flush {
        let mut flush = Flush::NO;
        match self.pages.get(&key).and_then(|page| page.entries.get(&index)) {
            // The same page: what it was used for is kept.
            Some(Entry::Leaf(old)) if (old.pfn, old.gfn) == (leaf.pfn, leaf.gfn) => {
                leaf.accessed |= old.accessed;
                leaf.dirty |= old.dirty;
                flush.0 |= old.writable && !leaf.writable;
            }
            Some(_) => flush.and(self.drop_entry((key, index))),
            None => {}
        }
        if let Some(page) = self.pages.get_mut(&key) {
            page.entries.insert(index, Entry::Leaf(leaf));
            let at = self.rmap[level as usize].entry(leaf.gfn.get()).or_default();
            at.insert((key, index));
        }
        flush
    }

    /// Has a shadow page, in sync.
    fn make(&mut self, key: Key, tdp: &mut Table<TdpEntry>) -> Flush {
        if self.pages.contains_key(&key) {
            return Flush::NO;
        }
        self.pages.insert(key, Page::default());
        if key.direct { Flush::NO } else { self.track(key.gfn, tdp) }
    }

    /// Has an entry lead to a shadow page, which is in sync then.
    fn link(
        &mut self,
        (key, index): At,
        child: Key,
        memory: &GuestMemory<'_>,
        tdp: &mut Table<TdpEntry>,
    ) -> Flush {
        let mut flush = Flush::NO;
        match self.pages.get(&key).and_then(|page| page.entries.get(&index)) {
            Some(Entry::Table(there)) if *there == child => return flush,
            Some(_) => flush.and(self.drop_entry((key, index))),
            None => {}
        }
        // What becomes present needs no flush by the guest, and so may lead to nothing stale.
        flush.and(self.sync_below(child, memory, tdp));
        flush.and(self.make(child, tdp));
        if let Some(page) = self.pages.get_mut(&child) {
            page.parents.insert((key, index));
        }
        if let Some(page) = self.pages.get_mut(&key) {
            page.entries.insert(index, Entry::Table(child));
        }
        flush
    }

    /// Drops an entry, and the shadow pages that nothing else leads to.
    pub(crate) fn drop_entry(&mut self, (key, index): At) -> Flush {
        let Some(page) = self.pages.get_mut(&key) else { return Flush::NO };
        match page.entries.remove(&index) {
            None => Flush::NO,
            Some(Entry::Leaf(leaf)) => {
                if let Some(level) = page_level(key.level) {
                    self.forget(level, leaf.gfn, (key, index));
                }
                Flush(true)
            }
            Some(Entry::Table(child)) => {
                self.orphan(child, (key, index));
                Flush(true)
            }
        }
    }

    /// An entry no longer leads to a shadow page, which goes if it was the last.
    fn orphan(&mut self, child: Key, parent: At) {
        let Some(page) = self.pages.get_mut(&child) else { return };
        page.parents.remove(&parent);
        if page.parents.is_empty() {
            let _: Flush = self.free(child);
        }
    }

    /// Takes a shadow page away, with all that only it leads to.
    fn free(&mut self, key: Key) -> Flush {
        let Some(page) = self.pages.remove(&key) else { return Flush::NO };
        if !key.direct && !page.unsync {
            self.untrack(key.gfn);
        }
        for (parent, index) in page.parents {
            if let Some(parent) = self.pages.get_mut(&parent) {
                parent.entries.remove(&index);
            }
        }
        for (index, entry) in page.entries {
            match (entry, page_level(key.level)) {
                (Entry::Leaf(leaf), Some(level)) => self.forget(level, leaf.gfn, (key, index)),
                (Entry::Leaf(_), None) => {}
                (Entry::Table(child), _) => self.orphan(child, (key, index)),
            }
        }
        Flush(true)
    }

    /// Every mapping: the first guest frame, its level and what maps it.
    pub(crate) fn leaves(&self) -> impl Iterator<Item = (Level, Leaf)> {
        self.pages.iter().flat_map(|(key, page)| {
            let level = page_level(key.level);
            page.entries.values().filter_map(move |entry| match entry {
                Entry::Leaf(leaf) => Some((level?, *leaf)),
                Entry::Table(_) => None,
            })
        })
    }

    /// How many shadow pages there are.
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }
}
