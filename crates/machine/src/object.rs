//! Memory objects: the page cache of a memfd or guest_memfd, and the driver's view of its bytes.
//!
//! A folio sits at a page index that is a multiple of its pages. The trusted view reads and writes
//! bytes through the kernel's own mapping, not through a process: no host page table is asked.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use polder_units::{Level, PAGE_SHIFT, PageCount, PageIndex, PageRange, Pfn};

use crate::access::Access;
use crate::chunk::{chunks, chunks_mut};
use crate::folio::Folio;
use crate::frames::{frame_at, page_count};
use crate::table::{Found, Table};
use crate::{Error, LockOwner, Machine, ObjectId};

#[derive(Clone, Hash)]
pub(crate) struct Object {
    pub(crate) pages: PageCount,
    /// The first frame of the folio at each page, at the folio's level.
    pub(crate) cache: Table<Pfn>,
    /// Its pages are anonymous memory: `anonymous.rs`.
    pub(crate) anonymous: bool,
    /// The pages that are copied before they are written to.
    pub(crate) copied: BTreeSet<u64>,
}

/// The memory behind a page of an object.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Backing {
    /// The page's frame.
    pub pfn: Pfn,
    /// The level of the folio it is part of.
    pub level: Level,
}

impl Object {
    pub(crate) fn backing(&self, page: PageIndex) -> Option<Backing> {
        let Found { start, level, entry } = self.cache.get(page.get())?;
        Some(Backing { pfn: frame_at(*entry, page.get() - start), level })
    }
}

impl Machine {
    /// Creates an object of `pages` pages, none of them allocated.
    ///
    /// # Errors
    /// [`Error::Space`] for more pages than an address space has; 0 pages are
    /// [`Error::OutOfBounds`].
    pub fn create_object(&mut self, pages: PageCount) -> Result<ObjectId, Error> {
        self.in_space(pages.get())?;
        if pages.is_zero() {
            return Err(Error::OutOfBounds { offset: 0, len: 0 });
        }
        let (cache, copied) = (Table::new(self.config.geometry), BTreeSet::new());
        self.objects.insert(Object { pages, cache, anonymous: false, copied })
    }

    /// Destroys an object. Pages that are pinned stay allocated until their last pin is released.
    ///
    /// # Errors
    /// [`Error::InUse`] while a process maps it or a VM binds it; as [`Machine::punch`].
    pub fn destroy_object(&mut self, object: ObjectId) -> Result<(), Error> {
        let count = self.objects.get(object)?.pages;
        let mapped = self.processes.iter().any(|(_, process)| process.uses(object));
        let bound = self.vms.iter().any(|(_, vm)| vm.uses(object));
        if mapped || bound {
            return Err(Error::InUse { object });
        }
        if let Ok(all) = PageRange::new(PageIndex::from(0), count) {
            self.punch(object, all, None)?;
        }
        self.release_all_tables(object);
        self.objects.remove(object).map(|_| ())
    }

    /// Allocates a folio of `level` at `page`, zeroed, and puts it into the page cache.
    ///
    /// # Errors
    /// [`Error::Misaligned`], [`Error::Beyond`] the object's end, [`Error::Exists`] if any page of
    /// it is allocated already, [`Error::NoMemory`], [`Error::Refused`] if the
    /// RMP still has the frames assigned.
    pub fn allocate(
        &mut self,
        object: ObjectId,
        page: PageIndex,
        level: Level,
    ) -> Result<Pfn, Error> {
        self.vacant(object, page, level)?;
        let pfn = self.allocate_frames(level)?;
        self.add_to_cache(object, page, level, pfn, None);
        Ok(pfn)
    }

    /// The pages of a folio of `level` at `page`, none of which has memory.
    pub(crate) fn vacant(
        &self,
        object: ObjectId,
        page: PageIndex,
        level: Level,
    ) -> Result<PageRange, Error> {
        let pages = self.config.geometry.pages(level);
        if !page.is_multiple_of(pages) {
            return Err(Error::Misaligned { number: page.get(), level });
        }
        let range = PageRange::enclosing(page, level, self.config.geometry);
        let in_object = self.object_range(object, range)?;
        match in_object.cache.first_in(range.start().get(), range.end()) {
            Some(found) => Err(Error::Exists { number: found.start }),
            None => Ok(range),
        }
    }

