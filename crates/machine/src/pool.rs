//! A pool of huge pages, and the tables that it takes to split one.
//!
//! The pool is of blocks of frames set aside (hugetlb's). A block that is given to an object comes
//! back as a whole: its frames may come one by one, for a folio that was split goes in pieces, and
//! pinned ones go last; the last of them returns it (`pending` until then).
//!
//! The kernel keeps something of each frame (`struct page`, 64 bytes, in the vmemmap), and of a
//! huge page of a pool only as much as one page holds (HVO; Linux
//! `Documentation/mm/vmemmap_dedup.rst`). To split the folio needs the rest, which may not be had:
//!
//! | split | takes |
//! |---|---|
//! | 1G to 2M | a page for each but the first: 511 |
//! | 2M to 4K | as much as its frames need, but the first page: 7 |
//!
//! They can be had before ([`Machine::prepare_split`]) and kept by a merge, so that undoing one
//! takes no memory. What is prepared is kept by object, page and level; what a split has used, by
//! its first frame and level.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use polder_units::{Level, PageIndex, PageRange, Pfn};

use crate::plant::Plant;
use crate::{Error, LockOwner, Machine, ObjectId};

/// `struct page`s in a page of the vmemmap.
const PER_TABLE: u64 = 64;

/// What a pool has.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub struct PoolCounts {
    /// All blocks.
    pub total: u64,
    /// Those in the pool.
    pub free: u64,
    /// Those that no object has any more and of which a frame is still referenced.
    pub pending: u64,
}

/// A block of a pool.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Block {
    level: Level,
    /// The frames that came back since it was given out.
    back: u64,
    free: bool,
}

#[derive(Clone, Default, Hash)]
pub(crate) struct Pool {
    /// By their first frame.
    blocks: BTreeMap<u64, Block>,
    /// Tables for a split that has not happened, or was undone.
    prepared: BTreeMap<(ObjectId, PageIndex, Level), Vec<Pfn>>,
    /// Those of folios that were split, by their first frame.
    used: BTreeMap<(u64, Level), Vec<Pfn>>,
}

impl Pool {
    /// The frames that no folio has: in blocks that are free or on their way back, and of tables.
    pub(crate) fn frames(&self, pages: impl Fn(Level) -> u64) -> u64 {
        let blocks = self.blocks.values();
        let blocks: u64 = blocks.map(|it| if it.free { pages(it.level) } else { it.back }).sum();
        let tables = self.prepared.values().chain(self.used.values());
        blocks + tables.map(|tables| tables.len() as u64).sum::<u64>()
    }

    /// The block that a frame lies in.
    fn block_of(&self, pfn: Pfn, pages: impl Fn(Level) -> u64) -> Option<u64> {
        let (&head, block) = self.blocks.range(..=pfn.get()).next_back()?;
        (pfn.get() < head + pages(block.level)).then_some(head)
    }
}

impl Machine {
    /// Sets up to `count` blocks of `level` aside for the pool. How many.
    pub fn fill_pool(&mut self, level: Level, count: u64) -> u64 {
        let mut filled = 0;
        while filled < count
            && let Ok(pfn) = self.allocate_frames(level)
        {
            self.pool.blocks.insert(pfn.get(), Block { level, back: 0, free: true });
            filled += 1;
        }
        filled
    }

    /// What the pool has of a level.
    pub fn pool_counts(&self, level: Level) -> PoolCounts {
        let mut counts = PoolCounts::default();
        for (&head, block) in self.pool.blocks.iter().filter(|(_, block)| block.level == level) {
            counts.total += 1;
            let mut folios = self.folios.0.range(head, head + self.pages(level));
            let is_used = folios.any(|found| found.entry.cache.is_some());
            counts.free += u64::from(block.free);
            counts.pending += u64::from(!block.free && !is_used);
        }
        counts
    }

    /// Allocates a folio of the pool at `page`, zeroed, and puts it into the page cache.
    ///
    /// # Errors
    /// As [`Machine::allocate`]; [`Error::NoMemory`] where the pool is empty.
    pub fn allocate_from_pool(
        &mut self,
        object: ObjectId,
        page: PageIndex,
        level: Level,
    ) -> Result<Pfn, Error> {
        let range = self.vacant(object, page, level)?;
        if self.plants.allocation_fails() {
            return Err(Error::NoMemory { level });
        }
        let mut free = self.pool.blocks.iter_mut();
        let block = free.find(|(_, block)| block.free && block.level == level);
        let (&head, block) = block.ok_or(Error::NoMemory { level })?;
        let pfn = Pfn::new(head).ok_or(Error::NoMemory { level })?;
        self.protection.check_block(pfn, range.count())?;
        (block.free, block.back) = (false, 0);
        self.frames.zero(pfn, range.count());
        self.add_to_cache(object, page, level, pfn, None);
        Ok(pfn)
    }

