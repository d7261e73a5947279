//! Operations: `polder/src/driver/`, one call of the engine or of the host after the other.

use polder_explored_engine::{
    Clearing, Contents, ConversionRequest, Draining, Engine, Merging, MoveUnmapped, MoveUnpinned,
    Moving, OpId, Operation, Protected, Published, Refusal, Reshaped, Response, Settled,
    Stage as OpStage, Start, Step, Unmapped, Unpinned, Visibility, Writing,
};

use super::act::Act;
use super::host::References;
use super::kept::{one, range, set};
use super::rmp::Part;
use super::{Came, Slip, Stage, Task, World};
use crate::system::Violation;

/// How a host takes a step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Well.
    Well,
    /// It does nothing, and says that it failed.
    FailsUndone,
    /// It is done, and says that it failed.
    FailsDone,
    /// It is done, and its thread dies.
    Dies,
}

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

/// In how many holds of the machine's lock a host takes a step; unmapping flushes in one more.
/// What it does about the RMP is as many as the entries make it.
fn parts_of(step: Step) -> u8 {
    match step {
        Step::UnmapHost(_) | Step::UnmapDma(..) => 2,
        Step::Free(_) | Step::Quarantine(_) => 3,
        _ => 1,
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
        let pages = set(pages_of(task));
        match task {
            Task::Convert { to, contents, .. } => {
                let already = self.so_already(pages, to);
                self.engine(|engine| {
                    let settled: Operation<Settled> = engine.resume(op);
                    engine.finish_conversion(settled);
                });
                match to {
                    Visibility::Private => self.promised.private |= pages,
                    Visibility::Shared => self.promised.private &= !pages,
                }
                self.converted(pages & !already, to);
                if pages & !already != 0 {
                    self.reshaped(pages, to);
                }
                if contents == Contents::Zero {
                    self.promised.owed &= !(pages & !already);
                    self.promised.unknown &= !(pages & !already);
                }
                self.say(|| format!("pages {} are {to} from here on", pages_of(task)));
                self.resume_guest(task);
                self.done(actor);
                Ok(())
            }
            Task::Populate { start, end, value } => {
                let answer = self.engine(|engine| {
                    let published: Operation<Published> = engine.resume(op);
                    engine.finish_population(published)
                });
                self.promised.owed &= !pages;
                for page in start..end {
                    self.promised.values[usize::from(page)] = value;
                }
                self.say(|| format!("pages {} are whole from here on", pages_of(task)));
                self.go(actor, Stage::Show(answer.expect("its granules are pages")));
                Ok(())
            }
            Task::Move { .. } => {
                self.engine(|engine| {
                    let moved = engine.resume(op);
                    engine.finish_move(moved);
                });
                self.say(|| format!("pages {} are in their new place", pages_of(task)));
                self.done(actor);
                self.check_unpinned(pages, "moved")
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
            _ => {
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
        }
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

    /// The ways in which a host takes a step, in its part. The kernel flushes what it has unmapped
    /// whatever else goes wrong, so nothing does between the two.
    fn ways_of_part(&self, step: Step, part: u8) -> impl Iterator<Item = Way> + use<> {
        let (unmapping, flushing) = match step {
            Step::UnmapHost(_) | Step::UnmapDma(..) => (part == 0, part == 1),
            _ => (false, false),
        };
        let (fails, dies) = (self.failures > 0, self.deaths > 0);
        // Who meets another CPU at work waits until it has let go, or gives up.
        let blocked = self.is_blocked(step, part);
        let ways = [
            (Way::Well, !blocked),
            (Way::FailsUndone, fails && !flushing),
            (Way::FailsDone, fails && !unmapping && !blocked),
            (Way::Dies, dies && !unmapping && !blocked),
        ];
        ways.into_iter().filter(|&(_, may)| may).map(|(way, _)| way)
    }

    pub(super) fn ways_of_step(&self, step: Step, part: u8) -> u8 {
        if let Step::CheckReferences(range) = step
            && !self.setup.slips(Slip::NoRetry)
            && self.references(range) == References::Transient
        {
            return 0;
        }
        u8::try_from(self.ways_of_part(step, part).count()).unwrap_or(u8::MAX)
    }

    pub(super) fn take_step(
        &mut self,
        actor: usize,
        op: OpId,
        stage: u8,
        step: Step,
        part: u8,
        way: u8,
    ) -> Result<(), Violation> {
        let way = self.ways_of_part(step, part).nth(way.into()).unwrap_or(Way::Well);
        let fails = matches!(way, Way::FailsUndone | Way::FailsDone);
        if part == 0 {
            self.note(op, step);
        }
        let mut went = Part::Failed;
        if way != Way::FailsUndone {
            went = self.perform(step, part)?;
            self.say(|| format!("{step} ({})", part_name(step, part)));
        } else {
            self.say(|| format!("is to {step}"));
        }
        let done = went != Part::Failed;
        if way == Way::Dies {
            self.die(actor, op);
            return Ok(());
        }
        if let (Step::CheckReferences(range), false, Way::Well) = (step, done, way) {
            self.came(actor, Came::Is("referenced"));
            self.check_referenced(range)?;
        }
        if let (Step::Merge(range), Way::FailsUndone) = (step, way)
            && part > 1
        {
            // A merge that can't be made is none, and what was frozen for it is taken back.
            self.failures -= 1;
            self.say(|| "which fails: the entries stay small".into());
            let part = Self::thaw_from(range);
            self.go(actor, Stage::Take(op, stage, step, part));
            return Ok(());
        }
        if fails || !done {
            self.failures -= u8::from(fails);
            self.say(|| "which fails".into());
            return self.turn_back(actor, op);
        }
        self.go(
            actor,
            match went {
                Part::Then(part) => Stage::Take(op, stage, step, part),
                _ => Stage::Taken(op, stage),
            },
        );
        Ok(())
    }

    /// The thread that drives an operation dies.
    pub(super) fn die(&mut self, actor: usize, op: OpId) {
        self.deaths -= 1;
        self.say(|| "dies".into());
        self.engine(|engine| engine.abandon(op));
        self.go(actor, Stage::Dead);
    }

    /// What host `machine` does for a step, in one part of it.
    pub(super) fn perform(&mut self, step: Step, part: u8) -> Result<Part, Violation> {
        match step {
            Step::Assign(_) | Step::Unassign(_) | Step::Reassign(_) | Step::Smash(_) => {
                self.perform_rmp(step, part)
            }
            Step::SplitFolio(range) | Step::MergeFolio(range) if self.any_pinned(range) => {
                let what = format!("the folio of pages {range} is reshaped, and one is pinned");
                Err(Violation::new("INV-7", what))
            }
            Step::Merge(range) => self.perform_merge(range, part),
            Step::Thaw(range) => self.perform_thaw(range, part, 0),
            _ if !self.perform_plain(step, part) => Ok(Part::Failed),
            _ if part + 1 < parts_of(step) => Ok(Part::Then(part + 1)),
            _ => Ok(Part::Last),
        }
    }

    fn perform_plain(&mut self, step: Step, part: u8) -> bool {
        match (step, part) {
            (Step::UnmapHost(range), 0) => self.unmap_host(range),
            (Step::UnmapHost(range), _) => self.flush_host(range),
            (Step::UnmapGuest(range), _) => self.unmap_guest(range),
            (Step::CheckReferences(range), _) => self.references(range) == References::None,
            (Step::Protect(range, to), _) => {
                if !self.answer_by_hypervisor(range, to) {
                    return false;
                }
                match to {
                    Visibility::Private => self.promised.hardware |= set(range),
                    Visibility::Shared => self.promised.hardware &= !set(range),
                }
                true
            }
            (Step::Publish(range), _) => self.take_off_direct_map(range),
            (Step::Move(range), _) => self.act(Act::Migrate(range)).is_well(),
            (Step::MapDma(_, range), _) => self.act(Act::MapDevice(range)).is_well(),
            (Step::UnmapDma(_, range), 0) => self.act(Act::UnmapDevice(range)).is_well(),
            (Step::UnmapDma(_, range), _) => {
                let flushes = !self.setup.slips(Slip::IotlbNotFlushed);
                self.act(Act::ReleaseDevice(range, flushes)).is_well()
            }
            (Step::Free(range) | Step::Quarantine(range), 0) => self.unmap_guest(range),
            (Step::Free(range) | Step::Quarantine(range), 1) => {
                self.unmap_host(range) && self.flush_host(range)
            }
            (Step::Free(range), _) => {
                let punched = self.act(Act::Punch(range)).is_well();
                if punched {
                    self.taken.forget(set(range));
                }
                for page in range.frames().filter(|_| punched) {
                    if let Some(value) = usize::try_from(page.get())
                        .ok()
                        .and_then(|at| self.promised.values.get_mut(at))
                    {
                        *value = 0;
                    }
                }
                punched
            }
            (Step::Assign(_) | Step::Unassign(_) | Step::Reassign(_) | Step::Smash(_), _)
            | (Step::Merge(_) | Step::Thaw(_) | Step::Launch(_), _) => {
                unreachable!("one for the RMP: {step}")
            }
            (Step::PrepareSplit(folio), _) => self.act(Act::PrepareSplit(folio)).is_well(),
            (Step::SplitFolio(folio), _) => self.act(Act::SplitFolio(folio)).is_well(),
            (Step::MergeFolio(folio), _) => self.act(Act::MergeFolio(folio)).is_well(),
            (Step::ReleaseTables(folio), _) => self.act(Act::ReleaseTables(folio)).is_well(),
            (Step::Quarantine(range), _) => self.answer_host(Response::Poison, range),
        }
    }

    /// Whether the library pins a page of a range.
    fn any_pinned(&self, range: polder_units::PageRange) -> bool {
        let pages = set(range);
        (0..8).any(|page| self.promised.pins[page] > 0 && pages & 1 << page != 0)
    }

    fn unmap_host(&mut self, range: polder_units::PageRange) -> bool {
        self.act(Act::UnmapHost(range)).is_well()
    }

    fn flush_host(&mut self, range: polder_units::PageRange) -> bool {
        self.act(Act::FlushHost(range)).is_well()
    }

    fn unmap_guest(&mut self, range: polder_units::PageRange) -> bool {
        self.act(Act::ZapGuest(range)).is_well()
    }
}

/// The pages that an operation's task is about.
pub(super) fn pages_of(task: Task) -> polder_units::PageRange {
    match task {
        Task::Convert { start, end, .. }
        | Task::Populate { start, end, .. }
        | Task::Discard { start, end }
        | Task::Move { start, end }
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
        Task::Rebind => unreachable!("a task about the slot"),
    }
}

pub(super) fn part_name(step: Step, part: u8) -> &'static str {
    match (step, part) {
        (Step::UnmapHost(_), 0) => "page tables",
        (Step::UnmapDma(..), 0) => "its table",
        (Step::UnmapHost(_) | Step::UnmapDma(..), _) => "flush",
        (Step::Free(_) | Step::Quarantine(_), 0) => "from the guest",
        (Step::Free(_) | Step::Quarantine(_), 1) => "from the host view",
        (Step::Quarantine(_), _) => "a marker",
        (Step::Free(_), _) => "its memory",
        _ => "in the host",
    }
}
