//! Running a cell.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::Duration;

use polder_require::patience;

use crate::{Case, Host, Skipped, World};

/// What came of a cell.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It behaved.
    Ok,
    /// This machine lacks something.
    Skipped(Skipped),
    /// It did not behave: what was said of it.
    Failed(String),
}

/// How long a cell may take before it counts as hung. They take some seconds at most.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs a case on a host, in a thread of its own: one that hangs is left behind.
pub fn run(host: &'static dyn Host, case: &'static Case) -> Verdict {
    run_within(host, case, patience(LIMIT))
}

/// The same with a time limit of one's own.
pub fn run_within(host: &'static dyn Host, case: &'static Case, limit: Duration) -> Verdict {
    // Put back also where the case hangs.
    let _held = match host.set_aside() {
        Ok(held) => held,
        Err(skipped) => return Verdict::Skipped(skipped),
    };
    let (done, came) = mpsc::channel();
    let thread = std::thread::Builder::new().name(format!("{}: {}", host.name(), case.name));
    let started = thread.spawn(move || {
        let ran = catch_unwind(AssertUnwindSafe(|| (case.run)(&World::new(host))));
        // Nobody listens any more where it took too long.
        let _ = done.send(match ran {
            Ok(Ok(())) => Verdict::Ok,
            Ok(Err(skipped)) => Verdict::Skipped(skipped),
            Err(panic) => Verdict::Failed(message(panic.as_ref())),
        });
    });
    match (started, came.recv_timeout(limit)) {
        (Err(error), _) => Verdict::Failed(format!("no thread to run it in: {error}")),
        (Ok(_), Ok(verdict)) => verdict,
        (Ok(_), Err(_)) => Verdict::Failed(format!("it hangs, for {limit:?} by now")),
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked with something that is no text").to_owned()
}
