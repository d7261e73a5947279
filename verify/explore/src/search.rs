//! The search: every interleaving, or some of many.
//!
//! - [`exhaust`] goes depth first through all states, each once.
//! - [`shortest`] goes breadth first to the nearest state that breaks an invariant.
//! - [`wander`] takes random ways with few preemptions, for what is too large for either.
//!
//! All of them look whether somebody goes round in a circle (`fair.rs`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::fair::Fair;
use crate::fold::Seen;
use crate::system::{Point, System, Violation};

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

/// Who was met where by whom: work, stage, and the kind of work that went on meanwhile.
pub type Overlaps = BTreeSet<(Point, u8)>;

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

/// How many steps one actor takes in a row at most, if there is another.
const IN_A_ROW: u32 = 64;

/// How long a random way is at most: eight times as long as any that was seen to end.
const LONGEST: usize = 1 << 13;

/// Nobody can go on, or only in circles of one step: broken unless everybody has done his work.
fn stuck<S: System>(system: &S) -> Option<Violation> {
    let waiting = (0..system.actors()).find(|&actor| !system.is_done(actor))?;
    let what = format!("{} waits for ever", system.name(waiting));
    Some(Violation::new("INV-8", what))
}

/// Notes in the middle of what everybody else is while an actor takes a step.
struct Met {
    /// By work and stage: a bit for each work that went on meanwhile.
    met: Vec<u32>,
}

/// The places of one work in that table.
const STAGES: usize = 64;

impl Met {
    fn new<S: System>() -> Self {
        assert!(S::WORKS.len() <= 32 && S::STAGES.len() <= STAGES, "the table is too small");
        Self { met: vec![0; S::WORKS.len() * STAGES] }
    }

    #[inline]
    fn note<S: System>(&mut self, system: &S, actor: usize) {
        let by = 1 << system.point(actor).work;
        for other in (0..system.actors()).filter(|&other| other != actor) {
            let Point { work, stage } = system.point(other);
            if stage > 0 {
                self.met[usize::from(work) * STAGES + usize::from(stage)] |= by;
            }
        }
    }

    fn overlaps(&self) -> Overlaps {
        let mut overlaps = Overlaps::new();
        for (at, &bits) in self.met.iter().enumerate() {
            let number = |number: usize| u8::try_from(number).unwrap_or(u8::MAX);
            let point = Point { work: number(at / STAGES), stage: number(at % STAGES) };
            overlaps.extend((0..32).filter(|by| bits >> by & 1 == 1).map(|by| (point, by)));
        }
        overlaps
    }
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
        let (mut left, mut last, mut in_a_row) = (preemptions, None, 0);
        loop {
            let open: Vec<u8> = (0..u8::try_from(system.actors()).unwrap_or(u8::MAX))
                .filter(|&actor| system.ways(actor.into()) > 0)
                .collect();
            if open.is_empty() || moves.len() >= LONGEST {
                break;
            }
            // Who goes round in a circle until another goes on does not keep him from it.
            let goes_on = last.filter(|actor| in_a_row < IN_A_ROW && open.contains(actor));
            let actor = match goes_on {
                Some(actor) if left == 0 || random.below(4) > 0 => actor,
                _ => open[random.below(open.len())],
            };
            left -= u32::from(goes_on.is_some_and(|other| other != actor) && left > 0);
            in_a_row = if last == Some(actor) { in_a_row + 1 } else { 0 };
            last = Some(actor);
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

/// The overlaps that the actors make possible: everybody at every point of his work, met by the
/// work of everybody else.
pub fn possible<S: System>(system: &S) -> Overlaps {
    let works: BTreeMap<usize, BTreeSet<u8>> = (0..system.actors())
        .map(|actor| (actor, system.points(actor).into_iter().map(|point| point.work).collect()))
        .collect();
    let mut all = Overlaps::new();
    for actor in 0..system.actors() {
        for point in system.points(actor).into_iter().filter(|point| point.stage > 0) {
            let others = works.iter().filter(|&(&other, _)| other != actor);
            all.extend(others.flat_map(|(_, works)| works.iter().map(move |&by| (point, by))));
        }
    }
    all
}

/// An overlap, in words.
pub fn name<S: System>((point, by): (Point, u8)) -> String {
    let (work, stage) = (S::WORKS[usize::from(point.work)], S::STAGES[usize::from(point.stage)]);
    format!("{work}, {stage}, met by {}", S::WORKS[usize::from(by)])
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
