//! A guest with memory, and its programs.

use polder::units::{GfnRange, Gpa, PAGE_SIZE, PageRange};
use polder::{Memory, VmId};
use polder_vmm::scenario::{Op, Visibility};
use polder_vmm::{End, Ended};

use super::ranges::walked;
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
        self.guest.run((&self.memory, self.vm), &[program(ops)])
    }

    /// Runs a guest, all of whose checks pass.
    pub fn passes(&self, ops: impl IntoIterator<Item = Op>) {
        self.pass(vec![ops.into_iter().collect()]);
    }

    /// Runs a guest of several vCPUs, all of whose checks pass.
    pub fn pass(&self, programs: Vec<Vec<Op>>) {
        let programs: Vec<_> = programs.into_iter().map(program).collect();
        let ended = self.guest.run((&self.memory, self.vm), &programs);
        let Ended { end, faults, .. } = ended;
        assert_eq!((end, faults.as_slice()), (End::Ok, [].as_slice()), "the guest");
    }
}

/// The ops, each about the pages that are [`walked`] of its own, and the end.
fn program(ops: impl IntoIterator<Item = Op>) -> Vec<Op> {
    ops.into_iter().flat_map(walk).chain([Op::Done]).collect()
}

fn walk(op: Op) -> Vec<Op> {
    let parts = |gpa: Gpa, pages: u64| {
        assert!(gpa.get().is_multiple_of(PAGE_SIZE), "{op:?}");
        let start = gpa.get() / PAGE_SIZE;
        let parts = walked(start, start + pages);
        parts.map(|(start, end)| (Gpa::new(start * PAGE_SIZE), end - start))
    };
    match op {
        Op::Fill { gpa, len, pattern } => parts(gpa, len / PAGE_SIZE)
            .map(|(gpa, pages)| Op::Fill { gpa, len: pages * PAGE_SIZE, pattern })
            .collect(),
        Op::Check { gpa, len, pattern } => parts(gpa, len / PAGE_SIZE)
            .map(|(gpa, pages)| Op::Check { gpa, len: pages * PAGE_SIZE, pattern })
            .collect(),
        Op::Probe { gpa, pages, expect } => {
            parts(gpa, pages).map(|(gpa, pages)| Op::Probe { gpa, pages, expect }).collect()
        }
        op => vec![op],
    }
}
