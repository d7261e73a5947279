//! The product: Polder's engine, driven over the simulated machine as `crates/polder` drives it.
//!
//! A step is what the driver does in one hold of its lock, or what host `machine` does in one hold
//! of the machine's; unmapping and flushing, which the host does together, are two. What follows
//! on the same thread and that nobody else could notice in between goes with the step before it.
//!
//! # What is not searched
//! - Wake-ups: who waits goes on as soon as he could (`polder/src/driver_tests.rs` has a test in
//!   which nobody asks again unprompted).
//! - The bounded number of looks at references: who finds only GUP-fast's waits until it has
//!   looked again, as the host does for a while.
//! - A second fault thread: the driver has one.

mod act;
mod check;
mod configs;
mod copy;
mod fault;
mod guest;
mod host;
mod kept;
mod operation;
mod points;
mod setup;
mod start;
mod story;
mod undo;

use std::cell::RefCell;
use std::hash::{Hash, Hasher};
use std::rc::Rc;

use polder_explored_engine::{
    Answer, Engine, InFlight, OpId, PinId, Response, Slot, Step, Visibility, VmId,
};
use polder_machine::{GupFast, HostPte, Resolved};
use polder_units::{Level, PageRange};

use crate::fold::Fold;
use crate::system::{Point, System, Violation};
use act::{Act, After, Done, Machines};
pub use configs::{all, named};
use kept::{KeptEngine, KeptMachine, Pages, Parts, range};
pub use setup::{Actor, Bug, Role, Setup, Slip, Task};
pub use story::story;
use story::{Came, Telling};

/// The one VM, and its one slot.
const VM: VmId = VmId(0);
const SLOT: Slot = Slot(0);

/// The most actors.
const MOST: usize = 7;

/// An answer, and what was done of it.
type Given = (Answer, Option<Response>);

/// In the middle of what an actor is.
#[derive(Clone, Copy)]
enum Stage {
    /// Before the next task.
    Idle,
    /// Its thread has died.
    Dead,

    /// A guest's fault was taken.
    GuestAsk,
    GuestAllocate(Answer, Level),
    GuestResolve(Answer, Level),
    /// With whether nothing was invalidated since.
    GuestMap(Answer, Level, Resolved, bool),
    /// With whether the page was mapped.
    GuestGive(Answer, bool),

    /// A touch of the host view waits to be answered.
    Waits,

    /// The fault thread carries out answers from the first that has not been.
    CarryOut([Option<Given>; 2], u8, Option<OpId>),
    GiveBack([Option<Given>; 2], Option<OpId>),
    /// It carries an answer out that it has given back: a bug.
    CarryOutLate(Answer),

    Drain(OpId),
    /// The bytes of a population, in two pieces.
    Write(OpId, u8),
    /// The same after the pages were shown: a bug.
    WriteLate(u8),
    /// A step of an operation's stage, in its part.
    Take(OpId, u8, Step, u8),
    Taken(OpId, u8),
    /// An operation of somebody who died is undone, or one's own: a step, in its part.
    TakeBack(OpId, Step, u8, bool),
    /// Whether that was done; whether the operation was one's own.
    TakenBack(OpId, bool, bool),
    /// The answer that a population ends with.
    Show(Answer),

    Copy(Option<InFlight>),
    Copied(Option<InFlight>),
    Held(PinId),

    Gup(GupFast),
    GupSlow,
    GupWaits,
    GupHeld(polder_machine::PinId),

    /// The slot has gone from the host, and not from the engine.
    Unbinding,
    Unbound,
    /// The slot is back in the engine, and not in the host.
    Binding,
}

#[derive(Clone, Copy)]
struct State {
    /// The task that it is at.
    at: u8,
    stage: Stage,
}

/// What the requests that were answered add up to: who may see what, told by nobody but them.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Promised {
    private: Pages,
    owed: Pages,
    quarantine: Pages,
    /// What the host was last told by `Step::Protect`.
    hardware: Pages,
    bound: bool,
    /// The token last written to each page.
    values: [u8; 8],
    /// How often each is pinned by the library.
    pins: [u8; 8],
}

