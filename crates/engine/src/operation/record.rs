//! An operation from the inside: what it claims, its steps, and how far it has come.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicBool, Ordering};

use polder_units::PageRange;

use super::{Activity, Lease, OpId};
use crate::fault::InFlight;
use crate::folio::Reshape;
use crate::pin::PinGate;
use crate::plant::{Bug, Plants};
use crate::step::Undo;
use crate::{Config, Refusal, Step};

/// An operation in flight.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) id: OpId,
    pub(crate) activity: Activity,
    pub(crate) claims: Vec<PageRange>,
    /// The pages that it changes; a part of the claims.
    pub(crate) parts: Vec<PageRange>,
    /// The pages that a conversion was asked for; a part of the claims, too.
    pub(crate) asked: Vec<PageRange>,
    pub(crate) reshape: Reshape,
    pub(super) progress: Progress,
    /// Whether pins of what it changes were looked for since it claimed it, and none was found.
    pub(crate) unpinned: bool,
    /// Why it failed, if that is known.
    pub(super) why: Option<Refusal>,
    pub(crate) abandoned: Arc<AtomicBool>,
}

/// An operation that has ended. Dropped, it lets its pages be pinned again, as what they are by
/// then in the page map.
pub(crate) struct Ended {
    pub(super) record: Record,
    pub(super) gate: Option<PinGate>,
}

impl Deref for Ended {
    type Target = Record;

    fn deref(&self) -> &Record {
        &self.record
    }
}

impl DerefMut for Ended {
    fn deref_mut(&mut self) -> &mut Record {
        &mut self.record
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(gate) = &self.gate {
            self.record.claims.iter().for_each(|&claim| gate.open(claim));
        }
    }
}

/// The steps of an operation, stage by stage.
#[derive(Clone, Default, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Program {
    pub(super) steps: Vec<Step>,
    /// For each stage, the number of steps taken once it is over.
    pub(super) stage_ends: [usize; Self::MOST_STAGES],
    stages: usize,
}

impl Program {
    const MOST_STAGES: usize = 5;

    /// Adds a stage of these steps.
    pub(crate) fn stage(mut self, steps: impl Iterator<Item = Step>) -> Self {
        self.push(steps);
        self.end_stage();
        self
    }

    /// Adds steps to the stage that is being written.
    pub(crate) fn push(&mut self, steps: impl IntoIterator<Item = Step>) {
        self.steps.extend(steps);
    }

    /// Ends that stage: what follows is of the next one.
    pub(crate) fn end_stage(&mut self) {
        self.stage_ends[self.stages] = self.steps.len();
        self.stages += 1;
    }
}

/// How far a record has come.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Progress {
    Forward {
        program: Program,
        taken: usize,
        /// Whether the next step has been handed out, and so may have been done in part.
        issued: bool,
    },
    Back {
        steps: Vec<Step>,
        taken: usize,
        quarantined: Vec<PageRange>,
    },
}

impl Record {
    /// Whether it is on its way back.
    pub(crate) fn is_undoing(&self) -> bool {
        matches!(self.progress, Progress::Back { .. })
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Whether none of the answers and copies in flight is on what it claims.
    pub(super) fn is_drained(&self, in_flight: &[InFlight]) -> bool {
        let claimed = |one: &InFlight| self.claims.iter().any(|claim| claim.overlaps(one.range()));
        !in_flight.iter().any(claimed)
    }

    pub(super) fn lease(&mut self) -> Lease {
        self.abandoned = Arc::new(AtomicBool::new(false));
        Lease(Arc::clone(&self.abandoned))
    }

    /// The first page that it claims of `range`, as a range, and the claim that it is in.
    pub(crate) fn claim_on(&self, range: PageRange) -> Option<PageRange> {
        self.claims.iter().copied().find(|claim| claim.overlaps(range))
    }

    #[cfg(feature = "explore")]
    pub(crate) fn fingerprint<H: core::hash::Hasher>(&self, state: &mut H) {
        use core::hash::Hash;
        (self.activity, &self.claims, &self.parts, &self.progress, &self.reshape).hash(state);
        self.is_abandoned().hash(state);
    }

    /// Turns it round: from here on its steps are those that undo what was done.
    pub(super) fn turn_back(&mut self, plants: Plants, config: &Config) {
        let Progress::Forward { program, taken, issued } = &self.progress else { return };
        let failing = *issued && !plants.has(Bug::SkippedFailed);
        let reached = taken + usize::from(failing);
        let mut quarantined = Vec::new();
        let mut back: Vec<Step> = Vec::new();
        for step in program.steps[..reached].iter().rev() {
            match step.undo() {
                Undo::Nothing => {}
                Undo::Step(undo) => back.push(undo),
                Undo::Impossible => {
                    let range = config.granules(step.range());
                    back.push(Step::Quarantine(range));
                    quarantined.push(range);
                }
            }
        }
        if plants.has(Bug::NotReverted) {
            back.retain(|step| !matches!(step, Step::Reassign(_) | Step::Unassign(_)));
        }
        if plants.has(Bug::ForwardUndo) {
            back.reverse();
        }
        if self.activity == Activity::Population && reached == 0 {
            // The bytes are written before the first step.
            back.extend(self.parts.iter().map(|&part| Step::Free(part)));
        }
        self.progress = Progress::Back { steps: back, taken: 0, quarantined };
    }
}
