//! A finding as a scenario that `polder play` plays on the product (`docs/scenarios.md`).
//!
//! A scenario holds an operation between two of its steps, and nobody anywhere else. So what is
//! saved is looked for among the interleavings of that kind ([`Setup::held`]): whoever is at a
//! point where a scenario can't hold him goes on before anybody else does.
//!
//! It is told as it goes without the bug, for no scenario can plant one: who acts is taken from the
//! finding, what comes of it from the same configuration as it should be. It passes, and with the
//! bug planted it does not.

use std::fmt::Write;

use polder_explored_engine::Visibility;
use polder_machine::HostPte;

use super::kept::range;
use super::operation::pages_of;
use super::{MOST, Role, Setup, Stage, State, Task, World};
use crate::search::Finding;
use crate::system::System;

/// What came of a task, or of a piece of one that is a step of a scenario.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) enum Came {
    #[default]
    Well,
    /// It read a word.
    Read(u64),
    /// It ended by this word of a scenario.
    Is(&'static str),
}

/// What is kept for whoever tells a way.
#[derive(Clone, Default)]
pub(super) struct Telling {
    pub(super) line: String,
    pub(super) came: [Came; MOST],
}

impl World {
    /// Notes what came of an actor's task.
    pub(super) fn came(&mut self, actor: usize, came: Came) {
        if let Some(told) = &mut self.told {
            told.came[actor] = came;
        }
    }

    /// Who has to go on first, because no scenario can hold him where he is.
    pub(super) fn goes_first(&self) -> Option<usize> {
        if !self.setup.held {
            return None;
        }
        (0..self.actors()).find(|&actor| match self.actors[actor].stage {
            Stage::Idle => self.role(actor) == Role::Faults && self.has_answers(),
            Stage::Dead | Stage::Drain(_) | Stage::Held(_) => false,
            Stage::Take(_, _, _, 0) | Stage::Write(_, 0) => false,
            Stage::Gup(_) | Stage::GupSlow | Stage::GupHeld(_) => false,
            Stage::GuestAsk => !self.guest_has_to_wait(actor),
            _ => self.ways_of(actor) > 0,
        })
    }
}

/// A scenario being written.
struct Story {
    world: World,
    /// Its steps so far.
    text: String,
    /// Who has acted.
    acts: [bool; MOST],
    /// In which task each one waits, in the scenario, if he does.
    waits: [Option<u8>; MOST],
    /// How many steps each one's operation has taken.
    taken: [u8; MOST],
}

/// Tells a finding of a configuration as a scenario.
///
/// # Errors
/// What of it no scenario can say.
pub fn story(setup: &Setup, finding: &Finding, about: &str) -> Result<String, String> {
    let right = Setup { bug: None, ..setup.clone() };
    let mut world = World::new(&right);
    world.tell();
    let (text, none) = (String::new(), [None; MOST]);
    let mut story = Story { world, text, acts: [false; MOST], waits: none, taken: [0; MOST] };
    let mut bugs = World::new(setup);
    for now in &finding.moves {
        let actor = usize::from(now.actor);
        if bugs.goes_first().is_none() {
            story.turn(actor)?;
        }
        // The last one breaks something.
        let _ = bugs.take(actor, now.way);
    }
    if story.world.engine.idle {
        story.text.push_str("\n[[step]]\ndo = \"audit\"\n");
    }
    story.look("[[step]]\ndo = \"look\"");
    story.end()?;
    story.look("[[expect]]");
    let head = story.head(finding.violation.invariant, about);
    Ok(head + &story.text)
}

const RESUME: &str = "do = \"resume\"";
const WAITS: &str = "expect = \"waits\"\n";
const ZEROS: &str = "expect = { zeros = true }\n";

fn refer(page: u8) -> String {
    format!("do = \"refer\"\npage = {page}\nname = \"gup\"")
}

/// A token, as long as a word.
fn bytes(token: u8) -> String {
    format!("token {token:02}")
}

/// What a task is called, and what it is about.
fn verb(task: Task) -> Result<String, String> {
    let one = |verb: &str, page: u8| format!("do = \"{verb}\"\npage = {page}");
    let run =
        |verb: &str, start: u8, end: u8| format!("do = \"{verb}\"\npages = \"{start}..{end}\"");
    Ok(match task {
        Task::GuestRead(page) | Task::HostRead(page) | Task::CopyOut(page) => one("read", page),
        Task::GuestWrite(page, token)
        | Task::HostWrite(page, token)
        | Task::CopyIn(page, token) => {
            format!("{}\nbytes = \"{}\"", one("write", page), bytes(token))
        }
        Task::Convert { start, end, to, contents } => {
            format!("{}\nto = \"{to}\"\ncontents = \"{contents}\"", run("convert", start, end))
        }
        Task::Populate { start, end, value } => {
            format!("{}\nbytes = \"{}\"", run("populate", start, end), bytes(value))
        }
        Task::Discard { start, end } => run("discard", start, end),
        Task::Pin(page) => format!("{}\nname = \"pin\"", one("pin", page)),
        Task::Gup(page) => format!("{}\nname = \"gup\"", one("gup-fast", page)),
        Task::Move { .. }
        | Task::Want(..)
        | Task::DmaWrite(..)
        | Task::PinExclusive(_)
        | Task::PinUnlocked(_)
        | Task::PinAlone(_)
        | Task::HypervisorFails(_) => return Err("a task that no scenario is told of yet".into()),
        Task::Prefault { .. } | Task::CopiedWrite(..) | Task::Unbind => {
            return Err("a task that no scenario is told of yet".into());
        }
        Task::Rebind => return Err("a slot that is deleted in two parts".into()),
        _ => return Err("what an SNP guest, the kernel or another CPU does".into()),
    })
}

