//! The rows, a file for each section; conversion has several.

mod bind;
mod contents;
mod conversion;
mod create;
mod devices;
mod dirty_log;
mod discard;
mod exits;
mod guest_conversion;
mod host_view;
mod huge_pages;
mod kernel_access;
mod moves;
mod pins;
mod pkvm;
mod population;
mod prefault;
mod reach;
mod rmp;
mod selftests;
mod together;
mod userfault;

pub use reach::way_of;

use crate::{Case, Section};

// Names that hosts refer to.
pub(crate) use bind::{ANOTHER, DROPPED, MOVED, SLOTS};
pub(crate) use contents::{
    LOST, PRESERVED, PRESERVED_PROTECTED, UNSPECIFIED, UNSPECIFIED_PROTECTED, ZEROED,
    ZEROED_PROTECTED,
};
pub(crate) use conversion::{AUDIT, DISAGREE, GUP, QUARANTINE, REFERENCED, STEP_FAILS};
pub(crate) use devices::{FAILS, REACHES};
pub(crate) use dirty_log::STARTED;
pub(crate) use exits::{FAILED, MISMATCH, PLAIN_VM, QUARANTINE_EXIT};
pub(crate) use guest_conversion::IMPLICIT;
pub(crate) use host_view::{CHILD, OTHER, STRAY};
pub(crate) use huge_pages::SPLIT as SPLIT_FOLIOS;
pub(crate) use moves::{
    LAUNCHED, MOVES, MOVES_BUSY, MOVES_PINNED, MOVES_UNTOLD, NO_MOVE, NO_PRELOAD, NOT_PRELOADED,
    PRELOADED, UNMOVABLE,
};
pub(crate) use pins::MAPPED;
pub(crate) use population::{CONTINUE_FAILS, PLAIN_FAULTS};
pub(crate) use prefault::{FAILED_STOPS, OWED_STOPS, PART_STOPS, STILL_OWED, UNTOLD};
pub(crate) use reach::{
    DESCRIPTOR, MEM_HOST_VIEW, MEM_OTHER_VIEWS, TRACED_HOST_VIEW, TRACED_OTHER_VIEWS,
};
pub(crate) use together::DENIED_WHILE_FAILING;

/// Every row, in the table's order within a section.
pub fn cases() -> impl Iterator<Item = &'static Case> {
    let files: [&[Case]; 19] = [
        create::CASES,
        bind::CASES,
        host_view::CASES,
        discard::CASES,
        guest_conversion::CASES,
        conversion::CASES,
        contents::CASES,
        together::CASES,
        huge_pages::CASES,
        exits::CASES,
        population::CASES,
        kernel_access::CASES,
        prefault::CASES,
        pins::CASES,
        devices::CASES,
        dirty_log::CASES,
        moves::CASES,
        pkvm::CASES,
        reach::CASES,
    ];
    let more = userfault::FILES.into_iter().chain(rmp::FILES).chain(selftests::FILES);
    files.into_iter().chain(more).flatten()
}

impl Case {
    const fn new(
        section: Section,
        name: &'static str,
        run: fn(&crate::World<'_>) -> crate::Ran,
    ) -> Self {
        Self { section, name, run }
    }
}
