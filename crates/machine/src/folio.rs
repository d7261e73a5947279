//! Folios: a block of frames of one level, with lock, reference, map and pin counts.
//!
//! Who holds references, as mm/gup.c, mm/rmap.c and `folio_expected_ref_count()`
//! (include/linux/mm.h) count them:
//!
//! | holder | references | map count | pin count |
//! |---|---|---|---|
//! | the page cache | one a page of the folio | | |
//! | another object that has it copied on write | 1 | | |
//! | anonymous memory, of the zero page | 1 for all | | |
//! | an entry of a host page table, of any level | 1 | 1 | |
//! | a pin of a 4K folio | [`GUP_PIN_COUNTING_BIAS`] | | none: it shows in the references |
//! | a pin of a larger folio | 1 | | 1 |
//! | a TDP entry, a TLB entry | | | |
//!
//! The last reference frees the frames. That the counts are never below what is held is ours to
//! keep (a breach panics); that they are never above it is what [`Machine::audit`] checks.

use polder_units::{Geometry, Level, PageIndex, Pfn};

use crate::frames::frame_at;
use crate::table::{Found, Table};
use crate::{Error, Machine, ObjectId, ProcessId, Vpn};

/// What a pin adds to the reference count of a 4K folio (include/linux/mm.h).
pub const GUP_PIN_COUNTING_BIAS: u64 = 1024;

/// Who takes folio locks: a thread of the driver, an actor of a search. The caller numbers them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LockOwner(pub u32);

#[derive(Clone, Default, Hash)]
pub(crate) struct Folio {
    pub(crate) refs: u64,
    pub(crate) mapcount: u32,
    pub(crate) pincount: u32,
    /// Where it is in a page cache.
    pub(crate) cache: Option<(ObjectId, PageIndex)>,
    pub(crate) lock: Option<LockOwner>,
    /// How many other objects have it, to be copied when it is written to.
    pub(crate) shared: u32,
}

/// A folio's counts at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Counts {
    /// Its first frame.
    pub pfn: Pfn,
    /// Its level.
    pub level: Level,
    /// All references.
    pub refs: u64,
    /// How many host page-table entries map it or a part of it.
    pub mapcount: u32,
    /// The references that page cache and mappings explain (`folio_expected_ref_count()`).
    pub expected: u64,
    /// The pin count; always 0 for a 4K folio, which has none.
    pub pincount: u32,
    /// Where it is in a page cache.
    pub cache: Option<(ObjectId, PageIndex)>,
}

impl Counts {
    /// The references that page cache and mappings do not explain: pins, speculative references.
    pub const fn foreign(&self) -> u64 {
        self.refs.saturating_sub(self.expected)
    }

    /// Whether it looks pinned, as `folio_maybe_dma_pinned()` says: exact for a large folio; for
    /// a 4K one also true of 1024 other references.
    pub const fn maybe_dma_pinned(&self) -> bool {
        match self.level {
            Level::Size4K => self.refs >= GUP_PIN_COUNTING_BIAS,
            Level::Size2M | Level::Size1G => self.pincount > 0,
        }
    }
}

/// Every folio of the machine, by its frames.
#[derive(Clone, Hash)]
pub(crate) struct Folios(pub(crate) Table<Folio>);

impl Folios {
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self(Table::new(geometry))
    }

    pub(crate) fn get(&self, pfn: Pfn) -> Result<Found<&Folio>, Error> {
        self.0.get(pfn.get()).ok_or(Error::Free { pfn })
    }

    pub(crate) fn get_mut(&mut self, pfn: Pfn) -> Result<Found<&mut Folio>, Error> {
        self.0.get_mut(pfn.get()).ok_or(Error::Free { pfn })
    }

    /// The folio of a frame that somebody holds a reference of.
    pub(crate) fn held(&mut self, pfn: Pfn) -> Found<&mut Folio> {
        let Some(folio) = self.0.get_mut(pfn.get()) else {
            panic!("pfn {pfn} is referenced but belongs to no folio");
        };
        folio
    }

    /// Adds the reference and the map count of one host page-table entry; `counted` says
    /// whether the map count is raised (it is, but for [`Plant::LostMapcount`](crate::Plant)).
    pub(crate) fn map(&mut self, pfn: Pfn, counted: bool) {
        let folio = self.held(pfn).entry;
        folio.refs += 1;
        folio.mapcount += u32::from(counted);
    }

    /// What a pin or speculative pin adds.
    pub(crate) fn pin(&mut self, pfn: Pfn) {
        let Found { level, entry: folio, .. } = self.held(pfn);
        if level == Level::Size4K {
            folio.refs += GUP_PIN_COUNTING_BIAS;
        } else {
            folio.refs += 1;
            folio.pincount += 1;
        }
    }
}

