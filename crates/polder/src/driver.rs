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

use std::collections::BTreeSet;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;

use polder_engine::{
    Activity, Answer, Blocked, Config, Contents, ConversionRequest, Converted, Copying, Engine,
    GuestAccess, GuestAnswer, MemoryFault, Operation, Published, Refusal, Response, Slot, Stage,
    Start, Step, Undoing, View, Visibility, VmId,
};
use polder_units::{Gfn, GfnRange, PAGE_BYTES, PageCount, PageIndex, PageRange};

use crate::dma::Devices;
use crate::host::views::Views;
use crate::host::{Faulted, Host, Shown, Smashed, Translated};
use crate::pager::Pager;
use crate::prefault::{Came, Span};
use crate::statistics::Counters;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::unpinned::Patience;
use crate::watch::{Moment, Reached, Watch};
use crate::{DeadPin, Error, OnBusy, Vcpu};

/// [`Driver::ask_again`], as a rule.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// How often a step of a way back is tried, and how long is waited in between.
const UNDO_TRIES: u32 = 100;
const UNDO_PAUSE: Duration = Duration::from_millis(1);

pub(crate) struct Driver {
    engine: Mutex<Engine>,
    /// A thread panicked while it held the lock: the engine may be half-changed.
    broken: AtomicBool,
    changed: Condvar,
    pub(crate) host: Box<dyn Host>,
    pub(crate) counters: Counters,
    pub(crate) devices: Devices,
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
    pub(crate) waiting: Mutex<BTreeSet<(View, PageIndex)>>,
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
struct Land<'a> {
    driver: &'a Driver,
    landing: Option<Landing>,
}

enum Landing {
    Copy(Copying),
    /// With what was done.
    Answer(Answer, Option<Response>),
}