    /// Takes back the frames of a folio that nobody references: for the pool if they are its.
    pub(crate) fn free_frames_of(&mut self, pfn: Pfn, level: Level) {
        let pages = self.config.geometry;
        let pages = |level| pages.pages(level).get();
        let Some(head) = self.pool.block_of(pfn, pages) else {
            return self.frames.free(pfn, level);
        };
        let early = self.plants.has(Plant::ReturnedEarly);
        let block = self.pool.blocks.get_mut(&head).expect("looked up a moment ago");
        block.back += pages(level);
        let all = pages(block.level);
        assert!(block.back <= all, "a frame of the huge page at {head:#x} comes back twice");
        if block.back == all || early {
            (block.free, block.back) = (true, 0);
            self.free_tables_within(head, head + all);
        }
    }

    fn free_tables_within(&mut self, start: u64, end: u64) {
        for tables in self.take_used(start, end) {
            self.free_tables(tables.1);
        }
    }

    /// The tables of folios that were split, of these frames.
    fn take_used(&mut self, start: u64, end: u64) -> Vec<((u64, Level), Vec<Pfn>)> {
        let first = (start, Level::Size4K);
        let keys: Vec<_> =
            self.pool.used.range(first..(end, Level::Size4K)).map(|it| *it.0).collect();
        keys.into_iter().filter_map(|key| Some((key, self.pool.used.remove(&key)?))).collect()
    }

    fn free_tables(&mut self, tables: Vec<Pfn>) {
        tables.into_iter().for_each(|pfn| self.frames.free(pfn, Level::Size4K));
    }

    /// How many tables a split of a folio of `level` takes.
    pub fn tables_for(&self, level: Level) -> u64 {
        match level.smaller() {
            None => 0,
            Some(Level::Size4K) => self.pages(level).div_ceil(PER_TABLE).saturating_sub(1).max(1),
            Some(below) => self.pages(level) / self.pages(below) - 1,
        }
    }

    fn allocate_tables(&mut self, level: Level) -> Result<Vec<Pfn>, Error> {
        let mut tables = Vec::new();
        for _ in 0..self.tables_for(level) {
            match self.allocate_frames(Level::Size4K) {
                Ok(table) => tables.push(table),
                Err(error) => {
                    self.free_tables(tables);
                    return Err(error);
                }
            }
        }
        Ok(tables)
    }

    /// Has what it takes to split the folio of `level` at `page`, also one that is not there yet.
    /// What was prepared before and not used is enough.
    ///
    /// # Errors
    /// [`Error::NoMemory`], and then none of it is kept.
    pub fn prepare_split(
        &mut self,
        object: ObjectId,
        page: PageIndex,
        level: Level,
    ) -> Result<(), Error> {
        self.objects.get(object)?;
        let key = (object, page, level);
        if !self.pool.prepared.contains_key(&key) {
            let tables = self.allocate_tables(level)?;
            self.pool.prepared.insert(key, tables);
        }
        Ok(())
    }

    /// Gives back what was prepared, or kept, for a split of the folio of `level` at `page`.
    pub fn release_tables(&mut self, object: ObjectId, page: PageIndex, level: Level) {
        if let Some(tables) = self.pool.prepared.remove(&(object, page, level)) {
            self.free_tables(tables);
        }
    }

    /// The same, of everything in an object.
    pub(crate) fn release_all_tables(&mut self, object: ObjectId) {
        let keys: Vec<_> = self.pool.prepared.keys().copied().collect();
        for (of, page, level) in keys.into_iter().filter(|key| key.0 == object) {
            self.release_tables(of, page, level);
        }
    }

    /// Tables for the split of a folio, whose first page and frame these are: what was prepared, or
    /// new ones. A folio of no pool has them already.
    pub(crate) fn use_tables(
        &mut self,
        (object, first): (ObjectId, PageIndex),
        pfn: Pfn,
        level: Level,
    ) -> Result<(), Error> {
        let geometry = self.config.geometry;
        if self.pool.block_of(pfn, |level| geometry.pages(level).get()).is_none() {
            return Ok(());
        }
        let tables = match self.pool.prepared.remove(&(object, first, level)) {
            Some(tables) => tables,
            None => self.allocate_tables(level)?,
        };
        self.pool.used.insert((pfn.get(), level), tables);
        Ok(())
    }

    /// Merges as [`Machine::merge_folios`], and keeps what it took to split the folios: a split of
    /// the same takes no memory until [`Machine::release_tables`].
    ///
    /// # Errors
    /// As there.
    pub fn merge_folios_keeping_tables(
        &mut self,
        object: ObjectId,
        page: PageIndex,
        level: Level,
        by: LockOwner,
    ) -> Result<(), Error> {
        let head = self.merge(object, page, level, by)?;
        let whole = PageRange::enclosing(page, level, self.config.geometry);
        for ((pfn, level), tables) in self.take_used(head.get(), head.get() + self.pages(level)) {
            let first = PageIndex::new(whole.start().get() + (pfn - head.get()));
            let first = first.expect("a page of the folio");
            let before = self.pool.prepared.insert((object, first, level), tables);
            before.into_iter().for_each(|tables| self.free_tables(tables));
        }
        Ok(())
    }

    /// Frees the tables that the split of what is one folio now took.
    pub(crate) fn merged(&mut self, head: Pfn, level: Level) {
        self.free_tables_within(head.get(), head.get() + self.pages(level));
    }
}