impl Story {
    /// What comes before its steps.
    fn head(&self, invariant: &str, about: &str) -> String {
        let setup = &self.world.setup;
        let mut text = format!(
            "about = \"Found by `polder check`, with this planted: {about}\"\n\
             invariant = \"{invariant}\"\n\n[memory]\npages = {}\nstarts = \"{}\"\n",
            setup.pages, setup.initial
        );
        if setup.owed {
            text.push_str("owed = true\n");
        }
        for (actor, _) in setup.actors.iter().zip(self.acts).filter(|(_, acts)| *acts) {
            let is = match actor.role {
                Role::Vcpu(_) => "guest",
                Role::Thread(_) | Role::Pinner => "device",
                _ => "vmm",
            };
            let _ = write!(text, "\n[[actor]]\nname = \"{}\"\nis = \"{is}\"\n", actor.name);
        }
        text
    }

    fn step(&mut self, actor: usize, does: &str, comes_to: &str) {
        let name = self.world.setup.actors[actor].name;
        self.acts[actor] = true;
        let _ = write!(self.text, "\n[[step]]\nactor = \"{name}\"\n{does}\n{comes_to}");
    }

    /// An actor acts, as far as to where he can be held next.
    fn turn(&mut self, actor: usize) -> Result<(), String> {
        let Some(task) = self.world.task(actor) else { return Ok(()) };
        if self.waits[actor].is_some() {
            return Ok(());
        }
        let State { at, stage, .. } = self.world.actors[actor];
        let idle = matches!(stage, Stage::Idle);
        if self.world.ways(actor) == 0 {
            if idle {
                self.waits[actor] = Some(at);
                self.step(actor, &verb(task)?, WAITS);
            }
            return Ok(());
        }
        if idle {
            self.taken[actor] = 0;
        }
        let does = match stage {
            Stage::Idle | Stage::Gup(_) => verb(task)?,
            Stage::GupSlow => return self.slow(actor, task),
            Stage::GupHeld(_) => "do = \"release\"\nname = \"gup\"".into(),
            Stage::Held(_) => "do = \"unpin\"\nname = \"pin\"".into(),
            _ => RESUME.into(),
        };
        self.go(actor)?;
        let comes_to = self.comes_to(actor, task, at);
        self.step(actor, &does, &comes_to);
        self.others()
    }

    /// The kernel's slow path: a touch of the page if it is not mapped, and then a reference of it.
    fn slow(&mut self, actor: usize, task: Task) -> Result<(), String> {
        let Task::Gup(page) = task else { return Ok(()) };
        let touches = self.world.faults(Role::Pinner, page);
        let at = self.world.actors[actor].at;
        self.go(actor)?;
        let comes_to = self.comes_to(actor, task, at);
        if touches {
            self.step(actor, &format!("do = \"read\"\npage = {page}"), &comes_to);
        }
        if !touches || comes_to.is_empty() {
            self.step(actor, &refer(page), &comes_to);
        }
        self.others()
    }

    /// Takes a step of an actor, and then of all who can't be held where they are.
    fn go(&mut self, actor: usize) -> Result<(), String> {
        let mut next = Some(actor);
        while let Some(actor) = next {
            if matches!(self.world.actors[actor].stage, Stage::Taken(..)) {
                self.taken[actor] += 1;
            }
            let broken = self.world.take(actor, 0).and_then(|()| self.world.check());
            broken.map_err(|violation| format!("without the bug, {violation}"))?;
            next = self.world.goes_first();
        }
        Ok(())
    }

    /// An actor goes on until his task is over.
    fn finish(&mut self, actor: usize) -> Result<(), String> {
        let at = self.world.actors[actor].at;
        while self.world.actors[actor].at == at {
            if self.world.ways(actor) == 0 {
                return Err(format!("{} can't go on to his end", self.world.name(actor)));
            }
            self.go(actor)?;
        }
        Ok(())
    }

