//! Operations: `polder/src/driver/`, one call of the engine or of the host after the other.

use polder_explored_engine::{
    Clearing, Contents, ConversionRequest, Draining, Engine, Merging, MoveUnmapped, MoveUnpinned,
    Moving, OpId, Operation, Protected, Published, Refusal, Reshaped, Response, Settled,
    Stage as OpStage, Start, Step, Unmapped, Unpinned, Visibility, Writing,
};
use polder_units::PageRange;

use super::act::Act;
use super::kept::{one, range, set};
use super::{Came, Slip, Stage, Task, World};
use crate::system::Violation;

/// How many stages an operation has.
const CONVERSION_STAGES: u8 = 5;

/// The next step of a stage, and its end if there is none.
fn next<S: OpStage>(engine: &mut Engine, op: OpId, taken: bool) -> Option<Step> {
    let operation = engine.resume::<S>(op);
    let step = if taken { engine.step_taken(&operation) } else { engine.next_step(&operation) };
    if step.is_some() {
        engine.park(operation);
    } else {
        let next = engine.advance(operation);
        engine.park(next);
    }
    step
}

/// Goes on to the next step of an operation, through stages that have none.
fn go_on(
    engine: &mut Engine,
    task: Task,
    op: OpId,
    stage: &mut u8,
    mut taken: bool,
) -> Option<Step> {
    let stages = match task {
        Task::Convert { .. } => CONVERSION_STAGES,
        Task::Move { .. } => 3,
        _ => 1,
    };
    while *stage < stages {
        let step = match (task, *stage) {
            (Task::Convert { .. }, 0) => next::<Draining>(engine, op, taken),
            (Task::Convert { .. }, 1) => next::<Unmapped>(engine, op, taken),
            (Task::Convert { .. }, 2) => next::<Unpinned>(engine, op, taken),
            (Task::Convert { .. }, 3) => next::<Reshaped>(engine, op, taken),
            (Task::Convert { .. }, _) => next::<Protected>(engine, op, taken),
            (Task::Populate { .. }, _) => next::<Writing>(engine, op, taken),
            (Task::Merge { .. }, _) => next::<Merging>(engine, op, taken),
            (Task::Move { .. }, 0) => next::<Moving>(engine, op, taken),
            (Task::Move { .. }, 1) => next::<MoveUnmapped>(engine, op, taken),
            (Task::Move { .. }, _) => next::<MoveUnpinned>(engine, op, taken),
            _ => next::<Clearing>(engine, op, taken),
        };
        if step.is_some() {
            return step;
        }
        *stage += 1;
        taken = false;
    }
    None
}

/// Looks for pins that came without the engine's lock.
fn look_for_pins(engine: &mut Engine, task: Task, op: OpId) -> Result<(), Refusal> {
    fn look<S: OpStage>(engine: &mut Engine, op: OpId) -> Result<(), Refusal> {
        let operation = engine.resume::<S>(op);
        let found = engine.look_for_pins(&operation);
        engine.park(operation);
        found
    }
    match task {
        Task::Convert { .. } => look::<Draining>(engine, op),
        Task::Populate { .. } => look::<Writing>(engine, op),
        Task::Merge { .. } => look::<Merging>(engine, op),
        _ => look::<Clearing>(engine, op),
    }
}

impl World {
    pub(super) fn claim(&mut self, actor: usize, task: Task) -> Result<(), Violation> {
        let claimed = match task {
            Task::Convert { start, end, to, contents } => {
                let by_guest = self.ask_hypervisor(start, end, to);
                let ranges = vec![range(start, end)];
                let request = ConversionRequest { ranges, to, contents, by: None, by_guest };
                self.engine(|engine| match engine.convert(&request)? {
                    Start::AlreadySo => Ok(None),
                    Start::Claimed(conversion) => Ok(Some(engine.park(conversion))),
                })
            }
            Task::Populate { start, end, .. } => self.engine(|engine| {
                let writing = engine.populate(range(start, end))?;
                Ok(Some(engine.park(writing)))
            }),
            Task::Discard { start, end } => self.engine(|engine| {
                let discard = engine.discard(range(start, end))?;
                Ok(Some(engine.park(discard)))
            }),
            Task::Merge { start, end } => self.engine(|engine| {
                let merge = engine.merge(range(start, end))?;
                Ok(Some(engine.park(merge)))
            }),
            Task::Move { start, end } => self.engine(|engine| {
                let moving = engine.move_pages(range(start, end))?;
                Ok(Some(engine.park(moving)))
            }),
            other => unreachable!("no operation: {other:?}"),
        };
        match claimed {
            Ok(None) => {
                self.say(|| "finds the pages so already".into());
                self.resume_guest(task);
                self.done(actor);
                Ok(())
            }
            Ok(Some(op)) => {
                let work = self.work(actor);
                self.unaccept(task, set(pages_of(task)));
                self.say(|| format!("claims pages {} for a {work}", pages_of(task)));
                self.go(actor, Stage::Drain(op));
                Ok(())
            }
            Err(blocked) => self.blocked(actor, blocked),
        }
    }

