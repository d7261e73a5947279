//! Fault threads: touches in, answers out, in batches.
//!
//! One of the threads *leads*: it takes all touches that wait, asks the engine for all of them in
//! one hold of its lock, carries the answers out (neighbours with the same answer by one system
//! call), and gives them back in one hold. What has to wait is kept, for whoever leads, and asked
//! again when a claim is released. The threads touch no view but through the host, which uses the
//! trusted one: a thread never waits for itself.
//!
//! What is owed is brought from the source by the same threads ([`crate::pager`]), without a
//! handover on a fault's way: the leader gives the lead away and brings it himself. The last thread
//! that is free never reads, so that somebody is always there to answer, and to see that time is
//! over.
//!
//! Waking another thread costs as much as a page. So who leads brings the one page that is asked
//! for with the lead in his hand, where reads have been short so far, and another thread *watches*:
//! it takes the lead over if a read becomes a long one. It watches only as long as such reads come.
//!
//! A thread that panics loses nothing: the lead goes to another, touches and demands are kept by
//! the driver, claims and answers are given back or undone. It ends, and another takes its place:
//! what it had of its own, its pins among it, ends with it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use polder_engine::{Answer, Operation, Response, TouchAnswer, Undoing, View};
use polder_units::PageRange;

use crate::driver::Driver;
use crate::pager::Pager;
use crate::sync::{Condvar, JoinHandle, Mutex, yield_now};
use crate::watch::Moment;

/// How long a thread that reads a source is waited for when its memory ends.
const GRACE: u32 = 100;
const GRACE_PAUSE: Duration = Duration::from_millis(1);

/// How often a watch looks whether who leads is in a long read.
const WATCH: Duration = Duration::from_millis(5);

/// Where the last touches came as soon as that after an answer, who leads looks for the next ones
/// as long before it sleeps: to be woken takes longer than to answer. Others who want the CPU have
/// it.
const SOON: Duration = Duration::from_micros(100);

/// The threads, ended when stopped.
pub(crate) struct FaultThreads {
    team: Arc<Team>,
}

/// A fault thread, and whether it is off to read a source.
type FaultThread = (JoinHandle<()>, Arc<AtomicBool>);

/// Who leads, and who could.
#[derive(Default)]
struct Team {
    stop: AtomicBool,
    lead: Mutex<Lead>,
    free: Condvar,
    /// Those that were started and live, each of which is waited for in the end.
    threads: Mutex<Vec<FaultThread>>,
    /// Whether the last touches came [`SOON`].
    soon: AtomicBool,
}

#[derive(Default)]
struct Lead {
    taken: bool,
    /// How often it was taken: who leads in an earlier term does so no more.
    term: u64,
    /// Threads that wait for it.
    waiting: usize,
    /// Whether one of them is the watch.
    watched: bool,
    /// Since when who leads has been reading.
    reads_since: Option<Instant>,
    /// Whether he has read since the watch looked last.
    has_read: bool,
}

impl FaultThreads {
    pub(crate) fn start(driver: &Arc<Driver>, count: usize) -> Result<Self, polder_linux::Error> {
        let mut threads = Self { team: Arc::default() };
        for _ in 0..count {
            if let Err(error) = start(driver, &threads.team) {
                threads.stop(driver);
                return Err(error);
            }
        }
        Ok(threads)
    }

    /// Ends the threads. One that is in a source which does not return is left to that: it ends
    /// when the source does.
    pub(crate) fn stop(&mut self, driver: &Driver) {
        self.team.stop.store(true, Ordering::SeqCst);
        // With the lock, so that nobody is between looking and waiting.
        drop(self.team.lead.lock());
        self.team.free.notify_all();
        driver.host.views().nudge();
        // From here on none takes another's place.
        let threads = std::mem::take(&mut *self.team.threads.lock());
        for (thread, away) in threads {
            let mut left = GRACE;
            while away.load(Ordering::SeqCst) && left > 0 {
                crate::sync::sleep(GRACE_PAUSE);
                left -= 1;
            }
            if left > 0 {
                // A panic in it was reported when it happened.
                let _ = thread.join();
            }
        }
    }
}

/// Starts a fault thread, unless all are to end.
fn start(driver: &Arc<Driver>, team: &Arc<Team>) -> Result<(), polder_linux::Error> {
    let mut threads = team.threads.lock();
    if team.stop.load(Ordering::SeqCst) {
        return Ok(());
    }
    let away = Arc::new(AtomicBool::new(false));
    let thread = crate::sync::spawn("polder-faults", {
        let (driver, team, away) = (Arc::clone(driver), Arc::clone(team), Arc::clone(&away));
        move || run(&driver, &team, &away)
    })?;
    // Those that died of a bug have told of it, and leave nothing to wait for.
    threads.retain(|(thread, _)| !crate::sync::is_finished(thread));
    threads.push((thread, away));
    Ok(())
}

