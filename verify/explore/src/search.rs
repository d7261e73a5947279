//! The search: every interleaving, or some of many.
//!
//! - [`exhaust`] goes depth first through all states, each once.
//! - [`shortest`] goes breadth first to the nearest state that breaks an invariant.
//! - [`wander`] takes random ways with few preemptions, for what is too large for either.
//!
//! All of them look whether somebody goes round in a circle (`fair.rs`).

mod exhaust;
mod overlaps;
mod shortest;
mod shrink;
mod wander;

pub use self::exhaust::exhaust;
use self::overlaps::Met;
pub use self::overlaps::{Overlaps, name, possible};
pub use self::shortest::shortest;
pub use self::shrink::{shrink, tell};
pub use self::wander::wander;
use crate::system::{System, Violation};

/// One step: who, and in which of the ways open to him.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Move {
    /// The actor.
    pub actor: u8,
    /// The way.
    pub way: u8,
}

/// A way to a broken invariant.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What is broken.
    pub violation: Violation,
    /// The steps that lead there.
    pub moves: Vec<Move>,
    /// Whether they end in a circle, in which all have taken turns.
    pub circle: bool,
}

impl Finding {
    fn new(violation: Violation, moves: Vec<Move>) -> Self {
        Self { violation, moves, circle: false }
    }

    /// One that goes on in a circle behind these moves.
    fn circle((violation, turns): (Violation, Vec<Move>), mut moves: Vec<Move>) -> Self {
        moves.extend(turns);
        Self { violation, moves, circle: true }
    }
}

/// What a search came to.
#[derive(Clone, Default, Debug)]
pub struct Outcome {
    /// States, each counted once.
    pub states: usize,
    /// Steps taken.
    pub steps: u64,
    /// The longest way.
    pub depth: usize,
    /// Whether all there is was looked at.
    pub complete: bool,
    /// What was broken.
    pub finding: Option<Finding>,
    /// Which work was interrupted where by which.
    pub overlaps: Overlaps,
}

/// Told how far the search is: states, steps. Whether to go on.
pub type Progress<'a> = dyn FnMut(usize, u64) -> bool + 'a;

/// How many steps are taken between two reports.
const REPORT_EVERY: u64 = 1 << 14;

/// Nobody can go on, or only in circles of one step: broken unless everybody has done his work.
fn stuck<S: System>(system: &S) -> Option<Violation> {
    let waiting = (0..system.actors()).find(|&actor| !system.is_done(actor))?;
    let what = format!("{} waits for ever", system.name(waiting));
    Some(Violation::new("INV-8", what))
}

struct Frame<S> {
    system: S,
    /// The move that led here.
    came: Option<Move>,
    next: Move,
    fingerprint: u64,
    /// Whether a step from here changed anything.
    any: bool,
}

impl<S: System> Frame<S> {
    fn new(system: S, fingerprint: u64, came: Option<Move>) -> Self {
        Self { system, came, next: Move { actor: 0, way: 0 }, fingerprint, any: false }
    }

    /// The next move that has not been tried from here.
    fn next(&mut self) -> Option<Move> {
        while usize::from(self.next.actor) < self.system.actors() {
            if self.next.way < self.system.ways(self.next.actor.into()) {
                let now = self.next;
                self.next.way += 1;
                return Some(now);
            }
            self.next = Move { actor: self.next.actor + 1, way: 0 };
        }
        None
    }
}
