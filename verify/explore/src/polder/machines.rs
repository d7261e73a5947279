//! The machine of a state, and what has become of it.
//!
//! Few machines stand below many states: of three million states of the configuration
//! "conversion" there are some two thousand. So each is kept once ([`Machines`]), with what was
//! worked out about it, and with what became of it by each [`Act`] that was tried. A state has a
//! pointer to its machine, and an act that was tried before is looked up.
//!
//! Two machines count as one if they hash alike; that they behave alike then is a promise of
//! [`Machine`]'s. What that hash leaves out is `mmu_invalidate_seq`: a state notes by itself
//! whether what a fault has resolved is current, and [`After::invalidates`] says when it no longer
//! is.

use std::collections::BTreeMap;
use std::rc::Rc;

use polder_machine::Machine;

use super::act::{Act, Done};
use super::kept::{KeptMachine, MOST_CPUS, Parts};

/// A machine after an act.
#[derive(Clone)]
pub(super) struct After {
    pub(super) machine: Rc<KeptMachine>,
    pub(super) done: Done,
    /// Whether what was resolved before is stale now.
    pub(super) invalidates: bool,
}

/// The most machines that are kept; what comes later is made anew each time.
const MOST_MACHINES: usize = 1 << 15;

/// By what machines are told apart.
type Hashes = (u64, [u64; MOST_CPUS], [u64; MOST_CPUS]);

/// Every machine of a search, each once, and what was tried on it.
pub(super) struct Machines {
    parts: Parts,
    known: BTreeMap<Hashes, Rc<KeptMachine>>,
    /// By a machine's number.
    tried: Vec<Vec<(Act, After)>>,
}

impl Machines {
    pub(super) fn new(parts: Parts) -> Self {
        Self { parts, known: BTreeMap::new(), tried: Vec::new() }
    }

    /// The machine that is kept for one like this.
    pub(super) fn keep(&mut self, machine: Machine) -> Rc<KeptMachine> {
        let mut kept = KeptMachine::new(machine, &self.parts);
        let hashes = (kept.hash, kept.thread_hashes, kept.vcpu_hashes);
        if let Some(known) = self.known.get(&hashes) {
            return Rc::clone(known);
        }
        if self.tried.len() == MOST_MACHINES {
            return Rc::new(kept);
        }
        kept.number = Some(self.tried.len());
        let kept = Rc::new(kept);
        self.tried.push(Vec::new());
        self.known.insert(hashes, Rc::clone(&kept));
        kept
    }

    /// What becomes of a machine by an act.
    pub(super) fn after(&mut self, machine: &KeptMachine, act: Act) -> After {
        let tried = machine.number.and_then(|number| self.tried.get(number));
        if let Some((_, after)) = tried.into_iter().flatten().find(|(other, _)| *other == act) {
            return after.clone();
        }
        let mut next = machine.machine.clone();
        let done = act.perform(&mut next, &self.parts);
        let invalidates = next.has_invalidated_since(&machine.machine, self.parts.vm);
        let after = After { machine: self.keep(next), done, invalidates };
        if let Some(number) = machine.number {
            self.tried[number].push((act, after.clone()));
        }
        after
    }
}
