//! The VMs of a scenario on their host, and the page tables of their guests.

use polder::machine::Asid;
use polder::{HostKind, Slot, VmId};
use polder_vmm::{GuestRoot, RunError};

use super::{GuestTables, Unplayable, Vm, World};
use crate::guest_tables::Placed;
use crate::outcome::Stop;
use crate::scenario::{Tables, VmSpec};

impl World {
    pub(super) fn add_vm(&self, spec: &VmSpec, host: HostKind) -> Result<Vm, Unplayable> {
        if let Some(asid) = spec.asid {
            return self.add_bare_vm(spec, asid);
        }
        let kvm = match host {
            HostKind::Machine => None,
            _ => Some(polder_vmm::Vm::new(host).map_err(unplayable)?),
        };
        let id = match &kvm {
            None => self.memory.attach(match spec.tables.map(|tables| tables.root) {
                Some(GuestRoot::Shadow) => polder::Vm::MachineWithoutTdp,
                _ => polder::Vm::Machine,
            })?,
            Some(vm) => vm.attach(&self.memory)?,
        };
        for slot in &spec.slots {
            self.memory.bind(id, Slot(slot.slot), slot.gpa.gfn(), slot.pages)?;
        }
        let machine = self.memory.simulated_vm(id).ok();
        // The n-th VM of Polder's is given the n-th ASID (`polder::host::machine::rmp`).
        let asid =
            id.0.checked_add(1).and_then(|asid| u16::try_from(asid).ok()).and_then(Asid::new);
        let tables = match spec.tables {
            None => None,
            Some(_) if kvm.is_some() => {
                let what = "a guest with page tables of its own";
                let way_out = "play it on the machine";
                return Err(polder::Error::NotOffered { what, way_out }.into());
            }
            Some(tables) => Some(self.set_up(id, spec, tables)?),
        };
        Ok(Vm { id: Some(id), machine, asid, kvm, tables })
    }

    /// Has a VM's guest make its page tables.
    fn set_up(&self, id: VmId, spec: &VmSpec, tables: Tables) -> Result<GuestTables, Unplayable> {
        let none = || Unplayable::Failed("a VM with page tables needs a slot".to_owned());
        let slot = spec.slots.first().ok_or_else(none)?;
        let vcpu = self.memory.machine_vcpu(id)?;
        let slot = (slot.gpa.gfn(), slot.pages);
        let placed = Placed::new((&self.memory, id), tables, slot);
        let placed = placed.map_err(|Stop(outcome)| Unplayable::Failed(outcome.line()))?;
        placed.load(&vcpu)?;
        Ok(GuestTables { root: tables.root, placed, vcpu })
    }

    /// A VM of the machine's own, that nobody looks after.
    fn add_bare_vm(&self, spec: &VmSpec, asid: u16) -> Result<Vm, Unplayable> {
        let asid = Asid::new(asid);
        let made = self.memory.simulated(|machine, object, _| {
            machine.enable_snp();
            let vm = match asid {
                Some(asid) => machine.create_snp_vm(asid)?,
                None => machine.create_vm()?,
            };
            for slot in &spec.slots {
                machine.bind(vm, slot.gpa.gfn(), object, slot.pages)?;
            }
            Ok::<_, polder::machine::Error>(vm)
        });
        Ok(Vm { id: None, machine: Some(made??), asid, kvm: None, tables: None })
    }
}

fn unplayable(error: RunError) -> Unplayable {
    match error {
        RunError::Memory(error) => error.into(),
        RunError::Kvm(source) => Unplayable::Skipped(format!("it needs KVM: {source}")),
        RunError::NoPrivateMemory => Unplayable::Skipped(error.to_string()),
        error => Unplayable::Failed(error.to_string()),
    }
}