impl Land<'_> {
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
    fn wait(&self, locked: &mut Locked<'_>) {
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
        let mut engine = self.engine();
        loop {
            match ask(&mut engine) {
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

    /// Converts pages, as [`Self::convert_now`]; where pins are in the way and are to be waited
    /// for, once they are gone.
    pub(crate) fn convert(
        &self,
        find: impl Fn(&Engine) -> Result<Vec<PageRange>, Refusal>,
        (to, contents): (Visibility, Contents),
        (by, by_guest): (Option<VmId>, bool),
        on_busy: OnBusy,
    ) -> Result<Option<Converted>, Error> {
        let activity = Activity::Conversion { to, contents, by };
        self.unpinned(on_busy, activity, &find, || {
            self.convert_now(&find, (to, contents), (by, by_guest), on_busy)
        })
    }

    /// Converts pages: all of them, or none. The pages are found and claimed in one hold of the
    /// lock, so that no slot can move under the request.
    fn convert_now(
        &self,
        find: impl Fn(&Engine) -> Result<Vec<PageRange>, Refusal>,
        (to, contents): (Visibility, Contents),
        (by, by_guest): (Option<VmId>, bool),
        on_busy: OnBusy,
    ) -> Result<Option<Converted>, Error> {
        let claim = |engine: &mut Engine| {
            let ranges = find(engine)?;
            engine.convert(&ConversionRequest { ranges, to, contents, by, by_guest })
        };
        let conversion = match self.claim(on_busy, claim)? {
            Start::AlreadySo => return Ok(None),
            Start::Claimed(conversion) => conversion,
        };
        let (engine, conversion) = self.drain(conversion)?;
        let (engine, unmapped) = self.perform(engine, conversion, Reached::Unmapped)?;
        let (engine, unpinned) = self.perform(engine, unmapped, Reached::Unpinned)?;
        let (engine, reshaped) = self.perform(engine, unpinned, Reached::Reshaped)?;
        let (engine, protected) = self.perform(engine, reshaped, Reached::Protected)?;
        let (mut engine, settled) = self.perform(engine, protected, Reached::Settled)?;
        let converted = engine.finish_conversion(settled);
        drop(engine);
        self.released();
        Ok(Some(converted))
    }

    /// The same, counted. How many pages changed.
    pub(crate) fn convert_counted(
        &self,
        find: impl Fn(&Engine) -> Result<Vec<PageRange>, Refusal>,
        (to, contents): (Visibility, Contents),
        by: (Option<VmId>, bool),
        on_busy: OnBusy,
    ) -> Result<PageCount, Error> {
        match self.convert(find, (to, contents), by, on_busy) {
            Ok(converted) => {
                let pages = converted.map_or(PageCount::ZERO, |converted| converted.pages);
                self.counters.converted(to, pages);
                Ok(pages)
            }
            Err(error) => {
                self.counters.refused();
                Err(error)
            }
        }
    }

    /// Takes a slot away, from the host first: that may take long, and fail, and until it is done
    /// the slot is there, its faults are answered, and what is granted meets its wishes. No other
    /// slot may change meanwhile.
    ///
    /// In between, a fault is answered for a slot that the host has no more. It finds that it has
    /// moved, and the guest faults again; KVM, which maps by itself, is not asked to.
    pub(crate) fn unbind(&self, vm: VmId, slot: Slot) -> Result<(), Error> {
        self.ask(|engine| engine.binding(vm, slot))?;
        self.host.unbind(vm, slot)?;
        let unbound = self.engine().unbind(vm, slot);
        assert!(unbound.is_ok(), "no slot changes meanwhile: {unbound:?}");
        Ok(())
    }

    /// Drops the contents of pages, by the guest's own wish or the VMM's; where pins are in the way
    /// and are to be waited for, once they are gone.
    pub(crate) fn discard(
        &self,
        range: PageRange,
        by_guest: bool,
        on_busy: OnBusy,
    ) -> Result<(), Error> {
        let find = |_: &Engine| Ok(vec![range]);
        let discard = || self.discard_now(range, by_guest, on_busy);
        self.unpinned(on_busy, Activity::Discard, find, discard)
    }

    fn discard_now(&self, range: PageRange, by_guest: bool, on_busy: OnBusy) -> Result<(), Error> {
        let discard = self.claim(on_busy, |engine| match by_guest {
            true => engine.discard_for_guest(range),
            false => engine.discard(range),
        })?;
        let (engine, discard) = self.drain(discard)?;
        let (mut engine, cleared) = self.perform(engine, discard, Reached::Cleared)?;
        engine.finish_discard(cleared);
        drop(engine);
        self.released();
        if let Some(pager) = &self.pager {
            pager.forget(self, range);
        }
        Ok(())
    }

    /// Merges the RMP entries of private 2M pages, one after the other: nobody waits for more than
    /// the one that he is about.
    pub(crate) fn merge(&self, range: PageRange, on_busy: OnBusy) -> Result<(), Error> {
        self.ask(|engine| engine.check_bounds(range))?;
        let pages = self.engine().mergeable(range);
        pages.into_iter().try_for_each(|page| {
            let merge = self.claim(on_busy, |engine| engine.merge(page))?;
            let (engine, merge) = self.drain(merge)?;
            let (mut engine, merged) = self.take_steps(engine, merge)?;
            engine.finish_merge(merged);
            drop(engine);
            self.released();
            Ok(())
        })
    }

    /// Fills pages that are owed with `bytes`, and zeros after them.
    pub(crate) fn populate(&self, range: PageRange, bytes: &[u8]) -> Result<(), Error> {
        let writing = self.claim(OnBusy::Wait, |engine| engine.populate(range))?;
        let (engine, writing) = self.drain(writing)?;
        drop(engine);
        if let Err(error) = self.host.views().write(range.start().offset(), bytes) {
            return Err(self.fail(writing, error));
        }
        self.tell(Moment::Reached(Reached::Written));
        let (mut engine, published) = self.perform(self.engine(), writing, Reached::Published)?;
        let answer = engine.finish_population(published);
        drop(engine);
        match answer {
            Some(answer) => self.show_populated(answer),
            // What a view can map as a whole alone is not whole yet.
            None => self.released(),
        }
        Ok(())
    }

    fn show_populated(&self, answer: Answer) {
        let (view, response, range) = (answer.view(), answer.response(), answer.range());
        let mut given = Land { driver: self, landing: Some(Landing::Answer(answer, None)) };
        // Should it fail, whoever waits is answered one by one.
        given.done(self.host.views().answer(view, response, range).is_ok());
    }

    /// Makes pages whole with `bytes`, or zeros for `None`, and shows those of `shown`; of all that
    /// are still owed and held by nobody. Each run is told by `note` before anybody sees it. What
    /// can't be written now for want of memory is owed as before.
    pub(crate) fn land(
        &self,
        range: PageRange,
        bytes: Option<&[u8]>,
        shown: PageRange,
        note: impl Fn(PageRange),
    ) {
        let mut left = Some(range);
        while let Some(rest) = left {
            let claimed = {
                let mut engine = self.engine();
                engine.first_owed(rest).map(|owed| (owed, engine.populate(owed)))
            };
            let Some((owed, claimed)) = claimed else { break };
            left = PageRange::between(owed.end(), rest.end());
            let Ok(writing) = claimed else { continue };
            let Ok((engine, writing)) = self.drain(writing) else { continue };
            drop(engine);
            if let Some(bytes) = bytes {
                let skipped = owed.start().offset() - range.start().offset();
                let from = usize::try_from(skipped).expect("within the bytes of a slice");
                let length = usize::try_from(owed.count().get()).expect("a part") * PAGE_BYTES;
                let written =
                    self.host.views().fill(owed.start().offset(), &bytes[from..][..length]);
                if let Err(error) = written {
                    self.fail(writing, error);
                    continue;
                }
            }
            self.tell(Moment::Reached(Reached::Written));
            let published = self.perform(self.engine(), writing, Reached::Published);
            let Ok((engine, published)) = published else { continue };
            drop(engine);
            note(owed);
            self.show(published, shown);
        }
    }

    /// Ends a population, and lets those go on who wait for a page of `shown` in the guest view.
    fn show(&self, published: Operation<Published>, shown: PageRange) {
        let Some(answer) = self.engine().finish_population_showing(published, shown) else {
            return self.released();
        };
        let (view, response, range) = (answer.view(), answer.response(), answer.range());
        let mut given = Land { driver: self, landing: Some(Landing::Answer(answer, None)) };
        self.tell(Moment::Answer(view, response, range));
        let done = self.host.views().answer(view, response, range).is_ok();
        given.done(done);
        if done {
            // They go on, and need no other answer.
            let mut waiting = self.waiting.lock();
            let before = waiting.len();
            waiting.retain(|(of, page)| *of != view || !range.contains(*page));
            let answered = before - waiting.len();
            drop(waiting);
            (0..answered).for_each(|_| self.counters.answered(view, Some(response)));
        }
    }

    /// Says that the contents of pages will not come.
    pub(crate) fn fail_source(&self, range: PageRange) -> Result<(), Error> {
        self.claim(OnBusy::Wait, |engine| engine.fail(range))?;
        self.released();
        Ok(())
    }

    /// Says that nothing is owed any more.
    pub(crate) fn settle(&self) -> Result<(), Error> {
        let failed = self.claim(OnBusy::Wait, |engine| {
            engine.settle()?;
            Ok(engine.failed().runs().collect::<Vec<_>>())
        })?;
        // Who waits is let go whether or not the host goes on watching.
        let settled = self.host.settle(&failed);
        self.released();
        settled
    }

    /// Answers a guest's access that was not let through: a fault for the VMM to handle, or
    /// `None` when the guest may try again. Waits while an operation holds the page, unless told
    /// to stop.
    pub(crate) fn guest_fault(
        &self,
        vm: VmId,
        access: GuestAccess,
        faulted: Option<Faulted>,
        stop: impl Fn() -> bool,
    ) -> Result<Option<MemoryFault>, Error> {
        self.counters.guest_fault();
        if !self.begun.swap(true, Ordering::Relaxed) {
            self.engine().launch();
        }
        let ask = |engine: &mut Engine| engine.guest_fault(vm, access);
        self.answer_guest(ask, stop, |range| self.host.map_guest(vm, access, faulted, range))
    }

    /// Asks until there is an answer, and carries it out under its claim.
    fn answer_guest(
        &self,
        ask: impl Fn(&mut Engine) -> GuestAnswer,
        stop: impl Fn() -> bool,
        carry_out: impl FnOnce(PageRange) -> Result<(), Error>,
    ) -> Result<Option<MemoryFault>, Error> {
        let mut engine = self.engine();
        loop {
            match ask(&mut engine) {
                GuestAnswer::Exit(fault) => return Ok(Some(fault)),
                GuestAnswer::Now(answer) => {
                    drop(engine);
                    let range = answer.range();
                    let mut given =
                        Land { driver: self, landing: Some(Landing::Answer(answer, None)) };
                    let done = carry_out(range);
                    given.done(done.is_ok());
                    return done.map(|()| None);
                }
                GuestAnswer::Wait if stop() => return Ok(None),
                GuestAnswer::Wait => self.wait(&mut engine),
                GuestAnswer::Owed(_) if stop() => return Ok(None),
                GuestAnswer::Owed(page) => engine = self.wait_for_contents(engine, page),
                GuestAnswer::Undo(operation) => {
                    drop(engine);
                    self.undo(operation);
                    engine = self.engine();
                }
            }
        }
    }

    /// Has the first pages of a span and those like it ready for a guest's touches, `most` at most.
    /// With an error it says whether several were tried, some of which may be done. No slot may
    /// change meanwhile. Waits while an operation holds the first page, until the vCPU is kicked.
    pub(crate) fn prefault(
        &self,
        of: (VmId, Vcpu<'_>),
        span: Span,
        most: u64,
    ) -> Result<Came, (Error, bool)> {
        let none = |error| (error, false);
        match self.host.translate(of.1, span, most).map_err(none)? {
            Translated::At(gfns) => self.prefault_frames(of, span.start, gfns),
            Translated::Nowhere(pages) => Ok(Came { end: span.start + pages, skipped: pages }),
            Translated::Table(gfn) => match self.ready(of, gfn) {
                Ok(()) => Ok(Came { end: span.start, skipped: 0 }),
                // A table where no memory is maps nothing.
                Err(Error::Refused(Refusal::NoSlot { .. })) => {
                    Ok(Came { end: span.start + 1, skipped: 1 })
                }
                Err(error) => Err(none(error)),
            },
        }
    }

    /// The same for pages that are in these frames.
    fn prefault_frames(
        &self,
        (vm, vcpu): (VmId, Vcpu<'_>),
        page: u64,
        gfns: GfnRange,
    ) -> Result<Came, (Error, bool)> {
        let claimed = self.claim_frames((vm, vcpu), gfns);
        let (answer, run, visibility) = claimed.map_err(|error| (error, false))?;
        let range = answer.range();
        let mut given = Land { driver: self, landing: Some(Landing::Answer(answer, None)) };
        let shown = self.host.show(vm, vcpu, Shown { page, gfns: run, visibility }, range);
        given.done(shown.is_ok());
        drop(given);
        let several = run.count() > PageCount::ONE;
        // The machine fails of the first frame only.
        let tried = several && self.host.machine().is_none();
        let (mut end, skipped) = shown.map_err(|error| (error, tried))?;
        if let Some(shown) = GfnRange::between(run.start().get(), end) {
            end = self.host.shown(vm, vcpu, shown).map_err(|error| (error, several))?;
        }
        Ok(Came { end: page + (end - run.start().get()), skipped })
    }

    /// Has the page with a guest's table ready to be read.
    fn ready(&self, of: (VmId, Vcpu<'_>), gfn: Gfn) -> Result<(), Error> {
        let (answer, ..) = self.claim_frames(of, GfnRange::one(gfn))?;
        let range = answer.range();
        let mut given = Land { driver: self, landing: Some(Landing::Answer(answer, None)) };
        let ready = self.host.ready(range);
        given.done(ready.is_ok());
        ready
    }

    fn claim_frames(
        &self,
        (vm, vcpu): (VmId, Vcpu<'_>),
        gfns: GfnRange,
    ) -> Result<(Answer, GfnRange, Visibility), Error> {
        let claim = |engine: &mut Engine| engine.prefault(vm, gfns, gfns.count());
        let kicked = || matches!(vcpu, Vcpu::Machine(vcpu) if vcpu.is_kicked());
        self.claim_unless(kicked, OnBusy::Wait, claim)
    }

    /// Answers an access or PVALIDATE that the RMP refused for its size, as
    /// `sev_handle_rmp_fault()` (arch/x86/kvm/svm/sev.c) does. What is to be done is looked up: the
    /// fault says SIZEM for PVALIDATE and RMPADJUST only (AMD APM volume 2, 15.36.10). What was
    /// done is told by `smashed`.
    pub(crate) fn size_fault(
        &self,
        vm: VmId,
        gfn: Gfn,
        stop: impl Fn() -> bool,
        smashed: &mut Option<Smashed>,
    ) -> Result<Option<MemoryFault>, Error> {
        let ask = |engine: &mut Engine| engine.size_fault(vm, gfn);
        self.answer_guest(ask, stop, |within| {
            let done = self.host.smash(vm, gfn, within)?;
            self.counters.smashed(done);
            *smashed = Some(done);
            Ok(())
        })
    }

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
        self.devices.take(step).unwrap_or_else(|| self.host.take(step))
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
        let _given = Land { driver: self, landing: Some(Landing::Copy(copying)) };
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
