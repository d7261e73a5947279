//! The RMP against stage 2, TLBs and free frames (INV-5, INV-9).
//!
//! A stage-2 entry *below* the RMP's level is no discrepancy: a split leaves it, and the next
//! access smashes (thread 1). A validated bit is the guest's own affair.

use polder_units::{Gfn, Level, Pfn};

use crate::access::Access;
use crate::frames::frame_at;
use crate::rmp::{Rmp, User};
use crate::table::Found;
use crate::vm::Vm;
use crate::{AccessCheck, Discrepancy, Machine, Side, VmId};

impl Machine {
    pub(crate) fn audit_rmp(&self) -> Result<(), Discrepancy> {
        let Some(rmp) = &self.protection.rmp else { return Ok(()) };
        let large = self.config.geometry.pages(Level::Size2M);
        for Found { start, level, entry } in rmp.entries.iter() {
            let pfn = frame_at(Pfn::from(0), start);
            let frames = (0..self.pages(level)).map(|offset| frame_at(pfn, offset));
            if let Some(pfn) = frames.into_iter().find(|pfn| self.folios.get(*pfn).is_err()) {
                return Err(Discrepancy::FreeAssigned { pfn });
            }
            if level != Level::Size4K && !entry.gfn.is_multiple_of(large) {
                return Err(Discrepancy::RmpAlignment { pfn });
            }
        }
        for (at, (_, user)) in &rmp.held {
            let pfn = frame_at(Pfn::from(0), *at);
            if matches!(user, User::Vcpu(_)) && pfn.is_multiple_of(large) {
                return Err(Discrepancy::AlignedVmsa { pfn });
            }
        }
        for (id, vm) in self.vms.iter() {
            audit_stage2(rmp, id, vm)?;
        }
        self.audit_rmp_tlbs(rmp)
    }

    fn audit_rmp_tlbs(&self, rmp: &Rmp) -> Result<(), Discrepancy> {
        let host = self.processes.iter().flat_map(|(_, process)| &process.threads);
        let host = host.flat_map(|tlb| tlb.iter()).filter(|(_, _, it)| it.writable);
        let host = host.map(|(_, _, it)| Access::host(it.pfn, it.level, true));
        let guests = self.vms.iter().flat_map(|(_, vm)| {
            let cached = vm.vcpus.iter().flat_map(|vcpu| vcpu.tlb.iter());
            cached.map(move |(gfn, private, it)| {
                let path = if private { Side::Private.path() } else { Side::Shared.path() };
                let private = vm.snp.filter(|_| private).map(|snp| (snp.asid, gfn));
                Access { path, private, pfn: it.pfn, level: it.level, write: it.writable }
            })
        });
        for access in host.chain(guests) {
            match rmp.check(&access) {
                Ok(()) => {}
                Err(it) if matches!(it.check, AccessCheck::InUse | AccessCheck::Validated) => {}
                Err(refused) => return Err(Discrepancy::RmpTlb(refused)),
            }
        }
        Ok(())
    }
}

/// What stage 2 of an SNP guest maps, where it is assigned at all.
fn audit_stage2(rmp: &Rmp, id: VmId, vm: &Vm) -> Result<(), Discrepancy> {
    let Some(snp) = vm.snp else { return Ok(()) };
    for Found { start, level, entry } in vm.table.iter() {
        let first = entry.pfn.get();
        let pages = vm.table.pages(level);
        for found in rmp.entries.range(first, first + pages) {
            let at = found.start.max(first);
            let pfn = frame_at(Pfn::from(0), at);
            let gfn = start + (at - first);
            let here = rmp.entry(pfn);
            if here.asid != Some(snp.asid) || Some(here.gfn) != Gfn::new(gfn) {
                return Err(Discrepancy::RmpOwner { vm: id, gfn, pfn });
            }
            if found.level < level.min(Level::Size2M) {
                return Err(Discrepancy::RmpLevel { vm: id, gfn });
            }
        }
    }
    Ok(())
}