/// A state of the product and all that is at work on it.
#[derive(Clone)]
pub struct World {
    setup: Rc<Setup>,
    parts: Parts,
    engine: Rc<KeptEngine>,
    machine: Rc<KeptMachine>,
    machines: Rc<RefCell<Machines>>,
    actors: [State; MOST],
    promised: Promised,
    /// Touches that wait for the fault thread.
    touched: Pages,
    /// Touches that it is answering.
    answering: Pages,
    /// What was done to hardware, by operation, in order.
    journal: [Option<(OpId, Pages)>; 6],
    failures: u8,
    deaths: u8,
    /// How many actors from each one on do the same work as it.
    alike: [u8; MOST],
    /// What is told of the last step; of a search, nothing.
    told: Option<Box<Telling>>,
}

impl World {
    /// The beginning.
    ///
    /// # Panics
    /// If the setup is none.
    pub fn new(setup: &Setup) -> Self {
        let (machine, parts) = start::machine(setup).expect("a setup for a small machine");
        let mut machines = Machines::new(parts);
        let engine = start::engine(setup);
        let setup = Rc::new(setup.clone());
        let all = Pages::MAX >> (8 - setup.pages);
        let private = if setup.initial == Visibility::Private { all } else { 0 };
        let promised = Promised {
            private,
            owed: if setup.owed { all } else { 0 },
            hardware: private,
            bound: true,
            ..Promised::default()
        };
        Self {
            engine: KeptEngine::new(engine, &setup),
            machine: machines.keep(machine),
            machines: Rc::new(RefCell::new(machines)),
            parts,
            actors: [State { at: 0, stage: Stage::Idle }; MOST],
            promised,
            touched: 0,
            answering: 0,
            journal: [None; 6],
            failures: setup.failures,
            deaths: setup.deaths,
            told: None,
            alike: start::alike(&setup),
            setup,
        }
    }

    /// Changes the engine.
    fn engine<T>(&mut self, change: impl FnOnce(&mut Engine) -> T) -> T {
        let kept = Rc::make_mut(&mut self.engine);
        let outcome = change(&mut kept.engine);
        kept.refresh(self.setup.pages);
        outcome
    }

    /// Does something to the machine.
    fn act(&mut self, act: Act) -> Done {
        let After { machine, done, invalidates } =
            self.machines.borrow_mut().after(&self.machine, act);
        self.machine = machine;
        if invalidates {
            for State { stage, .. } in &mut self.actors {
                if let Stage::GuestMap(.., current) = stage {
                    *current = false;
                }
            }
        }
        done
    }

    fn say(&mut self, line: impl FnOnce() -> String) {
        if let Some(told) = &mut self.told {
            if !told.line.is_empty() {
                told.line.push_str("; ");
            }
            told.line.push_str(&line());
        }
    }

    fn role(&self, actor: usize) -> Role {
        self.setup.actors[actor].role
    }

    fn task(&self, actor: usize) -> Option<Task> {
        self.setup.actors[actor].tasks.get(usize::from(self.actors[actor].at)).copied()
    }

    fn go(&mut self, actor: usize, stage: Stage) {
        self.actors[actor].stage = stage;
    }

    /// The task is over.
    fn done(&mut self, actor: usize) {
        self.actors[actor].at += 1;
        self.actors[actor].stage = Stage::Idle;
    }

    /// Whether a touch of the host view would be a fault now.
    fn faults(&self, role: Role, page: u8) -> bool {
        let (machine, vpn) = (&self.machine.machine, self.parts.vpn(page));
        let none = matches!(machine.host_pte(self.parts.process, vpn), Ok(HostPte::None));
        none && match role {
            Role::Thread(index) => machine.remembered(self.parts.thread(index), vpn).is_none(),
            _ => true,
        }
    }

    /// Whether somebody who waits for a touch to be answered has to go on waiting.
    fn unanswered(&self, role: Role, page: u8) -> bool {
        self.faults(role, page) && (self.touched | self.answering) & (1 << page) != 0
    }

