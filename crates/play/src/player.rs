//! Plays a scenario: lets one actor act at a time, and compares what comes of it.
//!
//! An actor's step has come to something once it is done, held, or known to wait. An actor waits if
//! his own thread says so, or a fault thread says so of a page that he touches, several times: a
//! first time may be about an answer that is on its way. After every step, those who wait are given
//! the time to find that they need not any more: so nothing is left to chance.

mod record;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use polder::units::{PageCount, PageRange};
use polder::{HostKind, Moment, PoolCounts, View};

use crate::limits::{LOOKED_MAX, WAITS_MAX};
use crate::names::{Is, Kind};
use crate::outcome::{Outcome, Stop};
use crate::report::{Change, Played, PlayedStep, Verdict};
use crate::scenario::{Actor, Hold, Look, Place, Scenario, Step, Verb};
use crate::state::{PageState, states};
use crate::worker::{self, Job, Start};
use crate::world::{Event, Unplayable, World};

pub use record::{Recorded, record};

/// How long a step may give no sign of life.
const PATIENCE: Duration = Duration::from_secs(20);

/// The most that is heard of those who were amid a step when the scenario was over.
const ENDING: u32 = 100_000;

/// How often somebody has to be found waiting.
const ROUNDS: u32 = 3;

/// The same, where nobody is there to wait for: what is on its way may take long on a busy machine.
const ROUNDS_FOR_NOBODY: u32 = 500;

/// How often others may be told to wait while a step gives no sign of life: that is none of its own,
/// and comes every 20 ms.
const OTHERS_WAIT: u32 = 1000;

/// How many answers a touch needs at most.
const ANSWERS: u32 = 8;

/// How to play.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// Called with the memory before the first step: by a test, to plant a bug that the scenario
    /// has to notice. No scenario can ask for one.
    pub prepare: Option<&'a dyn Fn(&polder::Memory)>,
}

