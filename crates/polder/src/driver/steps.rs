//! The steps of an operation: taken in order, or back again.

use std::time::Duration;

use polder_engine::{Operation, Stage, Step, Undoing};
use polder_units::PageRange;

use super::{Driver, Locked};
use crate::Error;
use crate::unpinned::Patience;
use crate::watch::{Moment, Reached};

/// How often a step of a way back is tried, and how long is waited in between.
const UNDO_TRIES: u32 = 100;
const UNDO_PAUSE: Duration = Duration::from_millis(1);

impl Driver {
    /// Looks for pins of what an operation claims that were taken without the lock, and waits for
    /// the answers and copies in flight on it.
    pub(crate) fn drain<S: Stage>(
        &self,
        operation: Operation<S>,
    ) -> Result<(Locked<'_>, Operation<S>), Error> {
        self.tell(Moment::Reached(Reached::Claimed));
        let mut engine = self.pass_barrier();
        let mut patience = Patience::short();
        while let Err(refusal) = engine.look_for_pins(&operation) {
            match self.wait_for_unpin(engine, &mut patience) {
                Some(again) => engine = again,
                None => return Err(self.fail(operation, refusal.into())),
            }
        }
        while !engine.is_drained(&operation) {
            self.wait(&mut engine);
        }
        Ok((self.reached(engine, Reached::Drained), operation))
    }

    /// Takes all steps of a stage, and tells that the next one is reached.
    pub(crate) fn perform<'a, S: Stage>(
        &'a self,
        engine: Locked<'a>,
        operation: Operation<S>,
        next: Reached,
    ) -> Result<(Locked<'a>, Operation<S::Next>), Error> {
        let (engine, operation) = self.take_steps(engine, operation)?;
        Ok((self.reached(engine, next), operation))
    }

    /// Takes all steps of a stage. The engine is let go of only where the host has something to do:
    /// a conversion of one page takes no longer than its system call and as much again.
    pub(crate) fn take_steps<'a, S: Stage>(
        &'a self,
        mut engine: Locked<'a>,
        operation: Operation<S>,
    ) -> Result<(Locked<'a>, Operation<S::Next>), Error> {
        let watched = self.watch.get().is_some();
        let mut step = engine.next_step(&operation);
        while let Some(now) = step {
            if !watched && !self.host.has_to_take(now) {
                self.log(now);
                step = engine.step_taken(&operation);
                continue;
            }
            drop(engine);
            self.tell(Moment::Step(now));
            if let Err(error) = self.take(now) {
                self.tell(Moment::Failed(now));
                return Err(self.fail(operation, error));
            }
            engine = self.engine();
            step = engine.step_taken(&operation);
        }
        let operation = engine.advance(operation);
        Ok((engine, operation))
    }

    /// Takes a step: on the host, or with a device.
    fn take(&self, step: Step) -> Result<(), Error> {
        let taken = self.devices.take(step).unwrap_or_else(|| self.host.take(step));
        // Also of one that failed: it may have done a part.
        self.log(step);
        taken
    }

    /// Has the dirty log know of a step, with the pages still claimed.
    fn log(&self, step: Step) {
        match step {
            // The bytes are others; a device may have written until now; and what becomes shared
            // could not be copied before.
            Step::Free(range) | Step::UnmapDma(_, range) | Step::Protect(range, _) => {
                self.dirty.wrote_pages(range);
            }
            _ => {}
        }
    }

    /// Undoes an operation of our own because of `error`; returns what to tell the caller.
    pub(crate) fn fail<S: Stage>(&self, operation: Operation<S>, error: Error) -> Error {
        let operation = {
            let mut engine = self.engine();
            let operation = engine.undo(operation);
            if let Error::Refused(why) = &error {
                engine.note_reason(&operation, why.clone());
            }
            operation
        };
        match self.undo(operation) {
            pages if pages.is_empty() => error,
            pages => Error::Quarantined { pages, source: Box::new(error) },
        }
    }

    /// Takes all steps of a way back. Returns the pages that had to be quarantined.
    pub(crate) fn undo(&self, operation: Operation<Undoing>) -> Vec<PageRange> {
        let mut step = self.engine().next_undo(&operation);
        while let Some(now) = step {
            self.tell(Moment::Undo(now));
            let done = self.undo_step(now);
            let mut engine = self.engine();
            engine.undo_taken(&operation, done);
            step = engine.next_undo(&operation);
        }
        let quarantined = self.engine().finish_undo(operation);
        self.released();
        quarantined
    }

    /// Takes a step of a way back; whether it was done. It is tried again while what is in its way
    /// may pass: else the pages are lost. Cutting them off, which has no way back of its own, is
    /// tried again whatever is in its way.
    fn undo_step(&self, step: Step) -> bool {
        let cuts_off = matches!(step, Step::Quarantine(_));
        for tried in 1..=UNDO_TRIES {
            match self.take(step) {
                Ok(()) => return true,
                Err(error) if tried < UNDO_TRIES && (cuts_off || error.may_pass()) => {
                    crate::sync::sleep(UNDO_PAUSE);
                }
                Err(_) => return false,
            }
        }
        false
    }
}
