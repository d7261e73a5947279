//! Random ways with few preemptions, for what is too large to be looked at as a whole.

use super::{Finding, Met, Move, Outcome, Progress, REPORT_EVERY, stuck};
use crate::fair::Fair;
use crate::fold::Seen;
use crate::system::System;

/// How many steps one actor takes in a row at most, if there is another.
const IN_A_ROW: u32 = 64;

/// How long a random way is at most: eight times as long as any that was seen to end.
const LONGEST: usize = 1 << 13;

/// Takes random ways from start to end, one after the other, each with at most `preemptions`
/// changes of actor that nobody had to make, until one is broken or `progress` says to stop.
pub fn wander<S: System>(
    start: &S,
    seed: u64,
    preemptions: u32,
    progress: &mut Progress<'_>,
) -> Outcome {
    let mut seen = Seen::new();
    let mut outcome = Outcome::default();
    let mut met = Met::new::<S>();
    let mut fair = Fair::new();
    let mut random = Random(seed.wrapping_mul(2).wrapping_add(1));
    loop {
        let mut system = start.clone();
        let mut moves: Vec<Move> = Vec::new();
        let mut turns = Turns { preemptions, last: None, in_a_row: 0 };
        loop {
            let open: Vec<u8> = (0..u8::try_from(system.actors()).unwrap_or(u8::MAX))
                .filter(|&actor| system.ways(actor.into()) > 0)
                .collect();
            if open.is_empty() || moves.len() >= LONGEST {
                break;
            }
            let actor = turns.next(&open, &mut random);
            let ways = usize::from(system.ways(actor.into()));
            let way = u8::try_from(random.below(ways)).unwrap_or(0);
            met.note(&system, actor.into());
            moves.push(Move { actor, way });
            let broken = system.take(actor.into(), way).and_then(|()| system.check());
            outcome.steps += 1;
            let fingerprint = system.fingerprint();
            seen.insert(fingerprint);
            let stop =
                outcome.steps.is_multiple_of(REPORT_EVERY) && !progress(seen.len(), outcome.steps);
            if let Err(violation) = broken {
                outcome.finding = Some(Finding::new(violation, moves.clone()));
            } else if let Some(circle) = fair.sample(&system, fingerprint) {
                outcome.finding = Some(Finding::circle(circle, moves.clone()));
            }
            if stop || outcome.finding.is_some() {
                break;
            }
        }
        outcome.depth = outcome.depth.max(moves.len());
        let ended = (0..system.actors()).all(|actor| system.ways(actor) == 0);
        if outcome.finding.is_none()
            && ended
            && let Some(violation) = stuck(&system)
        {
            outcome.finding = Some(Finding::new(violation, moves));
        } else if outcome.finding.is_none()
            && !ended
            && let Some(circle) = fair.circle(&system)
        {
            outcome.finding = Some(Finding::circle(circle, moves));
        }
        outcome.states = seen.len();
        if outcome.finding.is_some() || !progress(seen.len(), outcome.steps) {
            outcome.overlaps = met.overlaps();
            return outcome;
        }
    }
}

/// Whose turn it is.
struct Turns {
    /// How many changes of actor are left that nobody has to make.
    preemptions: u32,
    last: Option<u8>,
    in_a_row: u32,
}

impl Turns {
    /// Who takes the next step, of those who can.
    fn next(&mut self, open: &[u8], random: &mut Random) -> u8 {
        // Who goes round in a circle until another goes on does not keep him from it.
        let may_go_on = |actor: &u8| self.in_a_row < IN_A_ROW && open.contains(actor);
        let goes_on = self.last.filter(may_go_on);
        let actor = match goes_on {
            Some(actor) if self.preemptions == 0 || random.below(4) > 0 => actor,
            _ => open[random.below(open.len())],
        };
        let preempted = goes_on.is_some_and(|other| other != actor);
        self.preemptions = self.preemptions.saturating_sub(u32::from(preempted));
        self.in_a_row = if self.last == Some(actor) { self.in_a_row + 1 } else { 0 };
        self.last = Some(actor);
        actor
    }
}

/// A sequence that looks random and is the same for the same seed: xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let bound = bound.max(1) as u64;
        usize::try_from((self.0 >> 11) % bound).unwrap_or(0)
    }
}
