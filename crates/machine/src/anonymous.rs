//! Anonymous memory: the zero page, and pages that are copied at the first write.
//!
//! An anonymous object is what a VMM has from `mmap(MAP_ANONYMOUS)`. A read of a page that was
//! never written finds the one zero page, mapped read-only; a write makes a page
//! (`do_anonymous_page()`, mm/memory.c). After a fork both sides have the same pages, read-only;
//! the first that writes to one gets a copy, and the last has it to itself (`do_wp_page()`).
//! Whoever maps such memory for a guest asks for what the guest does: a read must not copy.
//!
//! No process of the machine maps it: guests reach it, and the trusted view.

use polder_units::{Level, PageCount, PageIndex, PageRange, Pfn};

use crate::folio::Folio;
use crate::frames::{frame_at, page_count};
use crate::object::{Backing, Object};
use crate::{Error, Machine, ObjectId, Plant};

/// What a guest's access of a page finds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Behind {
    pub(crate) pfn: Pfn,
    /// Of the folio.
    pub(crate) level: Level,
    /// Writes may be let through: it is neither the zero page nor one that is to be copied.
    pub(crate) writable: bool,
}

impl Object {
    /// What is behind a page for who reads; `None` for a hole that has to be filled first.
    pub(crate) fn behind(&self, page: PageIndex, zero_page: Option<Pfn>) -> Option<Behind> {
        match self.backing(page) {
            Some(Backing { pfn, level }) => {
                Some(Behind { pfn, level, writable: !self.copied.contains(&page.get()) })
            }
            None if self.anonymous && page.get() < self.pages.get() => {
                Some(Behind { pfn: zero_page?, level: Level::Size4K, writable: false })
            }
            None => None,
        }
    }
}

impl Machine {
    /// Creates anonymous memory of `pages` pages.
    ///
    /// # Errors
    /// As [`Machine::create_object`]; [`Error::NoMemory`] for the zero page.
    pub fn create_anonymous(&mut self, pages: PageCount) -> Result<ObjectId, Error> {
        if self.zero_page.is_none() {
            let pfn = self.allocate_frames(Level::Size4K)?;
            let folio = Folio { refs: 1, ..Folio::default() };
            let added = self.folios.0.insert(pfn.get(), Level::Size4K, folio);
            assert!(added.is_ok(), "pfn {pfn} is part of another folio");
            self.zero_page = Some(pfn);
        }
        let object = self.create_object(pages)?;
        self.objects.get_mut(object)?.anonymous = true;
        Ok(object)
    }

    /// The zero page, once there is anonymous memory.
    pub const fn zero_page(&self) -> Option<Pfn> {
        self.zero_page
    }

    /// What fork does to anonymous memory: another object with the same pages, each copied when one
    /// of the two is written to. Guests' mappings of it are taken away: they let writes through.
    ///
    /// # Errors
    /// [`Error::NotAnonymous`]; [`Error::TooLarge`] for a folio above 4K; [`Error::Gone`].
    pub fn fork_anonymous(&mut self, object: ObjectId) -> Result<ObjectId, Error> {
        let parent = self.objects.get(object)?;
        if !parent.anonymous {
            return Err(Error::NotAnonymous { object });
        }
        if let Some(large) = parent.cache.iter().find(|found| found.level != Level::Size4K) {
            return Err(Error::TooLarge { level: large.level, largest: Level::Size4K });
        }
        let pages: alloc::vec::Vec<_> =
            parent.cache.iter().map(|found| (found.start, *found.entry)).collect();
        let count = parent.pages;
        if let Ok(all) = PageRange::new(PageIndex::from(0), count) {
            self.zap_guests(object, all)?;
        }
        let child = self.create_anonymous(count)?;
        for (page, pfn) in pages {
            let folio = self.folios.held(pfn).entry;
            (folio.refs, folio.shared) = (folio.refs + 1, folio.shared + 1);
            self.objects.get_mut(object)?.copied.insert(page);
            let other = self.objects.get_mut(child)?;
            other.copied.insert(page);
            let added = other.cache.insert(page, Level::Size4K, pfn);
            assert!(added.is_ok(), "the child has nothing yet");
        }
        Ok(child)
    }

    /// What the kernel does before it lets a write of a page through: makes a page, or a copy,
    /// unless it is the object's alone. Whoever had another frame there mapped has it no longer.
    ///
    /// # Errors
    /// [`Error::NoMemory`], and nothing has changed; [`Error::Beyond`]; [`Error::Gone`].
    pub fn write_fault(&mut self, object: ObjectId, page: PageIndex) -> Result<(), Error> {
        let one = PageRange::one(page);
        self.object_range(object, one)?;
        let Some(Backing { pfn, .. }) = self.objects.get(object)?.backing(page) else {
            self.zap_guests(object, one)?;
            return self.allocate(object, page, Level::Size4K).map(drop);
        };
        if !self.objects.get(object)?.copied.contains(&page.get()) {
            return Ok(());
        }
        if self.folios.get(pfn)?.entry.shared == 0 || self.plants.has(Plant::CopyForgotten) {
            // Nobody else has it any more.
            self.objects.get_mut(object)?.copied.remove(&page.get());
            return Ok(());
        }
        let copy = self.allocate_frames(Level::Size4K)?;
        self.frames.copy(pfn, copy);
        self.zap_guests(object, one)?;
        self.leave_folio(object, page, pfn);
        let it = self.objects.get_mut(object)?;
        it.copied.remove(&page.get());
        it.cache.remove(page.get());
        self.add_to_cache(object, page, Level::Size4K, copy, None);
        Ok(())
    }

    /// An object no longer has a folio at `page`: drops its references, and what it alone had.
    pub(crate) fn leave_folio(&mut self, object: ObjectId, page: PageIndex, pfn: Pfn) {
        let shared = self.folios.held(pfn).entry.shared;
        let other = |(id, it): (ObjectId, &Object)| {
            (id != object && it.backing(page).is_some_and(|it| it.pfn == pfn)).then_some(id)
        };
        let heir = if shared > 0 { self.objects.iter().find_map(other) } else { None };
        let found = self.folios.held(pfn);
        (found.entry.cache, found.entry.lock) = (heir.map(|heir| (heir, page)), None);
        found.entry.shared = shared.saturating_sub(1);
        let pages = self.config.geometry.pages(found.level);
        self.put_folio(pfn, pages.get());
    }

    /// Takes pages out of every guest, as an invalidation by the kernel does.
    pub(crate) fn zap_guests(&mut self, object: ObjectId, range: PageRange) -> Result<(), Error> {
        let gfns: alloc::vec::Vec<_> = self.gfns_of(object, range).collect();
        gfns.into_iter().try_for_each(|(vm, gfns)| self.tdp_zap(vm, gfns).map(drop))
    }

    /// How many of an object's pages would be copied by a write.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn copied_on_write(&self, object: ObjectId) -> Result<PageCount, Error> {
        let object = self.objects.get(object)?;
        let shared = |page: &&u64| {
            let pfn = object.cache.get(**page).map(|found| frame_at(*found.entry, 0));
            pfn.is_some_and(|pfn| self.folios.get(pfn).is_ok_and(|it| it.entry.shared > 0))
        };
        Ok(page_count(object.copied.iter().filter(shared).count() as u64))
    }
}