    pub(super) fn drained(&mut self, actor: usize, op: OpId) -> Result<(), Violation> {
        let Some(task) = self.task(actor) else { return Ok(()) };
        self.say(|| "no answer is in flight".into());
        if let Err(refusal) = self.engine(|engine| look_for_pins(engine, task, op)) {
            self.say(|| format!("finds a pin: {refusal}"));
            self.came(actor, Came::Is("pinned"));
            self.check_refusal(actor, &refusal)?;
            return self.turn_back(actor, op);
        }
        match task {
            Task::Populate { .. } if self.setup.slips(Slip::PublishBeforeBytes) => {
                self.next_step(actor, task, op, 0, false)
            }
            Task::Populate { .. } => {
                self.go(actor, Stage::Write(op, 0));
                Ok(())
            }
            _ => self.next_step(actor, task, op, 0, false),
        }
    }

    /// Writes a population's bytes, in two pieces.
    pub(super) fn write(
        &mut self,
        actor: usize,
        op: OpId,
        half: u8,
        way: u8,
    ) -> Result<(), Violation> {
        let Some(task @ Task::Populate { start, end, value }) = self.task(actor) else {
            return Ok(());
        };
        if way == 1 {
            self.failures -= 1;
            self.say(|| "has no more bytes: it fails".into());
            return self.turn_back(actor, op);
        }
        let pages = range(start, end);
        self.allocate(pages)?;
        self.act(Act::Fill { pages, offset: half * 4, len: 4, token: value }).well();
        let which = if half == 0 { "first" } else { "second" };
        self.say(|| format!("writes the {which} half of pages {pages}"));
        if half == 0 {
            self.go(actor, Stage::Write(op, 1));
            return Ok(());
        }
        self.next_step(actor, task, op, 0, false)
    }

    fn next_step(
        &mut self,
        actor: usize,
        task: Task,
        op: OpId,
        mut stage: u8,
        taken: bool,
    ) -> Result<(), Violation> {
        let step = self.engine(|engine| go_on(engine, task, op, &mut stage, taken));
        match step {
            Some(step) => {
                self.go(actor, Stage::Take(op, stage, step, 0));
                Ok(())
            }
            None => self.finish(actor, task, op),
        }
    }

    pub(super) fn step_taken(
        &mut self,
        actor: usize,
        op: OpId,
        stage: u8,
    ) -> Result<(), Violation> {
        let Some(task) = self.task(actor) else { return Ok(()) };
        self.say(|| "reports that it is done".into());
        self.next_step(actor, task, op, stage, true)
    }

    fn finish(&mut self, actor: usize, task: Task, op: OpId) -> Result<(), Violation> {
        self.forget(op);
        match task {
            Task::Convert { to, contents, .. } => {
                self.finish_conversion(actor, task, op, (to, contents));
                Ok(())
            }
            Task::Populate { start, end, value } => {
                self.finish_population(actor, op, (start, end), value);
                Ok(())
            }
            Task::Move { .. } => {
                self.engine(|engine| {
                    let moved = engine.resume(op);
                    engine.finish_move(moved);
                });
                self.say(|| format!("pages {} are in their new place", pages_of(task)));
                self.done(actor);
                self.check_unpinned(set(pages_of(task)), "moved")
            }
            Task::Merge { .. } => {
                self.engine(|engine| {
                    let merged = engine.resume(op);
                    engine.finish_merge(merged);
                });
                self.say(|| format!("pages {} are merged, if they agree", pages_of(task)));
                self.done(actor);
                Ok(())
            }
            _ => self.finish_discard(actor, task, op),
        }
    }

    fn finish_conversion(
        &mut self,
        actor: usize,
        task: Task,
        op: OpId,
        (to, contents): (Visibility, Contents),
    ) {
        let pages = set(pages_of(task));
        let changed = pages & !self.so_already(pages, to);
        self.engine(|engine| {
            let settled: Operation<Settled> = engine.resume(op);
            engine.finish_conversion(settled);
        });
        match to {
            Visibility::Private => self.promised.private |= pages,
            Visibility::Shared => self.promised.private &= !pages,
        }
        self.converted(changed, to);
        if changed != 0 {
            self.reshaped(pages, to);
        }
        if contents == Contents::Zero {
            self.promised.owed &= !changed;
            self.promised.unknown &= !changed;
        }
        self.say(|| format!("pages {} are {to} from here on", pages_of(task)));
        self.resume_guest(task);
        self.done(actor);
    }

