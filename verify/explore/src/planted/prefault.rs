//! Prefault: what is mapped ahead.

use polder_explored_engine::Bug as EngineBug;
use polder_machine::Plant;

use super::{PlantedBug, bug};
use crate::polder::{Bug, Slip};

pub(super) const BUGS: &[PlantedBug] = &[
    bug(
        "prefault-past-the-like",
        "what is mapped ahead goes on past the pages that are like the first",
        Bug::Engine(EngineBug::PrefaultPastTheLike),
        "prefault-owed",
        "INV-5",
    ),
    bug(
        "prefault-accessed",
        "what is mapped ahead is called accessed",
        Bug::Machine(Plant::AccessedSet),
        "prefault",
        "INV-11",
    ),
    bug(
        "prefault-copies",
        "what is mapped ahead is copied first, as a write would have it",
        Bug::Driver(Slip::PrefaultCopies),
        "prefault-copied",
        "INV-11",
    ),
    bug(
        "copy-forgotten",
        "a page that others have, too, is written to without a copy",
        Bug::Machine(Plant::CopyForgotten),
        "prefault-copied",
        "INV-2",
    ),
    bug(
        "prefault-progress-beyond",
        "a prefault that stops early says that all it had claimed is done",
        Bug::Driver(Slip::ProgressBeyond),
        "prefault",
        "INV-11",
    ),
    bug(
        "prefault-deleted-slot-spins",
        "a prefault tries again and again where the slot has gone",
        Bug::Driver(Slip::DeletedSlotSpins),
        "prefault-slots",
        "INV-8",
    ),
];