/// A fault thread, until all are to end. One that panics ends once another was started: a touch
/// outlives a bug of ours, to be asked again, or denied if the engine broke.
fn run(driver: &Arc<Driver>, team: &Arc<Team>, away: &AtomicBool) {
    while !team.stop.load(Ordering::SeqCst) {
        let served = catch_unwind(AssertUnwindSafe(|| team.serve(driver, away)));
        // Where there is no other to be had this one stays.
        if served.is_err() && start(driver, team).is_ok() {
            return;
        }
    }
}

/// The lead, given away when dropped, unless it was taken over before.
struct Leading<'a> {
    team: &'a Team,
    term: u64,
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        let mut lead = self.team.lead.lock();
        if lead.term == self.term {
            lead.taken = false;
            lead.reads_since = None;
            drop(lead);
            self.team.free.notify_one();
        }
    }
}

impl Leading<'_> {
    /// Reads with the lead in hand, if somebody watches. `None` if nobody does; else whether the
    /// lead is still in hand.
    fn read(&self, read: impl FnOnce()) -> Option<bool> {
        {
            let mut lead = self.team.lead.lock();
            if !lead.watched {
                return None;
            }
            lead.has_read = true;
            lead.reads_since = Some(polder_linux::now());
        }
        read();
        let mut lead = self.team.lead.lock();
        let leads = lead.term == self.term;
        if leads {
            lead.reads_since = None;
        }
        Some(leads)
    }
}

/// Off to read a source, until dropped.
struct Away<'a>(&'a AtomicBool);

impl Drop for Away<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Team {
    /// Waits for the lead; `None` when all is to end.
    fn lead(&self, pager: Option<&Pager>) -> Option<Leading<'_>> {
        let mut lead = self.lead.lock();
        let mut may_watch = pager.is_some();
        while lead.taken {
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            lead.waiting += 1;
            if may_watch && !lead.watched {
                (lead.watched, lead.has_read) = (true, false);
                self.free.wait_for(&mut lead, WATCH);
                lead.watched = false;
                may_watch = lead.has_read || lead.reads_since.is_some();
            } else {
                self.free.wait(&mut lead);
            }
            lead.waiting -= 1;
            let long = |since: Instant| polder_linux::now().duration_since(since) >= WATCH;
            if let (Some(pager), true) = (pager, lead.reads_since.is_some_and(long)) {
                pager.note_slow();
                break;
            }
        }
        (lead.taken, lead.reads_since) = (true, None);
        lead.term += 1;
        Some(Leading { team: self, term: lead.term })
    }

    /// Leads until there is something to bring for which another can take the lead, and brings it.
    fn serve(&self, driver: &Driver, away: &AtomicBool) {
        let Some(leading) = self.lead(driver.pager.as_ref()) else { return };
        while !self.stop.load(Ordering::SeqCst) {
            self.batch(driver);
            let Some(pager) = &driver.pager else { continue };
            pager.expire(driver);
            away.store(true, Ordering::SeqCst);
            let _away = Away(away);
            while pager.has_one_demand() {
                match leading.read(|| pager.bring_next(driver)) {
                    Some(true) => {}
                    Some(false) => return,
                    None => break,
                }
            }
            if pager.has_work() && self.lead.lock().waiting > 0 {
                drop(leading);
                pager.work(driver, || self.stop.load(Ordering::SeqCst));
                return;
            }
        }
    }

    /// Adds the touches that wait, to those that waited before.
    fn touches(&self, driver: &Driver) {
        let waits = || !driver.waiting.lock().is_empty();
        // Work that is there has found nobody to take the lead: somebody may have come since.
        let bringing = driver.pager.as_ref().is_some_and(|it| it.is_awaited() || it.has_work());
        let at_most = (bringing || waits()).then_some(driver.ask_again);
        let mut touches = Vec::new();
        // What can fail here is reading descriptors that are ours: it is tried again. Whoever
        // nudges has changed what there is to do: that is not to be slept over.
        let mut look = |at_most| {
            let nudged = driver.host.views().touches(&mut touches, at_most);
            nudged.unwrap_or_default() || !touches.is_empty()
        };
        if driver.pager.is_some() {
            let start = polder_linux::now();
            let is_soon = || polder_linux::now().duration_since(start) < SOON;
            let mut came = false;
            while self.soon.load(Ordering::Relaxed) && !came && is_soon() {
                came = look(Some(Duration::ZERO));
                if !came {
                    yield_now();
                }
            }
            let _ = came || look(at_most);
            self.soon.store(!touches.is_empty() && is_soon(), Ordering::Relaxed);
        } else {
            look(at_most);
        }
        driver.keep_touches(touches);
    }

    /// One batch.
    fn batch(&self, driver: &Driver) {
        self.touches(driver);
        if driver.try_engine().is_none() {
            deny_all(driver);
            return;
        }
        let mut answers = Answers { driver, given: Vec::new() };
        let abandoned = answers.ask();
        answers.carry_out();
        drop(answers);
        for operation in abandoned {
            driver.undo(operation);
        }
    }
}

