//! The engine: what may happen to a guest's memory, and in which order. It is pure. It takes
//! events (a fault, a request, the outcome of a step) and returns answers and [`Step`]s; a driver
//! executes the steps on a host and reports back. It has no descriptor, no thread and no clock,
//! so real hosts, the simulated machine and the search over interleavings all run this code.
//!
//! # Vocabulary
//! - **Object**: the memory, numbered in 4 KiB pages from 0. Its size is fixed for life.
//! - **Granted**: whether a page is private or shared, a fact of the object's page
//!   ([`PageFacts`]), kept in the [`PageMap`].
//! - **Binding**: a run of the object's pages seen by one VM at some gfn ([`Binding`]).
//! - **View**: a mapping of the object. The *host view* is what device models get pointers into,
//!   the *guest view* is the VM's slot, the *trusted view* is the driver's own.
//! - **Operation**: a conversion, population or discard in flight ([`Operation`]). It **claims**
//!   its range: others that overlap are refused or wait, faults in it wait.
//! - **Answer**: one fault being answered, or one copy being made ([`Answer`], [`Copying`]). They
//!   claim too, briefly, and any number of them may overlap; an operation **drains** them before
//!   it touches a mapping, so no answer given before can take effect after.
//!
//! # The rules
//! - No driver answers a fault or copies a byte without holding the answer for it.
//! - A handle that is dropped before its end makes its operation *abandoned*; whoever meets its
//!   claim next is given the [`Operation<Undoing>`] and undoes it.
//! - A step that fails is undone with all before it, last first. Pages whose undo fails are
//!   **quarantined**: refused to everybody, for good, and reported.
//!
//! # Holes
//! Who holds pins, and operations, are kept in lists: both are meant for as many entries as there
//! are threads and devices, not for millions. How many pins a holder has does not matter.

#![no_std]

extern crate alloc;
#[cfg(any(test, feature = "loom"))]
extern crate std;

mod binding;
mod convert;
mod copy;
mod discard;
mod dma;
mod error;
mod explain;
#[cfg(feature = "explore")]
mod explore;
mod fault;
mod folio;
mod history;
mod level;
mod merge;
mod move_pages;
mod operation;
mod page_map;
mod pin;
mod plant;
mod platform;
pub mod pool;
mod populate;
mod prefault;
mod preload;
mod range_set;
mod rmp;
mod step;
mod sync;
mod turns;
mod wanted;

#[cfg(test)]
mod tests;

use alloc::vec::Vec;

use polder_units::{Geometry, Level, PageCount, PageIndex, PageRange};

pub use binding::{Binding, Slot, VmId};
pub use convert::{
    Conversion, ConversionRequest, Converted, Draining, Protected, Reshaped, Settled, Start,
    Unmapped, Unpinned,
};
pub use copy::Copying;
pub use discard::{Cleared, Clearing, Discard};
pub use dma::{Attached, Attaching, DeviceId};
pub use error::{Errno, Refusal};
pub use explain::{Clause, Explanation, Held, LevelLimit, Pinned, Shown};
#[cfg(feature = "explore")]
pub use fault::InFlight;
pub use fault::{Answer, GuestAccess, GuestAnswer, MemoryFault, Response, TouchAnswer, View};
pub use folio::{Backing, FolioCounts, ReshapeCounts};
pub use history::{Came, Past};
pub use level::{LevelLimits, Limit};
pub use merge::{Merged, Merging};
pub use move_pages::{MoveUnmapped, MoveUnpinned, Moved, Moving};
pub use operation::{Activity, Blocked, OpId, Operation, Stage, Undoing};
pub use page_map::{PageFacts, PageMap, PageReader, Population, Visibility};
pub use pin::{AskEngine, Holder, Local, PinId, PinKind, Pinner, WaitFor, Waiting};
#[cfg(feature = "plant")]
pub use plant::Bug;
pub use platform::{Contents, Platform};
pub use populate::{Published, Writing};
pub use preload::{Filling, Preloaded, Preparing};
pub use range_set::RangeSet;
pub use rmp::{LargeRmpEntry, NotLarge, can_install_large_rmp_entry};
pub use step::Step;
pub use turns::Turn;
pub use wanted::Wish;

use crate::binding::Bindings;
#[cfg(not(feature = "explore"))]
use crate::fault::InFlight;
use crate::operation::Record;
use crate::pin::Pins;

