//! The way back of an operation: `Driver::undo`.

use polder_explored_engine::{Draining, OpId, Operation, Step, Undoing};

use super::kept::set;
use super::operation::pages_of;
use super::rmp::Part;
use super::take::part_name;
use super::{Slip, Stage, World, verdict};
use crate::system::Violation;

impl World {
    /// One's own operation has failed.
    pub(super) fn turn_back(&mut self, actor: usize, op: OpId) -> Result<(), Violation> {
        let operation = self.engine(|engine| {
            // At which stage it was does not matter to the engine.
            let operation: Operation<Draining> = engine.resume(op);
            engine.undo(operation)
        });
        self.begin_undo(actor, operation, true)
    }

    pub(super) fn begin_undo(
        &mut self,
        actor: usize,
        operation: Operation<Undoing>,
        own: bool,
    ) -> Result<(), Violation> {
        let (op, step) = self.engine(|engine| {
            let step = engine.next_undo(&operation);
            (engine.park(operation), step)
        });
        self.undo_next(actor, op, step, own)
    }

    fn undo_next(
        &mut self,
        actor: usize,
        op: OpId,
        step: Option<Step>,
        own: bool,
    ) -> Result<(), Violation> {
        if let Some(step) = step {
            self.go(actor, Stage::TakeBack(op, step, 0, own));
            return Ok(());
        }
        self.forget(op);
        let held = self.engine.held;
        self.engine(|engine| {
            let operation: Operation<Undoing> = engine.resume(op);
            engine.finish_undo(operation);
        });
        match self.task(actor) {
            Some(task) if own => self.unaccept(task, set(pages_of(task))),
            // What somebody who died was about to do with them is not known here.
            _ => self.promised.accepted &= !(held & !self.engine.held),
        }
        self.say(|| "all of it is undone".into());
        if let (Some(task), true) = (self.task(actor), own) {
            self.resume_guest(task);
        }
        if own {
            self.done(actor)
        } else {
            self.go(actor, Stage::Idle)
        }
        Ok(())
    }

    /// In how many ways a part of a step of a way back goes.
    pub(super) fn ways_back(&self, step: Step, part: u8) -> u8 {
        u8::from(!self.is_blocked(step, part)) + u8::from(self.may_fail_back(step, part))
    }

    fn may_fail_back(&self, step: Step, part: u8) -> bool {
        self.failures > 0 && (part == 0 || matches!(step, Step::Reassign(_) | Step::Unassign(_)))
    }

    fn fails_back(&self, step: Step, part: u8, way: u8) -> bool {
        way > 0 || self.is_blocked(step, part)
    }

    pub(super) fn take_back(
        &mut self,
        actor: usize,
        op: OpId,
        step: Step,
        part: u8,
        own: bool,
        way: u8,
    ) -> Result<(), Violation> {
        if part == 0 {
            let right = self.check_undo(op, step);
            if right.is_err() {
                self.say(|| format!("undoing: is to {step}"));
            }
            right?;
        }
        let fails = self.fails_back(step, part, way);
        self.failures -= u8::from(fails);
        let went = if fails { Part::Failed } else { self.perform(step, part)? };
        let done = went != Part::Failed;
        self.say(|| format!("undoing: {step} ({}): {}", part_name(step, part), verdict(done)));
        // To cut pages off has no way back of its own: the driver tries again.
        let again = fails && matches!(step, Step::Quarantine(_));
        self.go(
            actor,
            if again {
                Stage::TakeBack(op, step, 0, own)
            } else if let Part::Then(part) = went {
                Stage::TakeBack(op, step, part, own)
            } else {
                Stage::TakenBack(op, done, own)
            },
        );
        Ok(())
    }

    pub(super) fn taken_back(
        &mut self,
        actor: usize,
        op: OpId,
        done: bool,
        own: bool,
    ) -> Result<(), Violation> {
        let doubted = self.setup.slips(Slip::UndoneDoubted);
        let (taken, step) = self.engine(|engine| {
            let operation: Operation<Undoing> = engine.resume(op);
            let taken = engine.next_undo(&operation);
            engine.undo_taken(&operation, done && !doubted);
            let step = engine.next_undo(&operation);
            engine.park(operation);
            (taken, step)
        });
        if let Some(taken) = taken {
            self.undone(op, taken);
            if !done {
                self.promised.quarantine |= set(taken.range());
            }
        }
        self.say(|| "reports on it".into());
        self.undo_next(actor, op, step, own)
    }
}