    fn finish_population(&mut self, actor: usize, op: OpId, (start, end): (u8, u8), value: u8) {
        let answer = self.engine(|engine| {
            let published: Operation<Published> = engine.resume(op);
            engine.finish_population(published)
        });
        self.promised.owed &= !set(range(start, end));
        for page in start..end {
            self.promised.values[usize::from(page)] = value;
        }
        self.say(|| format!("pages {} are whole from here on", range(start, end)));
        self.go(actor, Stage::Show(answer.expect("its granules are pages")));
    }

    fn finish_discard(&mut self, actor: usize, task: Task, op: OpId) -> Result<(), Violation> {
        let pages = set(pages_of(task));
        self.engine(|engine| {
            let cleared = engine.resume(op);
            engine.finish_discard(cleared);
        });
        self.promised.owed &= !pages;
        self.promised.given &= !pages;
        self.unaccept(task, pages);
        if self.setup.is_snp() {
            // Zeros are not what a guest's key makes of them.
            self.promised.unknown |= pages & self.promised.private;
        }
        self.say(|| format!("pages {} are zeros from here on", pages_of(task)));
        self.done(actor);
        self.check_unpinned(pages, "discarded")
    }

    /// Those of the pages that were so before a conversion, and stay as they are.
    fn so_already(&self, pages: u8, to: Visibility) -> u8 {
        match to {
            Visibility::Private => pages & self.promised.private,
            Visibility::Shared => pages & !self.promised.private,
        }
    }

    /// Gives a population's answer back: on the machine there is nobody to wake.
    pub(super) fn show(
        &mut self,
        actor: usize,
        answer: polder_explored_engine::Answer,
    ) -> Result<(), Violation> {
        self.engine(|engine| engine.answered(answer, Some(Response::Map)));
        self.say(|| "wakes the guest's waiters".into());
        if self.setup.slips(Slip::DirectMapLate) {
            self.go(actor, Stage::DirectMapLate);
            return Ok(());
        }
        if self.setup.slips(Slip::PublishBeforeBytes) {
            // Its operation is over; what is left is to write.
            self.go(actor, Stage::WriteLate(0));
            return Ok(());
        }
        self.done(actor);
        Ok(())
    }

    /// Writes bytes after they were shown: a bug.
    pub(super) fn write_late(&mut self, actor: usize, half: u8) -> Result<(), Violation> {
        let Some(Task::Populate { start, end, value }) = self.task(actor) else { return Ok(()) };
        let pages = range(start, end);
        self.allocate(pages)?;
        self.act(Act::Fill { pages, offset: half * 4, len: 4, token: value }).well();
        self.say(|| format!("writes half {half} of pages {pages}"));
        if half == 0 {
            self.go(actor, Stage::WriteLate(1))
        } else {
            self.done(actor)
        }
        Ok(())
    }

    /// The thread that drives an operation dies.
    pub(super) fn die(&mut self, actor: usize, op: OpId) {
        self.deaths -= 1;
        self.say(|| "dies".into());
        self.engine(|engine| engine.abandon(op));
        self.go(actor, Stage::Dead);
    }
}

/// The pages that an operation's task is about.
pub(super) fn pages_of(task: Task) -> PageRange {
    match task {
        Task::Convert { start, end, .. }
        | Task::Populate { start, end, .. }
        | Task::Discard { start, end }
        | Task::Move { start, end }
        | Task::Prefault { start, end }
        | Task::Merge { start, end } => range(start, end),
        Task::CopyOut(page) | Task::CopyIn(page, _) | Task::Pin(page) | Task::Gup(page) => {
            one(page)
        }
        Task::GuestRead(page) | Task::GuestWrite(page, _) => one(page),
        Task::HostRead(page) | Task::HostWrite(page, _) => one(page),
        Task::Accept(page)
        | Task::AcceptLarge(page)
        | Task::PrivateRead(page)
        | Task::PrivateWrite(page, _) => one(page),
        Task::Split(page) | Task::Collapse(page) | Task::Hold(page, _) => one(page),
        Task::OtherWrite(page, _) | Task::DmaWrite(page, _) => one(page),
        Task::Want(page, _) | Task::PinExclusive(page) => one(page),
        Task::PinUnlocked(page) | Task::PinAlone(page) => one(page),
        Task::HypervisorFails(_) => unreachable!("a task about no page"),
        Task::CopiedWrite(page, _) => one(page),
        Task::Rebind | Task::Unbind => unreachable!("a task about the slot"),
    }
}
