//! Accesses of a guest on KVM: for each a guest runs that makes it.

use polder::units::Gpa;
use polder_vmm::scenario::Op;
use polder_vmm::{End, Failure, Progress, Supervision};

use super::access::Transfer;
use super::{Acted, Worker, nobodys};
use crate::names::Is;
use crate::outcome::Stop;

const WORD: usize = 8;

impl Worker<'_> {
    /// Reads or writes bytes by whole words.
    pub(super) fn transfer_on_kvm(&self, gpa: Gpa, transfer: Transfer<'_>) -> Acted<()> {
        if !gpa.get().is_multiple_of(WORD as u64) {
            let what = "on KVM a guest accesses whole words: `at` is a multiple of 8";
            return Err(Stop::new(Is::NotOffered, what));
        }
        let at = |word: usize| gpa.checked_add((word * WORD) as u64).unwrap_or(gpa);
        match transfer {
            Transfer::Write(bytes) => {
                for (word, bytes) in bytes.chunks(WORD).enumerate() {
                    let store = Op::Store { gpa: at(word), value: to_word(bytes) };
                    self.came_of(self.run_on_kvm(store)?)?;
                }
            }
            Transfer::Read(into) => {
                for (word, bytes) in into.chunks_mut(WORD).enumerate() {
                    let value = match self.run_on_kvm(Op::Load { gpa: at(word), expect: 0 })? {
                        End::Failed(Failure::Check { found, .. }) => found,
                        other => self.came_of(other).map(|()| 0)?,
                    };
                    bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
                }
            }
        }
        Ok(())
    }

    fn run_on_kvm(&self, op: Op) -> Acted<End> {
        let vm = &self.world.vms[self.actor.vm];
        let (Some(kvm), Some(id)) = (&vm.kvm, vm.id) else { return Err(nobodys()) };
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
    }

    fn came_of(&self, end: End) -> Acted<()> {
        match end {
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
        }
    }
}

/// Up to 8 bytes as a word, zeros behind them.
fn to_word(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}
