//! The product: Polder's engine, driven over the simulated machine as `crates/polder` drives it.
//!
//! A step is what the driver does in one hold of its lock, or what host `machine` does in one hold
//! of the machine's; unmapping and flushing, which the host does together, are two. What follows
//! on the same thread and that nobody else could notice in between goes with the step before it.
//!
//! # What is not searched
//! - Wake-ups: who waits goes on as soon as he could (`polder/src/driver/tests.rs` has a test in
//!   which nobody asks again unprompted).
//! - The bounded number of looks at references: who finds only GUP-fast's waits until it has
//!   looked again, as the host does for a while.
//! - A second fault thread: the driver has one.
//! - Memory that is freed in part: the host frees folio by folio, a hold of its lock each.

mod act;
mod agents;
mod check;
mod configs;
mod copy;
mod fault;
mod folio;
mod guest;
mod hardware;
mod host;
mod kept;
mod machines;
mod merge;
mod operation;
mod pins;
mod pkvm;
mod points;
mod prefault;
mod private;
mod rmp;
mod setup;
mod slot;
mod stage;
mod start;
mod story;
mod system;
mod take;
mod undo;
mod ways;

use std::cell::RefCell;
use std::hash::Hash;
use std::rc::Rc;

use polder_explored_engine::{Engine, OpId, Slot, Visibility, VmId};
use polder_machine::HostPte;

use crate::system::Violation;
use act::{Act, Done};
pub use configs::{all, named};
use kept::{KeptEngine, KeptMachine, Pages, Parts};
use machines::{After, Machines};
use prefault::{Ahead, Step};
pub use setup::{Actor, Bug, Role, Setup, Slip, Task};
use stage::{Given, Stage};
pub use story::story;
use story::{Came, Telling};

/// The one VM, and its one slot.
const VM: VmId = VmId(0);
const SLOT: Slot = Slot(0);

/// The most actors.
const MOST: usize = 7;