    /// Puts the folio `[pfn..)` that nobody references into the vacant page cache at `page`.
    pub(crate) fn add_to_cache(
        &mut self,
        object: ObjectId,
        page: PageIndex,
        level: Level,
        pfn: Pfn,
        lock: Option<LockOwner>,
    ) {
        let refs = self.pages(level);
        let folio = Folio { refs, cache: Some((object, page)), lock, ..Folio::default() };
        let added = self.folios.0.insert(pfn.get(), level, folio);
        assert!(added.is_ok(), "the frames at pfn {pfn} are part of another folio");
        if let Ok(object) = self.objects.get_mut(object) {
            let added = object.cache.insert(page.get(), level, pfn);
            assert!(added.is_ok(), "the page cache is occupied at page {page}");
        }
    }

    /// The memory behind a page; `None` for a hole.
    ///
    /// # Errors
    /// [`Error::Gone`]; a page past the end is a hole.
    pub fn backing(&self, object: ObjectId, page: PageIndex) -> Result<Option<Backing>, Error> {
        Ok(self.objects.get(object)?.backing(page))
    }

    /// The folios of a range, in order: the page of the object each starts at, and its backing.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn folios(
        &self,
        object: ObjectId,
        range: PageRange,
    ) -> Result<impl Iterator<Item = (PageIndex, Backing)>, Error> {
        let found = self.objects.get(object)?.cache.range(range.start().get(), range.end());
        Ok(found.filter_map(|Found { start, level, entry }| {
            Some((PageIndex::new(start)?, Backing { pfn: *entry, level }))
        }))
    }

    /// Takes the folios of a range out of the page cache, as `FALLOC_FL_PUNCH_HOLE`.
    ///
    /// Their frames are freed unless pinned: then by the last unpin. TDP and TLB entries hold
    /// nothing and are not looked for: who leaves them lets a guest reach freed frames.
    ///
    /// # Errors
    /// For the first folio that cannot go, and then none goes: [`Error::Part`] if the range holds
    /// only a part of it, [`Error::Mapped`] while a host page table maps it, [`Error::Locked`] by
    /// another than `by`.
    pub fn punch(
        &mut self,
        object: ObjectId,
        range: PageRange,
        by: Option<LockOwner>,
    ) -> Result<PageCount, Error> {
        for (page, Backing { pfn, level }) in self.folios(object, range)? {
            let whole = PageRange::enclosing(page, level, self.config.geometry);
            if !range.contains_range(whole) {
                return Err(Error::Part { page, level });
            }
            self.check_not_locked(pfn, by)?;
            let mapcount = self.counts(pfn)?.mapcount;
            if mapcount > 0 {
                return Err(Error::Mapped { pfn, mapcount });
            }
        }
        let mut gone = Vec::new();
        let it = self.objects.get_mut(object)?;
        it.cache.drain(range.start().get(), range.end(), |found| gone.push(found));
        it.copied.retain(|page| !(range.start().get()..range.end()).contains(page));
        let mut count = 0;
        for Found { start, level, entry: pfn } in gone {
            count += self.pages(level);
            let Some(page) = PageIndex::new(start) else { continue };
            self.leave_folio(object, page, pfn);
        }
        Ok(page_count(count))
    }

    /// Makes the allocated pages of a range contain zeros.
    ///
    /// # Errors
    /// [`Error::Beyond`] the object's end; [`Error::Refused`] by the hardware.
    pub fn zero(&mut self, object: ObjectId, range: PageRange) -> Result<(), Error> {
        if self.object_range(object, range)?.anonymous {
            // What was never written is zeros.
            return self.punch(object, range, None).map(drop);
        }
        let cache = &self.objects.get(object)?.cache;
        for Found { start, level, entry } in cache.range(range.start().get(), range.end()) {
            let end = range.end().min(start + cache.pages(level));
            let first = range.start().get().max(start);
            let pfn = frame_at(*entry, first - start);
            let count = page_count(end - first);
            self.check_direct_map(pfn, count, true)?;
            self.protection.check_block(pfn, count)?;
            self.frames.zero(pfn, count);
        }
        Ok(())
    }

    /// Reads bytes of the object through the trusted view. Holes read as zeros.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`]; [`Error::Refused`] by the hardware.
    pub fn object_read(
        &self,
        object: ObjectId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), Error> {
        self.read_bytes(object, (offset, buffer), true)
    }

    /// The same by a mapping of the reader's own, which takes no direct map.
    ///
    /// # Errors
    /// As [`Machine::object_read`].
    pub fn object_read_mapped(
        &self,
        object: ObjectId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), Error> {
        self.read_bytes(object, (offset, buffer), false)
    }

    fn read_bytes(
        &self,
        object: ObjectId,
        (offset, buffer): (u64, &mut [u8]),
        by_direct_map: bool,
    ) -> Result<(), Error> {
        let object = self.object_bytes(object, offset, buffer.len())?;
        for (page, at, bytes) in chunks_mut(offset, buffer) {
            match PageIndex::new(page).and_then(|page| object.backing(page)) {
                Some(Backing { pfn, .. }) => {
                    if by_direct_map {
                        self.check_direct_map(pfn, page_count(1), false)?;
                    }
                    self.protection.check(&Access::host(pfn, Level::Size4K, false))?;
                    self.frames.read(pfn, at, bytes);
                }
                None => bytes.fill(0),
            }
        }
        Ok(())
    }

    /// Writes bytes of the object through the trusted view.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`]; [`Error::Hole`] at a page that is not allocated, and
    /// [`Error::Refused`] by the hardware: then the pages before are written.
    pub fn object_write(
        &mut self,
        object: ObjectId,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Error> {
        self.write_bytes(object, (offset, bytes), true)
    }

    /// The same by a mapping of the writer's own, which takes no direct map.
    ///
    /// # Errors
    /// As [`Machine::object_write`].
    pub fn object_write_mapped(
        &mut self,
        object: ObjectId,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Error> {
        self.write_bytes(object, (offset, bytes), false)
    }

    fn write_bytes(
        &mut self,
        object: ObjectId,
        (offset, bytes): (u64, &[u8]),
        by_direct_map: bool,
    ) -> Result<(), Error> {
        let anonymous = self.object_bytes(object, offset, bytes.len())?.anonymous;
        for (page, at, bytes) in chunks(offset, bytes) {
            let Some(page) = PageIndex::new(page) else { continue };
            if anonymous {
                self.write_fault(object, page)?;
            }
            let backing = self.objects.get(object)?.backing(page);
            let Backing { pfn, .. } = backing.ok_or(Error::Hole { object, page })?;
            if by_direct_map {
                self.check_direct_map(pfn, page_count(1), true)?;
            }
            self.protection.check(&Access::host(pfn, Level::Size4K, true))?;
            self.frames.write(pfn, at, bytes);
        }
        Ok(())
    }

    /// The object, if `range` lies in it.
    pub(crate) fn object_range(&self, id: ObjectId, range: PageRange) -> Result<&Object, Error> {
        let object = self.objects.get(id)?;
        let end = PageIndex::new(object.pages.get());
        match end {
            Some(page) if range.end() > page.get() => Err(Error::Beyond { object: id, page }),
            _ => Ok(object),
        }
    }

    fn object_bytes(&self, id: ObjectId, offset: u64, len: usize) -> Result<&Object, Error> {
        let object = self.objects.get(id)?;
        let len = len as u64;
        let end = object.pages.get() << PAGE_SHIFT;
        let within = offset.checked_add(len).is_some_and(|last| last <= end);
        if within { Ok(object) } else { Err(Error::OutOfBounds { offset, len }) }
    }
}