    fn begin(&mut self, actor: usize) -> Result<(), Violation> {
        let Some(task) = self.task(actor) else { return Ok(()) };
        match task {
            Task::GuestRead(_) | Task::GuestWrite(..) => self.guest_access(actor, task),
            Task::HostRead(page) | Task::HostWrite(page, _) => self.touch(actor, task, page),
            Task::Convert { .. } | Task::Populate { .. } | Task::Discard { .. } => {
                self.claim(actor, task)
            }
            Task::CopyOut(page) | Task::CopyIn(page, _) => self.claim_copy(actor, page),
            Task::Pin(page) => self.pin(actor, page),
            Task::Gup(page) => {
                self.say(|| format!("GUP-fast of page {page} reads the page table"));
                self.begin_gup(actor, page)
            }
            Task::Rebind => self.unbind_host(actor),
        }
    }

    fn go_on(&mut self, actor: usize, way: u8) -> Result<(), Violation> {
        match self.actors[actor].stage {
            Stage::Idle if self.role(actor) == Role::Faults => self.serve(actor),
            Stage::Idle => self.begin(actor),
            Stage::Dead => Ok(()),
            Stage::GuestAsk => self.guest_ask(actor),
            Stage::GuestAllocate(answer, level) => self.guest_allocate(actor, answer, level, way),
            Stage::GuestResolve(answer, level) => self.guest_resolve(actor, answer, level),
            Stage::GuestMap(answer, level, resolved, current) => {
                self.guest_map(actor, answer, level, (resolved, current))
            }
            Stage::GuestGive(answer, mapped) => self.guest_give(actor, answer, mapped),
            Stage::Waits => self.begin(actor),
            Stage::CarryOut(given, at, undo) => self.carry_out(actor, given, at, undo, way),
            Stage::GiveBack(given, undo) => self.give_back(actor, given, undo),
            Stage::CarryOutLate(answer) => {
                let done = self.answer_host(answer.response(), answer.range());
                self.say(|| format!("carries the answer out: {}", verdict(done)));
                self.go(actor, Stage::Idle);
                Ok(())
            }
            Stage::Drain(op) => self.drained(actor, op),
            Stage::Write(op, half) => self.write(actor, op, half, way),
            Stage::WriteLate(half) => self.write_late(actor, half),
            Stage::Take(op, stage, step, part) => self.take_step(actor, op, stage, step, part, way),
            Stage::Taken(op, stage) => self.step_taken(actor, op, stage),
            Stage::TakeBack(op, step, part, own) => self.take_back(actor, op, step, part, own, way),
            Stage::TakenBack(op, done, own) => self.taken_back(actor, op, done, own),
            Stage::Show(answer) => self.show(actor, answer),
            Stage::Copy(in_flight) => self.copy(actor, in_flight),
            Stage::Copied(in_flight) => self.copied(actor, in_flight),
            Stage::Held(pin) => self.unpin(actor, pin),
            Stage::Gup(gup) => self.gup(actor, gup),
            Stage::GupSlow | Stage::GupWaits => self.gup_slow(actor),
            Stage::GupHeld(pin) => self.gup_release(actor, pin),
            Stage::Unbinding => {
                self.engine(|engine| engine.unbind(VM, SLOT)).expect("it is bound");
                self.promised.bound = false;
                self.say(|| "takes the slot out of the engine".into());
                self.go(actor, Stage::Unbound);
                Ok(())
            }
            Stage::Unbound => {
                let gfn = self.setup.gfn(self.setup.first_page);
                let pages = self.slot_pages();
                self.engine(|engine| engine.bind(VM, SLOT, gfn, pages)).expect("it was free");
                self.promised.bound = true;
                self.say(|| "puts the slot back into the engine".into());
                self.go(actor, Stage::Binding);
                Ok(())
            }
            Stage::Binding => {
                let (gfn, pages) = (self.setup.gfn(self.setup.first_page), self.slot_pages());
                self.act(Act::Bind(gfn, pages)).well();
                self.say(|| "puts the slot back into the host".into());
                self.done(actor);
                Ok(())
            }
        }
    }

