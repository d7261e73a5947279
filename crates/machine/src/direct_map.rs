//! The kernel's direct map: one more mapping of every frame, which can be taken away.
//!
//! The kernel's own accesses go through it: the trusted view, zeroing on allocation, a copy of a
//! folio that moves. A frame that is taken out of it (`set_direct_map_invalid_noflush()`) the
//! kernel does not reach, by mistake or by speculation; mappings of processes, guests and devices
//! stay. What is freed must be put back before: the next owner zeroes it that way.

use polder_units::{Level, PageCount, Pfn, PfnRange};

use crate::{AccessCheck, Error, Machine, Path, Refused};

impl Machine {
    /// Takes frames out of the direct map.
    ///
    /// # Errors
    /// [`Error::Free`] if one of them belongs to nobody: nothing was done then.
    pub fn direct_map_remove(&mut self, frames: PfnRange) -> Result<(), Error> {
        for pfn in frames.frames() {
            self.folios.get(pfn)?;
        }
        self.protection.off_direct_map.extend(frames.frames().map(Pfn::get));
        Ok(())
    }

    /// Puts frames back into the direct map; those that are there stay.
    pub fn direct_map_restore(&mut self, frames: PfnRange) {
        for pfn in frames.frames() {
            self.protection.off_direct_map.remove(&pfn.get());
        }
    }

    /// Whether the direct map has a frame.
    pub fn is_in_direct_map(&self, pfn: Pfn) -> bool {
        !self.protection.off_direct_map.contains(&pfn.get())
    }

    /// Refuses an access of the kernel's own to frames of which the direct map lacks one.
    pub(crate) fn check_direct_map(
        &self,
        pfn: Pfn,
        count: PageCount,
        write: bool,
    ) -> Result<(), Error> {
        let (start, end) = (pfn.get(), pfn.get() + count.get());
        let missing = self.protection.off_direct_map.range(start..end).next();
        match missing.and_then(|pfn| Pfn::new(*pfn)) {
            None => Ok(()),
            Some(pfn) => {
                let (path, check) = (Path::Host, AccessCheck::DirectMap);
                Err(Refused { path, pfn, write, check }.into())
            }
        }
    }

    /// Whether the kernel may write a folio's frames, whoever else protects them.
    pub(crate) fn check_kernel_block(&self, pfn: Pfn, level: Level) -> Result<(), Error> {
        let pages = self.config.geometry.pages(level);
        self.check_direct_map(pfn, pages, true)?;
        Ok(self.protection.check_block(pfn, pages)?)
    }
}
