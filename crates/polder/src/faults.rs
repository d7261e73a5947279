//! Fault threads: touches in, answers out, in batches.
//!
//! One of the threads *leads*: it takes all touches that wait, asks the engine for all of them in
//! one hold of its lock, carries the answers out (neighbours with the same answer by one system
//! call), and gives them back in one hold. What has to wait is kept, for whoever leads, and asked
//! again when a claim is released. The threads touch no view but through the host, which uses the
//! trusted one: a thread never waits for itself.
//!
//! What is owed is brought from the source by the same threads ([`crate::pager`]), without a handover
//! on a fault's way: the leader gives the lead away and brings it himself. The last thread that is
//! free never reads, so that somebody is always there to answer, and to see that time is over.
//!
//! A thread that panics loses nothing: the lead goes to another, touches and demands are kept by the
//! driver, claims and answers are given back or undone.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use polder_engine::{Answer, Operation, Response, TouchAnswer, Undoing, View};
use polder_units::PageRange;

use crate::driver::Driver;
use crate::sync::{Condvar, JoinHandle, Mutex};
use crate::watch::Moment;

/// How long a thread that reads a source is waited for when its memory ends.
const GRACE: u32 = 100;
const GRACE_PAUSE: Duration = Duration::from_millis(1);

/// The threads, ended when stopped.
pub(crate) struct FaultThreads {
    team: Arc<Team>,
    threads: Vec<(JoinHandle<()>, Arc<AtomicBool>)>,
}

/// Who leads, and who could.
#[derive(Default)]
struct Team {
    stop: AtomicBool,
    lead: Mutex<Lead>,
    free: Condvar,
}

#[derive(Default)]
struct Lead {
    taken: bool,
    /// Threads that wait for it.
    waiting: usize,
}

impl FaultThreads {
    pub(crate) fn start(driver: &Arc<Driver>, count: usize) -> Result<Self, polder_linux::Error> {
        let mut threads = Self { team: Arc::default(), threads: Vec::new() };
        for _ in 0..count {
            let away = Arc::new(AtomicBool::new(false));
            let thread = crate::sync::spawn("polder-faults", {
                let (driver, team) = (Arc::clone(driver), Arc::clone(&threads.team));
                let away = Arc::clone(&away);
                move || run(&driver, &team, &away)
            });
            match thread {
                Ok(thread) => threads.threads.push((thread, away)),
                Err(error) => {
                    threads.stop(driver);
                    return Err(error);
                }
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
        for (thread, away) in self.threads.drain(..) {
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

/// A fault thread.
fn run(driver: &Driver, team: &Team, away: &AtomicBool) {
    while !team.stop.load(Ordering::SeqCst) {
        // A touch outlives a bug of ours: it is asked again, or denied if the engine broke.
        let _ = catch_unwind(AssertUnwindSafe(|| team.serve(driver, away)));
    }
}

/// The lead, given away when dropped.
struct Leading<'a>(&'a Team);

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        self.0.lead.lock().taken = false;
        self.0.free.notify_one();
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
    fn lead(&self) -> Option<Leading<'_>> {
        let mut lead = self.lead.lock();
        while lead.taken {
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            lead.waiting += 1;
            self.free.wait(&mut lead);
            lead.waiting -= 1;
        }
        lead.taken = true;
        Some(Leading(self))
    }

    /// Leads until there is something to bring, and brings it.
    fn serve(&self, driver: &Driver, away: &AtomicBool) {
        let Some(leading) = self.lead() else { return };
        while !self.stop.load(Ordering::SeqCst) {
            serve(driver);
            let Some(pager) = &driver.pager else { continue };
            pager.expire(driver);
            if pager.has_work() && self.lead.lock().waiting > 0 {
                away.store(true, Ordering::SeqCst);
                let _away = Away(away);
                drop(leading);
                pager.work(driver, || self.stop.load(Ordering::SeqCst));
                return;
            }
        }
    }
}

/// One batch.
fn serve(driver: &Driver) {
    let waits = || !driver.waiting.lock().is_empty();
    // Work that is there has found nobody to take the lead meanwhile: somebody may have come since.
    let bringing = driver.pager.as_ref().is_some_and(|it| it.is_awaited() || it.has_work());
    let at_most = (bringing || waits()).then_some(driver.ask_again);
    let mut touches = Vec::new();
    // What can fail here is reading descriptors that are ours: it is tried again.
    let _ = driver.host.views().touches(&mut touches, at_most);
    driver.waiting.lock().extend(touches);
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

/// Denies all touches, without an engine to ask.
fn deny_all(driver: &Driver) {
    let touches = std::mem::take(&mut *driver.waiting.lock());
    for (view, page) in touches {
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
            self.driver.waiting.lock().retain(|&(view, page)| match engine.touch(view, page) {
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
            self.driver.tell(Moment::Answer(view, response, range));
            let done = views.answer(view, response, range).is_ok();
            for (answer, carried_out) in &mut self.given[first..first + count] {
                // Memory that has run out may come back: who touches waits for that.
                let done = done || views.answer(view, response, answer.range()).is_ok();
                *carried_out = done.then_some(response);
                self.driver.counters.answered(view, *carried_out);
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
            self.driver.waiting.lock().extend(left);
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
