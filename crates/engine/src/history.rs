//! What was done to pages last, and refused: for whoever asks why a page is as it is.
//!
//! A ring of a fixed size, without a clock: entries have numbers, by which one is before another.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use polder_units::{PageIndex, PageRange};

use crate::{Activity, Blocked, Engine, Refusal};

/// How many entries are kept, of all pages together.
const KEPT: usize = 64;

/// How many runs of an operation are kept, each an entry.
const RUNS: usize = 8;

/// How an operation ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Came {
    /// It is done.
    Done,
    /// It failed, or its thread died, and nothing has changed: for this, if it is known.
    Undone(Option<Refusal>),
    /// It failed and could not be undone: pages are in quarantine.
    Quarantined,
    /// It was refused before anything was touched.
    Refused(Refusal),
}

/// An operation that is over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Past {
    /// Its number: larger than those of all that ended, or were refused, before.
    pub sequence: u64,
    /// What it was.
    pub activity: Activity,
    /// The pages that it claimed, or asked for, in one run of them.
    pub range: PageRange,
    /// What came of it.
    pub came: Came,
}

/// The last operations.
#[derive(Clone, Default, Debug)]
pub(crate) struct History {
    ring: VecDeque<Past>,
    last: u64,
}

impl History {
    /// Notes the end of an operation on these runs of pages.
    pub(crate) fn note(&mut self, activity: Activity, runs: &[PageRange], came: &Came) {
        if cfg!(feature = "explore") {
            // A search asks nobody why, and copies the engine at every step.
            return;
        }
        self.last += 1;
        for &range in runs.iter().take(RUNS) {
            if self.ring.len() == KEPT {
                self.ring.pop_front();
            }
            let came = came.clone();
            self.ring.push_back(Past { sequence: self.last, activity, range, came });
        }
    }

    /// Those on a page, the last of them last.
    pub(crate) fn of(&self, page: PageIndex) -> Vec<Past> {
        self.ring.iter().filter(|past| past.range.contains(page)).cloned().collect()
    }
}

impl Engine {
    /// Notes that an operation on these pages could not begin, if it never can as things are: who
    /// has to wait is not refused.
    pub(crate) fn note_refused<T>(
        &mut self,
        activity: Activity,
        runs: &[PageRange],
        begun: &Result<T, Blocked>,
    ) {
        if let Err(Blocked::Refused(refusal)) = begun {
            self.history.note(activity, runs, &Came::Refused(refusal.clone()));
        }
    }
}
