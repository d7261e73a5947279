//! Touches and copies: their answers, and what page tables and TLBs keep of them.

use polder_machine::Plant;

use super::{PlantedBug, driver, machine};
use crate::polder::Slip;

pub(super) const BUGS: &[PlantedBug] = &[
    driver(
        "touch-forgotten",
        "a touch is lost with the fault thread that took it from its queue",
        Slip::TouchForgotten,
        "abandoned",
        "INV-8",
    ),
    driver(
        "answer-after-given-back",
        "a fault is answered after the drain has seen its answer given back",
        Slip::AnswerAfterGivenBack,
        "conversion",
        "INV-1",
    ),
    driver(
        "never-mapped",
        "a guest's fault is answered, and its page is not mapped",
        Slip::NeverMapped,
        "conversion",
        "INV-8",
    ),
    driver(
        "copy-unclaimed",
        "the page map is looked at, and bytes are copied later",
        Slip::CopyUnclaimed,
        "pins",
        "INV-1",
    ),
    driver(
        "last-copy-kept",
        "the last of all copies does not give its claim back",
        Slip::LastCopyKept,
        "pins",
        "INV-8",
    ),
    driver(
        "slot-not-zapped",
        "a slot that is deleted stays in stage 2",
        Slip::SlotNotZapped,
        "slots",
        "INV-2",
    ),
    machine(
        "sequence-not-rechecked",
        "a guest's page is mapped though it was invalidated since it was found",
        Plant::StaleSequence,
        "slots",
        "INV-2",
    ),
    machine("no-flush", "a TLB is not flushed", Plant::SkipFlush, "conversion", "INV-2"),
    machine(
        "lost-mapcount",
        "mapping a page does not count",
        Plant::LostMapcount,
        "conversion",
        "INV-2",
    ),
];