/// What an [`Engine`] is made for.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The object's size in pages, at least 1.
    pub pages: PageCount,
    /// Pages per level.
    pub geometry: Geometry,
    /// Who decides about visibility, and what a conversion does to contents.
    pub platform: Platform,
    /// Whether the host keeps private and shared pages in the same memory. Where it does not
    /// (two pools), a conversion loses the contents.
    pub in_place: bool,
    /// The largest page that the host view maps.
    pub host_view_level: Level,
    /// What the memory is made of.
    pub backing: Backing,
    /// What every page is at first.
    pub initial: PageFacts,
}

/// All that is known and decided about one memory object. See the [crate] documentation.
#[derive(Clone, Debug)]
pub struct Engine {
    config: Config,
    pages: PageMap,
    folios: folio::Folios,
    bindings: Bindings,
    wishes: wanted::Wishes,
    operations: Vec<Record>,
    in_flight: Vec<InFlight>,
    pins: Pins,
    /// Devices that have what is shared mapped.
    devices: Vec<dma::Device>,
    /// Pages in whose place a view holds a poison marker, by view.
    markers: [RangeSet; 2],
    /// Pages that are owed for good: their source failed.
    failed: RangeSet,
    /// Pages whose undo failed; neither side may touch them again.
    quarantine: RangeSet,
    /// Those who wait for operations to end.
    turns: turns::Turns,
    /// The last operations that ended or were refused.
    history: history::History,
    /// The bug planted in it; none, but where a checker is checked.
    plants: plant::Plants,
    /// The guest has begun: nobody but the guest puts anything onto its private pages.
    launched: bool,
    /// The last id given out, to operations, answers and pins alike.
    last_id: u64,
}

impl Engine {
    /// An engine for an object in which nothing has happened yet.
    ///
    /// # Panics
    /// For an object without pages, for one that is no multiple of its huge pages, and for pages
    /// that are private and owed where the guest alone can fill such
    /// ([`Platform::host_fills_private`]): who touches them would wait for ever.
    pub fn new(config: Config) -> Self {
        assert!(!config.pages.is_zero(), "an object has at least one page");
        let PageFacts { visibility, population } = config.initial;
        assert!(
            config.platform.host_fills_private()
                || visibility == Visibility::Shared
                || population == Population::Whole,
            "what the guest alone can fill is never owed"
        );
        Self {
            pages: PageMap::new(config.pages, config.geometry, config.initial),
            folios: folio::Folios::new(config.pages, config.backing, config.geometry),
            bindings: Bindings::default(),
            wishes: wanted::Wishes::default(),
            operations: Vec::new(),
            in_flight: Vec::new(),
            pins: Pins::new(config.pages),
            devices: Vec::new(),
            launched: false,
            markers: <[RangeSet; 2]>::default(),
            failed: RangeSet::default(),
            quarantine: RangeSet::default(),
            turns: turns::Turns::default(),
            history: history::History::default(),
            plants: plant::Plants::default(),
            last_id: 0,
            config,
        }
    }

    /// What it was made for.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Private or shared, owed or whole, for every page.
    pub fn pages(&self) -> &PageMap {
        &self.pages
    }

    /// A reader of the same, for threads that don't hold whatever guards the engine.
    pub fn reader(&self) -> PageReader {
        self.pages.reader()
    }

    /// The pages that nobody may touch because an operation on them could not be undone.
    pub fn quarantine(&self) -> &RangeSet {
        &self.quarantine
    }

    /// The pages in whose place a view holds a poison marker.
    pub fn markers(&self, view: View) -> &RangeSet {
        &self.markers[view as usize]
    }

    /// Whether nothing is in flight: no operation, no answer, no copy.
    pub fn is_idle(&self) -> bool {
        self.operations.is_empty() && self.in_flight.is_empty()
    }

    /// All pages.
    fn all(&self) -> PageRange {
        PageRange::between(0, self.config.pages.get()).expect("an object has pages")
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// Refuses a range that is not inside the object.
    ///
    /// # Errors
    /// [`Refusal::Beyond`].
    pub fn check_bounds(&self, range: PageRange) -> Result<(), Refusal> {
        if range.end() <= self.config.pages.get() {
            Ok(())
        } else {
            Err(Refusal::Beyond { range, pages: self.config.pages })
        }
    }

    /// Refuses a range that holds a quarantined page.
    fn check_quarantine(&self, range: PageRange) -> Result<(), Refusal> {
        match self.quarantine.first_in(range) {
            Some(page) => Err(Refusal::Quarantined { page }),
            None => Ok(()),
        }
    }

    /// The first page of `range` whose facts `is` accepts.
    fn first_page(&self, range: PageRange, is: impl Fn(PageFacts) -> bool) -> Option<PageIndex> {
        self.pages.runs(range).find(|&(_, facts)| is(facts)).map(|(run, _)| run.start())
    }
}
