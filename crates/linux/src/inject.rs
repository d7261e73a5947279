//! Calls that fail because a test wants them to. The feature `inject` alone has this; without it
//! there is nothing of it in the program.
//!
//! ```
//! use polder_linux::{Errno, Memfd, inject};
//! use polder_units::PageCount;
//!
//! let plan = inject::Plan { nth: 1, ..inject::Plan::of(&["ftruncate"], Errno::NOMEM) };
//! let armed = inject::arm(plan);
//! let error = Memfd::new("test", PageCount::ONE).unwrap_err();
//! assert_eq!((error.call, error.errno), ("ftruncate", Errno::NOMEM));
//! assert!(armed.disarm().hit());
//! ```
//!
//! The calls of all threads of the process count: tests that use this stand in a program of their
//! own. A plan holds all others off until it is disarmed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

/// What becomes of a call that is to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// It is not made.
    Instead,
    /// It is made, and then reported to have failed.
    After,
}

/// Which call is to fail, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Calls of these names only count; of any, if there is none.
    pub calls: &'static [&'static str],
    /// The first that fails, counted from 1; none for 0.
    pub nth: u64,
    /// How many fail, from that one on.
    pub times: u64,
    /// With what.
    pub errno: Errno,
    /// Whether they are made all the same.
    pub when: When,
}

impl Plan {
    /// No call fails; they are only counted.
    pub const COUNT: Self =
        Self { calls: &[], nth: 0, times: 0, errno: Errno::IO, when: When::Instead };

    /// The first call of these names fails.
    pub const fn of(calls: &'static [&'static str], errno: Errno) -> Self {
        Self { calls, nth: 1, times: 1, errno, when: When::Instead }
    }
}

/// What came of a plan so far.
#[derive(Clone, Debug)]
pub struct Outcome {
    plan: Plan,
    /// Every call since it was armed, by name, in order.
    pub calls: Vec<&'static str>,
    counted: u64,
    /// The calls that failed by the plan, by name.
    pub failed: Vec<&'static str>,
}

impl Outcome {
    /// Whether a call has failed by the plan.
    pub fn hit(&self) -> bool {
        !self.failed.is_empty()
    }

    /// Notes a call; whether it is to fail.
    fn note(&mut self, name: &'static str) -> bool {
        self.calls.push(name);
        if !self.plan.calls.is_empty() && !self.plan.calls.contains(&name) {
            return false;
        }
        self.counted += 1;
        let Some(after) = self.counted.checked_sub(self.plan.nth) else { return false };
        let fails = self.plan.nth > 0 && after < self.plan.times;
        self.failed.extend(fails.then_some(name));
        fails
    }
}

/// Whether there is a plan: asked first, so that without one nobody waits for anybody.
static ARMED: AtomicBool = AtomicBool::new(false);
static CURRENT: Mutex<Option<Outcome>> = Mutex::new(None);
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A plan in force, until it is disarmed or dropped.
#[derive(Debug)]
pub struct Armed {
    _alone: MutexGuard<'static, ()>,
}

/// Puts a plan in force.
pub fn arm(plan: Plan) -> Armed {
    let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    *current() = Some(Outcome { plan, calls: Vec::new(), counted: 0, failed: Vec::new() });
    ARMED.store(true, Ordering::SeqCst);
    Armed { _alone: alone }
}

impl Armed {
    /// What came of it so far.
    pub fn outcome(&self) -> Outcome {
        current().clone().expect("it is in force")
    }

    /// Has no further call fail.
    pub fn disarm(self) -> Outcome {
        self.outcome()
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        ARMED.store(false, Ordering::SeqCst);
        *current() = None;
    }
}

fn current() -> MutexGuard<'static, Option<Outcome>> {
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call that fails if it is planned to.
pub(crate) fn watch<T>(
    name: &'static str,
    mut ask: impl FnMut() -> Result<T, Errno>,
) -> impl FnMut() -> Result<T, Errno> {
    move || {
        if !ARMED.load(Ordering::SeqCst) {
            return ask();
        }
        let planned = current().as_mut().and_then(|now| now.note(name).then_some(now.plan));
        match planned {
            None => ask(),
            Some(Plan { errno, when: When::Instead, .. }) => Err(errno),
            Some(Plan { errno, .. }) => ask().and(Err(errno)),
        }
    }
}