/// Plays a scenario on a host.
pub fn play(scenario: &Scenario, host: HostKind, options: Options<'_>) -> Played {
    let mut player = match Player::new(scenario, host, options) {
        Ok(player) => player,
        Err(verdict) => return Played::none(host, verdict),
    };
    let mut played = Played::none(host, Verdict::Passed);
    let told = player.story(&mut played);
    let ended = player.end();
    if let Err(why) = told.and(ended) {
        played.verdict = Verdict::Failed(why);
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
    fn new(scenario: &'s Scenario, host: HostKind, options: Options<'_>) -> Result<Self, Verdict> {
        let (events, heard) = channel();
        let world = World::new(scenario, host, options, events.clone());
        let world = world.map_err(|unplayable| match unplayable {
            Unplayable::Skipped(why) => Verdict::Skipped(why),
            Unplayable::Failed(why) => Verdict::Failed(why),
        })?;
        Ok(Self {
            scenario,
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
    /// Plays all steps, and looks at the end.
    fn story(&mut self, played: &mut Played) -> Result<(), String> {
        for step in &self.scenario.steps {
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

    fn audit_at_the_end(&self) -> Result<(), String> {
        let found = match self.world.memory.simulated(|machine, _, _| machine.audit()) {
            // Nobody can audit a real kernel.
            Err(_) | Ok(Ok(())) => None,
            Ok(Err(found)) => Some(found.to_string()),
        };
        match (&self.scenario.discrepancy, found) {
            (None, None) => Ok(()),
            (Some(says), Some(found)) if found.contains(says.as_str()) => Ok(()),
            (None, Some(found)) => Err(format!("the machine's audit: {found}")),
            (Some(says), Some(found)) => {
                Err(format!("the machine's audit: {found}; \"{says}\" was expected"))
            }
            (Some(says), None) => {
                Err(format!("the machine's audit is clean; \"{says}\" was expected"))
            }
        }
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

    /// Waits until an actor's step has come to something.
    fn await_actor(&mut self, number: usize, line: usize) -> Result<Outcome, String> {
        let others = self.actors.iter().enumerate().filter(|(other, _)| *other != number);
        let amid = |hand: &Hand| matches!(hand.doing, Doing::Held(_) | Doing::Waiting);
        let somebody = self.scenario.memory.owed || others.into_iter().any(|(_, hand)| amid(hand));
        let rounds = if somebody { ROUNDS } else { ROUNDS_FOR_NOBODY };
        self.others_wait = 0;
        loop {
            let hand = &mut self.actors[number];
            match &hand.doing {
                Doing::Done(outcome) => {
                    let outcome = (**outcome).clone();
                    hand.doing = Doing::Nothing;
                    return Ok(outcome);
                }
                Doing::Held(at) => return Ok(Outcome::new(Is::Held, at.clone())),
                _ if hand.found_waiting >= rounds => {
                    hand.doing = Doing::Waiting;
                    return Ok(Outcome::new(Is::Waits, ""));
                }
                _ if hand.found_waiting == 0 && self.others_wait >= OTHERS_WAIT => {
                    return Err(silent(line));
                }
                _ => self.hear(line)?,
            }
        }
    }

    /// Gives those who wait, but for one, the time to find that they need not any more.
    fn settle(&mut self, but: Option<usize>) -> Result<(), String> {
        self.listen();
        for number in 0..self.actors.len() {
            if Some(number) == but || self.actors[number].doing != Doing::Waiting {
                continue;
            }
            self.waits += 1;
            if self.waits > WAITS_MAX {
                return Err(format!("more than {WAITS_MAX} steps while somebody waits"));
            }
            (self.actors[number].found_waiting, self.actors[number].answers) = (0, 0);
            while self.actors[number].doing == Doing::Waiting
                && self.actors[number].found_waiting < ROUNDS
            {
                self.hear(0)?;
            }
        }
        Ok(())
    }

    /// Takes in what has been told already.
    fn listen(&mut self) {
        while let Ok(event) = self.heard.try_recv() {
            self.take_in(event);
        }
    }

    fn hear(&mut self, line: usize) -> Result<(), String> {
        match self.heard.recv_timeout(PATIENCE) {
            Ok(event) => {
                self.take_in(event);
                Ok(())
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(silent(line)),
        }
    }

    fn take_in(&mut self, event: Event) {
        match event {
            Event::Waits(_) | Event::TouchWaits(..) => self.others_wait += 1,
            Event::Done(..) | Event::Held(..) | Event::Moment(..) => self.others_wait = 0,
        }
        match event {
            Event::Done(number, outcome) => self.actors[number].doing = Doing::Done(outcome),
            Event::Held(number, at) => self.actors[number].doing = Doing::Held(at),
            Event::Waits(number) => {
                if self.actors[number].found_waiting == 0 {
                    self.trace_of(Some(number), "waits");
                }
                self.actors[number].found_waiting += 1;
            }
            Event::TouchWaits(view, range) => {
                for number in 0..self.actors.len() {
                    let touches = self.actors[number].touches.as_ref();
                    let is_his = touches.is_some_and(|(through, pages)| {
                        *through == view && pages.iter().any(|pages| pages.overlaps(range))
                    });
                    if is_his && matches!(self.actors[number].doing, Doing::Acting | Doing::Waiting)
                    {
                        if self.actors[number].found_waiting == 0 {
                            self.trace_of(Some(number), "waits");
                        }
                        self.actors[number].found_waiting += 1;
                    }
                }
            }
            Event::Moment(number, moment) => {
                let told = moment.to_string();
                self.trace_of(number, &told);
                if let (Moment::Answer(view, _, range), None) = (moment, number) {
                    for hand in &mut self.actors {
                        let is_his = hand.touches.as_ref().is_some_and(|(through, pages)| {
                            *through == view && pages.iter().any(|pages| pages.overlaps(range))
                        });
                        // Whoever touched goes on, unless the answer can't be carried out: then it
                        // is given again and again, as where somebody has the folio locked.
                        hand.answers += u32::from(is_his);
                        hand.found_waiting =
                            if hand.answers > ANSWERS { ROUNDS_FOR_NOBODY } else { 0 };
                    }
                }
            }
        }
    }

    fn trace_of(&mut self, number: Option<usize>, told: &str) {
        let name = number.and_then(|number| {
            self.numbers.iter().find(|(_, other)| **other == number).map(|(name, _)| name.as_str())
        });
        let line = format!("{}: {told}", name.unwrap_or("fault thread"));
        if self.trace.last() != Some(&line) {
            self.trace.push(line);
        }
    }

    /// The pages that a step is about, as far as they can be told.
    fn pages_of(&self, step: &Step, number: Option<usize>) -> Vec<PageRange> {
        if let (Verb::Resume { .. }, Some(number)) = (&step.verb, number) {
            return self.actors[number].pages.clone();
        }
        let actor = step.actor.as_ref().and_then(|name| self.scenario.actors.get(name));
        let Some(place) = step.verb.place() else { return Vec::new() };
        let vm = step.verb.vm().unwrap_or(actor.map_or(0, |actor| actor.vm));
        let Some(bytes) = step.verb.length() else {
            return self.world.pages(place, vm).unwrap_or_default();
        };
        // Those that it touches, whatever else the place has.
        let count = PageCount::new(bytes.div_ceil(polder::units::PAGE_SIZE).max(1));
        let of = |count| match place {
            Place::Gpa(gpa, _) => self.world.pages(Place::Gpa(gpa, count), vm),
            Place::Pages(range) => {
                Ok(PageRange::new(range.start(), count).into_iter().collect::<Vec<_>>())
            }
        };
        let pages = count.and_then(|count| of(count).ok());
        pages.or_else(|| of(PageCount::ONE).ok()).unwrap_or_default()
    }

    /// Through which view a step touches its pages.
    fn touches(&self, step: &Step, pages: &[PageRange]) -> Option<(View, Vec<PageRange>)> {
        let actor: &Actor = self.scenario.actors.get(step.actor.as_ref()?)?;
        let view = match (&step.verb, actor.kind) {
            (Verb::Read { .. } | Verb::Write { .. }, Kind::Device) => View::Host,
            (Verb::Read { .. } | Verb::Write { .. }, Kind::Guest) => View::Guest,
            _ => return None,
        };
        Some((view, pages.to_vec()))
    }

    fn states(&self, pages: &[PageRange]) -> Vec<(u64, PageState)> {
        let mut left = LOOKED_MAX;
        let vms = self.world.names();
        let mut found = Vec::new();
        for range in pages {
            let count = range.count().get().min(left);
            let Some(part) =
                PageCount::new(count).and_then(|count| PageRange::new(range.start(), count).ok())
            else {
                break;
            };
            left -= count;
            found.extend(states(&self.world.memory, (&vms, &self.names), part));
        }
        found
    }

    /// Checks what is so of pages.
    fn look(&self, look: &Look) -> Result<(), Stop> {
        let mut pages: VecDeque<PageRange> = self.world.pages(look.place, look.vm)?.into();
        let vms = self.world.names();
        while let Some(range) = pages.pop_front() {
            // A piece at a time: what is looked at is kept.
            let end = range.end().min(range.start().get() + LOOKED_MAX);
            let Some(now) = PageRange::between(range.start().get(), end) else { break };
            pages.extend(PageRange::between(end, range.end()));
            for (page, state) in states(&self.world.memory, (&vms, &self.names), now) {
                if let Some(why) = look.unmet(&state) {
                    return Err(Stop::new(Is::Differs, format!("page {page}: {why}")));
                }
            }
        }
        Ok(())
    }

    fn explain(&self, place: Place) -> Result<Outcome, Stop> {
        let pages = self.world.pages(place, 0)?;
        let Some(first) = pages.first() else { return Ok(Outcome::done()) };
        let explanation = self.world.memory.explain(first.start())?;
        // As it stands in what is told of a step.
        let text = explanation.to_string().trim_end().replace('\n', "\n          ");
        Ok(Outcome::new(Is::Ok, text))
    }

    fn pool(&self) -> Outcome {
        match self.world.memory.pool() {
            Some(PoolCounts { total, free, reserved, pending }) => {
                let text =
                    format!("total {total}, free {free}, reserved {reserved}, pending {pending}");
                Outcome::new(Is::Ok, text)
            }
            None => Outcome::new(Is::NotOffered, "this memory is of no pool"),
        }
    }

    fn audit(&self) -> Outcome {
        match self.world.memory.simulated(|machine, _, _| machine.audit()) {
            Ok(Ok(())) => Outcome::done(),
            Ok(Err(found)) => found.into(),
            Err(error) => error.into(),
        }
    }

    /// Has everybody end: nobody is left amid a step.
    fn end(mut self) -> Result<(), String> {
        self.listen();
        let Self { actors, heard, world, events, .. } = self;
        drop(events);
        let mut threads = Vec::new();
        let mut amid = 0;
        for hand in actors {
            amid += usize::from(hand.doing != Doing::Nothing);
            // Without anybody to resume or tell him, he goes on to his end.
            drop((hand.resume, hand.jobs));
            threads.push(hand.thread);
        }
        if amid > 0 {
            world.end();
        }
        // All threads hold an end of the channel.
        drop(world);
        // A touch whose answer fails is answered again and again: what is heard is no sign of an end.
        let mut heard_since = 0;
        loop {
            match heard.recv_timeout(PATIENCE) {
                Ok(_) if heard_since < ENDING => heard_since += 1,
                Ok(_) => return Err("the scenario is over, and a step of it never ends".into()),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    if threads.iter().all(JoinHandle::is_finished) {
                        break;
                    }
                    return Err("the scenario is over, and a step of it never ends".into());
                }
            }
        }
        let panicked = threads.into_iter().map(JoinHandle::join).any(|ended| ended.is_err());
        if panicked {
            Err("a thread of the player panicked: a bug of Polder's".into())
        } else {
            Ok(())
        }
    }
}

fn silent(line: usize) -> String {
    format!("line {line}: the step neither ends nor is known to wait")
}

fn gone(line: usize) -> String {
    format!("line {line}: the actor's thread is gone: a bug of Polder's")
}

impl Verb {
    /// The pages that it names.
    pub(crate) fn place(&self) -> Option<Place> {
        Some(match self {
            Self::Convert { place, .. }
            | Self::Want { place, .. }
            | Self::Discard { place }
            | Self::Move { place }
            | Self::Relinquish { place }
            | Self::Preload { place, .. }
            | Self::Populate { place, .. }
            | Self::Fail { place }
            | Self::Pin { place, .. }
            | Self::Refer { place, .. }
            | Self::GupFast { place, .. }
            | Self::Pvalidate { place, .. }
            | Self::Allocate { place, .. }
            | Self::Lock { place }
            | Self::Unlock { place }
            | Self::Split { place }
            | Self::Merge { place, .. }
            | Self::Map { place, .. }
            | Self::Zap { place, .. }
            | Self::Rmpupdate { place, .. }
            | Self::Psmash { place }
            | Self::Unsmash { place }
            | Self::Reclaim { place, .. }
            | Self::RmpHold { place, .. }
            | Self::Explain { place }
            | Self::RmpRelease { place } => *place,
            Self::Bind { slot, .. } => Place::Pages(slot.pages),
            Self::Read { from: bytes, .. } | Self::Write { to: bytes, .. } => bytes.place,
            Self::Look(look) => look.place,
            Self::Settle | Self::Unbind { .. } | Self::Unpin { .. } | Self::Release { .. } => {
                return None;
            }
            Self::NoMemory { .. } | Self::Resume { .. } => return None,
            Self::Create { .. } | Self::Drop { .. } | Self::Pool | Self::Audit => return None,
        })
    }

    /// The VM that it names.
    fn vm(&self) -> Option<usize> {
        match self {
            Self::Bind { vm, .. }
            | Self::Unbind { vm, .. }
            | Self::Want { vm, .. }
            | Self::Map { vm, .. }
            | Self::Zap { vm, .. }
            | Self::Rmpupdate { vm, .. } => Some(*vm),
            Self::Look(look) => Some(look.vm),
            _ => None,
        }
    }

    /// The bytes from the start of its first page to the last that it reads or writes.
    fn length(&self) -> Option<u64> {
        match self {
            Self::Read { from, length } => Some(from.at + length),
            Self::Write { to, bytes } => Some(to.at + bytes.len() as u64),
            _ => None,
        }
    }
}
