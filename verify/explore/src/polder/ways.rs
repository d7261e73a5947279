//! In how many ways everybody can go on.

use polder_explored_engine::{OpId, Waiting};

use super::kept::{self, Pages, range};
use super::operation::pages_of;
use super::prefault::{Ahead, Step};
use super::{Role, Slip, Stage, Task, World};

/// One way, if it is so.
fn may(so: bool) -> u8 {
    u8::from(so)
}

impl World {
    /// In how many ways an actor can go on, whoever else would have to go first.
    pub(super) fn ways_of(&self, actor: usize) -> u8 {
        let role = self.role(actor);
        match self.actors[actor].stage {
            Stage::Dead => 0,
            Stage::Idle if role == Role::Faults => may(self.can_serve()),
            Stage::Idle => self.ways_to_begin(actor),
            Stage::Ahead(ahead) => self.ways_ahead(ahead),
            Stage::Unbound => may(!self.slots_are_read()),
            Stage::GuestAsk => may(!self.guest_waits(actor)),
            Stage::SizeAsk => may(!self.size_waits(actor)),
            Stage::GuestAllocate(answer, _) => 1 + may(self.failures > 0 && self.is_hole(answer)),
            Stage::Waits => match self.task(actor) {
                Some(Task::HostRead(page) | Task::HostWrite(page, _)) => {
                    may(!self.unanswered(role, page))
                }
                _ => 0,
            },
            Stage::GupWaits => match self.task(actor) {
                Some(Task::Gup(page) | Task::PinExclusive(page)) => {
                    may(!self.unanswered(role, page))
                }
                _ => 0,
            },
            Stage::GupSlow => match self.task(actor) {
                Some(Task::PinExclusive(page)) => may(!self.pinned_in_passing(page)),
                _ => 1,
            },
            Stage::Donate(_) => may(!self.donation_waits(actor)),
            Stage::CarryOut(..) => 1 + may(self.failures > 0) + may(self.deaths > 0),
            Stage::Drain(op) => {
                may(self.engine.engine.is_drained_of(op) && !self.meets_passing_pins(actor, op))
                    + may(self.may_die(actor))
            }
            Stage::AskPin => match self.task(actor) {
                Some(Task::PinUnlocked(page)) => may(!self.pin_waits(page)),
                _ => 0,
            },
            Stage::Alone(waiting) => may(!self.alone_waits(actor, waiting)),
            Stage::Write(..) => 1 + may(self.failures > 0) + may(self.may_die(actor)),
            Stage::Take(_, _, step, part) => self.ways_of_step(step, part),
            Stage::TakeBack(_, step, part, _) => {
                self.ways_back(step, part) + may(self.may_die(actor))
            }
            Stage::TakenBack(..) => 1 + may(self.may_die(actor)),
            _ => 1,
        }
    }

    /// The same of one that is about to begin its next task.
    fn ways_to_begin(&self, actor: usize) -> u8 {
        let busy = |start: u8, end: u8| {
            let pages = kept::set(range(start, end));
            self.engine.busy & pages != 0 && !self.setup.asks_while_busy()
        };
        match self.task(actor) {
            None => 0,
            Some(
                Task::Convert { start, end, .. }
                | Task::Populate { start, end, .. }
                | Task::Discard { start, end }
                | Task::Move { start, end }
                | Task::Merge { start, end },
            ) => may(!busy(start, end)),
            Some(Task::CopyOut(_) | Task::CopyIn(..)) if self.setup.slips(Slip::CopyUnclaimed) => 1,
            Some(Task::CopyOut(page) | Task::CopyIn(page, _)) => may(!busy(page, page + 1)),
            Some(Task::Pin(page) | Task::PinAlone(page)) => may(!self.pin_waits(page)),
            Some(Task::Split(page) | Task::Collapse(page)) => may(!self.folio_is_locked(page)),
            Some(Task::Prefault { start, .. }) => {
                self.ways_ahead(Ahead { next: start, step: Step::Between })
            }
            Some(Task::Rebind | Task::Unbind) => may(!self.slots_are_read()),
            Some(Task::Want(page, _)) => may(!busy(page, page + 1)),
            Some(Task::PinExclusive(page)) => may(!self.pinned_in_passing(page)),
            Some(Task::Hold(page, large)) => may(self.can_hold(page, large)),
            Some(_) => 1,
        }
    }

    /// Whether who asks the engine for a pin has to wait.
    fn pin_waits(&self, page: u8) -> bool {
        (self.engine.busy | self.engine.awaited) & 1 << page != 0 && !self.setup.asks_while_busy()
    }

    /// Whether the pins in an operation's way go by themselves.
    fn meets_passing_pins(&self, actor: usize, op: OpId) -> bool {
        let pages = self.task(actor).map_or(0, |task| kept::set(pages_of(task)));
        self.passes(pages, self.engine.engine.finds_pins(op))
    }

    /// Whether who is to have a page alone waits: for an operation, or for pins that go by
    /// themselves.
    fn alone_waits(&self, actor: usize, waiting: Waiting) -> bool {
        let pages = self.task(actor).map_or(0, |task| kept::set(pages_of(task)));
        let found = self.engine.engine.still_pinned(&waiting).is_some();
        self.engine.busy & pages != 0 || self.passes(pages, found)
    }

    /// Whether a caller's thread may die where it drains, writes or undoes: the last of his ways.
    /// Where it dies on a step of an operation, `operation.rs` has it.
    fn may_die(&self, actor: usize) -> bool {
        self.deaths > 0 && self.role(actor) == Role::Caller
    }

    /// The operation that an actor dies on if he goes on in this way.
    pub(super) fn dies_on(&self, actor: usize, way: u8) -> Option<OpId> {
        let op = match self.actors[actor].stage {
            Stage::Drain(op) | Stage::Write(op, _) => op,
            Stage::TakeBack(op, ..) | Stage::TakenBack(op, ..) => op,
            _ => return None,
        };
        (self.may_die(actor) && way + 1 == self.ways_of(actor)).then_some(op)
    }

    /// Whose contents are to come, and never will: a thread that was to bring them is dead.
    pub(super) fn forsaken(&self) -> Pages {
        if !self.setup.owed || self.deaths == self.setup.deaths {
            return 0;
        }
        let dead = (0..self.setup.actors.len())
            .filter(|&actor| matches!(self.actors[actor].stage, Stage::Dead))
            .flat_map(|actor| {
                &self.setup.actors[actor].tasks[usize::from(self.actors[actor].at)..]
            });
        let pages = dead.fold(0, |all, task| match task {
            &Task::Populate { start, end, .. } => all | kept::set(range(start, end)),
            _ => all,
        });
        pages & self.promised.owed
    }
}
