//! vCPUs: the actor's own, and what is done by one.

use std::rc::Rc;

use polder::MachineVcpu;
use polder::machine::{Intercept, Pte, RmpSize, VcpuId};
use polder::units::Geometry;
use polder_vmm::GuestRoot;

use super::{Acted, Worker, nobodys};
use crate::guest_tables;
use crate::names::Is;
use crate::outcome::{Outcome, Stop};
use crate::scenario::{By, Place};

/// A vCPU of the actor's own.
pub(super) enum Vcpu {
    /// Whose faults Polder answers.
    Polder(MachineVcpu),
    /// Whose faults nobody answers.
    Bare(VcpuId),
    /// Of KVM's: a guest runs for each access.
    Kvm,
}

impl Worker<'_> {
    /// The actor's vCPU, made when he first needs it.
    pub(super) fn vcpu(&mut self) -> Acted<Rc<Vcpu>> {
        if let Some(vcpu) = &self.vcpu {
            return Ok(Rc::clone(vcpu));
        }
        let vm = &self.world.vms[self.actor.vm];
        let vcpu = Rc::new(match (vm.id, vm.machine, &vm.kvm) {
            (_, _, Some(_)) => Vcpu::Kvm,
            (Some(id), ..) => {
                let vcpu = self.world.memory.machine_vcpu(id)?;
                self.world.add_kicker(vcpu.kicker());
                if let Some(tables) = &vm.tables {
                    tables.placed.load(&vcpu)?;
                }
                Vcpu::Polder(vcpu)
            }
            (None, Some(vm), _) => {
                Vcpu::Bare(self.world.inside(|machine, _, _| Ok(machine.add_vcpu(vm)?))?)
            }
            (None, None, None) => return Err(nobodys()),
        });
        self.vcpu = Some(Rc::clone(&vcpu));
        Ok(vcpu)
    }

    /// Maps ahead for a vCPU of the VM's that runs no guest.
    pub(super) fn prefault(&self, place: Place, vm: usize, by: By) -> Acted {
        let memory = &self.world.memory;
        let gfns = self.gfns(place, vm)?;
        let id = self.id(vm)?;
        let vm = &self.world.vms[vm];
        let came = match (&vm.tables, &vm.kvm) {
            (Some(tables), _) => {
                guest_tables::prefault((memory, id), &tables.vcpu, tables.root, gfns, by)?
            }
            (None, Some(kvm)) => {
                let vcpu = kvm.idle_vcpu(memory, id);
                let vcpu = vcpu.map_err(|error| Stop::new(Is::Failed, error.to_string()))?;
                guest_tables::prefault((memory, id), &vcpu, GuestRoot::Tdp, gfns, by)?
            }
            (None, None) => {
                let vcpu = memory.machine_vcpu(id)?;
                self.world.add_kicker(vcpu.kicker());
                guest_tables::prefault((memory, id), &vcpu, GuestRoot::Tdp, gfns, by)?
            }
        };
        let left = came.left.map_or(0, |left| left.count().get());
        let counts = [came.done.count().get(), came.skipped.get(), left];
        Ok(Outcome { prefaulted: Some(counts), ..Outcome::done() })
    }

    /// Has the guest write entries of its tables, by another of its vCPUs, and flush them by its
    /// own.
    pub(super) fn pte(&mut self, place: Place, present: bool, used: bool) -> Acted {
        let gfns = self.gfns(place, self.actor.vm)?;
        let vm = &self.world.vms[self.actor.vm];
        let none =
            || Stop::new(Is::NotOffered, "the VM's guest has no page tables: give it a `root`");
        let (Some(tables), Some(id)) = (&vm.tables, vm.id) else { return Err(none()) };
        let bits = match (present, used) {
            (false, _) => 0,
            (true, true) => Pte::ALL,
            (true, false) => Pte::PRESENT | Pte::USER | Pte::WRITABLE,
        };
        let writer = self.world.memory.machine_vcpu(id)?;
        for gfn in gfns.frames() {
            if !tables.placed.covers(gfn) {
                let what = format!("the guest's tables have no entry for guest frame {gfn}");
                return Err(Stop::new(Is::Range, what));
            }
            tables.placed.set(&writer, gfn, bits)?;
        }
        let own = self.vcpu()?;
        for gfn in gfns.frames() {
            tables.vcpu.carry_out(Intercept::Invlpg(gfn.get()))?;
            if let Vcpu::Polder(own) = &*own {
                own.carry_out(Intercept::Invlpg(gfn.get()))?;
            }
        }
        Ok(Outcome::done())
    }

    pub(super) fn pvalidate(&mut self, place: Place, size: RmpSize, validate: bool) -> Acted {
        let (world, vm) = (self.world, self.actor.vm);
        let gfns = self.gfns(place, vm)?;
        let pages = Geometry::X86_64.pages(size.level()).get();
        let step = usize::try_from(pages).unwrap_or(usize::MAX);
        let mut changed = false;
        for gfn in gfns.frames().step_by(step) {
            changed |= match &*self.vcpu()? {
                Vcpu::Polder(vcpu) => vcpu.pvalidate(gfn, size.level(), validate)??,
                Vcpu::Bare(id) => {
                    let id = *id;
                    world.inside(|machine, _, _| {
                        Ok(machine.vcpu(id)?.pvalidate(gfn, size, validate)??)
                    })?
                }
                Vcpu::Kvm => return Err(Stop::new(Is::NotOffered, "this is no SNP guest")),
            };
        }
        Ok(Outcome::new(Is::Ok, if changed { "" } else { "nothing changed" }))
    }
}
