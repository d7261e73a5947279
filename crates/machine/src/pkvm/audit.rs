//! Whether the tables of the hypervisor agree, with each other and with what hardware remembers
//! (INV-9). It reads the tables alone.

use alloc::collections::BTreeMap;

use polder_units::{Gfn, Pfn};

use crate::frames::frame_at;
use crate::pkvm::{Component, PageState, Pkvm};
use crate::{Discrepancy, Machine};

impl Machine {
    pub(crate) fn audit_pkvm(&self) -> Result<(), Discrepancy> {
        let Some(pkvm) = &self.protection.pkvm else { return Ok(()) };
        let frames = pkvm.host.keys().chain(pkvm.hypervisor.keys()).chain(&pkvm.closed);
        let frames = frames.copied().chain(pkvm.guests.values().map(|page| page.pfn.get()));
        for number in frames {
            let pfn = frame_at(Pfn::from(0), number);
            if !self.tables_agree(pkvm, pfn) {
                return Err(Discrepancy::Ownership { pfn });
            }
            let gone = pkvm.host(pfn).owner != Component::Host;
            if gone && self.folios.get(pfn).is_err() {
                return Err(Discrepancy::FreeAssigned { pfn });
            }
        }
        for ((vm, gfn), page) in &pkvm.guests {
            let spte = Gfn::new(*gfn).and_then(|gfn| self.spte(*vm, gfn).ok().flatten());
            if spte.map(|spte| spte.pfn) != Some(page.pfn) {
                return Err(Discrepancy::Ownership { pfn: page.pfn });
            }
        }
        self.audit_pkvm_tlbs(pkvm)?;
        self.audit_pkvm_dma(pkvm)
    }

    /// Whether one component has the frame, others as it says, and the IOMMU as the host.
    fn tables_agree(&self, pkvm: &Pkvm, pfn: Pfn) -> bool {
        use PageState::{NoPage, Owned, SharedBorrowed, SharedOwned};
        let guests = || pkvm.guests.iter().filter(|(_, page)| page.pfn == pfn);
        let host = pkvm.host(pfn);
        let hypervisor = pkvm.hypervisor(pfn);
        let open = !pkvm.closed.contains(&pfn.get());
        let guests_have = |state| guests().filter(|(_, page)| page.state == state).count();
        let owning = guests_have(Owned) + guests_have(SharedOwned);
        let borrowing = guests_have(SharedBorrowed) + usize::from(hypervisor == SharedBorrowed);
        let owner_is_guest =
            guests().all(|((vm, _), _)| host.owner == Component::Guest(*vm)) && owning == 1;
        open == (host.state != NoPage)
            && match host.state {
                Owned => owning == 0 && borrowing == 0 && hypervisor == NoPage,
                SharedOwned => owning == 0 && borrowing > 0 && hypervisor != Owned,
                SharedBorrowed => {
                    owner_is_guest && guests_have(SharedOwned) == 1 && hypervisor == NoPage
                }
                NoPage => match hypervisor {
                    Owned => host.owner == Component::Hypervisor && guests().next().is_none(),
                    NoPage => owner_is_guest && guests_have(Owned) == 1,
                    SharedOwned | SharedBorrowed => false,
                },
            }
    }

    fn audit_pkvm_tlbs(&self, pkvm: &Pkvm) -> Result<(), Discrepancy> {
        let host = self.processes.iter().flat_map(|(_, process)| &process.threads);
        let host = host.flat_map(|tlb| tlb.iter()).map(|(_, _, it)| (it.pfn, false));
        let devices = self.domains.iter().flat_map(|(_, domain)| domain.iotlb.iter());
        let devices = devices.map(|(_, _, it)| (it.pfn, true));
        let mut stale = host.chain(devices);
        match stale.find(|&(pfn, device)| pkvm.refuses(pfn, device).is_some()) {
            Some((pfn, _)) => Err(Discrepancy::StaleOwner { pfn }),
            None => Ok(()),
        }
    }

    fn audit_pkvm_dma(&self, pkvm: &Pkvm) -> Result<(), Discrepancy> {
        let mut mapped: BTreeMap<u64, u32> = BTreeMap::new();
        for (_, domain) in self.domains.iter() {
            for found in domain.table.iter() {
                *mapped.entry(found.entry.pfn.get()).or_default() += 1;
            }
        }
        if mapped == pkvm.dma {
            return Ok(());
        }
        let wrong = mapped.keys().chain(pkvm.dma.keys());
        let wrong = wrong.copied().find(|pfn| mapped.get(pfn) != pkvm.dma.get(pfn));
        Err(Discrepancy::Ownership { pfn: frame_at(Pfn::from(0), wrong.unwrap_or(0)) })
    }
}
