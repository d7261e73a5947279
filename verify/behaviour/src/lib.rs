//! What memory promises: one table of [`Case`]s and [`Host`]s.
//!
//! A case is a sentence about memory and the code that tries it, through the API of [`polder`] and
//! from inside a guest. Every host is given the same cases. A cell of the table, one case on one
//! host, *runs*, or is *not applicable* for a reason that its host states ([`Cell`]). The table is
//! checked in as `table.md`; a test fails where it is not what is declared here, and where a cell
//! that runs does not pass.
//!
//! | to add | do |
//! |---|---|
//! | a case | write it in the file of its section, and list it in that file's `CASES` |
//! | a host | implement [`Host`] and [`Guest`], and list it in [`hosts()`] |
//!
//! Then `cargo xtask behaviours --write` writes the table anew.
//!
//! # Holes
//! What the API has no words for yet has no row: an event instead of a wait, a slot without a
//! private side. A row that needs two threads to meet tries often enough that they do, and fails if
//! they don't.

mod cases;
mod host;
mod hosts;
mod table;
mod verdict;
mod world;

use std::fmt;

use polder_require::Facility;

pub use cases::{cases, way_of};
pub use host::{Guest, Host, Inside, SetAside, Trouble, Way};
pub use hosts::{hosts, planted};
pub use table::{Cell, cell, render};
pub use verdict::{Verdict, run, run_within};
pub use world::{Bound, World};

/// What a case is about: the table's headings.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Section {
    /// Making memory.
    Create,
    /// Showing it to VMs.
    Bind,
    /// What device models see of it.
    HostView,
    /// Dropping contents.
    Discard,
    /// Private to shared and back.
    Conversion,
    /// Huge pages, split and merged.
    HugePages,
    /// SEV-SNP's reverse map table.
    Rmp,
    /// Guest accesses that end in the VMM.
    Exits,
    /// Contents that are owed, and arrive.
    Population,
    /// Contents that a source brings when they are touched.
    Userfault,
    /// KVM's own accesses to memory that is owed, or has failed.
    KernelAccess,
    /// Mapping for a guest ahead of its touches.
    Prefault,
    /// Pins, and who waits for them.
    Pins,
    /// Devices that have what is shared mapped.
    Devices,
    /// The log of what is written.
    DirtyLog,
    /// Bytes before the guest begins, and pages that move.
    Move,
    /// A protected VM under pKVM.
    Pkvm,
    /// Who reaches a private page.
    Reach,
    /// What the kernel's own selftests assert, through the kernel's interface.
    Selftests,
}

impl Section {
    /// Every section, in the table's order.
    pub const ALL: [Self; 19] = [
        Self::Create,
        Self::Bind,
        Self::HostView,
        Self::Discard,
        Self::Conversion,
        Self::HugePages,
        Self::Rmp,
        Self::Exits,
        Self::Population,
        Self::Userfault,
        Self::KernelAccess,
        Self::Prefault,
        Self::Pins,
        Self::Devices,
        Self::DirtyLog,
        Self::Move,
        Self::Pkvm,
        Self::Reach,
        Self::Selftests,
    ];
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Create => "create",
            Self::Bind => "bind",
            Self::HostView => "host view",
            Self::Discard => "discard",
            Self::Conversion => "conversion",
            Self::HugePages => "huge pages",
            Self::Rmp => "rmp",
            Self::Exits => "exits",
            Self::Population => "population",
            Self::Userfault => "userfault",
            Self::KernelAccess => "the kernel's own accesses",
            Self::Prefault => "prefault",
            Self::Pins => "pins",
            Self::Devices => "devices",
            Self::DirtyLog => "dirty log",
            Self::Move => "preload and move",
            Self::Pkvm => "pkvm",
            Self::Reach => "reach",
            Self::Selftests => "the kernel's selftests",
        })
    }
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What it is about.
    pub section: Section,
    /// What is promised, as a sentence. No two cases have the same.
    pub name: &'static str,
    /// Tries it; panics where the promise is broken.
    pub run: fn(&World<'_>) -> Ran,
}

/// What came of a case that did not panic.
pub type Ran = Result<(), Skipped>;

/// A cell that could not be run, because this machine lacks something.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Skipped {
    /// What it lacks.
    pub facility: Facility,
    /// How that showed.
    pub why: String,
}
