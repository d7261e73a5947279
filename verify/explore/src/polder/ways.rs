//! In how many ways everybody can go on.

use super::kept::{self, range};
use super::{Role, Slip, Stage, Task, World};

impl World {
    /// In how many ways an actor can go on, whoever else would have to go first.
    pub(super) fn ways_of(&self, actor: usize) -> u8 {
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
                    | Task::Discard { start, end }
                    | Task::Merge { start, end },
                ) => may(!busy(start, end)),
                Some(Task::CopyOut(_) | Task::CopyIn(..))
                    if self.setup.slips(Slip::CopyUnclaimed) =>
                {
                    1
                }
                Some(Task::CopyOut(page) | Task::CopyIn(page, _) | Task::Pin(page)) => {
                    may(!busy(page, page + 1))
                }
                Some(Task::Split(page) | Task::Collapse(page)) => may(!self.folio_is_locked(page)),
                Some(Task::Hold(page, large)) => may(self.can_hold(page, large)),
                Some(_) => 1,
            },
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
                Some(Task::Gup(page)) => may(!self.unanswered(role, page)),
                _ => 0,
            },
            Stage::CarryOut(..) => 1 + may(self.failures > 0),
            Stage::Drain(op) => may(self.engine.engine.is_drained_of(op)),
            Stage::Write(..) => 1 + may(self.failures > 0),
            Stage::Take(_, _, step, part) => self.ways_of_step(step, part),
            Stage::TakeBack(_, step, part, _) => self.ways_back(step, part),
            _ => 1,
        }
    }
}
