//! Memory of huge pages, of the machine's pool.
//!
//! ```text
//! created      as many huge pages as the memory has are reserved
//! first touch  a whole one is allocated, and split as far as has been noted for it
//! discard      of a whole one: merged, and back to the pool; of less: zeros
//! ```
//! What is to be split and is not there yet is noted, and what a split takes is kept for it: a
//! touch that brings the page needs no more than the page.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use polder_engine::pool::{HugePage, PoolCounts};
use polder_linux::Errno;
use polder_machine::{Backing, Machine};
use polder_units::{Geometry, Level, PageCount, PageIndex, PageRange};

use super::{DRIVER, MachineHost, REFERENCE_RETRIES, refused};
use crate::huge_pool::{HugePool, Reserved};
use crate::sync::Mutex;
use crate::{Error, host::failed};

/// Frames beside those of the pool: what a small machine needs for itself.
const SPARE: u64 = 1024;

/// Huge pages of a memory.
pub(super) struct Huge {
    pub(super) level: Level,
    state: Mutex<State>,
}

struct State {
    reserved: Reserved,
    /// What is held, by the number of the huge page in the memory.
    held: BTreeMap<u64, HugePage>,
    /// Folios to be split when their memory comes.
    unborn: BTreeSet<(Level, PageIndex)>,
}

/// The frames of a machine with a pool for such a memory: also tables to split all of it to 4K.
pub(super) fn frames(pages: PageCount) -> Option<PageCount> {
    let tables = pages.get().div_ceil(64);
    PageCount::new(pages.get() + tables + SPARE)
}

impl Huge {
    /// Reserves the huge pages of a memory, and fills the machine's pool with as many.
    pub(super) fn new(
        machine: &mut Machine,
        (pages, level): (PageCount, Level),
        pool: Option<&HugePool>,
    ) -> Result<Self, Error> {
        let count = pages.get() / Geometry::X86_64.pages(level).get();
        let pool = pool.cloned().unwrap_or_else(|| HugePool::new(level, count));
        let reserved = pool.reserve(level, count)?;
        if machine.fill_pool(level, count) < count {
            return Err(failed("an allocation for the pool", Errno::NOMEM));
        }
        let (held, unborn) = (BTreeMap::new(), BTreeSet::new());
        Ok(Self { level, state: Mutex::new(State { reserved, held, unborn }) })
    }

    pub(super) fn pool(&self) -> HugePool {
        self.state.lock().reserved.pool().clone()
    }

    /// Notes that the memory is going, and that on its machine pins keep so many huge pages: those
    /// that it holds, and such as it has discarded, which are promised to it still.
    pub(super) fn leave(&self, machine: &Arc<Mutex<Machine>>, pending: u64) {
        let mut state = self.state.lock();
        let held = state.held.values().copied().collect::<Vec<_>>().into_iter();
        let discarded = std::iter::from_fn(|| state.reserved.take());
        let kept = usize::try_from(pending).unwrap_or(usize::MAX);
        let kept: Vec<HugePage> = held.chain(discarded).take(kept).collect();
        state.reserved.leave(machine, kept);
    }

    /// What the pool has. What this memory has discarded, and pins on its machine keep, is promised
    /// to it as before, and not free yet: it is pending.
    pub(super) fn counts(&self, machine: &Machine) -> PoolCounts {
        let mut counts = self.state.lock().reserved.pool().counts();
        let pending = machine.pool_counts(self.level).pending;
        counts.free = counts.free.saturating_sub(pending);
        counts.reserved = counts.reserved.saturating_sub(pending);
        counts.pending += pending;
        counts
    }
}

impl MachineHost {
    fn level_of(machine: &Machine, range: PageRange) -> Level {
        let pages = |level: &Level| machine.geometry().pages(*level) == range.count();
        Level::ALL.into_iter().find(pages).expect("a folio's pages")
    }

    fn huge(&self) -> &Huge {
        self.huge.as_ref().expect("the engine reshapes memory of huge pages only")
    }

    pub(super) fn prepare_split(&self, range: PageRange) -> Result<(), Error> {
        let mut machine = self.lock();
        let level = Self::level_of(&machine, range);
        machine.prepare_split(self.object, range.start(), level).map_err(refused)
    }

    pub(super) fn release_tables(&self, range: PageRange) {
        let mut machine = self.lock();
        let level = Self::level_of(&machine, range);
        machine.release_tables(self.object, range.start(), level);
    }

    /// Splits a folio to the next level, or merges such to one and keeps what the split took. Of
    /// what is not there yet it is noted, and what is so already stays so. Whoever refers to the
    /// folio may soon not.
    pub(super) fn reshape(&self, range: PageRange, split: bool) -> Result<(), Error> {
        self.again(|| {
            let mut machine = self.lock();
            let level = Self::level_of(&machine, range);
            let page = range.start();
            match machine.backing(self.object, page).map_err(refused)? {
                None => {
                    let unborn = &mut self.huge().state.lock().unborn;
                    let _ = match split {
                        true => unborn.insert((level, page)),
                        false => unborn.remove(&(level, page)),
                    };
                    Ok(())
                }
                Some(Backing { level: there, .. }) if split == (there < level) => Ok(()),
                Some(_) if split => self.split_once(&mut machine, page),
                Some(_) => machine
                    .merge_folios_keeping_tables(self.object, page, level, DRIVER)
                    .map_err(refused),
            }
        })
    }

