//! What a scenario says, as data: a story of steps about one memory, and what is expected of it.
//!
//! [`parse()`](crate::parse()) makes one of a text, and `Display` writes a text of one that is read
//! as the same: so what a search has found can be saved and played again.

mod verb;

use std::collections::BTreeMap;
use std::fmt;

use polder::units::{Gpa, Level, PageCount, PageRange};
use polder::{HostKind, PageSize, Platform, Population, Reached, Visibility};
use polder_vmm::GuestRoot;

pub use self::verb::Verb;
use crate::names::{Is, Kind};

/// A story.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scenario {
    /// What happens in it, in words.
    pub about: String,
    /// Which of the threads that Polder answers it plays, if one.
    pub thread: Option<u64>,
    /// The invariants that it is about, such as `INV-1`.
    pub invariants: Vec<String>,
    /// Where it can be played.
    pub hosts: Vec<HostKind>,
    /// What the machine's audit says at the end, in part; it is clean unless this is said.
    pub discrepancy: Option<String>,
    /// The memory.
    pub memory: MemorySpec,
    /// The VMs, the first of them the one that is meant where none is named.
    pub vms: Vec<VmSpec>,
    /// Who acts, by name.
    pub actors: BTreeMap<String, Actor>,
    /// What happens, in order.
    pub steps: Vec<Step>,
    /// What is so at the end.
    pub expect: Vec<Look>,
}

/// The memory that a scenario is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemorySpec {
    /// Its size.
    pub pages: PageCount,
    /// For which kind of VM.
    pub platform: Platform,
    /// What every page is at first.
    pub starts: Visibility,
    /// Whether all contents are owed at first.
    pub owed: bool,
    /// What it is made of.
    pub page_size: PageSize,
    /// How many huge pages the pool has that it draws from, if it is not just enough.
    pub pool: Option<u64>,
}

/// A VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmSpec {
    /// Its name.
    pub name: String,
    /// The ASID of a VM that Polder does not know: an SNP guest of the machine's own, whose faults
    /// nobody answers but the story.
    pub asid: Option<u16>,
    /// The page tables that its guest has in its memory, where its vCPUs run on other roots than
    /// TDP.
    pub tables: Option<Tables>,
    /// What it sees of the memory.
    pub slots: Vec<SlotSpec>,
}

/// The tables of a VM's guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tables {
    /// What they are to its vCPUs: shadowed, as the guest's own or as L2's nested ones.
    pub root: GuestRoot,
    /// The first of the four pages that they lie in, the top table.
    pub first: u64,
}

/// The name of a root in a scenario.
pub(crate) const fn root_name(root: GuestRoot) -> &'static str {
    match root {
        GuestRoot::Tdp => "tdp",
        GuestRoot::Shadow => "shadow",
        GuestRoot::Nested => "nested",
    }
}

/// A slot of a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotSpec {
    /// Its number.
    pub slot: u32,
    /// The pages.
    pub pages: PageRange,
    /// Where the VM sees the first of them: a multiple of 4 KiB.
    pub gpa: Gpa,
}

/// Who acts: one after the other, as a thread does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Actor {
    /// What he is.
    pub kind: Kind,
    /// The VM whose guest he is, by its place in [`Scenario::vms`].
    pub vm: usize,
    /// Whether the scenario declares him, and the format has not.
    pub declared: bool,
}

/// One step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// The line that it begins at, from 1. Not a part of what is said.
    pub line: usize,
    /// Who does it; nobody, for [`Verb::Look`], [`Verb::Explain`], [`Verb::Pool`] and
    /// [`Verb::Audit`].
    pub actor: Option<String>,
    /// What he does.
    pub verb: Verb,
    /// Where he stops on the way.
    pub hold: Option<Hold>,
    /// What comes of it.
    pub expect: Expect,
}

/// Where an operation stops until [`Verb::Resume`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hold {
    /// At a stage.
    At(Reached),
    /// Before its n-th step on the host, from 1.
    BeforeStep(u64),
}