impl Machine {
    /// Locks the folio of `pfn`, as `folio_trylock()`.
    ///
    /// # Errors
    /// [`Error::Locked`] if anyone holds the lock, `by` included; [`Error::Free`].
    pub fn lock_folio(&mut self, pfn: Pfn, by: LockOwner) -> Result<(), Error> {
        let folio = self.folios.get_mut(pfn)?.entry;
        if folio.lock.is_some() {
            return Err(Error::Locked { pfn });
        }
        folio.lock = Some(by);
        Ok(())
    }

    /// Unlocks the folio of `pfn`.
    ///
    /// # Errors
    /// [`Error::NotLocked`] if `by` does not hold the lock; [`Error::Free`].
    pub fn unlock_folio(&mut self, pfn: Pfn, by: LockOwner) -> Result<(), Error> {
        let folio = self.folios.get_mut(pfn)?.entry;
        if folio.lock != Some(by) {
            return Err(Error::NotLocked { pfn });
        }
        folio.lock = None;
        Ok(())
    }

    /// The counts of the folio of `pfn`, read without its lock: they may be about to change.
    ///
    /// # Errors
    /// [`Error::Free`] if the frame belongs to no folio.
    pub fn counts(&self, pfn: Pfn) -> Result<Counts, Error> {
        let Found { start, level, entry: folio } = self.folios.get(pfn)?;
        let cached = if folio.cache.is_some() { self.pages(level) } else { 0 };
        let cached = cached + u64::from(folio.shared);
        Ok(Counts {
            pfn: frame_at(Pfn::from(0), start),
            level,
            refs: folio.refs,
            mapcount: folio.mapcount,
            expected: cached + u64::from(folio.mapcount),
            pincount: folio.pincount,
            cache: folio.cache,
        })
    }

    /// The counts of the folio of `pfn` under its lock: no mapping can be added meanwhile.
    ///
    /// # Errors
    /// [`Error::NotLocked`] if `by` does not hold the lock; [`Error::Free`].
    pub fn locked_counts(&self, pfn: Pfn, by: LockOwner) -> Result<Counts, Error> {
        self.check_locked(pfn, by)?;
        self.counts(pfn)
    }

    /// Where host page tables map page `page` of `object`: the reverse map of the folio.
    pub fn mappings_of(
        &self,
        object: ObjectId,
        page: PageIndex,
    ) -> impl Iterator<Item = (ProcessId, Vpn)> {
        self.processes.iter().flat_map(move |(id, process)| {
            let vmas = process.vmas.iter().filter(move |vma| vma.object == object);
            let vpns = vmas.filter_map(move |vma| vma.vpn_of(page));
            vpns.filter(|vpn| process.maps(*vpn)).map(move |vpn| (id, vpn))
        })
    }

    pub(crate) fn check_locked(&self, pfn: Pfn, by: LockOwner) -> Result<(), Error> {
        let locked = self.folios.get(pfn)?.entry.lock == Some(by);
        if locked { Ok(()) } else { Err(Error::NotLocked { pfn }) }
    }

    /// Refuses if another than `by` holds the lock of the folio of `pfn`.
    pub(crate) fn check_not_locked(&self, pfn: Pfn, by: Option<LockOwner>) -> Result<(), Error> {
        match self.folios.get(pfn)?.entry.lock {
            Some(owner) if Some(owner) != by => Err(Error::Locked { pfn }),
            _ => Ok(()),
        }
    }

    /// Drops what one host page-table entry added.
    pub(crate) fn unmap_folio(&mut self, pfn: Pfn, counted: bool) {
        if counted {
            let folio = self.folios.held(pfn).entry;
            assert!(folio.mapcount > 0, "pfn {pfn} is unmapped more often than mapped");
            folio.mapcount -= 1;
        }
        self.put_folio(pfn, 1);
    }

    /// Drops what a pin added.
    pub(crate) fn unpin_folio(&mut self, pfn: Pfn) {
        let Found { level, entry: folio, .. } = self.folios.held(pfn);
        if level == Level::Size4K {
            self.put_folio(pfn, GUP_PIN_COUNTING_BIAS);
        } else {
            assert!(folio.pincount > 0, "pfn {pfn} is unpinned more often than pinned");
            folio.pincount -= 1;
            self.put_folio(pfn, 1);
        }
    }

    /// Drops `refs` references; the last frees the frames.
    pub(crate) fn put_folio(&mut self, pfn: Pfn, refs: u64) {
        let Found { start, level, entry: folio } = self.folios.held(pfn);
        assert!(folio.refs >= refs, "pfn {pfn} has {} references, not {refs}", folio.refs);
        folio.refs -= refs;
        if folio.refs > 0 {
            return;
        }
        assert!(
            folio.mapcount == 0 && folio.pincount == 0 && folio.cache.is_none(),
            "the last reference of pfn {pfn} is dropped while it is mapped, pinned or cached"
        );
        self.folios.0.remove(start);
        self.free_frames_of(frame_at(Pfn::from(0), start), level);
    }
}