    /// What a step of an actor's task comes to: where he is held, that he waits, what came of it.
    fn comes_to(&mut self, actor: usize, task: Task, at: u8) -> String {
        let now = self.world.actors[actor];
        if now.at == at {
            match now.stage {
                Stage::Drain(_) => return "hold = \"claimed\"\n".into(),
                Stage::Write(..) => return "hold = \"drained\"\n".into(),
                Stage::Take(..) => return format!("hold = {}\n", self.taken[actor] + 1),
                Stage::Waits | Stage::GupWaits | Stage::GuestAsk => {
                    self.waits[actor] = Some(at);
                    return WAITS.into();
                }
                _ => {}
            }
        }
        let came = self.world.told.as_mut().map(|told| std::mem::take(&mut told.came[actor]));
        match came.unwrap_or_default() {
            Came::Well => String::new(),
            Came::Is(word) => format!("expect = \"{word}\"\n"),
            Came::Read(word) => match word.to_le_bytes()[0] {
                0 => ZEROS.into(),
                token if self.is_behind_a_population(task, token) => ZEROS.into(),
                token => format!("expect = {{ bytes = \"{}\" }}\n", bytes(token)),
            },
        }
    }

    /// Whether a page read is not the first of a population: a scenario's has zeros there.
    fn is_behind_a_population(&self, task: Task, token: u8) -> bool {
        let page = pages_of(task).start();
        let mut tasks = self.world.setup.actors.iter().flat_map(|actor| &actor.tasks);
        tasks.any(|task| match *task {
            Task::Populate { start, end, value } => {
                value == token && range(start, end).start() < page
            }
            _ => false,
        })
    }

    /// Those who waited, and need not any more, go on by themselves: what came of it is asked.
    fn others(&mut self) -> Result<(), String> {
        for actor in 0..self.world.actors() {
            let Some(at) = self.waits[actor] else { continue };
            let task = self.world.setup.actors[actor].tasks[usize::from(at)];
            let now = self.world.actors[actor];
            let begins = matches!(now.stage, Stage::Idle) && self.world.ways(actor) > 0;
            if now.at == at && begins {
                self.taken[actor] = 0;
                self.finish(actor)?;
            }
            let goes_on = matches!(now.stage, Stage::GupHeld(_));
            if self.world.actors[actor].at == at && !goes_on {
                continue;
            }
            self.waits[actor] = None;
            let comes_to = self.comes_to(actor, task, at);
            self.step(actor, RESUME, &comes_to);
            if let (Task::Gup(page), true) = (task, goes_on) {
                self.step(actor, &refer(page), "");
            }
        }
        Ok(())
    }

    /// Everybody who is amid something ends it.
    fn end(&mut self) -> Result<(), String> {
        let mut went = true;
        while std::mem::take(&mut went) {
            for actor in 0..self.world.actors() {
                let State { at, stage, .. } = self.world.actors[actor];
                let Some(task) = self.world.task(actor) else { continue };
                let over = matches!(stage, Stage::Idle | Stage::GupSlow);
                if over || self.waits[actor].is_some() || self.world.ways(actor) == 0 {
                    continue;
                }
                went = true;
                if matches!(stage, Stage::Gup(_) | Stage::GupHeld(_) | Stage::Held(_)) {
                    self.turn(actor)?;
                    continue;
                }
                self.finish(actor)?;
                let comes_to = self.comes_to(actor, task, at);
                self.step(actor, RESUME, &comes_to);
                self.others()?;
            }
            went |= !went && self.waits.iter().any(Option::is_some) && self.another_caller()?;
        }
        let amid = |&actor: &usize| {
            let stage = self.world.actors[actor].stage;
            self.waits[actor].is_some() || !matches!(stage, Stage::Idle | Stage::GupSlow)
        };
        match (0..self.world.actors()).find(amid) {
            Some(actor) => Err(format!("{} does not come to an end", self.world.name(actor))),
            None => Ok(()),
        }
    }

    /// A caller does his next task: somebody may wait for it. Whether there was one.
    fn another_caller(&mut self) -> Result<bool, String> {
        let can = |&actor: &usize| {
            let idle = matches!(self.world.actors[actor].stage, Stage::Idle);
            idle && self.world.role(actor) == Role::Caller && self.world.ways(actor) > 0
        };
        let Some(actor) = (0..self.world.actors()).find(can) else { return Ok(false) };
        let (at, task) = (self.world.actors[actor].at, self.world.task(actor));
        let Some(task) = task else { return Ok(false) };
        self.finish(actor)?;
        let comes_to = self.comes_to(actor, task, at);
        self.step(actor, &verb(task)?, &comes_to);
        self.others()?;
        Ok(true)
    }

    /// What is so of each page now.
    fn look(&mut self, head: &str) {
        for page in 0..self.world.setup.pages {
            let private = self.world.promised.private & 1 << page != 0;
            let visibility = if private { Visibility::Private } else { Visibility::Shared };
            let machine = &self.world.machine.machine;
            let parts = &self.world.parts;
            let view = match machine.host_pte(parts.process, parts.vpn(page)) {
                Ok(HostPte::Mapped { .. }) => "mapped",
                Ok(HostPte::Poison) => "denied",
                _ => "absent",
            };
            // A pin maps its page beforehand, which the search leaves to a touch.
            let mapped_by_pin =
                view == "absent" && self.text.contains(&format!("do = \"pin\"\npage = {page}\n"));
            let _ = write!(self.text, "\n{head}\npage = {page}\nvisibility = \"{visibility}\"\n");
            if !mapped_by_pin {
                let _ = writeln!(self.text, "host-view = \"{view}\"");
            }
        }
    }
}
