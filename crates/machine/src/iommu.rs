//! An IOMMU: domains, each with a page table and an IOTLB, by which devices reach memory.
//!
//! A device's address is a guest-physical one, as VFIO maps a VM's memory. What a domain maps are
//! pinned frames: mapping takes no reference, and who maps without a pin lets a device reach memory
//! that may be freed. Changing a table leaves the IOTLB as it is; [`Machine::flush_iotlb`] is a
//! step of its own. A translation that is cached is not checked again.
//!
//! Under pKVM the hypervisor has the domains' tables: it maps no frame that the host's stage 2 has
//! not, it counts how often a frame is mapped, and what is mapped it gives to nobody
//! ([`PkvmFail::Busy`]). Whatever the host loses the IOMMU loses with it, the IOTLB too.
//!
//! # Not modelled
//! Entries above 4K, page requests (PRI), several devices of one domain (they would see the same).

use polder_units::{Gfn, GfnRange, Gpa, Level, PageCount, Pfn};

#[cfg(doc)]
use crate::PkvmFail;
use crate::access::Access;
use crate::chunk::{chunks, chunks_mut, pages};
use crate::frames::page_count;
use crate::slab::DomainId;
use crate::table::Table;
use crate::tlb::{Tlb, Translation};
use crate::vm::TdpEntry;
use crate::{Error, Machine, PinId, Plant};

/// A device's view of memory.
#[derive(Clone, Hash)]
pub(crate) struct Domain {
    pub(crate) table: Table<TdpEntry>,
    pub(crate) iotlb: Tlb,
}

/// An access of a device's that the IOMMU did not translate. No byte of it was made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, thiserror::Error)]
#[error("{domain} does not map {gfn} so")]
pub struct IommuFault {
    /// The domain.
    pub domain: DomainId,
    /// The page accessed.
    pub gfn: Gfn,
    /// Whether it was a write.
    pub write: bool,
}

impl Machine {
    /// Creates a domain that maps nothing.
    ///
    /// # Errors
    /// [`Error::TooMany`].
    pub fn create_domain(&mut self) -> Result<DomainId, Error> {
        let table = Table::new(self.config.geometry);
        let iotlb = Tlb::new(self.config.tlb_entries);
        self.domains.insert(Domain { table, iotlb })
    }

