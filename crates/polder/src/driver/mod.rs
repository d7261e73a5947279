//! The driver: asks the engine, makes the host do it, reports back.
//!
//! # The lock
//! One lock, over the engine. It is never held across a system call or a touch of guest memory:
//! every host call stands outside it, and what must not change meanwhile is held by a claim in
//! the engine. Whoever has to wait for a claim waits on `changed`, with a limit, because a claim
//! whose thread died is told of by nobody: it is found by asking again.
//!
//! The lock is `parking_lot`'s because that one is fair after a while: with the standard
//! library's, one thread that reads guest memory in a loop keeps conversions out.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

mod guest;
mod operations;
mod population;
mod steps;
#[cfg(test)]
mod tests;
mod turn;

use polder_engine::{
    Answer, Blocked, Config, Contents, Copying, Engine, Refusal, Response, Turn, View, Visibility,
};
use polder_units::{PageIndex, PageRange};

pub(crate) use self::guest::GuestFault;
pub(crate) use self::turn::InTurn;
use crate::dirty::Marks;
use crate::dma::Devices;
use crate::host::Host;
use crate::host::views::Views;
use crate::pager::Pager;
use crate::statistics::Counters;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::watch::{Moment, Reached, Watch};
use crate::{DeadPin, Error, OnBusy};

/// [`Driver::ask_again`], as a rule.
const ASK_AGAIN: Duration = Duration::from_millis(20);

pub(crate) struct Driver {
    engine: Mutex<Engine>,
    /// A thread panicked while it held the lock: the engine may be half-changed.
    broken: AtomicBool,
    changed: Condvar,
    pub(crate) host: Box<dyn Host>,
    pub(crate) counters: Counters,
    pub(crate) devices: Devices,
    /// Slices of guest memory have it, too.
    pub(crate) dirty: Arc<Marks>,
    /// After how long a waiter asks again by itself: a claim whose thread died is released by
    /// whoever asks.
    pub(crate) ask_again: Duration,
    /// A guest has touched its memory.
    begun: AtomicBool,
    /// Who is told what happens.
    pub(crate) watch: OnceLock<Arc<dyn Watch>>,
    /// Pins that were given back because their holder's thread panicked.
    pub(crate) dead_pins: Mutex<Vec<DeadPin>>,
    /// Touches that wait to be answered: read from a queue of the kernel's, and kept for whichever
    /// fault thread asks next. Waited for with the engine locked, never the other way round.
    /// Each has a place among those who wait, once it was asked about.
    pub(crate) waiting: Mutex<BTreeMap<(View, PageIndex), Option<Turn>>>,
    /// Who brings what is owed, where there is a source.
    pub(crate) pager: Option<Pager>,
}

/// The engine, locked.
pub(crate) struct Locked<'a> {
    engine: MutexGuard<'a, Engine>,
    broken: &'a AtomicBool,
    /// Whether the thread was unwinding already, and so does not panic because of the engine.
    unwinding: bool,
}

impl Deref for Locked<'_> {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.engine
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Engine {
        &mut self.engine
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.unwinding {
            self.broken.store(true, Ordering::Relaxed);
        }
    }
}

/// What is to be given back to the engine, also when its thread panics.
pub(crate) struct Land<'a> {
    driver: &'a Driver,
    landing: Option<Landing>,
}

enum Landing {
    Copy(Copying),
    /// With what was done.
    Answer(Answer, Option<Response>),
}

impl<'a> Land<'a> {
    /// A copy's claim.
    pub(crate) fn copy(driver: &'a Driver, copying: Copying) -> Self {
        Self { driver, landing: Some(Landing::Copy(copying)) }
    }

    /// Notes whether an answer was carried out.
    fn done(&mut self, carried_out: bool) {
        if let Some(Landing::Answer(answer, done)) = &mut self.landing {
            *done = carried_out.then(|| answer.response());
        }
    }
}

impl Drop for Land<'_> {
    fn drop(&mut self) {
        if let (Some(mut engine), Some(landing)) = (self.driver.try_engine(), self.landing.take()) {
            match landing {
                Landing::Copy(copying) => engine.copied(copying),
                Landing::Answer(answer, done) => engine.answered(answer, done),
            }
        }
        self.driver.released();
    }
}

impl Driver {
    pub(crate) fn new(config: Config, host: Box<dyn Host>) -> Self {
        Self {
            engine: Mutex::new(Engine::new(config)),
            broken: AtomicBool::new(false),
            changed: Condvar::new(),
            host,
            counters: Counters::default(),
            devices: Devices::default(),
            dirty: Arc::default(),
            ask_again: ASK_AGAIN,
            begun: AtomicBool::new(false),
            watch: OnceLock::new(),
            dead_pins: Mutex::default(),
            waiting: Mutex::default(),
            pager: None,
        }
    }

    /// The object's size in pages.
    pub(crate) fn pages(&self) -> u64 {
        self.engine().config().pages.get()
    }

