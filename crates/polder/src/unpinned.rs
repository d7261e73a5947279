//! Waiting for pins to go: before an operation, and before an exclusive pin.
//!
//! Who waits closes the pages first, so that nobody pins them any more who does not hold them
//! already: he comes to his turn as soon as those have let go. Faults and copies go on meanwhile;
//! nobody who holds a pin is denied his page.

use std::time::Duration;

use polder_engine::{
    Activity, Blocked, Engine, Holder, PinId, PinKind, Refusal, Response, View, WaitFor, Waiting,
};
use polder_linux::Deadline;
use polder_units::{Level, PageRange};

use crate::driver::{Driver, InTurn, Land, Locked};
use crate::{Error, OnBusy};

/// Pins that pass by themselves are waited for so often: first others have their turn, then a while
/// passes each time. Somebody copies a few bytes, or has found that he came too late.
const LOOKS: u32 = 40;
const YIELDS: u32 = 20;
const PAUSE: Duration = Duration::from_micros(50);

/// Who unpins says so if he is asked to; but not who pinned around a few bytes.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// For how long pins are waited for.
pub(crate) struct Patience {
    looked: u32,
    deadline: Option<Deadline>,
}

impl Patience {
    /// As long as pins take that pass by themselves.
    pub(crate) fn short() -> Self {
        Self { looked: 0, deadline: None }
    }

    fn of(on_busy: OnBusy) -> Self {
        let deadline = match on_busy {
            OnBusy::Wait | OnBusy::Refuse => None,
            OnBusy::WaitForPins { at_most } => Some(Deadline::after(at_most)),
        };
        Self { looked: 0, deadline }
    }
}

/// A wait that is over when this is dropped, also by a panic.
struct Closed<'a> {
    driver: &'a Driver,
    waiting: Option<Waiting>,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            if let Some(mut engine) = self.driver.try_engine() {
                engine.stop_waiting(waiting);
            }
            self.driver.released();
        }
    }
}

impl Driver {
    /// The engine, locked once every thread has passed a barrier, where somebody pins counting on
    /// that.
    pub(crate) fn pass_barrier(&self) -> Locked<'_> {
        let engine = self.engine();
        if !engine.needs_barrier() {
            return engine;
        }
        drop(engine);
        polder_linux::barrier();
        self.engine()
    }

    /// Lets a little time pass, with the lock given up; `None` when patience is at its end.
    pub(crate) fn wait_for_unpin<'a>(
        &'a self,
        mut engine: Locked<'a>,
        patience: &mut Patience,
    ) -> Option<Locked<'a>> {
        patience.looked += 1;
        if let (Some(deadline), YIELDS..) = (patience.deadline, patience.looked) {
            self.wait_for(&mut engine, deadline.left()?.min(LOOK_AGAIN));
            return Some(engine);
        }
        drop(engine);
        match patience.looked {
            LOOKS.. => return None,
            YIELDS.. => crate::sync::sleep(PAUSE),
            _ => crate::sync::yield_now(),
        }
        Some(self.engine())
    }

    /// Makes an attempt; if pins are in its way, again once they are gone: those that pass by
    /// themselves, or whichever if `on_busy` says so.
    pub(crate) fn unpinned<T>(
        &self,
        on_busy: OnBusy,
        activity: Activity,
        find: impl Fn(&Engine) -> Result<Vec<PageRange>, Refusal>,
        attempt: impl Fn() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let first = attempt();
        let Err(Error::Refused(Refusal::Pinned { kind, .. })) = &first else { return first };
        // A short pin that somebody has around a few bytes passes by itself.
        let mut patience = match on_busy {
            OnBusy::WaitForPins { .. } => Patience::of(on_busy),
            OnBusy::Wait if *kind == PinKind::Short => Patience::short(),
            OnBusy::Wait | OnBusy::Refuse => return first,
        };
        let waiting = self.claim(on_busy, |engine| {
            let ranges = find(engine)?;
            engine.wait_for_pins(&ranges, WaitFor::Operation(activity))
        })?;
        let closed = Closed { driver: self, waiting: Some(waiting) };
        let mut engine = self.pass_barrier();
        while let Some(refusal) = closed.waiting.as_ref().and_then(|it| engine.still_pinned(it)) {
            match self.wait_for_unpin(engine, &mut patience) {
                Some(again) => engine = again,
                None => return Err(refusal.into()),
            }
        }
        drop(engine);
        attempt()
    }

    /// Maps in the host view what somebody has pinned, and is about to touch: else each touch would
    /// be a fault. Of huge pages one fault brings many; and a pin does not wait for somebody who
    /// has a page claimed and does not mind pins: touches will.
    pub(crate) fn map_pinned(&self, range: PageRange) -> Result<(), Error> {
        let mut engine = self.engine();
        if engine.config().backing.granule != Level::Size4K {
            return Ok(());
        }
        let Ok(claimed) = engine.copy(&[range]) else { return Ok(()) };
        drop(engine);
        let _given = Land::copy(self, claimed);
        self.host.views().answer(View::Host, Response::Map, range)
    }

    /// Pins pages exclusively.
    pub(crate) fn pin_exclusive(
        &self,
        range: PageRange,
        holder: &Holder,
        on_busy: OnBusy,
    ) -> Result<PinId, Error> {
        let mut patience = Patience::of(on_busy);
        let waiting = self.claim(on_busy, |engine| {
            engine.wait_for_pins(&[range], WaitFor::Exclusive(holder.clone()))
        })?;
        let mut closed = Closed { driver: self, waiting: Some(waiting) };
        let mut turn = InTurn::new(self);
        let mut engine = self.pass_barrier();
        while let Some(waiting) = closed.waiting.take() {
            let pinned = turn.ask(&mut engine, |engine| engine.pin_exclusive(waiting));
            let (waiting, blocked) = match pinned {
                Ok(pin) => return Ok(pin),
                Err(blocked) => blocked,
            };
            closed.waiting = Some(waiting);
            match blocked {
                Blocked::Refused(refusal @ Refusal::Pinned { .. }) => {
                    match self.wait_for_unpin(engine, &mut patience) {
                        Some(again) => engine = again,
                        None => return Err(refusal.into()),
                    }
                }
                Blocked::Busy(_) if on_busy != OnBusy::Refuse => self.wait(&mut engine),
                Blocked::Refused(refusal) | Blocked::Busy(refusal) => return Err(refusal.into()),
                Blocked::Abandoned(operation) => {
                    drop(engine);
                    self.undo(operation);
                    engine = self.engine();
                }
            }
        }
        unreachable!("the wait goes on until it is over")
    }
}
