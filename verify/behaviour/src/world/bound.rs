//! A guest with memory, and its programs.

use polder::units::{GfnRange, PageRange};
use polder::{Memory, VmId};
use polder_vmm::scenario::{Op, Visibility};
use polder_vmm::{End, Ended};

use super::{convert, fill, gfns, keeps, zero};
use crate::Guest;

/// Memory that a guest has.
pub struct Bound {
    /// The memory.
    pub memory: Memory,
    /// The VM's name there.
    pub vm: VmId,
    /// The VM.
    pub guest: Box<dyn Guest>,
}

impl Bound {
    /// The ops that convert frames full of a seed's pattern, and leave them full of it: a host that
    /// can't keep it has zeros there, which are filled again.
    pub fn converted(&self, gfns: GfnRange, to: Visibility, seed: u64) -> Vec<Op> {
        let mut ops = vec![convert(gfns, to)];
        if !keeps(&self.memory) {
            ops.extend([zero(gfns), fill(gfns, seed)]);
        }
        ops
    }

    /// The same after a conversion that the VMM asked for.
    pub fn refill(&self, range: PageRange, seed: u64) {
        if !keeps(&self.memory) {
            self.passes([zero(gfns(range)), fill(gfns(range), seed)]);
        }
    }

    /// Runs a guest of one vCPU.
    pub fn run(&self, ops: impl IntoIterator<Item = Op>) -> Ended {
        let program = ops.into_iter().chain([Op::Done]).collect();
        self.guest.run((&self.memory, self.vm), &[program])
    }

    /// Runs a guest, all of whose checks pass.
    pub fn passes(&self, ops: impl IntoIterator<Item = Op>) {
        self.pass(vec![ops.into_iter().collect()]);
    }

    /// Runs a guest of several vCPUs, all of whose checks pass.
    pub fn pass(&self, mut programs: Vec<Vec<Op>>) {
        programs.iter_mut().for_each(|ops| ops.push(Op::Done));
        let ended = self.guest.run((&self.memory, self.vm), &programs);
        let Ended { end, faults, .. } = ended;
        assert_eq!((end, faults.as_slice()), (End::Ok, [].as_slice()), "the guest");
    }
}
