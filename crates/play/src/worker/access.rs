//! Reads and writes: each actor's in his own way.

use polder::Visibility;
use polder::machine::Side;

use super::{Acted, Vcpu, Worker};
use crate::names::{Is, Kind};
use crate::outcome::{Outcome, Stop};
use crate::scenario::{Bytes, Verb};

/// Bytes to read or to write.
pub(super) enum Transfer<'b> {
    Read(&'b mut [u8]),
    Write(&'b [u8]),
}

use Transfer::{Read, Write};

impl Worker<'_> {
    /// What guests, devices and processes do to bytes, entries and references.
    pub(super) fn access(&mut self, verb: &Verb) -> Acted {
        match verb {
            Verb::Read { from, length } => {
                let mut bytes = vec![0; usize::try_from(*length).unwrap_or_default()];
                self.transfer(from, Read(&mut bytes))?;
                Ok(Outcome::read(bytes))
            }
            Verb::Write { to, bytes } => {
                self.transfer(to, Write(bytes.as_bytes()))?;
                Ok(Outcome::done())
            }
            Verb::Pte { place, present, used } => self.pte(*place, *present, *used),
            Verb::Pvalidate { place, size, validate } => self.pvalidate(*place, *size, *validate),
            Verb::Refer { place, kind, name, of: None } => self.refer(*place, *kind, name),
            Verb::Refer { place, name, of: Some(of), .. } => self.refer_to(*place, of, name),
            Verb::Release { name } => self.release(name),
            Verb::GupFast { place, name } => self.gup_fast(*place, name),
            other => self.kernel(other),
        }
    }

    fn transfer(&mut self, at: &Bytes, transfer: Transfer<'_>) -> Acted<()> {
        let (world, vm) = (self.world, self.actor.vm);
        match self.actor.kind {
            Kind::Vmm => {
                let (id, gpa) = (self.id(vm)?, world.gpa(at.place, at.at, vm)?);
                match transfer {
                    Read(into) => world.memory.read(id, gpa, into)?,
                    Write(bytes) => world.memory.write(id, gpa, bytes)?,
                }
            }
            Kind::Device => {
                let offset = world.offset(at.place, at.at, vm)?;
                match transfer {
                    Read(into) => world.memory.host_view().touch_read(offset, into)?,
                    Write(bytes) => world.memory.host_view().touch_write(offset, bytes)?,
                }
            }
            Kind::Process => {
                let (thread, hva) = self.process_at(at)?;
                world.inside(|machine, _, _| match transfer {
                    Read(into) => Ok(machine.host_read(thread, hva, into)?),
                    Write(bytes) => Ok(machine.host_write(thread, hva, bytes)?),
                })?;
            }
            Kind::Guest => self.transfer_by_guest(at, transfer)?,
            Kind::Kernel => {
                return Err(Stop::new(Is::Failed, "the kernel reads and writes nothing"));
            }
        }
        Ok(())
    }

    fn transfer_by_guest(&mut self, at: &Bytes, transfer: Transfer<'_>) -> Acted<()> {
        let gpa = self.world.gpa(at.place, at.at, self.actor.vm)?;
        match (&*self.vcpu()?, transfer) {
            (Vcpu::Polder(vcpu), Read(into)) => Ok(vcpu.read(gpa, at.side, into)?),
            (Vcpu::Polder(vcpu), Write(bytes)) => Ok(vcpu.write(gpa, at.side, bytes)?),
            (&Vcpu::Bare(id), transfer) => self.world.inside(|machine, _, _| {
                let mut vcpu = machine.vcpu(id)?;
                match transfer {
                    Read(into) => Ok(vcpu.read(gpa, side(at.side), into)?),
                    Write(bytes) => Ok(vcpu.write(gpa, side(at.side), bytes)?),
                }
            }),
            (Vcpu::Kvm, transfer) => self.transfer_on_kvm(gpa, transfer),
        }
    }
}

const fn side(visibility: Visibility) -> Side {
    match visibility {
        Visibility::Private => Side::Private,
        Visibility::Shared => Side::Shared,
    }
}