/// Pages, as a step names them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Pages of the object.
    Pages(PageRange),
    /// Guest frames: where the first is, and how many.
    Gpa(Gpa, PageCount),
}

/// Bytes to move: where in the first page they begin, and which they are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bytes {
    /// The pages; the bytes begin in the first.
    pub place: Place,
    /// The first byte's offset in its page.
    pub at: u64,
    /// How a guest means the address.
    pub side: Visibility,
}

/// By what a prefault names pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum By {
    /// By the addresses that the vCPU's root translates.
    Root,
    /// By guest-physical addresses.
    Gpa,
    /// By guest-physical addresses, wherever the guest's tables show them.
    Reverse,
}

impl By {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Root, Self::Gpa, Self::Reverse];
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Root => "root",
            Self::Gpa => "gpa",
            Self::Reverse => "reverse",
        })
    }
}

/// What is expected of a step.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Expect {
    /// What comes of it; that it is done, unless said.
    pub is: Option<Is>,
    /// The page that is named.
    pub page: Option<u64>,
    /// The holder that is named.
    pub holder: Option<String>,
    /// The error code, by Linux's name.
    pub errno: Option<String>,
    /// The bytes that were read begin so.
    pub bytes: Option<String>,
    /// The bytes that were read do not begin so.
    pub not: Option<String>,
    /// The bytes that were read are zeros.
    pub zeros: bool,
    /// How many pages were converted.
    pub converted: Option<u64>,
    /// How many pages were mapped ahead, or left out.
    pub done: Option<u64>,
    /// How many of these were left out.
    pub skipped: Option<u64>,
    /// How many pages are left to be mapped ahead.
    pub left: Option<u64>,
    /// What is told contains this.
    pub says: Option<String>,
}

/// What is expected of pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Look {
    /// The line that it begins at, from 1. Not a part of what is said.
    pub line: usize,
    /// The pages, all of which are so.
    pub place: Place,
    /// The VM whose stage 2 is meant.
    pub vm: usize,
    /// Private or shared.
    pub visibility: Option<Visibility>,
    /// Owed or whole.
    pub population: Option<Population>,
    /// What the VM wishes it to be, by the slot that shows it.
    pub wanted: Option<Visibility>,
    /// What the host view has there.
    pub host_view: Option<HostView>,
    /// The level at which stage 2 maps it, or that it does not.
    pub stage2: Option<Mapped>,
    /// Whether that mapping was used.
    pub accessed: Option<bool>,
    /// The level of the folio, or that there is none.
    pub folio: Option<Mapped>,
    /// The level of the RMP entry, or that it is not assigned.
    pub rmp: Option<Mapped>,
    /// Whether the guest has validated it.
    pub validated: Option<bool>,
}

/// What a host page table has in the place of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostView {
    /// Nothing: a touch is a fault.
    Absent,
    /// The page.
    Mapped,
    /// A marker that denies it.
    Denied,
}

/// A level, or nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapped {
    /// Nothing.
    No,
    /// So large.
    At(Level),
}

impl HostView {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Absent, Self::Mapped, Self::Denied];
}

impl fmt::Display for HostView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Absent => "absent",
            Self::Mapped => "mapped",
            Self::Denied => "denied",
        })
    }
}

impl fmt::Display for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::No => f.pad("none"),
            Self::At(level) => fmt::Display::fmt(level, f),
        }
    }
}

impl Look {
    /// Whether it says nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.visibility.is_none()
            && self.population.is_none()
            && self.wanted.is_none()
            && !self.is_simulated()
    }

    /// Whether it says what only the simulated machine shows.
    pub(crate) fn is_simulated(&self) -> bool {
        self.host_view.is_some()
            || self.stage2.is_some()
            || self.accessed.is_some()
            || self.folio.is_some()
            || self.rmp.is_some()
            || self.validated.is_some()
    }
}
