//! Prefault: what is mapped ahead.

use polder_explored_engine::Bug as EngineBug;
use polder_machine::Plant;

use super::{PlantedBug, driver, engine, machine};
use crate::polder::Slip;

pub(super) const BUGS: &[PlantedBug] = &[
    engine(
        "prefault-past-the-like",
        "what is mapped ahead goes on past the pages that are like the first",
        EngineBug::PrefaultPastTheLike,
        "prefault-owed",
        "INV-5",
    ),
    machine(
        "prefault-accessed",
        "what is mapped ahead is called accessed",
        Plant::AccessedSet,
        "prefault",
        "INV-11",
    ),
    driver(
        "prefault-copies",
        "what is mapped ahead is copied first, as a write would have it",
        Slip::PrefaultCopies,
        "prefault-copied",
        "INV-11",
    ),
    machine(
        "copy-forgotten",
        "a page that others have, too, is written to without a copy",
        Plant::CopyForgotten,
        "prefault-copied",
        "INV-2",
    ),
    driver(
        "prefault-progress-beyond",
        "a prefault that stops early says that all it had claimed is done",
        Slip::ProgressBeyond,
        "prefault",
        "INV-11",
    ),
    driver(
        "prefault-deleted-slot-spins",
        "a prefault tries again and again where the slot has gone",
        Slip::DeletedSlotSpins,
        "prefault-slots",
        "INV-8",
    ),
];
