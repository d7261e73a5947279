//! Recounting: every count of every folio against what page tables, caches and pins hold.
//!
//! It reads only what others keep and shares no code with the counting, so that one mistake does
//! not hide another. It is for a machine at rest: between two steps of an operation, entries that
//! the operation is about to drop may still be there.

use alloc::collections::BTreeMap;

use polder_units::{Gfn, Level, Pfn};

use crate::anonymous::Behind;
use crate::folio::GUP_PIN_COUNTING_BIAS;
use crate::host_mmu::HostEntry;
use crate::table::Found;
use crate::{Bound, Hva, Machine, PinKind, ProcessId, Thread, VcpuId, VmId, Vpn};

/// Something on the machine that does not add up.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Discrepancy {
    /// A count is not what its holders add up to.
    #[error("the {count} of pfn {pfn} is {is}, and its holders add up to {should}")]
    Count {
        /// The folio's first frame.
        pfn: Pfn,
        /// Which count.
        count: &'static str,
        /// What it says.
        is: u64,
        /// What it should say.
        should: u64,
    },
    /// A host page table maps another frame than the page cache has there, or above its level.
    #[error("{process} maps at {} what the page cache does not have there", .vpn.hva())]
    HostEntry {
        /// The process.
        process: ProcessId,
        /// Where.
        vpn: Vpn,
    },
    /// Stage 2 maps another frame than the slot's object has there, or above its level.
    #[error("{vm} maps at gfn {gfn:#x} what its slot does not have there")]
    Spte {
        /// The VM.
        vm: VmId,
        /// The guest frame's number.
        gfn: u64,
    },
    /// A shadow page has what its guest's table does not, or shadow pages do not add up.
    #[error("the shadow pages of {vm} are wrong about gfn {gfn:#x}")]
    Shadow {
        /// The VM.
        vm: VmId,
        /// The guest frame of the table, or of what is mapped.
        gfn: u64,
    },
    /// A thread's TLB remembers what its page table no longer says.
    #[error("a TLB of {} is stale at {hva}", .thread.process)]
    HostTlb {
        /// The thread.
        thread: Thread,
        /// Where.
        hva: Hva,
    },
    /// A vCPU's TLB remembers what stage 2 no longer says.
    #[error("the TLB of vcpu {} of {} is stale at gfn {gfn:#x}", .vcpu.index, .vcpu.vm)]
    GuestTlb {
        /// The vCPU.
        vcpu: VcpuId,
        /// The guest frame's number.
        gfn: u64,
    },
    /// A vCPU's TLB remembers what the shadow pages of one of its roots no longer say.
    #[error("the TLB of vcpu {} of {} is stale at page {page:#x} of a root", .vcpu.index, .vcpu.vm)]
    ShadowTlb {
        /// The vCPU.
        vcpu: VcpuId,
        /// The page, by its number in the space that the root translates.
        page: u64,
    },
    /// A frame is free, and RMP or pKVM has it for a guest: whoever is given it can't write it.
    #[error("pfn {pfn} is free and still assigned to a guest")]
    FreeAssigned {
        /// The frame.
        pfn: Pfn,
    },
    /// A frame is pinned exclusively, and by another pin as well (INV-7).
    #[error("pfn {pfn} is pinned exclusively, and by another as well")]
    NotExclusive {
        /// The frame.
        pfn: Pfn,
    },
    /// pKVM's tables do not say the same of a frame.
    #[error("host, hypervisor, guests and iommu do not agree about pfn {pfn}")]
    Ownership {
        /// The frame.
        pfn: Pfn,
    },
    /// A TLB or IOTLB of the host's leads to a frame that is no longer its own.
    #[error("a tlb or iotlb of the host leads to pfn {pfn}, which it has no page for")]
    StaleOwner {
        /// The frame.
        pfn: Pfn,
    },
    /// A domain maps a frame that nobody pins: it may be freed, or moved, under the device.
    #[error("{domain} maps at gfn {gfn:#x} a frame that nobody pins")]
    DmaUnpinned {
        /// The domain.
        domain: crate::DomainId,
        /// The device's page.
        gfn: u64,
    },
    /// An IOTLB remembers what its domain no longer maps.
    #[error("the iotlb of {domain} is stale at gfn {gfn:#x}")]
    Iotlb {
        /// The domain.
        domain: crate::DomainId,
        /// The device's page.
        gfn: u64,
    },
    /// A frame is free and not in the direct map: the kernel can't zero it for its next owner.
    #[error("pfn {pfn} is free and not in the direct map")]
    FreeUnmapped {
        /// The frame.
        pfn: Pfn,
    },
    /// A 2M entry is for a guest frame that is not 2M-aligned: no access passes.
    #[error("the 2M rmp entry of pfn {pfn} is for an unaligned gfn")]
    RmpAlignment {
        /// The entry's first frame.
        pfn: Pfn,
    },
    /// Stage 2 of an SNP guest maps a frame that the RMP gives to another, or elsewhere.
    #[error("{vm} maps at gfn {gfn:#x} pfn {pfn}, which the rmp has for another")]
    RmpOwner {
        /// The VM.
        vm: VmId,
        /// The guest frame's number.
        gfn: u64,
        /// The frame.
        pfn: Pfn,
    },
    /// Stage 2 of an SNP guest maps a page larger than a part of it is in the RMP (INV-5).
    #[error("{vm} maps gfn {gfn:#x} at a larger level than the rmp has it")]
    RmpLevel {
        /// The VM.
        vm: VmId,
        /// The guest frame's number.
        gfn: u64,
    },
    /// A TLB lets through what the RMP would refuse now.
    #[error("a tlb reaches pfn {} though {}", .0.pfn, .0.check)]
    RmpTlb(crate::Refused),
    /// A VMSA that runs is at a 2M boundary, where processors meet their erratum.
    #[error("the vmsa at pfn {pfn} runs at a 2M boundary")]
    AlignedVmsa {
        /// The frame.
        pfn: Pfn,
    },
    /// Frames that are neither free nor part of a folio, or both.
    #[error("{free} frames are free, {used} in folios, {pooled} the pool's, of {all}")]
    Frames {
        /// Free frames.
        free: u64,
        /// Frames of folios.
        used: u64,
        /// Frames of a pool that no folio has, and tables.
        pooled: u64,
        /// Frames of the machine.
        all: u64,
    },
}

