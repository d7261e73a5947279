//! What a guest does to its own paging, and to that of its own guest: loads of CR3, INVLPG, VMRUN.
//!
//! A CPU that shadows page tables has each of them come to the hypervisor. One with
//! two-dimensional paging walks a guest's own tables by itself, and only VMRUN comes: L2's nested
//! tables, which L1 has in its memory, are shadowed (`nested_svm_init_mmu_context()`,
//! arch/x86/kvm/svm/nested.c), and where L1 has none because it uses shadow paging itself, L2 runs
//! on what L1 runs on.

use polder_units::Gfn;

use crate::guest_table::GuestMemory;
use crate::root::{L2, Paging, Root};
use crate::shadow::Flush;
use crate::vm::Vm;
use crate::{Error, Machine, Plant, VcpuId, VmId};

/// An instruction of a guest's that its hypervisor carries out; the guest goes on behind it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Intercept {
    /// A load of CR3, or paging turned off: [`Machine::set_cr3`].
    Cr3(Option<Gfn>),
    /// INVLPG of the page with this number: [`Machine::invlpg`].
    Invlpg(u64),
    /// VMRUN: [`Machine::enter_l2`].
    Vmrun(L2),
    /// L2 exits to L1: [`Machine::leave_l2`].
    Vmexit,
}

impl Machine {
    /// The root of a vCPU.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn root(&self, vcpu: VcpuId) -> Result<Root, Error> {
        Ok(self.vcpu_ref(vcpu)?.roots.current())
    }

    /// How many shadow pages a VM has.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn shadow_pages(&self, vm: VmId) -> Result<usize, Error> {
        Ok(self.vms.get(vm)?.shadow.len())
    }

    /// Carries out what a guest's instruction asks for.
    ///
    /// # Errors
    /// As the functions that [`Intercept`] names.
    pub fn carry_out(&mut self, vcpu: VcpuId, intercept: Intercept) -> Result<(), Error> {
        match intercept {
            Intercept::Cr3(cr3) => self.set_cr3(vcpu, cr3),
            Intercept::Invlpg(page) => self.invlpg(vcpu, page),
            Intercept::Vmrun(l2) => self.enter_l2(vcpu, l2),
            Intercept::Vmexit => self.leave_l2(vcpu),
        }
    }

    /// Loads CR3, or turns paging off: what the CPU remembers of the tables is flushed, and tables
    /// that are out of sync are read again.
    ///
    /// # Errors
    /// [`Error::NoIndirect`] for an SNP guest, whose tables nobody can read; [`Error::Gone`].
    pub fn set_cr3(&mut self, vcpu: VcpuId, cr3: Option<Gfn>) -> Result<(), Error> {
        let paging = self.vcpu_ref(vcpu)?.paging;
        let paging = match paging.l2 {
            None => Paging { cr3, ..paging },
            Some(l2) => Paging { l2: Some(L2 { cr3, ..l2 }), ..paging },
        };
        self.set_paging(vcpu, paging)
    }

    /// Runs a guest of the guest's.
    ///
    /// # Errors
    /// As [`Machine::set_cr3`].
    pub fn enter_l2(&mut self, vcpu: VcpuId, l2: L2) -> Result<(), Error> {
        let paging = self.vcpu_ref(vcpu)?.paging;
        self.set_paging(vcpu, Paging { l2: Some(l2), ..paging })
    }

    /// Goes back from the guest's guest to the guest.
    ///
    /// # Errors
    /// As [`Machine::set_cr3`].
    pub fn leave_l2(&mut self, vcpu: VcpuId) -> Result<(), Error> {
        let paging = self.vcpu_ref(vcpu)?.paging;
        self.set_paging(vcpu, Paging { l2: None, ..paging })
    }

    /// Flushes a page of the space that the vCPU's root translates.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn invlpg(&mut self, vcpu: VcpuId, page: u64) -> Result<(), Error> {
        let (skip, geometry) = (self.plants.has(Plant::SkipFlush), self.config.geometry);
        let state = self.vcpu_state(vcpu)?;
        let (root, tag) = (state.roots.current(), state.roots.tag());
        if !skip {
            state.tlb.flush_page(tag, page, geometry);
        }
        let Some(table) = root.table() else { return Ok(()) };
        let flush = self.vms.get_mut(vcpu.vm)?.shadow.invlpg(table, page);
        self.flush_if(vcpu.vm, flush)
    }

    fn set_paging(&mut self, vcpu: VcpuId, paging: Paging) -> Result<(), Error> {
        let vm = self.vms.get_mut(vcpu.vm)?;
        let root = paging.root(vm.two_dimensional);
        if root != Root::Tdp && vm.snp.is_some() {
            return Err(Error::NoIndirect);
        }
        let skip = self.plants.has(Plant::SkipFlush);
        let state = self.vcpu_state(vcpu)?;
        let had = state.roots.indirect().any(|(_, it)| it == root);
        let gone = state.roots.load(root);
        state.paging = paging;
        if !skip {
            state.tlb.flush_root(state.roots.tag());
        }
        let shadow = &mut self.vms.get_mut(vcpu.vm)?.shadow;
        if let (Some(table), false) = (root.table(), had) {
            shadow.load(table);
        }
        let mut flush = Flush::NO;
        if let Some(table) = gone.and_then(|(_, gone)| gone.table()) {
            flush = shadow.unload(table);
        }
        if let Some(table) = root.table() {
            let synced = self.sync_root(vcpu.vm, table)?;
            flush = Flush(flush.0 || synced.0);
        }
        self.flush_if(vcpu.vm, flush)
    }

    fn sync_root(&mut self, id: VmId, table: Gfn) -> Result<Flush, Error> {
        if self.plants.has(Plant::StaleShadow) {
            return Ok(Flush::NO);
        }
        let (objects, frames) = (&self.objects, &self.frames);
        let (zero_page, geometry) = (self.zero_page, self.config.geometry);
        let Vm { slots, shadow, table: tdp, .. } = self.vms.get_mut(id)?;
        let memory = GuestMemory { slots, objects, frames, zero_page, geometry };
        Ok(shadow.sync_root(table, &memory, tdp))
    }

    /// Flushes every vCPU of a VM, if something was dropped that they may remember
    /// (`kvm_flush_remote_tlbs()`).
    pub(crate) fn flush_if(&mut self, vm: VmId, flush: Flush) -> Result<(), Error> {
        if flush.0 && !self.plants.has(Plant::SkipFlush) {
            self.vms.get_mut(vm)?.vcpus.iter_mut().for_each(|vcpu| vcpu.tlb.clear());
        }
        Ok(())
    }
}
