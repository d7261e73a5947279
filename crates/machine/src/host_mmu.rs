//! Host page tables: their entries, and the flushing of what CPUs remember of them.
//!
//! A poison marker is an entry that denies the page without asking anybody (`UFFDIO_POISON`).
//! Changing an entry flushes no TLB; [`Machine::flush_process`] does, as a step of its own.

use alloc::vec::Vec;

use polder_units::{Level, PageCount, PageRange, Pfn};

use crate::frames::{frame_at, page_count};
use crate::process::Thread;
use crate::table::Found;
use crate::{Error, Machine, ObjectId, Plant, ProcessId, Vpn, VpnRange};

/// An entry of a host page table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum HostEntry {
    /// Maps the frames from `pfn` on; `counted` in their folio's map count.
    Mapped { pfn: Pfn, counted: bool },
    /// Denies.
    Poison,
}

impl HostEntry {
    pub(crate) const fn is_mapped(&self) -> bool {
        matches!(self, Self::Mapped { .. })
    }
}

/// What a host page table says of a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HostPte {
    /// Nothing.
    None,
    /// It is in this frame, mapped at this level.
    Mapped {
        /// The page's frame.
        pfn: Pfn,
        /// The level of the entry.
        level: Level,
    },
    /// A marker denies it.
    Poison,
}