    fn slot_pages(&self) -> PageRange {
        let first = self.setup.first_page;
        range(first, first + self.setup.slot_pages)
    }

    fn unbind_host(&mut self, actor: usize) -> Result<(), Violation> {
        let gfn = self.setup.gfn(self.setup.first_page);
        let zaps = !self.setup.slips(Slip::SlotNotZapped);
        self.act(Act::Unbind(gfn, zaps)).well();
        self.say(|| "takes the slot out of the host, and of stage 2".into());
        self.go(actor, Stage::Unbinding);
        Ok(())
    }

    /// In how many ways an actor can go on, whoever else would have to go first.
    fn ways_of(&self, actor: usize) -> u8 {
        let may = |so: bool| u8::from(so);
        let busy = |start: u8, end: u8| {
            let pages = kept::set(range(start, end));
            self.engine.busy & pages != 0 && !self.setup.asks_while_busy()
        };
        let role = self.role(actor);
        match self.actors[actor].stage {
            Stage::Dead => 0,
            Stage::Idle if role == Role::Faults => may(self.can_serve()),
            Stage::Idle => match self.task(actor) {
                None => 0,
                Some(
                    Task::Convert { start, end, .. }
                    | Task::Populate { start, end, .. }
                    | Task::Discard { start, end },
                ) => may(!busy(start, end)),
                Some(Task::CopyOut(_) | Task::CopyIn(..))
                    if self.setup.slips(Slip::CopyUnclaimed) =>
                {
                    1
                }
                Some(Task::CopyOut(page) | Task::CopyIn(page, _) | Task::Pin(page)) => {
                    may(!busy(page, page + 1))
                }
                Some(_) => 1,
            },
            Stage::GuestAsk => may(!self.guest_waits(actor)),
            Stage::GuestAllocate(answer, _) => 1 + may(self.failures > 0 && self.is_hole(answer)),
            Stage::Waits => match self.task(actor) {
                Some(Task::HostRead(page) | Task::HostWrite(page, _)) => {
                    may(!self.unanswered(role, page))
                }
                _ => 0,
            },
            Stage::GupWaits => match self.task(actor) {
                Some(Task::Gup(page)) => may(!self.unanswered(role, page)),
                _ => 0,
            },
            Stage::CarryOut(..) => 1 + may(self.failures > 0),
            Stage::Drain(op) => may(self.engine.engine.is_drained_of(op)),
            Stage::Write(..) => 1 + may(self.failures > 0),
            Stage::Take(_, _, step, part) => self.ways_of_step(step, part),
            Stage::TakeBack(_, _, part, _) => 1 + may(self.failures > 0 && part == 0),
            _ => 1,
        }
    }