/// What the holders of a folio add up to.
#[derive(Clone, Copy, Default)]
struct Sum {
    refs: u64,
    mapcount: u64,
    pincount: u64,
}

impl Machine {
    /// Checks that everything adds up.
    ///
    /// # Errors
    /// The first thing that does not, in the order of [`Discrepancy`].
    pub fn audit(&self) -> Result<(), Discrepancy> {
        self.audit_counts()?;
        self.audit_pins()?;
        self.audit_host()?;
        self.audit_guests()?;
        self.audit_rmp()?;
        self.audit_iommu()?;
        self.audit_pkvm()?;
        self.audit_direct_map()?;
        let used: u64 = self.folios.0.iter().map(|found| self.pages(found.level)).sum();
        let pooled = self.pool.frames(|level| self.pages(level));
        let (free, all) = (self.free_frames(), self.config.frames.get());
        if free + used + pooled == all {
            Ok(())
        } else {
            Err(Discrepancy::Frames { free, used, pooled, all })
        }
    }

    fn audit_pins(&self) -> Result<(), Discrepancy> {
        let settled = || self.pins.iter().filter(|(_, pin)| !pin.speculative);
        for (id, pin) in settled().filter(|(_, pin)| pin.kind == PinKind::Exclusive) {
            let others = settled().filter(|(other, _)| *other != id);
            let mut shared = others.flat_map(|(_, other)| &other.pages);
            if let Some(pfn) = shared.find(|pfn| pin.pages.contains(pfn)) {
                return Err(Discrepancy::NotExclusive { pfn: *pfn });
            }
        }
        Ok(())
    }

    fn audit_direct_map(&self) -> Result<(), Discrepancy> {
        let off = self.protection.off_direct_map.iter().filter_map(|pfn| Pfn::new(*pfn));
        let mut free = off.filter(|pfn| self.folios.get(*pfn).is_err());
        free.next().map_or(Ok(()), |pfn| Err(Discrepancy::FreeUnmapped { pfn }))
    }

    fn audit_counts(&self) -> Result<(), Discrepancy> {
        let mut sums: BTreeMap<u64, Sum> = BTreeMap::new();
        let head = |pfn: Pfn| self.folios.0.get(pfn.get()).map_or(pfn.get(), |found| found.start);
        if let Some(zero_page) = self.zero_page {
            sums.entry(head(zero_page)).or_default().refs += 1;
        }
        for (_, object) in self.objects.iter() {
            for found in object.cache.iter() {
                sums.entry(head(*found.entry)).or_default().refs += self.pages(found.level);
            }
        }
        for (_, process) in self.processes.iter() {
            for found in process.table.iter() {
                if let HostEntry::Mapped { pfn, .. } = found.entry {
                    let sum = sums.entry(head(*pfn)).or_default();
                    sum.refs += 1;
                    sum.mapcount += 1;
                }
            }
        }
        for pfn in self.pins.iter().flat_map(|(_, pin)| &pin.pages) {
            let large = self.folios.0.get(pfn.get()).is_some_and(|it| it.level > Level::Size4K);
            let sum = sums.entry(head(*pfn)).or_default();
            sum.refs += if large { 1 } else { GUP_PIN_COUNTING_BIAS };
            sum.pincount += u64::from(large);
        }
        for Found { start, entry: folio, .. } in self.folios.0.iter() {
            let Some(pfn) = Pfn::new(start) else { continue };
            let sum = sums.remove(&start).unwrap_or_default();
            for (count, is, should) in [
                ("reference count", folio.refs, sum.refs),
                ("map count", u64::from(folio.mapcount), sum.mapcount),
                ("pin count", u64::from(folio.pincount), sum.pincount),
            ] {
                if is != should {
                    return Err(Discrepancy::Count { pfn, count, is, should });
                }
            }
        }
        // What is left belongs to frames that are free.
        match sums.into_iter().find_map(|(start, sum)| Some((Pfn::new(start)?, sum.refs))) {
            Some((pfn, should)) => {
                Err(Discrepancy::Count { pfn, count: "reference count", is: 0, should })
            }
            None => Ok(()),
        }
    }

