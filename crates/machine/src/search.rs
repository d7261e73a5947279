//! What a search over states asks of a machine: what each CPU remembers, hashes in parts, and
//! whether something was invalidated, from one machine to the next.
//!
//! CPUs of one kind that do the same work are interchangeable. A search that hashes each one's TLB
//! beside what its thread does, and sorts, takes two states that differ in names alone for one.

use core::hash::{Hash, Hasher};

use polder_units::{Gfn, Pfn};

use crate::tlb::guest_tag;
use crate::{DomainId, Machine, Side, Thread, VcpuId, VmId, Vpn};

impl Machine {
    /// The frame that a thread's TLB has for a page, however stale.
    pub fn remembered(&self, thread: Thread, vpn: Vpn) -> Option<Pfn> {
        let process = self.processes.get(thread.process).ok()?;
        process.threads.get(usize::from(thread.index))?.hit(vpn.get(), false)
    }

    /// The frame that a vCPU's TLB has for a guest frame, however stale.
    pub fn remembered_by_guest(&self, vcpu: VcpuId, gfn: Gfn, side: Side) -> Option<Pfn> {
        let state = self.vms.get(vcpu.vm).ok()?.vcpus.get(usize::from(vcpu.index))?;
        state.tlb.hit(guest_tag(gfn.get(), side == Side::Private, 0), false)
    }

    /// The frame that a domain's IOTLB has for a device's page, however stale.
    pub fn remembered_by_device(&self, domain: DomainId, gfn: Gfn) -> Option<Pfn> {
        self.domains.get(domain).ok()?.iotlb.hit(gfn.get(), false)
    }

    /// The first word of a frame, whoever may reach it: what a checker looks for secrets in.
    pub fn word_of(&self, pfn: Pfn) -> u64 {
        self.frames.read_u64(pfn, 0)
    }

    /// Hashes everything but what the CPUs remember.
    pub fn hash_without_tlbs<H: Hasher>(&self, state: &mut H) {
        self.frames.hash(state);
        self.folios.hash(state);
        self.objects.hash(state);
        for (id, process) in self.processes.iter() {
            (id, &process.vmas, process.threads.len()).hash(state);
            process.table.hash(state);
        }
        for (id, vm) in self.vms.iter() {
            (id, &vm.slots, vm.invalidating, vm.snp, vm.protected).hash(state);
            vm.table.hash(state);
            (&vm.shadow, vm.two_dimensional).hash(state);
            for vcpu in &vm.vcpus {
                (&vcpu.program, vcpu.next, vcpu.paging, vcpu.roots).hash(state);
            }
        }
        (&self.pins, &self.domains, &self.plants, self.zero_page).hash(state);
        self.protection.hash(state);
    }

    /// Hashes what a thread's CPU remembers.
    pub fn hash_tlb<H: Hasher>(&self, thread: Thread, state: &mut H) {
        let process = self.processes.get(thread.process).ok();
        process.and_then(|process| process.threads.get(usize::from(thread.index))).hash(state);
    }

    /// Hashes what a vCPU remembers.
    pub fn hash_guest_tlb<H: Hasher>(&self, vcpu: VcpuId, state: &mut H) {
        let vm = self.vms.get(vcpu.vm).ok();
        vm.and_then(|vm| vm.vcpus.get(usize::from(vcpu.index))).map(|vcpu| &vcpu.tlb).hash(state);
    }

    /// Whether what was resolved of a VM on `before`, from which this machine came, is stale.
    pub fn has_invalidated_since(&self, before: &Self, vm: VmId) -> bool {
        let sequence = |machine: &Self| machine.vms.get(vm).ok().map(|vm| vm.sequence);
        sequence(self) != sequence(before)
    }
}