#[derive(Clone, Copy)]
struct State {
    /// The task that it is at.
    at: u8,
    /// How often hardware has refused its access.
    refusals: u8,
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
    /// Pages whose bytes nobody was promised.
    unknown: Pages,
    /// Those that an SNP guest has accepted, and did not ask to share since.
    accepted: Pages,
    /// Those that are the guest's in the RMP: private ones that had memory when they became so.
    given: Pages,
    /// Those that a guest has touched at some time; of a huge page, all of it.
    used: Pages,
    /// Those that were written to since others have them, too.
    apart: Pages,
    /// How often each is pinned by the library.
    pins: [u8; 8],
    /// The same, of exclusive pins.
    alone: [u8; 8],
    /// Of memory of a pool, the level of the folio that each page is to be of.
    folios: [u8; 8],
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
    /// Touches that nobody knows of any more: a bug.
    lost: Pages,
    /// What was done to hardware, by operation, in order, and (`true`) what memory was freed.
    journal: [Option<(OpId, bool, Pages)>; 6],
    /// What was unassigned, and may be given back: `polder/src/host/machine/rmp/taken.rs`.
    taken: rmp::Taken,
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
            unknown: private,
            accepted: if setup.accepted { all } else { 0 },
            given: if setup.accepted { all } else { 0 },
            values: start::values(&setup),
            folios: [folio::first(&setup); 8],
            ..Promised::default()
        };
        Self {
            engine: KeptEngine::new(engine, &setup),
            machine: machines.keep(machine),
            machines: Rc::new(RefCell::new(machines)),
            parts,
            actors: [State { at: 0, refusals: 0, stage: Stage::Idle }; MOST],
            promised,
            touched: 0,
            answering: 0,
            lost: 0,
            journal: [None; 6],
            taken: rmp::Taken::default(),
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
                match stage {
                    Stage::GuestMap(.., current) => *current = false,
                    Stage::Ahead(Ahead { step: Step::Map(.., current), .. }) => *current = false,
                    _ => {}
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
        let at = self.actors[actor].at + 1;
        self.actors[actor] = State { at, refusals: 0, stage: Stage::Idle };
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
        self.faults(role, page) && (self.touched | self.answering | self.lost) & (1 << page) != 0
    }

    fn begin(&mut self, actor: usize) -> Result<(), Violation> {
        let Some(task) = self.task(actor) else { return Ok(()) };
        match task {
            Task::GuestRead(_) | Task::GuestWrite(..) => self.guest_access(actor, task),
            Task::Accept(_)
            | Task::AcceptLarge(_)
            | Task::PrivateRead(_)
            | Task::PrivateWrite(..) => self.guest_access(actor, task),
            Task::Split(page) | Task::Collapse(page) => self.lock_folio(actor, page),
            Task::OtherWrite(page, value) => self.other_write(actor, page, value),
            Task::Want(page, to) => self.want(actor, page, to),
            Task::DmaWrite(page, value) => self.dma_write(actor, page, value),
            Task::PinExclusive(_) => self.gup_slow(actor),
            Task::HypervisorFails(nth) => self.hypervisor_fails(actor, nth),
            Task::Hold(page, large) => self.hold(actor, page, large),
            Task::HostRead(page) | Task::HostWrite(page, _) => self.touch(actor, task, page),
            Task::Convert { .. }
            | Task::Populate { .. }
            | Task::Discard { .. }
            | Task::Move { .. }
            | Task::Merge { .. } => self.claim(actor, task),
            Task::CopyOut(page) | Task::CopyIn(page, _) => self.claim_copy(actor, page),
            Task::Pin(page) => self.pin(actor, page),
            Task::PinUnlocked(page) => self.count_pin(actor, page),
            Task::PinAlone(page) => self.wait_alone(actor, page),
            Task::Gup(page) => {
                self.say(|| format!("GUP-fast of page {page} reads the page table"));
                self.begin_gup(actor, page)
            }
            Task::Rebind | Task::Unbind => self.unbind_host(actor),
            Task::Prefault { start, .. } => {
                self.prefault(actor, Ahead { next: start, step: Step::Between }, 0)
            }
            Task::CopiedWrite(page, value) => self.copied_write(actor, page, value),
        }
    }

    fn go_on(&mut self, actor: usize, way: u8) -> Result<(), Violation> {
        if let Some(op) = self.dies_on(actor, way) {
            self.die(actor, op);
            return Ok(());
        }
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
            Stage::Ahead(ahead) => self.prefault(actor, ahead, way),
            Stage::Give(answer, level) => self.give(actor, answer, level),
            Stage::Donate(answer) => self.donate(actor, answer),
            Stage::SizeAsk => self.size_ask(actor),
            Stage::SizeLook(answer) => self.size_look(actor, answer),
            Stage::SizeSmash(answer, head) => self.size_smash(actor, answer, head),
            Stage::SizeZap(answer) => self.size_zap(actor, answer),
            Stage::SizeGive(answer) => self.size_give(actor, answer),
            Stage::Waits => self.begin(actor),
            Stage::CarryOut(given, at, undo) => self.carry_out(actor, given, at, undo, way),
            Stage::GiveBack(given, undo) => self.give_back(actor, given, undo),
            Stage::CarryOutLate(answer) => self.carry_out_late(actor, answer),
            Stage::Drain(op) => self.drained(actor, op),
            Stage::Write(op, half) => self.write(actor, op, half, way),
            Stage::WriteLate(half) => self.write_late(actor, half),
            Stage::DirectMapLate => self.direct_map_late(actor),
            Stage::Take(op, stage, step, part) => self.take_step(actor, op, stage, step, part, way),
            Stage::Taken(op, stage) => self.step_taken(actor, op, stage),
            Stage::TakeBack(op, step, part, own) => self.take_back(actor, op, step, part, own, way),
            Stage::TakenBack(op, done, own) => self.taken_back(actor, op, done, own),
            Stage::Show(answer) => self.show(actor, answer),
            Stage::Copy(in_flight) => self.copy(actor, in_flight),
            Stage::Copied(in_flight) => self.copied(actor, in_flight),
            Stage::Held(pin) => self.unpin(actor, pin),
            Stage::Counted(pin) => self.look_at_gate(actor, pin),
            Stage::Looked => self.count_late(actor),
            Stage::AskPin => self.ask_for_pin(actor),
            Stage::Alone(waiting) => self.pin_alone(actor, waiting),
            Stage::Gup(gup) => self.gup(actor, gup),
            Stage::GupSlow | Stage::GupWaits => self.gup_slow(actor),
            Stage::GupHeld(pin) => self.gup_release(actor, pin),
            Stage::Unbinding => self.unbind_engine(actor),
            Stage::Unbound => self.bind_engine(actor),
            Stage::Binding => self.bind_host(actor),
            Stage::FolioLocked(pfn) => self.zap_folio(actor, pfn),
            Stage::FolioZapped(pfn) => self.reshape_folio(actor, pfn),
            Stage::FolioDone(pfn, zapped) => self.unlock_folio(actor, pfn, zapped),
            Stage::Holding(pfn, _) => self.let_go(actor, pfn),
        }
    }
}

fn verdict(done: bool) -> &'static str {
    if done { "done" } else { "failed" }
}
