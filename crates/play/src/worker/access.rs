//! Reads and writes: each actor's in his own way.

use polder::Visibility;
use polder::machine::Side;
use polder::units::Gpa;
use polder_vmm::scenario::Op;
use polder_vmm::{End, Failure, Progress, Supervision};

use super::{Acted, Vcpu, Worker, nobodys};
use crate::names::{Is, Kind};
use crate::outcome::Stop;
use crate::scenario::Bytes;

impl Worker<'_> {
    pub(super) fn read(&mut self, from: &Bytes, bytes: &mut [u8]) -> Acted<()> {
        let (world, vm) = (self.world, self.actor.vm);
        match self.actor.kind {
            Kind::Vmm => {
                let id = world.vms[vm].id.ok_or_else(nobodys)?;
                Ok(world.memory.read(id, world.gpa(from.place, from.at, vm)?, bytes)?)
            }
            Kind::Device => {
                let offset = world.offset(from.place, from.at, vm)?;
                Ok(world.memory.host_view().touch_read(offset, bytes)?)
            }
            Kind::Process => {
                let (thread, hva) = self.process_at(from)?;
                world.inside(|machine, _, _| Ok(machine.host_read(thread, hva, bytes)?))
            }
            Kind::Guest => {
                let gpa = world.gpa(from.place, from.at, vm)?;
                match &*self.vcpu()? {
                    Vcpu::Polder(vcpu) => Ok(vcpu.read(gpa, from.side, bytes)?),
                    Vcpu::Bare(id) => {
                        let id = *id;
                        world.inside(|machine, _, _| {
                            Ok(machine.vcpu(id)?.read(gpa, side(from.side), bytes)?)
                        })
                    }
                    Vcpu::Kvm => self.run_kvm(gpa, bytes, None),
                }
            }
            Kind::Kernel => Err(Stop::new(Is::Failed, "the kernel reads nothing")),
        }
    }

    pub(super) fn write(&mut self, to: &Bytes, bytes: &[u8]) -> Acted<()> {
        let (world, vm) = (self.world, self.actor.vm);
        match self.actor.kind {
            Kind::Vmm => {
                let id = world.vms[vm].id.ok_or_else(nobodys)?;
                Ok(world.memory.write(id, world.gpa(to.place, to.at, vm)?, bytes)?)
            }
            Kind::Device => {
                let offset = world.offset(to.place, to.at, vm)?;
                Ok(world.memory.host_view().touch_write(offset, bytes)?)
            }
            Kind::Process => {
                let (thread, hva) = self.process_at(to)?;
                world.inside(|machine, _, _| Ok(machine.host_write(thread, hva, bytes)?))
            }
            Kind::Guest => {
                let gpa = world.gpa(to.place, to.at, vm)?;
                match &*self.vcpu()? {
                    Vcpu::Polder(vcpu) => Ok(vcpu.write(gpa, to.side, bytes)?),
                    Vcpu::Bare(id) => {
                        let id = *id;
                        world.inside(|machine, _, _| {
                            Ok(machine.vcpu(id)?.write(gpa, side(to.side), bytes)?)
                        })
                    }
                    Vcpu::Kvm => {
                        let mut unused = Vec::new();
                        self.run_kvm(gpa, &mut unused, Some(bytes))
                    }
                }
            }
            Kind::Kernel => Err(Stop::new(Is::Failed, "the kernel writes nothing")),
        }
    }

    /// Has a guest on KVM write bytes, or read them, by whole words.
    fn run_kvm(&self, gpa: Gpa, into: &mut [u8], from: Option<&[u8]>) -> Acted<()> {
        const WORD: u64 = 8;
        let vm = &self.world.vms[self.actor.vm];
        let (Some(kvm), Some(id)) = (&vm.kvm, vm.id) else { return Err(nobodys()) };
        if !gpa.get().is_multiple_of(WORD) {
            return Err(Stop::new(
                Is::NotOffered,
                "on KVM a guest accesses whole words: `at` is a multiple of 8",
            ));
        }
        let run = |op: Op| -> Acted<End> {
            let supervise = |_: Progress<'_>| match self.world.is_over() {
                true => Supervision::TimeOut,
                false => Supervision::GoOn,
            };
            let ended = kvm.run((&self.world.memory, id), &[vec![op, Op::Done]], supervise);
            let ended = ended.map_err(|error| Stop::new(Is::Failed, error.to_string()))?;
            match ended.faults.first() {
                Some(&fault) => Err(fault.into()),
                None => Ok(ended.end),
            }
        };
        let at = |word: usize| gpa.checked_add(word as u64 * WORD).unwrap_or(gpa);
        let ended = |end: End| match end {
            End::Ok => Ok(()),
            End::Failed(Failure::MemoryFault { fault, .. }) => Err(fault.into()),
            // By the guest view's page table the two are one: a page that is denied to the guest.
            End::Failed(failure @ Failure::MemoryFailure { page: Some(page), .. }) => {
                let quarantined = self.world.memory.quarantined();
                let is = match quarantined.iter().any(|run| run.contains(page)) {
                    true => Is::Quarantined,
                    false => Is::SourceFailed,
                };
                Err(Stop::new(is, failure.to_string()))
            }
            End::Failed(failure) => Err(Stop::new(Is::Failed, failure.to_string())),
            End::TimedOut | End::Interrupted => Err(Stop::new(Is::Kicked, "the guest was stopped")),
        };
        for (word, bytes) in from.into_iter().flat_map(|from| from.chunks(8)).enumerate() {
            ended(run(Op::Store { gpa: at(word), value: to_word(bytes) })?)?;
        }
        for (word, bytes) in into.chunks_mut(8).enumerate() {
            let value = match run(Op::Load { gpa: at(word), expect: 0 })? {
                End::Failed(Failure::Check { found, .. }) => found,
                other => ended(other).map(|()| 0)?,
            };
            bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
        }
        Ok(())
    }
}

const fn side(visibility: Visibility) -> Side {
    match visibility {
        Visibility::Private => Side::Private,
        Visibility::Shared => Side::Shared,
    }
}

/// Up to 8 bytes as a word, zeros behind them.
fn to_word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}