impl Machine {
    /// What the page table of a process says of a page.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn host_pte(&self, process: ProcessId, vpn: Vpn) -> Result<HostPte, Error> {
        Ok(match self.processes.get(process)?.table.get(vpn.get()) {
            None => HostPte::None,
            Some(Found { entry: HostEntry::Poison, .. }) => HostPte::Poison,
            Some(Found { start, level, entry: HostEntry::Mapped { pfn, .. } }) => {
                let pfn = frame_at(*pfn, vpn.get() - start);
                HostPte::Mapped { pfn, level }
            }
        })
    }

    /// Maps the page of `level` around `vpn` from the page cache: `UFFDIO_CONTINUE`, or the end
    /// of any page fault. Poison markers in all of it are lifted.
    ///
    /// # Errors
    /// [`Error::NoVma`], [`Error::Hole`], [`Error::Exists`] if it is mapped, [`Error::Locked`] if
    /// anyone holds the folio lock (wait), [`Error::TooLarge`] above what the folio, the view, the
    /// VMA's bounds or the alignment of both allow.
    pub fn host_map(&mut self, process: ProcessId, vpn: Vpn, level: Level) -> Result<(), Error> {
        let largest = self.largest_host_level(process, vpn)?;
        if level > largest {
            return Err(Error::TooLarge { level, largest });
        }
        let at = VpnRange::enclosing(vpn, level, self.config.geometry);
        let vma = self.processes.get(process)?.vma(at.start())?;
        let (object, no_vma) = (vma.object, Error::NoVma { vpn });
        let page = vma.page_of(at.start()).ok_or(no_vma)?;
        let backing = self.objects.get(object)?.backing(page);
        let pfn = backing.ok_or(Error::Hole { object, page })?.pfn;
        self.check_not_locked(pfn, None)?;
        let counted = !self.plants.has(Plant::LostMapcount);
        let process = self.processes.get_mut(process)?;
        let mut under = process.table.range(at.start().get(), at.end());
        if let Some(mapped) = under.find(|found| found.entry.is_mapped()) {
            return Err(Error::Exists { number: mapped.start });
        }
        drop(under);
        process.cut_marker(at.start().get());
        process.cut_marker(at.end());
        process.table.drain(at.start().get(), at.end(), |_| ());
        let added = process.table.insert(vpn.get(), level, HostEntry::Mapped { pfn, counted });
        assert!(added.is_ok(), "the entry at {vpn} was just emptied");
        self.folios.map(pfn, counted);
        Ok(())
    }

    /// Maps the pages of a range that are not mapped yet, each at the largest level possible:
    /// `UFFDIO_CONTINUE` of a range.
    ///
    /// Returns how many pages from its start on are mapped now: less than all if the page behind
    /// them could not be.
    ///
    /// # Errors
    /// As [`Machine::host_map`], of the first page: then nothing was mapped.
    pub fn host_map_range(
        &mut self,
        process: ProcessId,
        range: VpnRange,
    ) -> Result<PageCount, Error> {
        let mut done = PageCount::ZERO;
        while let Some(vpn) = Vpn::new(range.start().get() + done.get())
            && range.contains(vpn)
        {
            let end = match self.map_page_of_range(process, vpn, range) {
                Ok(end) => end,
                Err(error) if done.is_zero() => return Err(error),
                Err(_) => break,
            };
            done = page_count(end.min(range.end()) - range.start().get());
        }
        Ok(done)
    }

    /// Makes sure that `vpn` is mapped, within `range`, and says where its entry ends.
    pub(crate) fn map_page_of_range(
        &mut self,
        process: ProcessId,
        vpn: Vpn,
        range: VpnRange,
    ) -> Result<u64, Error> {
        if let HostPte::Mapped { level, .. } = self.host_pte(process, vpn)? {
            return Ok(VpnRange::enclosing(vpn, level, self.config.geometry).end());
        }
        let mut level = self.largest_host_level(process, vpn)?;
        loop {
            let at = VpnRange::enclosing(vpn, level, self.config.geometry);
            match level.smaller() {
                Some(smaller) if !range.contains_range(at) => level = smaller,
                smaller => match (self.host_map(process, vpn, level), smaller) {
                    (Err(Error::Exists { .. }), Some(smaller)) => level = smaller,
                    (outcome, _) => return outcome.map(|()| at.end()),
                },
            }
        }
    }

    /// The largest level that [`Machine::host_map`] can map `vpn` at.
    ///
    /// # Errors
    /// [`Error::NoVma`]; [`Error::Hole`]; [`Error::Gone`].
    pub fn largest_host_level(&self, process: ProcessId, vpn: Vpn) -> Result<Level, Error> {
        let vma = self.processes.get(process)?.vma(vpn)?;
        let page = vma.page_of(vpn).ok_or(Error::NoVma { vpn })?;
        let object = vma.object;
        let backing = self.objects.get(object)?.backing(page);
        let backing = backing.ok_or(Error::Hole { object, page })?;
        let fits = |level: &Level| {
            let pages = self.pages(*level);
            let at = VpnRange::enclosing(vpn, *level, self.config.geometry);
            vpn.get() % pages == page.get() % pages && vma.range.contains_range(at)
        };
        let levels = Level::ALL.into_iter().rev();
        let mut allowed = levels.filter(|level| *level <= backing.level.min(vma.view.largest));
        Ok(allowed.find(fits).unwrap_or(Level::Size4K))
    }

    /// Denies the pages of a range: `UFFDIO_POISON`. Pages denied already stay so.
    ///
    /// # Errors
    /// [`Error::NoVma`] if the range is not within one VMA; [`Error::NotWatched`] if no
    /// userfaultfd is registered there; [`Error::Exists`] if a page is mapped (unmap first);
    /// [`Error::Gone`].
    pub fn host_poison(&mut self, process: ProcessId, range: VpnRange) -> Result<(), Error> {
        let geometry = self.config.geometry;
        let process = self.processes.get_mut(process)?;
        let vma = process.vma(range.start())?;
        if !vma.range.contains_range(range) {
            return Err(Error::NoVma { vpn: range.start() });
        }
        if !vma.view.watched {
            return Err(Error::NotWatched { vpn: range.start() });
        }
        let mut there = process.table.range(range.start().get(), range.end());
        if let Some(mapped) = there.find(|found| found.entry.is_mapped()) {
            return Err(Error::Exists { number: mapped.start });
        }
        drop(there);
        let mut next = range.start();
        loop {
            let fits = |level: &Level| {
                let at = VpnRange::enclosing(next, *level, geometry);
                at.start() == next && range.contains_range(at)
            };
            let level = Level::ALL.into_iter().rev().find(fits).unwrap_or(Level::Size4K);
            let end = next.get() + geometry.pages(level).get();
            if process.table.get(next.get()).is_none_or(|found| found.level < level) {
                process.table.drain(next.get(), end, |_| ());
                let added = process.table.insert(next.get(), level, HostEntry::Poison);
                assert!(added.is_ok(), "the entry at {next} was just emptied");
            }
            match Vpn::new(end) {
                Some(after) if end < range.end() => next = after,
                _ => return Ok(()),
            }
        }
    }

    /// Drops entries and markers of a range: `MADV_DONTNEED`, but for the flush. A huge entry
    /// that the range touches goes whole (a fault refills it); a marker only where the range is.
    ///
    /// Returns how many pages were mapped.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn host_unmap(&mut self, process: ProcessId, range: VpnRange) -> Result<PageCount, Error> {
        let (start, end) = (range.start().get(), range.end());
        self.drop_entries(process, (start, end), false)
    }

    /// Drops every process's entries of the object's pages in `range`, but for the flush, and
    /// leaves poison markers: `unmap_mapping_range()` without `even_cows` (mm/memory.c).
    ///
    /// Returns how many pages were mapped.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn zap_object(&mut self, object: ObjectId, range: PageRange) -> Result<PageCount, Error> {
        self.objects.get(object)?;
        let mapped: Vec<_> = self.views_of(object, range).collect();
        let mut pages = 0;
        for (process, vpns) in mapped {
            let range = (vpns.start().get(), vpns.end());
            pages += self.drop_entries(process, range, true)?.get();
        }
        Ok(page_count(pages))
    }

    /// Where processes have VMAs onto the object's pages in `range`.
    pub fn views_of(
        &self,
        object: ObjectId,
        range: PageRange,
    ) -> impl Iterator<Item = (ProcessId, VpnRange)> {
        self.processes.iter().flat_map(move |(id, process)| {
            process.vmas_onto(object, range).map(move |vpns| (id, vpns))
        })
    }

    /// Flushes a range of one thread's TLB.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn flush_thread(&mut self, thread: Thread, range: VpnRange) -> Result<(), Error> {
        let skip = self.plants.has(Plant::SkipFlush);
        let geometry = self.config.geometry;
        let tlb = self.tlb_mut(thread)?;
        if !skip {
            tlb.flush(range.start().get(), range.end(), geometry);
        }
        Ok(())
    }

    /// Flushes a range of the TLBs of every thread of a process.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn flush_process(&mut self, process: ProcessId, range: VpnRange) -> Result<(), Error> {
        let threads = self.processes.get(process)?.threads.len();
        for index in (0..).take(threads) {
            self.flush_thread(Thread { process, index }, range)?;
        }
        Ok(())
    }

    /// Flushes the object's pages in `range` from the TLBs of every process that has a VMA on them.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn flush_object(&mut self, object: ObjectId, range: PageRange) -> Result<(), Error> {
        self.objects.get(object)?;
        let mapped: Vec<_> = self.views_of(object, range).collect();
        mapped.into_iter().try_for_each(|(process, vpns)| self.flush_process(process, vpns))
    }

    /// Drops the entries of a range, and its markers unless they are to be kept. Returns how many
    /// pages were mapped.
    pub(crate) fn drop_entries(
        &mut self,
        process: ProcessId,
        (start, end): (u64, u64),
        keep_markers: bool,
    ) -> Result<PageCount, Error> {
        let process = self.processes.get_mut(process)?;
        if !keep_markers {
            process.cut_marker(start);
            process.cut_marker(end);
        }
        let mut mapped = Vec::new();
        let wanted = |entry: &HostEntry| entry.is_mapped() || !keep_markers;
        process.table.drain_if(start, end, wanted, |Found { level, entry, .. }| {
            if let HostEntry::Mapped { pfn, counted } = entry {
                mapped.push((level, pfn, counted));
            }
        });
        let mut pages = 0;
        for (level, pfn, counted) in mapped {
            pages += self.pages(level);
            self.unmap_folio(pfn, counted);
        }
        Ok(page_count(pages))
    }
}
