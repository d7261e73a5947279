//! Breadth first to the nearest state that breaks an invariant.

use std::collections::VecDeque;

use super::{Finding, Frame, Met, Move, Outcome, Progress, REPORT_EVERY, stuck};
use crate::fair::Fair;
use crate::fold::Seen;
use crate::system::System;

/// Finds the shortest way to a broken invariant, among the first `most` states.
pub fn shortest<S: System>(start: &S, most: usize, progress: &mut Progress<'_>) -> Outcome {
    let mut seen = Seen::new();
    let first = start.fingerprint();
    seen.insert(first);
    let mut outcome = Outcome { complete: true, ..Outcome::default() };
    let mut met = Met::new::<S>();
    // Whence each state came; what was found of it is in the queue.
    let mut came: Vec<(usize, Move)> = Vec::new();
    let way = |came: &[(usize, Move)], mut at: usize, last: Option<Move>| {
        let mut moves: Vec<Move> = last.into_iter().collect();
        while at > 0 {
            moves.push(came[at - 1].1);
            at = came[at - 1].0;
        }
        moves.reverse();
        moves
    };
    let mut fair = Fair::new();
    if let Some(circle) = fair.circle(start) {
        outcome.finding = Some(Finding::circle(circle, Vec::new()));
    }
    let mut queue = VecDeque::from([(Frame::new(start.clone(), first, None), 0)]);
    'search: while outcome.finding.is_none()
        && let Some((mut frame, at)) = queue.pop_front()
    {
        while let Some(taken) = frame.next() {
            met.note(&frame.system, taken.actor.into());
            let mut system = frame.system.clone();
            outcome.steps += 1;
            if let Err(violation) = system.take(taken.actor.into(), taken.way) {
                let moves = way(&came, at, Some(taken));
                outcome.finding = Some(Finding::new(violation, moves));
                break 'search;
            }
            let fingerprint = system.fingerprint();
            frame.any |= fingerprint != frame.fingerprint;
            if seen.insert(fingerprint) {
                if let Err(violation) = system.check() {
                    let moves = way(&came, at, Some(taken));
                    outcome.finding = Some(Finding::new(violation, moves));
                    break 'search;
                }
                if let Some(circle) = fair.sample(&system, fingerprint) {
                    let moves = way(&came, at, Some(taken));
                    outcome.finding = Some(Finding::circle(circle, moves));
                    break 'search;
                }
                came.push((at, taken));
                queue.push_back((Frame::new(system, fingerprint, None), came.len()));
            }
            let go_on =
                !outcome.steps.is_multiple_of(REPORT_EVERY) || progress(seen.len(), outcome.steps);
            if !go_on || seen.len() > most {
                outcome.complete = false;
                break 'search;
            }
        }
        if !frame.any
            && let Some(violation) = stuck(&frame.system)
        {
            outcome.finding = Some(Finding::new(violation, way(&came, at, None)));
            break;
        }
    }
    outcome.complete &= outcome.finding.is_none();
    outcome.states = seen.len();
    outcome.depth = outcome.finding.as_ref().map_or(0, |finding| finding.moves.len());
    outcome.overlaps = met.overlaps();
    outcome
}
