//! The gate: the pages that nobody may pin without asking the engine.
//!
//! Closed are the pages that an operation claims to take them from who could pin them, those of an
//! exclusive pin, those that somebody waits to have unpinned, and those in quarantine. Whoever has
//! the engine closes and opens; who pins looks, without a lock. An operation on pages that can't be
//! pinned as they are (private, owed) closes nothing: until it is over, the page map says so.
//!
//! ```text
//! closes:  the range, stored      pins:  the pin, counted
//!          fence                         fence
//!          pins counted?                 is the gate closed? then back
//! ```
//! Each stores, then looks: at least one sees the other, and nobody pins what is being converted.
//! That a range that was closed and is open again may be pinned as what it has become follows from
//! release and acquire: the page map is changed before the gate is opened.
//!
//! A range that is read while it changes may come out as parts of two. Taken for closed where it is
//! not, it costs a question to the engine. Taken for open where it is being closed, who closes it
//! has not looked yet and will see the pin; where it was opened, the part that is new was stored
//! after.

use polder_units::PageRange;

use crate::sync::{AtomicU64, Ordering, fence};

/// How many ranges can be told apart. While there are more, everybody asks the engine.
const RANGES: usize = if cfg!(feature = "loom") { 2 } else { 32 };

/// Closings that found no place count this much.
const UNLISTED: u64 = 1 << 32;

/// Which pages are closed. Who pins reads the first line of it each time, and mostly no other: the
/// ranges that are listed first lie in it, so that whoever closes one takes one line from him.
#[repr(C, align(64))]
pub(super) struct Gate {
    /// How many ranges are listed, and times [`UNLISTED`], how many are not.
    closed: AtomicU64,
    /// Start and end; empty where no range is.
    ranges: [[AtomicU64; 2]; RANGES],
}

impl Gate {
    pub(super) fn new() -> Self {
        let ranges = core::array::from_fn(|_| [AtomicU64::new(0), AtomicU64::new(0)]);
        Self { closed: AtomicU64::new(0), ranges }
    }

    /// Closes `range`. One caller at a time. Pins are to be looked for after it, not before.
    pub(super) fn close(&self, range: PageRange) {
        let listed = self.place_of(0, 0).map(|[start, end]| {
            start.store(range.start().get(), Ordering::Release);
            end.store(range.end(), Ordering::Release);
        });
        let more = if listed.is_some() { 1 } else { UNLISTED };
        self.closed.store(self.closed.load(Ordering::Relaxed) + more, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// Opens what was closed. One caller at a time.
    pub(super) fn open(&self, range: PageRange) {
        let listed = self.place_of(range.start().get(), range.end()).map(|[start, end]| {
            end.store(0, Ordering::Release);
            start.store(0, Ordering::Release);
        });
        let less = if listed.is_some() { 1 } else { UNLISTED };
        self.closed.store(self.closed.load(Ordering::Relaxed) - less, Ordering::Release);
    }

    /// Whether no page of `range` is closed. The pin that depends on it was counted, and a fence
    /// passed, before.
    #[inline(always)]
    pub(super) fn is_open(&self, range: PageRange) -> bool {
        match self.closed.load(Ordering::Acquire) {
            0 => true,
            closed => closed < UNLISTED && self.is_listed_open(range),
        }
    }

    #[cold]
    fn is_listed_open(&self, range: PageRange) -> bool {
        self.ranges.iter().all(|[start, end]| {
            let start = start.load(Ordering::Acquire);
            let end = end.load(Ordering::Acquire);
            range.end() <= start || end <= range.start().get()
        })
    }

    fn place_of(&self, start: u64, end: u64) -> Option<&[AtomicU64; 2]> {
        self.ranges.iter().find(|range| {
            range[0].load(Ordering::Relaxed) == start && range[1].load(Ordering::Relaxed) == end
        })
    }
}

/// A copy of what is closed now.
impl Clone for Gate {
    fn clone(&self) -> Self {
        let copy = |word: &AtomicU64| AtomicU64::new(word.load(Ordering::Relaxed));
        let ranges = core::array::from_fn(|at| {
            let [start, end] = &self.ranges[at];
            [copy(start), copy(end)]
        });
        Self { closed: copy(&self.closed), ranges }
    }
}