    fn split_once(&self, machine: &mut Machine, page: PageIndex) -> Result<(), Error> {
        let backing = |machine: &Machine| match machine.backing(self.object, page) {
            Ok(Some(backing)) => Ok(backing.pfn),
            Ok(None) => unreachable!("a split page has memory"),
            Err(error) => Err(refused(error)),
        };
        machine.lock_folio(backing(machine)?, DRIVER).map_err(refused)?;
        let split = machine.split_folio(self.object, page, DRIVER);
        let unlocked = machine.unlock_folio(backing(machine)?, DRIVER);
        split.and(unlocked).map_err(refused)
    }

    /// Tries again what a reference, a mapping or a lock that is soon gone is in the way of.
    fn again(&self, mut attempt: impl FnMut() -> Result<(), Error>) -> Result<(), Error> {
        use polder_machine::Error::{Locked, Mapped, Referenced};
        let mut retries = REFERENCE_RETRIES;
        loop {
            match attempt() {
                Err(Error::Machine(Locked { .. } | Mapped { .. } | Referenced { .. }))
                    if retries > 0 =>
                {
                    retries -= 1;
                    crate::sync::yield_now();
                }
                done => return done,
            }
        }
    }

    /// Brings the huge page around a page, split as it was noted.
    pub(super) fn allocate_huge(
        &self,
        machine: &mut Machine,
        page: PageIndex,
    ) -> Result<(), Error> {
        let huge = self.huge();
        let whole = PageRange::enclosing(page, huge.level, machine.geometry());
        let number = whole.start().get() / whole.count().get();
        let mut state = huge.state.lock();
        let state = &mut *state;
        let none = || failed("a huge page's allocation", Errno::NOMEM);
        if !state.held.contains_key(&number) {
            let page = state.reserved.take().ok_or_else(none)?;
            state.held.insert(number, page);
        }
        let first = whole.start();
        if let Err(error) = machine.allocate_from_pool(self.object, first, huge.level) {
            // What was discarded while somebody pins it comes back with his last pin.
            if let Some(page) = state.held.remove(&number) {
                state.reserved.untake(page);
            }
            return Err(refused(error));
        }
        for level in [Level::Size1G, Level::Size2M] {
            let noted: Vec<_> = state.unborn.iter().copied().collect();
            let noted = noted.into_iter().filter(|it| it.0 == level && whole.contains(it.1));
            for (level, first) in noted {
                self.split_once(machine, first)?;
                state.unborn.remove(&(level, first));
            }
        }
        Ok(())
    }

    /// Frees the huge pages that lie in a range as a whole. What is left of the range is not freed.
    pub(super) fn free_huge(&self, range: PageRange) -> Result<Vec<PageRange>, Error> {
        let Some(huge) = &self.huge else { return Ok(Vec::new()) };
        let pages = self.lock().geometry().pages(huge.level).get();
        let (first, end) = (range.start().get().next_multiple_of(pages), range.end());
        let (mut freed, mut at) = (Vec::new(), first);
        while let Some(whole) = PageRange::between(at, at + pages).filter(|it| it.end() <= end) {
            self.free_one(huge, whole)?;
            freed.push(whole);
            at += pages;
        }
        Ok(freed)
    }

    fn free_one(&self, huge: &Huge, whole: PageRange) -> Result<(), Error> {
        let shape = self.shape_of(whole)?;
        if shape.is_empty() {
            return self.punch_huge(huge, whole);
        }
        let merged = {
            let (mut machine, first) = (self.lock(), whole.start());
            machine.merge_folios_keeping_tables(self.object, first, huge.level, DRIVER)
        };
        huge.state.lock().unborn.extend(&shape);
        let punched = self.punch_huge(huge, whole);
        if merged.is_err() {
            // Somebody pins a part: that keeps its tables, and what comes next needs its own.
            let mut machine = self.lock();
            for &(level, page) in &shape {
                machine.prepare_split(self.object, page, level).map_err(refused)?;
            }
        }
        punched
    }

    /// The folios of a huge page that are split.
    fn shape_of(&self, whole: PageRange) -> Result<BTreeSet<(Level, PageIndex)>, Error> {
        let machine = self.lock();
        let geometry = machine.geometry();
        let folios = machine.folios(self.object, whole).map_err(refused)?;
        let mut shape = BTreeSet::new();
        for (page, backing) in folios {
            let above = Level::ALL.into_iter().filter(|&level| level > backing.level);
            for level in above.filter(|&level| geometry.pages(level) <= whole.count()) {
                shape.insert((level, PageRange::enclosing(page, level, geometry).start()));
            }
        }
        Ok(shape)
    }

    fn punch_huge(&self, huge: &Huge, whole: PageRange) -> Result<(), Error> {
        let folios: Vec<PageRange> = {
            let machine = self.lock();
            let geometry = machine.geometry();
            let folios = machine.folios(self.object, whole).map_err(refused)?;
            let around =
                |(page, backing): (_, Backing)| PageRange::enclosing(page, backing.level, geometry);
            folios.map(around).collect()
        };
        folios.into_iter().try_for_each(|folio| self.punch(folio))?;
        let number = whole.start().get() / whole.count().get();
        let mut state = huge.state.lock();
        if let Some(page) = state.held.remove(&number) {
            state.reserved.discard(page);
        }
        Ok(())
    }
}