    /// The hash of what an actor is at, and of the CPU that it runs on.
    fn hash_of(&self, actor: usize) -> u64 {
        let mut hash = Fold::new();
        let state = &mut hash;
        let State { at, stage } = self.actors[actor];
        at.hash(state);
        std::mem::discriminant(&stage).hash(state);
        let engine = &self.engine.engine;
        let place = |op: OpId| engine.place_of(op);
        let answer = |answer: Answer| {
            (engine.place_in_flight(answer.in_flight()), answer.view(), answer.response())
        };
        match stage {
            Stage::Idle | Stage::Dead | Stage::GuestAsk | Stage::Waits | Stage::GupSlow => {}
            Stage::GupWaits | Stage::Unbinding | Stage::Unbound | Stage::Binding => {}
            Stage::GuestAllocate(it, level) | Stage::GuestResolve(it, level) => {
                (answer(it), level).hash(state);
            }
            Stage::GuestMap(it, level, resolved, current) => {
                (answer(it), level, resolved, current).hash(state);
            }
            Stage::GuestGive(it, mapped) => (answer(it), mapped).hash(state),
            Stage::CarryOut(given, at, undo) => {
                let given = given.map(|given| given.map(|(it, done)| (answer(it), done)));
                (given, at, undo.map(place)).hash(state);
            }
            Stage::GiveBack(given, undo) => {
                let given = given.map(|given| given.map(|(it, done)| (answer(it), done)));
                (given, undo.map(place)).hash(state);
            }
            Stage::CarryOutLate(it) => (it.range(), it.response()).hash(state),
            Stage::Drain(op) => place(op).hash(state),
            Stage::Write(op, half) => (place(op), half).hash(state),
            Stage::WriteLate(half) => half.hash(state),
            Stage::Take(op, stage, step, part) => (place(op), stage, step, part).hash(state),
            Stage::Taken(op, stage) => (place(op), stage).hash(state),
            Stage::TakeBack(op, step, part, own) => (place(op), step, part, own).hash(state),
            Stage::TakenBack(op, done, own) => (place(op), done, own).hash(state),
            Stage::Show(it) => answer(it).hash(state),
            Stage::Copy(it) | Stage::Copied(it) => {
                it.map(|it| engine.place_in_flight(it)).hash(state);
            }
            Stage::Held(pin) => engine.place_of_pin(pin).hash(state),
            Stage::Gup(gup) => gup.hash(state),
            Stage::GupHeld(pin) => pin.hash(state),
        }
        match self.role(actor) {
            Role::Vcpu(cpu) => self.machine.vcpu_hashes[usize::from(cpu)].hash(state),
            Role::Thread(cpu) => self.machine.thread_hashes[usize::from(cpu)].hash(state),
            Role::Faults | Role::Caller | Role::Pinner => {}
        }
        hash.finish()
    }
}

fn verdict(done: bool) -> &'static str {
    if done { "done" } else { "failed" }
}

impl System for World {
    const WORKS: &'static [&'static str] = points::WORKS;
    const STAGES: &'static [&'static str] = points::STAGES;

    fn actors(&self) -> usize {
        self.setup.actors.len()
    }

    fn ways(&self, actor: usize) -> u8 {
        match self.goes_first() {
            Some(first) if first != actor => 0,
            _ => self.ways_of(actor),
        }
    }

    fn is_done(&self, actor: usize) -> bool {
        let State { stage, .. } = self.actors[actor];
        match stage {
            Stage::Dead => true,
            Stage::Idle if self.role(actor) == Role::Faults => self.touched == 0,
            Stage::Idle => self.task(actor).is_none(),
            _ => false,
        }
    }

    fn take(&mut self, actor: usize, way: u8) -> Result<(), Violation> {
        self.go_on(actor, way)
    }

    fn check(&self) -> Result<(), Violation> {
        self.check_state()
    }

    fn fingerprint(&self) -> u64 {
        let mut hash = Fold::new();
        let state = &mut hash;
        (self.engine.hash, self.machine.hash).hash(state);
        let mut actors = [0; MOST];
        let count = self.setup.actors.len();
        for (actor, hash) in actors[..count].iter_mut().enumerate() {
            *hash = self.hash_of(actor);
        }
        // Who does the same work as his neighbour could as well be him.
        let mut first = 0;
        while first < count {
            let alike = usize::from(self.alike[first]);
            if alike > 1 {
                actors[first..first + alike].sort_unstable();
            }
            first += alike;
        }
        actors[..count].hash(state);
        self.promised.hash(state);
        (self.touched, self.answering, self.failures, self.deaths).hash(state);
        for (op, pages) in self.journal.iter().flatten() {
            (self.engine.engine.place_of(*op), pages).hash(state);
        }
        hash.finish()
    }

    fn point(&self, actor: usize) -> Point {
        self.point_of(actor)
    }

    fn points(&self, actor: usize) -> Vec<Point> {
        self.all_points(actor)
    }

    fn name(&self, actor: usize) -> String {
        self.setup.actors[actor].name.to_owned()
    }

    fn tell(&mut self) {
        self.told = Some(Box::default());
    }

    fn told(&mut self) -> String {
        self.told.as_mut().map(|told| std::mem::take(&mut told.line)).unwrap_or_default()
    }
}
