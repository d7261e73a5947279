//! Depth first through all states, each once.

use super::{Finding, Frame, Met, Outcome, Progress, REPORT_EVERY, stuck};
use crate::fair::Fair;
use crate::fold::Seen;
use crate::system::System;

/// Looks at every state, until one is broken, all are seen, or `progress` says to stop.
pub fn exhaust<S: System>(start: &S, progress: &mut Progress<'_>) -> Outcome {
    let mut seen = Seen::new();
    let first = start.fingerprint();
    seen.insert(first);
    let mut outcome = Outcome { complete: true, ..Outcome::default() };
    let mut met = Met::new::<S>();
    let mut fair = Fair::new();
    if let Some(circle) = fair.circle(start) {
        outcome.finding = Some(Finding::circle(circle, Vec::new()));
    }
    let mut stack = vec![Frame::new(start.clone(), first, None)];
    while outcome.finding.is_none()
        && let Some(top) = stack.last_mut()
    {
        let Some(taken) = top.next() else {
            let broken = if top.any { None } else { stuck(&top.system) };
            if let Some(violation) = broken {
                let moves = stack.iter().filter_map(|frame| frame.came).collect();
                outcome.finding = Some(Finding::new(violation, moves));
                break;
            }
            stack.pop();
            continue;
        };
        met.note(&top.system, taken.actor.into());
        let mut system = top.system.clone();
        let broken = system.take(taken.actor.into(), taken.way);
        outcome.steps += 1;
        if let Err(violation) = broken {
            let moves = stack.iter().filter_map(|frame| frame.came).chain([taken]).collect();
            outcome.finding = Some(Finding::new(violation, moves));
            break;
        }
        let fingerprint = system.fingerprint();
        top.any |= fingerprint != top.fingerprint;
        if seen.insert(fingerprint) {
            if let Err(violation) = system.check() {
                let moves = stack.iter().filter_map(|frame| frame.came).chain([taken]).collect();
                outcome.finding = Some(Finding::new(violation, moves));
                break;
            }
            if let Some(circle) = fair.sample(&system, fingerprint) {
                let moves = stack.iter().filter_map(|frame| frame.came).chain([taken]).collect();
                outcome.finding = Some(Finding::circle(circle, moves));
                break;
            }
            stack.push(Frame::new(system, fingerprint, Some(taken)));
            outcome.depth = outcome.depth.max(stack.len() - 1);
        }
        if outcome.steps.is_multiple_of(REPORT_EVERY) && !progress(seen.len(), outcome.steps) {
            outcome.complete = false;
            break;
        }
    }
    outcome.complete &= outcome.finding.is_none();
    outcome.states = seen.len();
    outcome.overlaps = met.overlaps();
    outcome
}
