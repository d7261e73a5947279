//! What the AMD secure processor does to the RMP for the hypervisor.
//!
//! Merging 4K entries takes three steps: RMPUPDATE sets the immutable bit of each (and keeps
//! validated), PAGE_UNSMASH makes them one, PAGE_RECLAIM clears the bit (SEV-SNP firmware ABI,
//! 56860, and AMD's published firmware: `snp_mcmd_page_unsmash()`, `snp_mcmd_page_reclaim()`,
//! sev_mcmd.c). While the bit is set the guest is refused the page.

use alloc::vec::Vec;

use polder_units::{Level, Pfn};

use crate::rmp::{Cipher, Entry, Rmp};
use crate::table::Found;
use crate::{Machine, RmpSize};

/// Why the firmware did nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, thiserror::Error)]
pub enum FirmwareFail {
    /// SNP was not initialized.
    #[error("INVALID_PLATFORM_STATE: SNP is not enabled")]
    Platform,
    /// The address is not aligned, or outside of the RMP.
    #[error("INVALID_PARAM: misaligned, or outside of the rmp")]
    Param,
    /// The page is not of the size that was named.
    #[error("INVALID_PAGE_SIZE: the rmp has the page at another size")]
    PageSize,
    /// A page is not in the state that the command needs.
    #[error("INVALID_PAGE_STATE: the pages do not agree, or are not immutable pages of a guest")]
    PageState,
}

impl Machine {
    /// `SNP_PAGE_UNSMASH`: makes the 4K entries of a 2M page one 2M entry. It stays immutable.
    ///
    /// # Errors
    /// [`FirmwareFail::PageState`] unless all are 4K, immutable, no VMSA, of one guest, alike
    /// validated, and of consecutive guest frames from a 2M-aligned one on;
    /// [`FirmwareFail::Param`]; [`FirmwareFail::Platform`].
    pub fn page_unsmash(&mut self, pfn: Pfn) -> Result<(), FirmwareFail> {
        let rmp = self.firmware()?;
        let (start, end) = rmp.page(pfn, RmpSize::Size2M).map_err(|_| FirmwareFail::Param)?;
        let pages = rmp.geometry.pages(Level::Size2M);
        let first = rmp.entries.get(start).map(|found| *found.entry);
        let first = first.ok_or(FirmwareFail::PageState)?;
        let one_guest = first.immutable && !first.vmsa && first.asid.is_some();
        let parts: Vec<_> = rmp.entries.range(start, end).collect();
        let agrees = |part: &Found<&Entry>| {
            part.level == Level::Size4K && *part.entry == first.part(part.start - start)
        };
        let whole = parts.len() as u64 == pages.get() && first.gfn.is_multiple_of(pages);
        if !one_guest || !whole || !parts.iter().all(agrees) {
            return Err(FirmwareFail::PageState);
        }
        rmp.entries.drain(start, end, |_| ());
        let added = rmp.entries.insert(start, Level::Size2M, first);
        assert!(added.is_ok(), "the rmp entries of pfn {pfn} were just emptied");
        Ok(())
    }

    /// `SNP_PAGE_RECLAIM`: clears the immutable bit. Nothing happens if it is not set.
    ///
    /// # Errors
    /// [`FirmwareFail::PageSize`]; [`FirmwareFail::PageState`] if the page is not assigned;
    /// [`FirmwareFail::Param`]; [`FirmwareFail::Platform`].
    pub fn page_reclaim(&mut self, pfn: Pfn, size: RmpSize) -> Result<(), FirmwareFail> {
        let rmp = self.firmware()?;
        rmp.page(pfn, size).map_err(|_| FirmwareFail::Param)?;
        let found = rmp.entries.get_mut(pfn.get()).ok_or(FirmwareFail::PageState)?;
        if found.level != size.level() {
            return Err(FirmwareFail::PageSize);
        }
        found.entry.immutable = false;
        Ok(())
    }

    /// `SNP_LAUNCH_UPDATE` of a 4K page: what the host has written there becomes the guest's, at
    /// its guest frame: encrypted in place, and validated, with the entry mutable again. The host
    /// assigns the page before, immutable (the pre-guest state). Whether the guest has begun is for
    /// the host to know here.
    ///
    /// # Errors
    /// [`FirmwareFail::PageState`] unless the entry is a guest's, immutable and not validated;
    /// [`FirmwareFail::PageSize`]; [`FirmwareFail::Param`]; [`FirmwareFail::Platform`].
    pub fn launch_update(&mut self, pfn: Pfn) -> Result<(), FirmwareFail> {
        let rmp = self.firmware()?;
        rmp.page(pfn, RmpSize::Size4K).map_err(|_| FirmwareFail::Param)?;
        let found = rmp.entries.get(pfn.get()).ok_or(FirmwareFail::PageState)?;
        if found.level != Level::Size4K {
            return Err(FirmwareFail::PageSize);
        }
        let entry = *found.entry;
        let mut guests = self.vms.iter().filter_map(|(_, vm)| vm.snp);
        let guest = guests.find(|snp| Some(snp.asid) == entry.asid);
        drop(guests);
        let (Some(guest), Entry { immutable: true, validated: false, .. }) = (guest, entry) else {
            return Err(FirmwareFail::PageState);
        };
        if let Some(found) = self.firmware()?.entries.get_mut(pfn.get()) {
            (found.entry.validated, found.entry.immutable) = (true, false);
        }
        self.frames.encrypt(Cipher::new(guest.key), pfn);
        Ok(())
    }

    fn firmware(&mut self) -> Result<&mut Rmp, FirmwareFail> {
        self.rmp_mut().map_err(|_| FirmwareFail::Platform)
    }
}
