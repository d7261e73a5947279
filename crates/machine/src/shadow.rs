//! The shadow MMU: what hardware walks in place of page tables that lie in guest memory.
//!
//! As arch/x86/kvm/mmu/mmu.c has it. A shadow page stands for one table of the guest's (*indirect*),
//! or for a part of a large page of the guest's that is mapped smaller (*direct*); which it is, at
//! which level, and whether the way there let writes through is its *role*. A guest frame can have
//! several.
//!
//! - **rmap**: from a guest frame to the entries that map it, so that who takes memory away finds
//!   them whatever linear addresses they are at.
//! - **Write-tracking**: a guest frame with a shadow page that is in sync is mapped read-only, by
//!   every root, and in no large page. What a guest writes there is carried out by the hypervisor,
//!   which drops the entries written over.
//! - **Unsync**: a table of the last level is let out of sync at the first write, because guests
//!   write many entries in a row. What it shadows is stale then, as a TLB is, until the guest
//!   flushes: INVLPG of a page, a load of CR3, VMRUN.
//!
//! # Holes
//! Shadow pages go when nothing leads to them; their number has no limit (`n_max_mmu_pages`). A
//! table that the host writes to is not noticed, as on KVM: zap it, and it is read again.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

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

    /// Whether a guest frame is mapped read-only because it has shadow pages in sync.
    pub(crate) fn is_tracked(&self, gfn: Gfn) -> bool {
        !self.tracked.is_empty() && self.tracked.contains_key(&gfn.get())
    }

    /// Whether one of the guest frames `[start..end)` is.
    pub(crate) fn tracks_in(&self, start: u64, end: u64) -> bool {
        !self.tracked.is_empty() && self.tracked.range(start..end).next().is_some()
    }

    /// Whether every shadow page of a frame is of the last level, so that it may go out of sync.
    pub(crate) fn may_unsync(&self, gfn: Gfn) -> bool {
        self.pages_of(gfn).all(|key| key.level == 1)
    }

    /// The indirect pages of a frame that are in sync.
    fn pages_of(&self, gfn: Gfn) -> impl Iterator<Item = Key> {
        self.of_tables(gfn.get(), gfn.get() + 1)
            .filter(|(_, page)| !page.unsync)
            .map(|(key, _)| key)
    }

    /// The indirect pages of frames `[start..end)`.
    fn of_tables(&self, start: u64, end: u64) -> impl Iterator<Item = (Key, &Page)> {
        let first = |gfn| Key { gfn, level: 0, direct: false, writable: false };
        let range = self.pages.range(first(start)..first(end));
        range.filter(|(key, _)| !key.direct).map(|(key, page)| (*key, page))
    }

    /// Lets the shadow pages of a frame, all of the last level, out of sync: it can be written to.
    pub(crate) fn unsync(&mut self, gfn: Gfn) {
        for key in self.pages_of(gfn).collect::<Vec<_>>() {
            if let Some(page) = self.pages.get_mut(&key) {
                page.unsync = true;
            }
        }
        self.tracked.remove(&gfn.get());
    }

    /// A guest has written `len` bytes at `offset` of a frame: the entries there are dropped.
    pub(crate) fn written(&mut self, gfn: Gfn, offset: u64, len: usize) -> Flush {
        let last = (offset + (len as u64).max(1) - 1) / 8;
        let index = |word: u64| u16::try_from(word).unwrap_or(u16::MAX);
        let over = index(offset / 8)..=index(last);
        let mut flush = Flush::NO;
        for key in self.pages_of(gfn).collect::<Vec<_>>() {
            let entries = self.pages.get(&key).map(|page| page.entries.range(over.clone()));
            let indices: Vec<u16> = entries.into_iter().flatten().map(|(at, _)| *at).collect();
            for index in indices {
                flush.and(self.drop_entry((key, index)));
            }
        }
        flush
    }

    /// Maps a page as a walk found it, and says at which level: shadow pages are made on the way, and
    /// their tables tracked.
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

    /// Has a guest frame mapped read-only, by small pages, by every root.
    fn track(&mut self, gfn: u64, tdp: &mut Table<TdpEntry>) -> Flush {
        let count = self.tracked.entry(gfn).or_insert(0);
        *count += 1;
        if *count > 1 {
            return Flush::NO;
        }
        let mut flush = Flush::NO;
        if let Some(found) = tdp.get_mut(gfn) {
            if found.level != Level::Size4K {
                tdp.remove(gfn);
                flush.0 = true;
            } else if core::mem::replace(&mut found.entry.writable, false) {
                flush.0 = true;
            }
        }
        for (level, at) in self.mappings_of(gfn, gfn + 1) {
            if level != Level::Size4K {
                flush.and(self.drop_entry(at));
            } else if let Some(leaf) = self.leaf_mut(at) {
                flush.0 |= core::mem::replace(&mut leaf.writable, false);
            }
        }
        flush
    }

    fn untrack(&mut self, gfn: u64) {
        if let Some(count) = self.tracked.get_mut(&gfn) {
            *count -= 1;
            if *count == 0 {
                self.tracked.remove(&gfn);
            }
        }
    }

    /// The entries that map one of the guest frames `[start..end)`.
    fn mappings_of(&self, start: u64, end: u64) -> Vec<(Level, At)> {
        let mut found = Vec::new();
        for level in Level::ALL {
            let first = start & !(self.geometry.pages(level).get() - 1);
            let here = self.rmap[level as usize].range(first..end).flat_map(|(_, at)| at);
            found.extend(here.map(|at| (level, *at)));
        }
        found
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

    fn forget(&mut self, level: Level, gfn: Gfn, at: At) {
        let rmap = &mut self.rmap[level as usize];
        if let Some(there) = rmap.get_mut(&gfn.get()) {
            there.remove(&at);
            if there.is_empty() {
                rmap.remove(&gfn.get());
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

    /// Takes what maps guest frames `[start..end)` away, and the shadows of tables in them.
    pub(crate) fn zap(&mut self, start: u64, end: u64) -> bool {
        let mappings = self.mappings_of(start, end);
        let tables: Vec<Key> = self.of_tables(start, end).map(|(key, _)| key).collect();
        let any = !mappings.is_empty() || !tables.is_empty();
        for (_, at) in mappings {
            let _: Flush = self.drop_entry(at);
        }
        for key in tables {
            let _: Flush = self.free(key);
        }
        any
    }

    /// Reads a table again, that has been let out of sync: what it no longer says is dropped.
    fn sync(&mut self, key: Key, memory: &GuestMemory<'_>, tdp: &mut Table<TdpEntry>) -> Flush {
        let table = Gfn::new(key.gfn);
        let entries = self.pages.get(&key).map(|page| &page.entries);
        let entries: Vec<(u16, Entry)> =
            entries.into_iter().flatten().map(|(index, entry)| (*index, *entry)).collect();
        let mut flush = Flush::NO;
        for (index, entry) in entries {
            let (Some(table), Entry::Leaf(leaf)) = (table, entry) else { continue };
            let Ok(pte) = memory.entry(table, index) else { return self.free(key) };
            if !pte.has(Pte::PRESENT | Pte::USER | Pte::ACCESSED) || pte.gfn() != leaf.gfn {
                flush.and(self.drop_entry((key, index)));
            } else if leaf.writable && !pte.has(Pte::WRITABLE | Pte::DIRTY) {
                flush.0 = true;
                if let Some(leaf) = self.leaf_mut((key, index)) {
                    leaf.writable = false;
                }
            }
        }
        if let Some(page) = self.pages.get_mut(&key) {
            page.unsync = false;
            flush.and(self.track(key.gfn, tdp));
        }
        flush
    }

    /// Reads every table below a root again that is out of sync.
    pub(crate) fn sync_root(
        &mut self,
        root: Gfn,
        memory: &GuestMemory<'_>,
        tdp: &mut Table<TdpEntry>,
    ) -> Flush {
        self.sync_below(Key::top(root), memory, tdp)
    }

    fn sync_below(
        &mut self,
        key: Key,
        memory: &GuestMemory<'_>,
        tdp: &mut Table<TdpEntry>,
    ) -> Flush {
        let (mut all, mut seen) = (alloc::vec![key], BTreeSet::new());
        let mut flush = Flush::NO;
        while let Some(key) = all.pop() {
            let Some(page) = self.pages.get(&key) else { continue };
            if page.unsync {
                flush.and(self.sync(key, memory, tdp));
                continue;
            }
            let children = page.entries.values().filter_map(|entry| match entry {
                Entry::Table(child) => Some(*child),
                Entry::Leaf(_) => None,
            });
            all.extend(children.filter(|child| seen.insert(*child)));
        }
        flush
    }

    /// The guest flushes a page: what a table out of sync has of it is dropped.
    pub(crate) fn invlpg(&mut self, root: Gfn, page: u64) -> Flush {
        let Some(found) = self.find(root, page) else { return Flush::NO };
        let unsync = self.pages.get(&found.at.0).is_some_and(|page| page.unsync);
        if unsync { self.drop_entry(found.at) } else { Flush::NO }
    }

    /// Clears the accessed bits of what maps guest frames `[start..end)`; whether one was set.
    pub(crate) fn age(&mut self, start: u64, end: u64) -> bool {
        let mut any = false;
        for (_, at) in self.mappings_of(start, end) {
            let accessed = self.leaf_mut(at).map(|leaf| &mut leaf.accessed);
            any |= accessed.is_some_and(|accessed| core::mem::replace(accessed, false));
        }
        any
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
