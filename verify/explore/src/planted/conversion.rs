//! Conversions: their order, the drain, and the undoing of what failed.

use polder_explored_engine::Bug as EngineBug;

use super::{PlantedBug, bug};
use crate::polder::{Bug, Slip};

pub(super) const BUGS: &[PlantedBug] = &[
    bug(
        "check-before-cut-off",
        "references are looked for while the pages can still be reached",
        Bug::Engine(EngineBug::CheckBeforeCuttingOff),
        "conversion",
        "INV-1",
    ),
    bug(
        "no-retry",
        "a reference that GUP-fast is about to drop fails a conversion",
        Bug::Driver(Slip::NoRetry),
        "conversion",
        "INV-4",
    ),
    bug(
        "commit-before-hardware",
        "the page map changes when a conversion is claimed",
        Bug::Engine(EngineBug::CommitBeforeHardware),
        "failures",
        "INV-4",
    ),
    bug(
        "undo-forward",
        "what was done is undone first to last",
        Bug::Engine(EngineBug::ForwardUndo),
        "failures",
        "INV-4",
    ),
    bug(
        "undo-skips-failing",
        "the step that failed, and may be done in part, is not undone",
        Bug::Engine(EngineBug::SkippedFailed),
        "failures",
        "INV-9",
    ),
    bug(
        "undone-doubted",
        "what was undone is taken for lost, and put in quarantine",
        Bug::Driver(Slip::UndoneDoubted),
        "failures",
        "INV-9",
    ),
    bug(
        "no-drain",
        "an operation does not wait for the answers in flight",
        Bug::Engine(EngineBug::NoDrain),
        "conversion",
        "INV-1",
    ),
    bug(
        "denied-while-claimed",
        "who touches a page of a conversion that may yet fail is denied, the holder of a pin too",
        Bug::Engine(EngineBug::DeniedWhileClaimed),
        "pins",
        "INV-4",
    ),
    bug(
        "markers-forgotten",
        "a conversion to shared leaves the markers of touches that were denied",
        Bug::Engine(EngineBug::MarkersForgotten),
        "conversion",
        "INV-4",
    ),
    bug(
        "abandoned-forgotten",
        "nobody sees that the thread of an operation has died",
        Bug::Engine(EngineBug::AbandonedForgotten),
        "abandoned",
        "INV-8",
    ),
];