    /// Destroys a domain, with what it maps and remembers.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn destroy_domain(&mut self, domain: DomainId) -> Result<(), Error> {
        let all = self.domains.get(domain)?.table.iter();
        let all: alloc::vec::Vec<u64> = all.map(|found| found.start).collect();
        for gfn in all.into_iter().filter_map(Gfn::new) {
            self.iommu_unmap(domain, GfnRange::one(gfn))?;
        }
        self.domains.remove(domain).map(|_| ())
    }

    /// Maps the frames of a pin from `gfn` on, for reading and writing.
    ///
    /// # Errors
    /// [`Error::Exists`] where something is mapped; [`Error::Refused`] for a frame that the host
    /// has no page for; [`Error::Gone`]. Nothing was mapped then.
    pub fn iommu_map(&mut self, domain: DomainId, gfn: Gfn, pin: PinId) -> Result<(), Error> {
        let frames = self.pins.get(pin)?.pages.clone();
        let end = gfn.get() + frames.len() as u64;
        self.in_space(end)?;
        let table = &self.domains.get(domain)?.table;
        if let Some(found) = table.first_in(gfn.get(), end) {
            return Err(Error::Exists { number: found.start });
        }
        for &pfn in &frames {
            self.protection.check(&Access::device(pfn, false))?;
        }
        for (number, pfn) in (gfn.get()..).zip(frames) {
            let table = &mut self.domains.get_mut(domain)?.table;
            let entry = TdpEntry { pfn, writable: true, accessed: true, dirty: true };
            let added = table.insert(number, Level::Size4K, entry);
            assert!(added.is_ok(), "nothing was mapped there a moment ago");
            if let Some(pkvm) = &mut self.protection.pkvm {
                *pkvm.dma.entry(pfn.get()).or_default() += 1;
            }
        }
        Ok(())
    }

    /// Drops what a domain maps in a range, and flushes nothing. Returns how many pages.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn iommu_unmap(&mut self, domain: DomainId, range: GfnRange) -> Result<PageCount, Error> {
        let mut gone = alloc::vec::Vec::new();
        let table = &mut self.domains.get_mut(domain)?.table;
        table.drain(range.start().get(), range.end(), |found| gone.push(found.entry.pfn));
        for pfn in &gone {
            let Some(pkvm) = &mut self.protection.pkvm else { break };
            if let Some(count) = pkvm.dma.get_mut(&pfn.get()) {
                *count -= 1;
                if *count == 0 {
                    pkvm.dma.remove(&pfn.get());
                }
            }
        }
        Ok(page_count(gone.len() as u64))
    }

    /// Flushes a range of a domain's IOTLB.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn flush_iotlb(&mut self, domain: DomainId, range: GfnRange) -> Result<(), Error> {
        let (skip, geometry) = (self.plants.has(Plant::SkipFlush), self.config.geometry);
        let iotlb = &mut self.domains.get_mut(domain)?.iotlb;
        if !skip {
            iotlb.flush(range.start().get(), range.end(), geometry);
        }
        Ok(())
    }

    /// The frame that a domain maps a page to, if it does.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn iommu_entry(&self, domain: DomainId, gfn: Gfn) -> Result<Option<Pfn>, Error> {
        let found = self.domains.get(domain)?.table.get(gfn.get());
        Ok(found.map(|found| found.entry.pfn))
    }

    /// A device reads memory. All pages are translated before the first byte is read.
    ///
    /// # Errors
    /// [`Error::Iommu`]; [`Error::Refused`] by the hardware.
    pub fn device_read(
        &mut self,
        domain: DomainId,
        gpa: Gpa,
        buffer: &mut [u8],
    ) -> Result<(), Error> {
        let frames = self.translate_device(domain, gpa, buffer.len(), false)?;
        for (pfn, (_, at, chunk)) in frames.into_iter().zip(chunks_mut(gpa.get(), buffer)) {
            self.frames.read(pfn, at, chunk);
        }
        Ok(())
    }

    /// A device writes memory. All pages are translated before the first byte is written.
    ///
    /// # Errors
    /// As [`Machine::device_read`].
    pub fn device_write(&mut self, domain: DomainId, gpa: Gpa, bytes: &[u8]) -> Result<(), Error> {
        let frames = self.translate_device(domain, gpa, bytes.len(), true)?;
        for (pfn, (_, at, chunk)) in frames.into_iter().zip(chunks(gpa.get(), bytes)) {
            self.frames.write(pfn, at, chunk);
        }
        Ok(())
    }

    fn translate_device(
        &mut self,
        domain: DomainId,
        gpa: Gpa,
        len: usize,
        write: bool,
    ) -> Result<alloc::vec::Vec<Pfn>, Error> {
        let gfns = pages(gpa.get(), len).filter_map(Gfn::new);
        gfns.map(|gfn| self.translate_page(IommuFault { domain, gfn, write })).collect()
    }

    fn translate_page(&mut self, access: IommuFault) -> Result<Pfn, Error> {
        let IommuFault { domain, gfn, write } = access;
        let state = self.domains.get_mut(domain)?;
        if let Some(pfn) = state.iotlb.hit(gfn.get(), write) {
            return Ok(pfn);
        }
        let entry = state.table.get(gfn.get()).map(|found| *found.entry);
        let TdpEntry { pfn, writable, .. } = entry.ok_or(Error::Iommu(access))?;
        self.protection.check(&Access::device(pfn, write))?;
        // What a read was let into, a write may be refused: it has to come here again.
        let writable =
            writable && (write || self.protection.check(&Access::device(pfn, true)).is_ok());
        let translation = Translation { pfn, level: Level::Size4K, writable };
        self.domains.get_mut(domain)?.iotlb.fill(gfn.get(), translation);
        Ok(pfn)
    }

    /// Whether every frame that a domain maps or remembers is one that somebody pins.
    pub(crate) fn audit_iommu(&self) -> Result<(), crate::Discrepancy> {
        for (id, domain) in self.domains.iter() {
            let mapped = domain.table.iter().map(|found| (found.start, found.entry.pfn));
            for (gfn, pfn) in mapped {
                let pinned = self.pins.iter().any(|(_, pin)| pin.pages.contains(&pfn));
                if !pinned {
                    return Err(crate::Discrepancy::DmaUnpinned { domain: id, gfn });
                }
            }
            for (gfn, _, cached) in domain.iotlb.iter() {
                let entry = domain.table.get(gfn).map(|found| found.entry.pfn);
                if entry != Some(cached.pfn) {
                    return Err(crate::Discrepancy::Iotlb { domain: id, gfn });
                }
            }
        }
        Ok(())
    }
}
