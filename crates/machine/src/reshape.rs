//! Splitting and merging folios: the frames stay, the folios around them change.

use alloc::vec::Vec;

use polder_units::{Level, PageIndex, PageRange, Pfn};

use crate::folio::Folio;
use crate::frames::frame_at;
use crate::{Backing, Error, LockOwner, Machine, ObjectId};

impl Machine {
    /// Splits the folio at `page` into folios of the next smaller level, as `folio_split()`.
    ///
    /// The part that holds `page` stays locked by `by`; the others are unlocked. TDP entries
    /// are left as they are: an entry above the new level is the caller's to zap first.
    ///
    /// # Errors
    /// [`Error::NoMemory`] for the tables of one that is of the pool, if none were
    /// [prepared](Machine::prepare_split);
    /// [`Error::Hole`], [`Error::NotLocked`] by `by`, [`Error::TooLarge`] for a 4K folio,
    /// [`Error::Mapped`] by a host page table, [`Error::Referenced`] by anyone but the page cache
    /// (a pin counts for the whole folio: nobody could say which part it holds).
    pub fn split_folio(
        &mut self,
        object: ObjectId,
        page: PageIndex,
        by: LockOwner,
    ) -> Result<Level, Error> {
        let backing = self.objects.get(object)?.backing(page);
        let Backing { pfn, level } = backing.ok_or(Error::Hole { object, page })?;
        self.check_locked(pfn, by)?;
        let below = level.smaller().ok_or(Error::TooLarge { level, largest: level })?;
        self.check_only_cached(pfn)?;
        let whole = PageRange::enclosing(page, level, self.config.geometry);
        let head = self.folio_head(pfn)?;
        self.use_tables((object, whole.start()), head, level)?;
        let first = whole.start().get();
        let pages = self.pages(below);
        let keeps_lock = (page.get() - first) / pages;
        self.folios.0.split(pfn.get(), |_, offset| Folio {
            refs: pages,
            mapcount: 0,
            pincount: 0,
            cache: PageIndex::new(first + offset).map(|page| (object, page)),
            lock: (offset / pages == keeps_lock).then_some(by),
            shared: 0,
        });
        let cache = &mut self.objects.get_mut(object)?.cache;
        cache.split(page.get(), |head, offset| frame_at(*head, offset));
        Ok(below)
    }

    /// Merges the folios of the `level` page around `page` into one, if their frames are one block.
    ///
    /// The folio is locked by `by` if one of the parts was. The parts may be of mixed levels.
    ///
    /// # Errors
    /// [`Error::Hole`] if a page is not allocated, [`Error::Scattered`] if the frames are not one
    /// aligned block in order, [`Error::Exists`] if the folio is that large already,
    /// [`Error::Mapped`], [`Error::Referenced`], [`Error::Locked`] by another than `by`.
    pub fn merge_folios(
        &mut self,
        object: ObjectId,
        page: PageIndex,
        level: Level,
        by: LockOwner,
    ) -> Result<(), Error> {
        let head = self.merge(object, page, level, by)?;
        self.merged(head, level);
        Ok(())
    }

    /// Merges, and leaves the tables of the split. The first frame.
    pub(crate) fn merge(
        &mut self,
        object: ObjectId,
        page: PageIndex,
        level: Level,
        by: LockOwner,
    ) -> Result<Pfn, Error> {
        let whole = PageRange::enclosing(page, level, self.config.geometry);
        let (first, end) = (whole.start(), whole.end());
        let hole = |page| Error::Hole { object, page };
        let head = self.objects.get(object)?.backing(first).ok_or(hole(first))?;
        if head.level >= level {
            return Err(Error::Exists { number: first.get() });
        }
        if !head.pfn.is_multiple_of(self.config.geometry.pages(level)) {
            return Err(Error::Scattered { page: first, level });
        }
        let (mut next, mut lock) = (first, None);
        let parts: Vec<_> = self.folios(object, whole)?.collect();
        for &(start, part) in &parts {
            if start != next {
                return Err(hole(next));
            }
            if part.pfn.get() - head.pfn.get().min(part.pfn.get()) != start.get() - first.get() {
                return Err(Error::Scattered { page: first, level });
            }
            self.check_not_locked(part.pfn, Some(by))?;
            self.check_only_cached(part.pfn)?;
            lock = lock.or(self.folios.get(part.pfn)?.entry.lock);
            let pages = self.config.geometry.pages(part.level);
            match start.checked_add(pages) {
                Some(after) => next = after,
                None => break,
            }
        }
        if next.get() < end {
            return Err(hole(next));
        }
        self.folios.0.drain(head.pfn.get(), head.pfn.get() + self.pages(level), |_| ());
        self.objects.get_mut(object)?.cache.drain(first.get(), end, |_| ());
        self.add_to_cache(object, first, level, head.pfn, lock);
        Ok(head.pfn)
    }

    /// The first frame of the folio of `pfn`.
    fn folio_head(&self, pfn: Pfn) -> Result<Pfn, Error> {
        Ok(self.counts(pfn)?.pfn)
    }

    /// Refuses unless the page cache holds the only references of the folio of `pfn`.
    pub(crate) fn check_only_cached(&self, pfn: Pfn) -> Result<(), Error> {
        let shared = self.folios.get(pfn)?.entry.shared;
        if shared > 0 {
            return Err(Error::Referenced { pfn, foreign: shared.into() });
        }
        let counts = self.counts(pfn)?;
        match (counts.mapcount, counts.foreign()) {
            (0, 0) => Ok(()),
            (0, foreign) => Err(Error::Referenced { pfn, foreign }),
            (mapcount, _) => Err(Error::Mapped { pfn, mapcount }),
        }
    }
}