    fn audit_host(&self) -> Result<(), Discrepancy> {
        for (id, process) in self.processes.iter() {
            for Found { start, level, entry } in process.table.iter() {
                let (HostEntry::Mapped { pfn, .. }, Some(vpn)) = (entry, Vpn::new(start)) else {
                    continue;
                };
                let vma = process.vmas.iter().find(|vma| vma.range.contains(vpn));
                let page = vma.and_then(|vma| Some((vma.object, vma.page_of(vpn)?)));
                let right = page.is_some_and(|(object, page)| {
                    let backing = self.backing(object, page).ok().flatten();
                    backing.is_some_and(|it| it.pfn == *pfn && level <= it.level)
                });
                if !right {
                    return Err(Discrepancy::HostEntry { process: id, vpn });
                }
            }
            for (index, tlb) in (0..).zip(&process.threads) {
                let stale = tlb.iter().find(|(vpn, _, it)| {
                    let found = process.table.get(*vpn);
                    !found.is_some_and(|found| {
                        matches!(found.entry, HostEntry::Mapped { pfn: head, .. }
                            if head.get() + (vpn - found.start) == it.pfn.get())
                    })
                });
                if let Some(vpn) = stale.and_then(|(vpn, ..)| Vpn::new(vpn)) {
                    let thread = Thread { process: id, index };
                    return Err(Discrepancy::HostTlb { thread, hva: vpn.hva() });
                }
            }
        }
        Ok(())
    }

    fn behind(&self, bound: Bound) -> Option<Behind> {
        self.objects.get(bound.object).ok()?.behind(bound.page, self.zero_page)
    }

    /// Shadow pages and their TLB entries, of one VM.
    fn audit_shadow(&self, id: VmId) -> Result<(), Discrepancy> {
        let (Ok(vm), Ok(memory)) = (self.vms.get(id), self.guest_memory(id)) else { return Ok(()) };
        if let Some(gfn) = vm.shadow.audit(&memory) {
            return Err(Discrepancy::Shadow { vm: id, gfn: gfn.get() });
        }
        for (level, leaf) in vm.shadow.leaves() {
            let behind = self.bound(id, leaf.gfn).ok().and_then(|it| self.behind(it));
            let right = behind.is_some_and(|it| {
                it.pfn == leaf.pfn && level <= it.level && (it.writable || !leaf.writable)
            });
            if !right {
                return Err(Discrepancy::Spte { vm: id, gfn: leaf.gfn.get() });
            }
        }
        for (index, vcpu) in (0..).zip(&vm.vcpus) {
            let stale = vcpu.tlb.iter_indirect().find(|(tag, page, cached)| {
                let root = vcpu.roots.indirect().find(|(root, _)| root == tag);
                let table = root.and_then(|(_, root)| root.table());
                let found = table.and_then(|table| vm.shadow.find(table, *page));
                !found.is_some_and(|found| {
                    let offset = page & (self.pages(found.level) - 1);
                    found.leaf.pfn.get() + offset == cached.pfn.get()
                        && (found.leaf.writable || !cached.writable)
                })
            });
            if let Some((_, page, _)) = stale {
                return Err(Discrepancy::ShadowTlb { vcpu: VcpuId { vm: id, index }, page });
            }
        }
        Ok(())
    }

    fn audit_guests(&self) -> Result<(), Discrepancy> {
        for (id, vm) in self.vms.iter() {
            for Found { start, level, entry } in vm.table.iter() {
                // What pKVM maps does not come from a slot: `pkvm/audit.rs` looks at it.
                if self.protection.pkvm.is_some() {
                    continue;
                }
                let bound = Gfn::new(start).and_then(|gfn| self.bound(id, gfn).ok());
                let behind = bound.and_then(|it| self.behind(it));
                let right = behind.is_some_and(|it| {
                    it.pfn == entry.pfn && level <= it.level && (it.writable || !entry.writable)
                });
                let tracked =
                    entry.writable && vm.shadow.tracks_in(start, start + self.pages(level));
                if !right || tracked {
                    return Err(Discrepancy::Spte { vm: id, gfn: start });
                }
            }
            self.audit_shadow(id)?;
            for (index, vcpu) in (0..).zip(&vm.vcpus) {
                let stale = vcpu.tlb.iter().find(|(gfn, _, cached)| {
                    let found = vm.table.get(*gfn);
                    found.is_none_or(|it| it.entry.pfn.get() + (gfn - it.start) != cached.pfn.get())
                });
                if let Some((gfn, ..)) = stale {
                    let vcpu = VcpuId { vm: id, index };
                    return Err(Discrepancy::GuestTlb { vcpu, gfn });
                }
            }
        }
        Ok(())
    }
}
