//! Scenarios: stories about a VM's memory, written in TOML, played step by step.
//!
//! | word | is |
//! |---|---|
//! | scenario | memory, VMs, actors, steps in an order, and what is expected |
//! | actor | one who acts, one step after the other, as a thread does |
//! | step | what one actor does; it may be held at a stage while others act |
//! | look | what is so of pages, in between or at the end |
//!
//! `docs/scenarios.md` is the format by example. Each actor is a thread; one at a time is let go
//! on, until its step is done, has stopped where it is to be held, or waits for somebody else: so
//! the same scenario is the same run. What it says is an allegation until [`parse()`] has made a
//! [`Scenario`] of it.
//!
//! [`record()`] plays a scenario that says nothing of what is expected, and says it: what came on
//! one host can be held against another.
//!
//! # Holes
//! - Whether a touch of the host view waits is told by the fault threads, by page: it takes up to
//!   two rounds of asking again (20 ms each) to be sure.
//! - On real hosts the state of a page is what the engine knows of it; page tables are the
//!   kernel's.

mod error;
mod guest_tables;
pub mod limits;
mod names;
mod outcome;
mod parse;
mod player;
mod report;
mod scenario;
mod state;
mod told;
mod watcher;
mod worker;
mod world;
mod write;

use polder::Platform;

pub use error::ScenarioError;
pub use names::{Is, Kind, VERBS, VerbEntry};
pub use outcome::Outcome;
pub use parse::{DEFAULT_GPA, parse};
pub use player::{Options, Recorded, play, record};
pub use report::{Change, Played, PlayedStep, Verdict};
pub use scenario::{
    Actor, By, Bytes, Expect, Hold, HostView, Look, Mapped, MemorySpec, Place, Scenario, SlotSpec,
    Step, Tables, Verb, VmSpec,
};

/// Every platform.
pub const PLATFORMS: [Platform; 4] =
    [Platform::Plain, Platform::SwProtected, Platform::Snp, Platform::Pkvm];
