//! A finding made shorter, and told.

use super::{Finding, Move, stuck};
use crate::fair::Fair;
use crate::system::System;

/// Leaves out of a way whatever it breaks the same invariant without: halves, then quarters, and
/// in the end single steps. A step that can't be taken where it comes is left out too.
pub fn shrink<S: System>(start: &S, finding: &Finding) -> Finding {
    let mut best = finding.clone();
    let mut chunk = best.moves.len().div_ceil(2);
    while chunk > 0 {
        let mut at = 0;
        while at < best.moves.len() {
            let mut moves = best.moves.clone();
            moves.drain(at..(at + chunk).min(moves.len()));
            match follow(start, &moves) {
                Some(shorter)
                    if shorter.violation.invariant == best.violation.invariant
                        && shorter.moves.len() < best.moves.len() =>
                {
                    best = shorter;
                }
                _ => at += chunk,
            }
        }
        chunk /= 2;
    }
    best
}

/// Follows a way as far as it breaks something; what can't be taken is passed over.
fn follow<S: System>(start: &S, moves: &[Move]) -> Option<Finding> {
    let mut system = start.clone();
    let mut taken = Vec::new();
    for &now in moves {
        if now.way >= system.ways(now.actor.into()) {
            continue;
        }
        taken.push(now);
        let broken = system.take(now.actor.into(), now.way).and_then(|()| system.check());
        if let Err(violation) = broken {
            return Some(Finding::new(violation, taken));
        }
    }
    let ended = (0..system.actors()).all(|actor| system.ways(actor) == 0);
    if ended {
        return stuck(&system).map(|violation| Finding::new(violation, taken));
    }
    Fair::new().circle(&system).map(|circle| Finding::circle(circle, taken))
}

/// A finding as a person reads it: a line for each step.
pub fn tell<S: System>(start: &S, finding: &Finding) -> Vec<String> {
    let mut system = start.clone();
    system.tell();
    let mut lines = Vec::new();
    for taken in &finding.moves {
        let name = system.name(taken.actor.into());
        let broken = system.take(taken.actor.into(), taken.way).is_err();
        lines.push(format!("{name}: {}", system.told()));
        if broken {
            break;
        }
    }
    lines
}
