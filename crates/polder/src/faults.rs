//! Fault threads: touches in, answers out, in batches.
//!
//! A thread takes all touches that wait, asks the engine for all of them in one hold of its lock,
//! carries the answers out (neighbours with the same answer by one system call), and gives them
//! back in one hold. What has to wait is asked again when a claim is released. The threads touch
//! no view but through the host, which uses the trusted one: a thread never waits for itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use polder_engine::{Answer, Response, TouchAnswer, View};
use polder_units::{PageIndex, PageRange};

use crate::driver::Driver;
use crate::host::Host;

/// How long a touch that has to wait is left before it is asked again unprompted: a claim whose
/// thread died is released by whoever asks.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// The threads, ended when dropped.
#[derive(Debug)]
pub(crate) struct FaultThreads {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl FaultThreads {
    pub(crate) fn start(driver: &Arc<Driver>) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("polder-faults".into()).spawn({
            let (driver, stop) = (Arc::clone(driver), Arc::clone(&stop));
            move || serve(&driver, &stop)
        })?;
        Ok(Self { stop, threads: vec![thread] })
    }

    pub(crate) fn stop(&mut self, driver: &Driver) {
        self.stop.store(true, Ordering::Release);
        driver.host.nudge();
        for thread in self.threads.drain(..) {
            // A panic in it was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn serve(driver: &Driver, stop: &AtomicBool) {
    let mut touches: Vec<(View, PageIndex)> = Vec::new();
    while !stop.load(Ordering::Acquire) {
        let at_most = if touches.is_empty() { None } else { Some(ASK_AGAIN) };
        // What can fail here is reading descriptors that are ours: it is tried again.
        let _ = driver.host.touches(&mut touches, at_most);
        touches.sort_unstable();
        touches.dedup();
        let answers = answer(driver, &mut touches);
        carry_out(driver, answers);
    }
}

/// Asks the engine about all touches. Those that have to wait stay in `touches`.
fn answer(driver: &Driver, touches: &mut Vec<(View, PageIndex)>) -> Vec<Answer> {
    let mut answers: Vec<Answer> = Vec::with_capacity(touches.len());
    let mut abandoned = Vec::new();
    let mut engine = driver.engine();
    touches.retain(|&(view, page)| match engine.touch(view, page) {
        TouchAnswer::Now(answer) => {
            answers.push(answer);
            false
        }
        TouchAnswer::Wait => true,
        TouchAnswer::Undo(operation) => {
            abandoned.push(operation);
            true
        }
    });
    drop(engine);
    for operation in abandoned {
        driver.undo(operation);
    }
    answers
}

/// Carries answers out, neighbours with the same one together, and gives them back.
fn carry_out(driver: &Driver, answers: Vec<Answer>) {
    if answers.is_empty() {
        return;
    }
    let mut done = Vec::with_capacity(answers.len());
    for (view, response, range, count) in together(&answers) {
        let carried_out = respond(driver.host.as_ref(), view, response, range);
        driver.counters.answered(view, carried_out, count as u64);
        done.extend(std::iter::repeat_n(carried_out, count));
    }
    let mut engine = driver.engine();
    for (answer, done) in answers.into_iter().zip(done) {
        engine.answered(answer, done);
    }
    drop(engine);
    driver.released();
}

/// Carries one answer out as far as it can be: poison where mapping fails (memory has run out), a
/// new touch where even that does. Returns what was done.
fn respond(host: &dyn Host, view: View, response: Response, range: PageRange) -> Option<Response> {
    for attempt in [response, Response::Poison] {
        if host.answer(view, attempt, range).is_ok() {
            return Some(attempt);
        }
    }
    host.wake(view, range);
    None
}

/// The answers, joined where one follows on the other, and of how many each consists.
fn together(answers: &[Answer]) -> Vec<(View, Response, PageRange, usize)> {
    let mut joined: Vec<(View, Response, PageRange, usize)> = Vec::new();
    for answer in answers {
        let (view, response, range) = (answer.view(), answer.response(), answer.range());
        match joined.last_mut() {
            Some(last) if (last.0, last.1) == (view, response) => match last.2.append(range) {
                Some(longer) => (last.2, last.3) = (longer, last.3 + 1),
                None => joined.push((view, response, range, 1)),
            },
            _ => joined.push((view, response, range, 1)),
        }
    }
    joined
}