/// Denies all touches, without an engine to ask.
fn deny_all(driver: &Driver) {
    let touches = std::mem::take(&mut *driver.waiting.lock());
    for (view, page) in touches.into_keys() {
        let page = PageRange::one(page);
        if driver.host.views().answer(view, Response::Poison, page).is_err() {
            driver.host.views().wake(view, page);
        }
    }
}

/// Answers that were given, and what was done of each so far. They are given back in one hold of
/// the lock when this is dropped, also by a panic; touches that were not answered are left to be
/// asked about again, after a while.
struct Answers<'a> {
    driver: &'a Driver,
    given: Vec<(Answer, Option<Response>)>,
}

impl Answers<'_> {
    /// Asks the engine about all touches. Those that have to wait stay, and what is owed is asked
    /// for; what they wait for and nobody drives is returned, to be undone.
    fn ask(&mut self) -> Vec<Operation<Undoing>> {
        let mut abandoned = Vec::new();
        let (mut waits, mut owed) = (Vec::new(), Vec::new());
        {
            let mut engine = self.driver.engine();
            // With the engine locked: a claim that is released after this finds them here.
            self.driver.waiting.lock().retain(|&(view, page), turn| {
                // Those who wait behind are told when the answers are given back.
                match engine.in_turn(turn, |engine| engine.touch(view, page)).0 {
                    TouchAnswer::Now(answer) => {
                        self.given.push((answer, None));
                        false
                    }
                    TouchAnswer::Wait => {
                        waits.push((view, page));
                        true
                    }
                    TouchAnswer::Owed => {
                        waits.push((view, page));
                        owed.push(page);
                        true
                    }
                    TouchAnswer::Undo(operation) => {
                        abandoned.push(operation);
                        true
                    }
                }
            });
        }
        if let Some(pager) = self.driver.pager.as_ref().filter(|_| !owed.is_empty()) {
            pager.demand(owed);
        }
        for (view, page) in waits {
            self.driver.tell(Moment::TouchWaits(view, PageRange::one(page)));
        }
        abandoned
    }

    /// Carries answers out, neighbours with the same one together. If that fails, one by one.
    fn carry_out(&mut self) {
        let mut first = 0;
        while first < self.given.len() {
            let (view, response, range, count) = together(&self.given[first..]);
            let views = self.driver.host.views();
            let counters = &self.driver.counters;
            (0..count).for_each(|_| counters.answered(view, response));
            self.driver.tell(Moment::Answer(view, response, range));
            let done = views.answer(view, response, range).is_ok();
            for (answer, carried_out) in &mut self.given[first..first + count] {
                // Memory that has run out may come back: who touches waits for that.
                let done = done || views.answer(view, response, answer.range()).is_ok();
                *carried_out = done.then_some(response);
                if !done {
                    counters.unanswered(view, response);
                }
            }
            first += count;
        }
    }
}

impl Drop for Answers<'_> {
    fn drop(&mut self) {
        let mut any = false;
        let mut left = Vec::new();
        let mut engine = self.driver.try_engine();
        for (answer, done) in self.given.drain(..) {
            any |= done.is_some();
            if done.is_none() {
                left.push((answer.view(), answer.range().start()));
            }
            if let Some(engine) = &mut engine {
                engine.answered(answer, done);
            }
        }
        drop(engine);
        if !left.is_empty() {
            self.driver.keep_touches(left);
        }
        if any {
            self.driver.released();
        } else {
            // Not the fault thread itself: what failed is tried again after a while.
            self.driver.changed();
        }
    }
}

/// The first answers that can be carried out as one, and of how many that consists.
fn together(answers: &[(Answer, Option<Response>)]) -> (View, Response, PageRange, usize) {
    let first = &answers[0].0;
    let (view, response, mut range) = (first.view(), first.response(), first.range());
    let mut count = 1;
    for (next, _) in &answers[1..] {
        match range.append(next.range()) {
            Some(longer) if (next.view(), next.response()) == (view, response) => range = longer,
            _ => break,
        }
        count += 1;
    }
    (view, response, range, count)
}
