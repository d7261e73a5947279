//! Plays a scenario: lets one actor act at a time, and compares what comes of it.
//!
//! An actor's step has come to something once it is done, held, or known to wait. An actor waits if
//! his own thread says so, or a fault thread says so of a page that he touches, several times: a
//! first time may be about an answer that is on its way. After every step, those who wait are given
//! the time to find that they need not any more: so nothing is left to chance.

mod end;
mod look;
mod record;
mod wait;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use polder::units::PageRange;
use polder::{HostKind, View};

use crate::outcome::{Outcome, Stop};
use crate::report::{Change, Played, PlayedStep, Verdict};
use crate::scenario::{Hold, Scenario, Step, Verb};
use crate::watcher::Event;
use crate::worker::{self, Job, Start};
use crate::world::{Unplayable, World};

pub use record::{Recorded, record};

/// How long a step may give no sign of life.
const PATIENCE: Duration = Duration::from_secs(20);

/// How to play.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// Called with the memory before the first step: by a test, to plant a bug that the scenario
    /// has to notice. No scenario can ask for one.
    pub prepare: Option<&'a dyn Fn(&polder::Memory)>,
    /// Asked several times a second whether to leave the rest of the story.
    pub stop: Option<&'a dyn Fn() -> bool>,
}

/// Why a story has no end, where it was left.
const LEFT: &str = "interrupted";

/// Plays a scenario on a host.
pub fn play<'a>(scenario: &'a Scenario, host: HostKind, options: Options<'a>) -> Played {
    let mut player = match Player::new(scenario, host, options) {
        Ok(player) => player,
        Err(verdict) => return Played::none(host, verdict),
    };
    let mut played = Played::none(host, Verdict::Passed);
    let told = player.story(&mut played);
    let ended = player.end();
    match told.and(ended) {
        Ok(()) => {}
        Err(why) if why == LEFT => played.verdict = Verdict::Skipped(why),
        Err(why) => played.verdict = Verdict::Failed(why),
    }
    played
}

/// What an actor is doing.
#[derive(Clone, PartialEq, Debug)]
enum Doing {
    Nothing,
    /// His step goes on.
    Acting,
    /// His step is held.
    Held(String),
    /// His step waits.
    Waiting,
    /// His step has ended, and nobody has asked what came of it.
    Done(Box<Outcome>),
}

/// An actor, from outside.
struct Hand {
    doing: Doing,
    jobs: Sender<Job>,
    resume: Sender<Option<Hold>>,
    thread: JoinHandle<()>,
    /// The pages that his step touches by a view, if it does.
    touches: Option<(View, Vec<PageRange>)>,
    /// The pages that his step is about.
    pages: Vec<PageRange>,
    /// How often he was found waiting since it was asked.
    found_waiting: u32,
    /// How often his touches were answered since then.
    answers: u32,
}

struct Player<'s> {
    scenario: &'s Scenario,
    stop: Option<&'s dyn Fn() -> bool>,
    world: Arc<World>,
    events: Sender<Event>,
    heard: Receiver<Event>,
    actors: Vec<Hand>,
    /// The actors' names, to their place in `actors`.
    numbers: BTreeMap<String, usize>,
    trace: Vec<String>,
    /// The VMs' names.
    names: Arc<[String]>,
    /// How often somebody was waited for to wait.
    waits: usize,
    /// How often somebody was told to wait since a step gave a sign of life.
    others_wait: u32,
}

impl<'s> Player<'s> {
    fn new(scenario: &'s Scenario, host: HostKind, options: Options<'s>) -> Result<Self, Verdict> {
        let (events, heard) = channel();
        let world = World::new(scenario, host, options.prepare, events.clone());
        let world = world.map_err(|unplayable| match unplayable {
            Unplayable::Skipped(why) => Verdict::Skipped(why),
            Unplayable::Failed(why) => Verdict::Failed(why),
        })?;
        Ok(Self {
            scenario,
            stop: options.stop,
            world: Arc::new(world),
            events,
            heard,
            actors: Vec::new(),
            numbers: BTreeMap::new(),
            trace: Vec::new(),
            names: scenario.vms.iter().map(|vm| vm.name.clone()).collect(),
            waits: 0,
            others_wait: 0,
        })
    }
}

