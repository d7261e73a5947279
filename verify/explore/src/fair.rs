//! Whether everybody is done in the end if all take turns.
//!
//! A state in which nobody can go on is an end, and looked at. Who goes round in a circle never
//! comes to one, and keeps the others from it too: he can always go on. So from a sample of the
//! states all actors take turns, each the first of the ways that are open to him
//! ([`System::turn`]). In the order that is fair to all, whoever is still at work after many rounds
//! never gets his answer.
//!
//! Sampled states are few, but a circle is met from every state before it that leads into it in
//! this order. One that needs another order of turns, or a step that fails in each round, is not
//! found.

use crate::fold::Seen;
use crate::search::Move;
use crate::system::{System, Violation};

/// One state among so many is looked at.
const SAMPLE: u64 = 64;

/// After so many rounds nobody comes to an end any more: no configuration has work for half of it.
const MOST_ROUNDS: usize = 256;

/// What is known of the states from which all took turns.
pub(crate) struct Fair {
    /// States at the end of a round. From all but those of the last look everybody gets done.
    known: Seen,
}

impl Fair {
    pub(crate) fn new() -> Self {
        Self { known: Seen::new() }
    }

    /// The same as [`Fair::circle`], for a sample of the states.
    pub(crate) fn sample<S: System>(
        &mut self,
        system: &S,
        fingerprint: u64,
    ) -> Option<(Violation, Vec<Move>)> {
        if fingerprint.is_multiple_of(SAMPLE) { self.circle(system) } else { None }
    }

    /// Who never gets done though all take turns, and the turns up to where they repeat.
    ///
    /// Whatever else is broken on the way, or an end with work left, is for the search to find.
    pub(crate) fn circle<S: System>(&mut self, system: &S) -> Option<(Violation, Vec<Move>)> {
        let mut system = system.clone();
        let (mut moves, mut rounds) = (Vec::new(), Vec::new());
        while rounds.len() < MOST_ROUNDS {
            let before = moves.len();
            for actor in 0..system.actors() {
                if let Some(way) = system.turn(actor) {
                    moves.push(Move { actor: u8::try_from(actor).unwrap_or(u8::MAX), way });
                    system.take(actor, way).ok()?;
                }
            }
            if moves.len() == before {
                return None;
            }
            let now = system.fingerprint();
            if rounds.contains(&now) {
                break;
            }
            if !self.known.insert(now) {
                return None;
            }
            rounds.push(now);
        }
        let waits = |&actor: &usize| !system.is_done(actor);
        let at_work = |actor: &usize| waits(actor) && system.turn(*actor).is_some();
        let actors = || 0..system.actors();
        let who = actors().find(at_work).or_else(|| actors().find(waits))?;
        let what = format!("{} goes round and round", system.name(who));
        Some((Violation::new("INV-8", what), moves))
    }
}