    /// The engine, locked. Not to be held across a system call.
    pub(crate) fn engine(&self) -> Locked<'_> {
        self.try_engine().expect("the engine broke an invariant of its own")
    }

    /// Tells those who wait that a claim was released. Not with the engine locked.
    pub(crate) fn released(&self) {
        self.changed.notify_all();
        // Whoever has a touch wait saw the claim, and put the touch here before it was released.
        if !self.waiting.lock().is_empty() {
            self.host.views().nudge();
        }
    }

    /// Tells those who wait in a call, and not the fault threads.
    pub(crate) fn changed(&self) {
        self.changed.notify_all();
    }

    /// Tells who watches. Not with the engine locked, but for some [`Moment::Waits`].
    pub(crate) fn tell(&self, moment: Moment) {
        if let Some(watch) = self.watch.get() {
            watch.at(moment);
        }
    }

    /// Tells who watches how far an operation has come, without the engine, which others have
    /// meanwhile.
    pub(crate) fn reached<'a>(&'a self, engine: Locked<'a>, stage: Reached) -> Locked<'a> {
        if self.watch.get().is_none() {
            return engine;
        }
        drop(engine);
        self.tell(Moment::Reached(stage));
        self.engine()
    }

    /// Waits until a claim was released, or for a while.
    pub(crate) fn wait(&self, locked: &mut Locked<'_>) {
        self.tell(Moment::Waits);
        self.wait_for(locked, self.ask_again);
    }

    /// Waits until a claim was released, or so long.
    pub(crate) fn wait_for(&self, locked: &mut Locked<'_>, at_most: Duration) {
        self.changed.wait_for(&mut locked.engine, at_most);
        assert!(!self.broken.load(Ordering::Relaxed), "the engine broke an invariant of its own");
    }

    /// The engine, unless it broke: for those who have to go on all the same.
    pub(crate) fn try_engine(&self) -> Option<Locked<'_>> {
        let engine = self.engine.lock();
        let unwinding = std::thread::panicking();
        let broken = self.broken.load(Ordering::Relaxed);
        (!broken).then_some(Locked { engine, broken: &self.broken, unwinding })
    }

    /// Asks the engine for something until it is given or refused.
    pub(crate) fn claim<T>(
        &self,
        on_busy: OnBusy,
        ask: impl FnMut(&mut Engine) -> Result<T, Blocked>,
    ) -> Result<T, Error> {
        self.claim_unless(|| false, on_busy, ask)
    }

    /// The same, unless told to stop where it would have to wait: [`Error::Interrupted`].
    fn claim_unless<T>(
        &self,
        stop: impl Fn() -> bool,
        on_busy: OnBusy,
        mut ask: impl FnMut(&mut Engine) -> Result<T, Blocked>,
    ) -> Result<T, Error> {
        let mut turn = InTurn::new(self);
        let mut engine = self.engine();
        loop {
            let asked = match on_busy {
                // Who does not wait has no turn, and lets those go first who do.
                OnBusy::Refuse => ask(&mut engine),
                OnBusy::Wait | OnBusy::WaitForPins { .. } => turn.ask(&mut engine, &mut ask),
            };
            match asked {
                Ok(given) => return Ok(given),
                Err(Blocked::Refused(Refusal::Owed { page }))
                    if self.pager.is_some() && on_busy == OnBusy::Wait =>
                {
                    if stop() {
                        return Err(Error::Interrupted);
                    }
                    engine = self.wait_for_contents(engine, page);
                }
                Err(Blocked::Refused(refusal)) => return Err(refusal.into()),
                Err(Blocked::Busy(refusal)) => match on_busy {
                    OnBusy::Refuse => return Err(refusal.into()),
                    OnBusy::Wait | OnBusy::WaitForPins { .. } if stop() => {
                        return Err(Error::Interrupted);
                    }
                    OnBusy::Wait | OnBusy::WaitForPins { .. } => self.wait(&mut engine),
                },
                Err(Blocked::Abandoned(operation)) => {
                    drop(engine);
                    self.undo(operation);
                    engine = self.engine();
                }
            }
        }
    }

    /// Waits until a page's contents may have come: has the source asked for them, if there is one.
    fn wait_for_contents<'a>(&'a self, mut engine: Locked<'a>, page: PageIndex) -> Locked<'a> {
        let Some(pager) = &self.pager else {
            self.wait(&mut engine);
            return engine;
        };
        pager.demand([page]);
        // With the engine locked, so that what comes is not told of before this waits.
        self.host.views().nudge();
        self.wait(&mut engine);
        drop(engine);
        pager.expire(self);
        self.engine()
    }

    /// What a conversion can do at best for what is in the pages.
    pub(crate) fn keeps_most(&self, to: Visibility) -> Contents {
        let config = *self.engine().config();
        config.platform.keeps_most(to, config.in_place)
    }

    /// Moves bytes between the host and shared pages. All runs are found, checked and claimed in
    /// one hold of the lock; then each is moved.
    pub(crate) fn copy(
        &self,
        find: impl Fn(&Engine) -> Result<Vec<PageRange>, Refusal>,
        mut each: impl FnMut(&dyn Views, PageRange) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (runs, copying) = self.claim(OnBusy::Wait, |engine| {
            let runs = find(engine)?;
            let copying = engine.copy(&runs)?;
            Ok((runs, copying))
        })?;
        let _given = Land::copy(self, copying);
        runs.into_iter().try_for_each(|run| each(self.host.views(), run))
    }

    /// A check of the engine that changes nothing.
    pub(crate) fn ask<T>(
        &self,
        ask: impl FnOnce(&mut Engine) -> Result<T, Refusal>,
    ) -> Result<T, Error> {
        Ok(ask(&mut self.engine())?)
    }
}