impl Player<'_> {
    /// Refuses where the rest is to be left.
    fn go_on(&self) -> Result<(), String> {
        match self.stop.is_some_and(|stop| stop()) {
            true => Err(LEFT.to_owned()),
            false => Ok(()),
        }
    }

    /// Plays all steps, and looks at the end.
    fn story(&mut self, played: &mut Played) -> Result<(), String> {
        for step in &self.scenario.steps {
            self.go_on()?;
            let step = self.step(step)?;
            let why = step
                .unmet
                .as_ref()
                .map(|unmet| format!("line {}: {}; {unmet}", step.line, step.outcome.line()));
            played.steps.push(step);
            if let Some(why) = why {
                return Err(why);
            }
        }
        for look in &self.scenario.expect {
            if let Err(Stop(outcome)) = self.look(look) {
                return Err(format!("line {}: {}", look.line, outcome.text));
            }
        }
        self.audit_at_the_end()
    }

    fn step(&mut self, step: &Step) -> Result<PlayedStep, String> {
        self.trace.clear();
        let number = match &step.actor {
            Some(name) => Some(self.actor(name)?),
            None => None,
        };
        self.listen();
        let pages = self.pages_of(step, number);
        let before = self.states(&pages);
        let outcome = match (&step.verb, number) {
            (Verb::Look(look), _) => {
                self.look(look).map_or_else(|Stop(outcome)| *outcome, |()| Outcome::done())
            }
            (Verb::Explain { place }, _) => {
                self.explain(*place).unwrap_or_else(|Stop(outcome)| *outcome)
            }
            (Verb::Pool, _) => self.pool(),
            (Verb::Audit, _) => self.audit(),
            (verb, Some(number)) => self.act(number, step, verb, &pages)?,
            (_, None) => return Err(format!("line {}: nobody does this", step.line)),
        };
        self.settle(number)?;
        let after = self.states(&pages);
        Ok(PlayedStep {
            line: step.line,
            actor: step.actor.clone().unwrap_or_default(),
            did: step.verb.told(self.scenario),
            unmet: outcome.unmet(&step.expect, &step.verb, step.hold),
            outcome,
            pages: Change::between(&before, &after),
            trace: std::mem::take(&mut self.trace),
        })
    }

    /// The actor's number; his thread is started when he first acts.
    fn actor(&mut self, name: &str) -> Result<usize, String> {
        if let Some(number) = self.numbers.get(name) {
            return Ok(*number);
        }
        let actor = self.scenario.actors.get(name).ok_or("an actor that the scenario has not")?;
        let number = self.actors.len();
        let ((jobs, next_job), (resume, next_resume)) = (channel(), channel());
        let start = Start {
            number,
            name: name.to_owned(),
            actor: actor.clone(),
            world: Arc::clone(&self.world),
            events: self.events.clone(),
            jobs: next_job,
            resume: next_resume,
        };
        let thread = std::thread::Builder::new()
            .name(format!("play-{number}"))
            .spawn(move || worker::run(start))
            .map_err(|error| format!("a thread can't be started: {error}"))?;
        self.actors.push(Hand {
            doing: Doing::Nothing,
            jobs,
            resume,
            thread,
            touches: None,
            pages: Vec::new(),
            found_waiting: 0,
            answers: 0,
        });
        self.numbers.insert(name.to_owned(), number);
        Ok(number)
    }

    fn act(
        &mut self,
        number: usize,
        step: &Step,
        verb: &Verb,
        pages: &[PageRange],
    ) -> Result<Outcome, String> {
        let line = step.line;
        if let Verb::Resume { hold } = verb {
            return self.resume(number, *hold, line);
        }
        let touches = self.touches(step, pages);
        let hand = &mut self.actors[number];
        if hand.doing != Doing::Nothing {
            return Err(format!("line {line}: the actor is still amid an earlier step"));
        }
        (hand.touches, hand.pages) = (touches, pages.to_vec());
        (hand.doing, hand.found_waiting, hand.answers) = (Doing::Acting, 0, 0);
        let job = Job { verb: verb.clone(), hold: step.hold };
        hand.jobs.send(job).map_err(|_| gone(line))?;
        self.await_actor(number, line)
    }

    fn resume(
        &mut self,
        number: usize,
        hold: Option<Hold>,
        line: usize,
    ) -> Result<Outcome, String> {
        let hand = &mut self.actors[number];
        match std::mem::replace(&mut hand.doing, Doing::Acting) {
            Doing::Held(_) => hand.resume.send(hold).map_err(|_| gone(line))?,
            Doing::Waiting => {}
            Doing::Done(outcome) => {
                hand.doing = Doing::Nothing;
                return Ok(*outcome);
            }
            Doing::Nothing | Doing::Acting => {
                return Err(format!("line {line}: the actor is amid nothing that could go on"));
            }
        }
        (hand.found_waiting, hand.answers) = (0, 0);
        self.await_actor(number, line)
    }
}

fn gone(line: usize) -> String {
    format!("line {line}: the actor's thread is gone: a bug of Polder's")
}
