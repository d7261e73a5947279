//! Conversions: their order, the drain, and the undoing of what failed.

use polder_explored_engine::Bug as EngineBug;

use super::{PlantedBug, driver, engine};
use crate::polder::Slip;

pub(super) const BUGS: &[PlantedBug] = &[
    engine(
        "check-before-cut-off",
        "references are looked for while the pages can still be reached",
        EngineBug::CheckBeforeCuttingOff,
        "conversion",
        "INV-1",
    ),
    driver(
        "no-retry",
        "a reference that GUP-fast is about to drop fails a conversion",
        Slip::NoRetry,
        "conversion",
        "INV-4",
    ),
    engine(
        "commit-before-hardware",
        "the page map changes when a conversion is claimed",
        EngineBug::CommitBeforeHardware,
        "failures",
        "INV-4",
    ),
    engine(
        "undo-forward",
        "what was done is undone first to last",
        EngineBug::ForwardUndo,
        "failures",
        "INV-4",
    ),
    engine(
        "undo-skips-failing",
        "the step that failed, and may be done in part, is not undone",
        EngineBug::SkippedFailed,
        "failures",
        "INV-9",
    ),
    driver(
        "undone-doubted",
        "what was undone is taken for lost, and put in quarantine",
        Slip::UndoneDoubted,
        "failures",
        "INV-9",
    ),
    engine(
        "no-drain",
        "an operation does not wait for the answers in flight",
        EngineBug::NoDrain,
        "conversion",
        "INV-1",
    ),
    engine(
        "denied-while-claimed",
        "who touches a page of a conversion that may yet fail is denied, the holder of a pin too",
        EngineBug::DeniedWhileClaimed,
        "pins",
        "INV-4",
    ),
    engine(
        "markers-forgotten",
        "a conversion to shared leaves the markers of touches that were denied",
        EngineBug::MarkersForgotten,
        "conversion",
        "INV-4",
    ),
    engine(
        "abandoned-forgotten",
        "nobody sees that the thread of an operation has died",
        EngineBug::AbandonedForgotten,
        "abandoned",
        "INV-8",
    ),
];
