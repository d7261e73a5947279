//! The VMs that see the memory, and their slots.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use polder_engine::{Slot, VmId};
use polder_units::{Gfn, GfnRange, PageRange};

use super::rmp::asid;
use super::{MachineHost, refused};
use crate::Error;
use crate::dirty::Marks;
use crate::host::{HostKind, Vm};

/// A VM, and where its slots are.
pub(super) struct Attached {
    pub(super) vm: polder_machine::VmId,
    pub(super) slots: BTreeMap<Slot, GfnRange>,
}

impl MachineHost {
    /// The machine's name for a VM.
    pub(crate) fn vm(&self, id: VmId) -> Option<polder_machine::VmId> {
        self.vms.lock().get(&id).map(|attached| attached.vm)
    }

    pub(super) fn attach_vm(&self, id: VmId, vm: Vm) -> Result<(), Error> {
        let vm = match (&self.rmp, vm) {
            (_, Vm::Kvm(_)) => return Err(Error::WrongVm { host: HostKind::Machine }),
            (None, Vm::Machine) if self.is_pkvm() => self.lock().create_pkvm_vm(),
            (None, Vm::MachineWithoutTdp) if self.is_pkvm() => {
                return Err(Error::NotOffered {
                    what: "a protected VM needs a CPU with two stages of translation",
                    way_out: "attach an ordinary VM of the machine",
                });
            }
            (None, Vm::Machine) => self.lock().create_vm(),
            (None, Vm::MachineWithoutTdp) => self.lock().create_vm_without_tdp(),
            (Some(_), Vm::MachineWithoutTdp) => {
                return Err(Error::NotOffered {
                    what: "an SNP guest needs a CPU with two-dimensional paging",
                    way_out: "attach an ordinary VM of the machine",
                });
            }
            (Some(_), Vm::Machine) => {
                let asid = asid(id)?;
                self.lock().create_snp_vm(asid)
            }
        };
        let vm = vm.map_err(refused)?;
        self.vms.lock().insert(id, Attached { vm, slots: BTreeMap::new() });
        Ok(())
    }

    pub(super) fn bind_slot(
        &self,
        id: VmId,
        slot: Slot,
        gfn: Gfn,
        pages: PageRange,
    ) -> Result<(), Error> {
        let mut vms = self.vms.lock();
        let attached = vms.get_mut(&id).ok_or(Error::NoSuchVm)?;
        if self.is_snp() {
            self.check_owner(id)?;
        }
        self.own_by_pkvm(id, attached.vm)?;
        let logs = self.logs.load(Ordering::Relaxed);
        let mut machine = self.lock();
        machine.bind(attached.vm, gfn, self.object, pages).map_err(refused)?;
        if logs {
            machine.log_dirty(attached.vm, gfn, true).map_err(refused)?;
        }
        drop(machine);
        self.own(id, attached.vm)?;
        let gfns = GfnRange::new(gfn, pages.count()).expect("the engine has checked");
        self.begin_exits(attached.vm, gfns)?;
        attached.slots.insert(slot, gfns);
        Ok(())
    }

    /// Has every slot log what its guest writes, and each that is bound, or no longer.
    pub(super) fn log_slots(&self, on: bool) -> Result<(), Error> {
        if self.is_snp() || self.is_pkvm() {
            if !on {
                return Ok(());
            }
            return Err(Error::NotOffered {
                what: "what a confidential guest writes is not logged: nobody but the guest can \
                       read its pages, to copy them",
                way_out: "use memory of an ordinary VM (Platform::Plain)",
            });
        }
        let vms = self.vms.lock();
        let mut machine = self.lock();
        for Attached { vm, slots } in vms.values() {
            for gfns in slots.values() {
                let set = machine.log_dirty(*vm, gfns.start(), on);
                assert!(set.is_ok(), "the slot is there: {set:?}");
            }
        }
        self.logs.store(on, Ordering::Relaxed);
        Ok(())
    }

    /// Notes what the slots have logged.
    pub(super) fn take_logs(&self, into: &Marks) -> Result<(), Error> {
        let vms = self.vms.lock();
        let mut machine = self.lock();
        for Attached { vm, slots } in vms.values() {
            for gfns in slots.values() {
                for gfn in machine.take_dirty(*vm, gfns.start()).map_err(refused)? {
                    let page = machine.bound(*vm, gfn).map_err(refused)?.page;
                    into.wrote_pages(PageRange::one(page));
                }
            }
        }
        Ok(())
    }

    pub(super) fn unbind_slot(&self, id: VmId, slot: Slot) -> Result<(), Error> {
        let mut vms = self.vms.lock();
        let Some(attached) = vms.get_mut(&id) else { return Ok(()) };
        let Some(&gfns) = attached.slots.get(&slot) else { return Ok(()) };
        self.check_none_donated(attached.vm, gfns)?;
        attached.slots.remove(&slot);
        let mut machine = self.lock();
        let gone = machine.unbind(attached.vm, gfns.start());
        let zapped = if self.is_pkvm() { Ok(false) } else { machine.tdp_zap(attached.vm, gfns) };
        assert!(gone.is_ok() && zapped.is_ok(), "the slot was there: {gone:?}, {zapped:?}");
        Ok(())
    }
}
