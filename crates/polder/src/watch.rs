//! Watching a memory at work, between two of its steps: how a scenario shows an operation step by
//! step, and has it stop while others act. Not for a VMM: it costs, and whoever holds a thread in a
//! [`Watch`] holds the operation.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use polder_engine::{Response, Step, View};
use polder_units::PageRange;

/// How far an operation has come. Between two of these anybody else may act.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Reached {
    /// It holds its range; answers and copies from before may be in flight.
    Claimed,
    /// Nothing is in flight on its range any more.
    Drained,
    /// A conversion: the side that loses the pages can't reach them.
    Unmapped,
    /// A conversion: nobody refers to the pages.
    Unpinned,
    /// A conversion: the huge pages have the shape that they need.
    Reshaped,
    /// A conversion: hardware or kernel treats the pages as what they become.
    Protected,
    /// A conversion: all but the page map says so.
    Settled,
    /// A population: the bytes are there, and nobody sees them yet.
    Written,
    /// A population: the pages are ready for their first use.
    Published,
    /// A discard: the memory is gone.
    Cleared,
    /// A move: the pages are in their new place.
    Moved,
}

impl Reached {
    /// Every stage.
    pub const ALL: [Self; 11] = [
        Self::Claimed,
        Self::Drained,
        Self::Unmapped,
        Self::Unpinned,
        Self::Reshaped,
        Self::Protected,
        Self::Settled,
        Self::Written,
        Self::Published,
        Self::Cleared,
        Self::Moved,
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::Drained => "drained",
            Self::Unmapped => "unmapped",
            Self::Unpinned => "unpinned",
            Self::Reshaped => "reshaped",
            Self::Protected => "protected",
            Self::Settled => "settled",
            Self::Written => "written",
            Self::Published => "published",
            Self::Cleared => "cleared",
            Self::Moved => "moved",
        }
    }
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A text that names no stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no stage of an operation has this name")]
pub struct UnknownStage;

impl FromStr for Reached {
    type Err = UnknownStage;

    fn from_str(text: &str) -> Result<Self, UnknownStage> {
        Self::ALL.into_iter().find(|stage| stage.name() == text).ok_or(UnknownStage)
    }
}

/// What happens, told by the thread that does it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Moment {
    /// An operation has reached a stage.
    Reached(Reached),
    /// A step is about to be taken on the host.
    Step(Step),
    /// The step failed; what was done is undone next.
    Failed(Step),
    /// A step of a way back is about to be taken.
    Undo(Step),
    /// The calling thread has asked for what somebody else holds, and waits; or it is a vCPU that
    /// waits for who is at work on an entry of the RMP. May be told with the engine locked: to be
    /// noted, and no more.
    Waits,
    /// A fault thread was asked about touches of these pages, which have to wait.
    TouchWaits(View, PageRange),
    /// A fault thread is about to answer touches of these pages.
    Answer(View, Response, PageRange),
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |view: &View| match view {
            View::Host => "the host view",
            View::Guest => "the guest view",
        };
        match self {
            Self::Reached(stage) => write!(f, "is {stage}"),
            Self::Step(step) => write!(f, "{step}"),
            Self::Failed(step) => write!(f, "failed: {step}"),
            Self::Undo(step) => write!(f, "undo: {step}"),
            Self::Waits => f.write_str("wait"),
            Self::TouchWaits(view, pages) => {
                write!(f, "touches of pages {pages} in {} wait", name(view))
            }
            Self::Answer(view, Response::Map, pages) => {
                write!(f, "map pages {pages} in {}", name(view))
            }
            Self::Answer(view, Response::Poison, pages) => {
                write!(f, "deny pages {pages} in {}", name(view))
            }
        }
    }
}

/// Who is told what happens, while it happens: the thread goes on once this returns.
///
/// ```
/// # use polder::{Contents, HostKind, Memory, Moment, OnBusy, Reached, Visibility, Watch, units::{PageCount, PageRange}};
/// use std::sync::{Arc, Mutex};
///
/// #[derive(Default)]
/// struct Stages(Mutex<Vec<Reached>>);
///
/// impl Watch for Stages {
///     fn at(&self, moment: Moment) {
///         if let Moment::Reached(stage) = moment {
///             self.0.lock().unwrap().push(stage);
///         }
///     }
/// }
///
/// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
/// let stages = Arc::new(Stages::default());
/// memory.watch(stages.clone());
/// let page = PageRange::between(0, 1).unwrap();
/// memory.convert(page, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
/// assert_eq!(stages.0.lock().unwrap()[0], Reached::Claimed);
/// # Ok::<_, polder::Error>(())
/// ```
pub trait Watch: Send + Sync {
    /// Something happens, on the calling thread.
    fn at(&self, moment: Moment);
}

/// Holds threads up at every moment by as much as chance will have it: what happens between two
/// steps once in a million comes often. For stress tests, and for who doubts.
///
/// ```
/// # use std::{sync::Arc, time::Duration};
/// # use polder::{Delays, HostKind, Memory, units::PageCount};
/// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
/// memory.watch(Arc::new(Delays::new(1, Duration::from_micros(200))));
/// # Ok::<_, polder::Error>(())
/// ```
#[derive(Debug)]
pub struct Delays {
    random: AtomicU64,
    most: Duration,
}

impl Delays {
    /// Delays of `most` at most; half of the moments have none. The same `seed` makes the same
    /// sequence of delays; which thread draws the next one is up to them.
    pub fn new(seed: u64, most: Duration) -> Self {
        Self { random: AtomicU64::new(seed), most }
    }

    /// splitmix64.
    fn next(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let state = self.random.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

impl Watch for Delays {
    fn at(&self, moment: Moment) {
        let random = self.next();
        if moment == Moment::Waits || random & 1 == 0 {
            return;
        }
        let most = u64::try_from(self.most.as_nanos()).unwrap_or(u64::MAX);
        let nanos = (random >> 1) % most.saturating_add(1).max(1);
        std::thread::sleep(Duration::from_nanos(nanos));
    }
}
