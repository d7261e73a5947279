//! A program on two hosts: recorded on the one, played on the other, compared step by step.

use polder::{HostKind, Memory};
use polder_play::{Change, Options, Outcome, Played, PlayedStep, Scenario, Verdict, play, record};

/// A host, and what is done to memory of it before it is played on.
#[derive(Clone, Copy)]
pub struct Side {
    /// The host.
    pub host: HostKind,
    /// Plants a bug that is to be found: by tests alone.
    pub prepare: Option<fn(&Memory)>,
}

impl Side {
    /// A host as it is.
    pub const fn new(host: HostKind) -> Self {
        Self { host, prepare: None }
    }
}

/// What came of a program.
#[derive(Clone, Debug)]
pub enum Came {
    /// The same, on both: what was played.
    Agreed(Played),
    /// Something else.
    Differs(Box<Difference>),
    /// A host can't be used here, and why.
    Skipped(HostKind, String),
}

/// A program that comes to something else on another host.
#[derive(Clone, Debug)]
pub struct Difference {
    /// The program, with what came of it on the first host as what is expected.
    pub scenario: Scenario,
    /// What was played on each.
    pub played: [Played; 2],
    /// The step, from 0; none if it shows at the end.
    pub step: Option<usize>,
    /// What differs, in words.
    pub what: String,
}

impl Difference {
    /// What it is about: a smaller program has the same difference if this is the same.
    pub(crate) fn kind(&self) -> (&'static str, [&'static str; 2]) {
        let Some(step) = self.step else {
            let word = |played: &Played| match &played.verdict {
                Verdict::Passed => "passed",
                Verdict::Failed(_) => "failed",
                Verdict::Skipped(_) => "skipped",
            };
            return ("", [word(&self.played[0]), word(&self.played[1])]);
        };
        let verb = self.scenario.steps.get(step).map_or("", |step| step.verb.name());
        let is = |played: &Played| played.steps.get(step).map_or("", |it| it.outcome.is.name());
        (verb, [is(&self.played[0]), is(&self.played[1])])
    }
}

/// Plays a program on both hosts.
pub fn compare(program: &Scenario, sides: &[Side; 2]) -> Came {
    let prepare = sides.map(|side| {
        move |memory: &Memory| {
            if let Some(prepare) = side.prepare {
                prepare(memory);
            }
        }
    });
    let options =
        prepare.each_ref().map(|prepare| Options { prepare: Some(prepare), ..Options::default() });
    let recorded = record(program, sides[0].host, options[0]);
    let (scenario, first) = (recorded.scenario, recorded.played);
    match &first.verdict {
        Verdict::Passed => {}
        Verdict::Skipped(why) => return Came::Skipped(sides[0].host, why.clone()),
        Verdict::Failed(why) => {
            // There is nothing to compare: it can't be so on any host.
            let what = format!("on {}: {why}", name(sides, 0));
            let second =
                Played { host: sides[1].host, verdict: Verdict::Passed, steps: Vec::new() };
            let played = [first, second];
            return Came::Differs(Box::new(Difference { scenario, played, step: None, what }));
        }
    }
    let second = play(&scenario, sides[1].host, options[1]);
    if let Verdict::Skipped(why) = &second.verdict {
        return Came::Skipped(sides[1].host, why.clone());
    }
    match difference(&first, &second) {
        None => Came::Agreed(first),
        Some((step, what)) => {
            let what = match step {
                Some(_) => what,
                None => format!("on {}: {what}", name(sides, 1)),
            };
            let played = [first, second];
            Came::Differs(Box::new(Difference { scenario, played, step, what }))
        }
    }
}

/// The first difference, if there is one: at a step, or at the end.
fn difference(first: &Played, second: &Played) -> Option<(Option<usize>, String)> {
    for (at, (one, other)) in first.steps.iter().zip(&second.steps).enumerate() {
        if let Some(what) = in_step(one, other) {
            return Some((Some(at), what));
        }
    }
    match &second.verdict {
        Verdict::Failed(why) => Some((None, why.clone())),
        Verdict::Passed | Verdict::Skipped(_) => None,
    }
}

/// What differs of a step: what it came to, or what its pages are before or after it.
fn in_step(one: &PlayedStep, other: &PlayedStep) -> Option<String> {
    if facts(&one.outcome) != facts(&other.outcome) {
        return Some(format!("{} / {}", one.outcome.line(), other.outcome.line()));
    }
    let (one, other) = (told(&one.pages), told(&other.pages));
    (one != other).then(|| format!("{} / {}", one.join("; "), other.join("; ")))
}

/// What is compared of an outcome: not its sentence, which may tell of the host.
fn facts(outcome: &Outcome) -> Outcome {
    Outcome { text: String::new(), ..outcome.clone() }
}

/// What is compared of pages: what every host knows of them. A line for each run.
fn told(pages: &[Change]) -> Vec<String> {
    let mut told: Vec<(Change, String)> = Vec::new();
    for change in pages {
        let mut change = change.clone();
        (change.before.inside, change.after.inside) = (None, None);
        match told.last_mut() {
            Some((last, _))
                if last.end == change.start
                    && last.before == change.before
                    && last.after == change.after =>
            {
                last.end = change.end;
            }
            _ => told.push((change, String::new())),
        }
    }
    told.into_iter().map(|(change, _)| change.to_string()).collect()
}

/// A side's name.
pub(crate) fn name(sides: &[Side; 2], side: usize) -> String {
    let planted = if sides[side].prepare.is_some() { " with a bug" } else { "" };
    format!("{}{planted}", sides[side].host)
}
