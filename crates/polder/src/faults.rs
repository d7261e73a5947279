//! Fault threads: touches in, answers out, in batches.
//!
//! A thread takes all touches that wait, asks the engine for all of them in one hold of its lock,
//! carries the answers out (neighbours with the same answer by one system call), and gives them
//! back in one hold. What has to wait is asked again when a claim is released. The threads touch
//! no view but through the host, which uses the trusted one: a thread never waits for itself.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use polder_engine::{Answer, Operation, Response, TouchAnswer, Undoing, View};
use polder_units::{PageIndex, PageRange};

use crate::driver::Driver;
use crate::sync::JoinHandle;
use crate::watch::Moment;

/// The threads, ended when stopped.
#[derive(Debug)]
pub(crate) struct FaultThreads {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl FaultThreads {
    pub(crate) fn start(driver: &Arc<Driver>) -> Result<Self, polder_linux::Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = crate::sync::spawn("polder-faults", {
            let (driver, stop) = (Arc::clone(driver), Arc::clone(&stop));
            move || Server { driver: &driver, touches: Vec::new() }.run(&stop)
        })?;
        Ok(Self { stop, threads: vec![thread] })
    }

    pub(crate) fn stop(&mut self, driver: &Driver) {
        self.stop.store(true, Ordering::Release);
        driver.host.views().nudge();
        for thread in self.threads.drain(..) {
            // A panic in it was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// What a fault thread keeps between two batches.
struct Server<'a> {
    driver: &'a Driver,
    /// Touches that wait to be answered.
    touches: Vec<(View, PageIndex)>,
}

impl Server<'_> {
    fn run(&mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Acquire) {
            // A touch outlives a bug of ours: it is asked again, or denied if the engine broke.
            let _ = catch_unwind(AssertUnwindSafe(|| self.serve()));
        }
    }

    /// One batch.
    fn serve(&mut self) {
        let waiting = !self.touches.is_empty();
        let at_most = waiting.then_some(self.driver.ask_again);
        // What can fail here is reading descriptors that are ours: it is tried again.
        let _ = self.driver.host.views().touches(&mut self.touches, at_most);
        self.touches.sort_unstable();
        self.touches.dedup();
        if self.driver.try_engine().is_none() {
            self.deny_all();
            return;
        }
        let mut answers =
            Answers { driver: self.driver, given: Vec::new(), left: &mut self.touches };
        let abandoned = answers.ask();
        answers.tell_who_waits();
        answers.carry_out();
        drop(answers);
        for operation in abandoned {
            self.driver.undo(operation);
        }
    }

    /// Denies all touches, without an engine to ask.
    fn deny_all(&mut self) {
        for (view, page) in self.touches.drain(..) {
            let page = PageRange::one(page);
            if self.driver.host.views().answer(view, Response::Poison, page).is_err() {
                self.driver.host.views().wake(view, page);
            }
        }
    }
}

/// Answers that were given, and what was done of each so far. They are given back in one hold of
/// the lock when this is dropped, also by a panic; touches that were not answered are left to be
/// asked about again, after a while.
struct Answers<'a> {
    driver: &'a Driver,
    given: Vec<(Answer, Option<Response>)>,
    left: &'a mut Vec<(View, PageIndex)>,
}

impl Answers<'_> {
    /// Asks the engine about all touches. Those that have to wait stay; what they wait for and
    /// nobody drives is returned, to be undone.
    fn ask(&mut self) -> Vec<Operation<Undoing>> {
        let mut abandoned = Vec::new();
        let mut engine = self.driver.engine();
        self.left.retain(|&(view, page)| match engine.touch(view, page) {
            TouchAnswer::Now(answer) => {
                self.given.push((answer, None));
                false
            }
            TouchAnswer::Wait => true,
            TouchAnswer::Undo(operation) => {
                abandoned.push(operation);
                true
            }
        });
        self.driver.note_waiting(&engine, !self.left.is_empty());
        abandoned
    }

    /// Tells who watches which touches were not answered.
    fn tell_who_waits(&self) {
        for &(view, page) in self.left.iter() {
            self.driver.tell(Moment::TouchWaits(view, PageRange::one(page)));
        }
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
        let mut engine = self.driver.try_engine();
        for (answer, done) in self.given.drain(..) {
            any |= done.is_some();
            if done.is_none() {
                self.left.push((answer.view(), answer.range().start()));
            }
            if let Some(engine) = &mut engine {
                engine.answered(answer, done);
            }
        }
        drop(engine);
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
