//! Migration: a folio's contents go to other frames, and the page cache has those from then on
//! (`migrate_folio()`, mm/migrate.c).
//!
//! Whoever moves a folio has it locked and unmapped everywhere, so that nobody sees the copy half
//! made. Stage 2 of a VM whose host keeps it is the caller's to zap first; of a protected guest the
//! hypervisor moves the page ([`Machine::host_move_guest`]), because the host can't reach it.

use polder_units::{Level, PageIndex, PageRange, Pfn};

use crate::{Backing, Error, LockOwner, Machine, ObjectId};

impl Machine {
    /// Moves the folio at `page` to new frames, which stay locked by `by`. Returns the first.
    ///
    /// # Errors
    /// [`Error::Hole`]; [`Error::NotLocked`] by `by`; [`Error::Mapped`] by a host page table;
    /// [`Error::Referenced`] by anyone but the page cache; [`Error::NoMemory`]; [`Error::Refused`]
    /// where the kernel can't reach the frames; [`Error::Pkvm`] by the hypervisor. The folio is
    /// where it was then.
    pub fn migrate_folio(
        &mut self,
        object: ObjectId,
        page: PageIndex,
        by: LockOwner,
    ) -> Result<Pfn, Error> {
        let backing = self.objects.get(object)?.backing(page);
        let Backing { level, .. } = backing.ok_or(Error::Hole { object, page })?;
        let whole = PageRange::enclosing(page, level, self.config.geometry);
        let head = self.objects.get(object)?.backing(whole.start());
        let Backing { pfn: from, .. } = head.ok_or(Error::Hole { object, page })?;
        self.check_locked(from, by)?;
        self.check_only_cached(from)?;
        let to = self.allocate_frames(level)?;
        if let Err(error) = self.move_contents((object, whole), (from, to), level) {
            self.frames.free(to, level);
            return Err(error);
        }
        self.objects.get_mut(object)?.cache.drain(whole.start().get(), whole.end(), |_| ());
        let folio = self.folios.held(from).entry;
        (folio.cache, folio.lock) = (None, None);
        self.put_folio(from, self.pages(level));
        self.add_to_cache(object, whole.start(), level, to, Some(by));
        Ok(to)
    }

    /// Copies, or has the hypervisor copy what is a guest's.
    fn move_contents(
        &mut self,
        (object, pages): (ObjectId, PageRange),
        (from, to): (Pfn, Pfn),
        level: Level,
    ) -> Result<(), Error> {
        let count = self.config.geometry.pages(level);
        let guests = self.protection.pkvm.as_ref().is_some_and(|pkvm| {
            pkvm.host.range(from.get()..from.get() + count.get()).next().is_some()
        });
        if !guests {
            self.check_kernel_block(from, level)?;
            for offset in 0..count.get() {
                let at = |pfn| crate::frames::frame_at(pfn, offset);
                self.frames.copy(at(from), at(to));
            }
            return Ok(());
        }
        if level != Level::Size4K {
            // A page at a time is what the hypervisor moves, and half a folio is no folio.
            return Err(Error::Part { page: pages.start(), level });
        }
        let shown = self
            .gfns_of(object, pages)
            .find(|(vm, _)| self.vms.get(*vm).is_ok_and(|vm| vm.protected));
        let (vm, gfns) = shown.ok_or(Error::Pkvm(crate::PkvmFail::NotFound))?;
        Ok(self.host_move_guest(vm, gfns.start(), to)?)
    }
}
