//! Touches and copies: their answers, and what page tables and TLBs keep of them.

use polder_machine::Plant;

use super::{PlantedBug, bug};
use crate::polder::{Bug, Slip};

pub(super) const BUGS: &[PlantedBug] = &[
    bug(
        "touch-forgotten",
        "a touch is lost with the fault thread that took it from its queue",
        Bug::Driver(Slip::TouchForgotten),
        "abandoned",
        "INV-8",
    ),
    bug(
        "answer-after-given-back",
        "a fault is answered after the drain has seen its answer given back",
        Bug::Driver(Slip::AnswerAfterGivenBack),
        "conversion",
        "INV-1",
    ),
    bug(
        "never-mapped",
        "a guest's fault is answered, and its page is not mapped",
        Bug::Driver(Slip::NeverMapped),
        "conversion",
        "INV-8",
    ),
    bug(
        "copy-unclaimed",
        "the page map is looked at, and bytes are copied later",
        Bug::Driver(Slip::CopyUnclaimed),
        "pins",
        "INV-1",
    ),
    bug(
        "last-copy-kept",
        "the last of all copies does not give its claim back",
        Bug::Driver(Slip::LastCopyKept),
        "pins",
        "INV-8",
    ),
    bug(
        "slot-not-zapped",
        "a slot that is deleted stays in stage 2",
        Bug::Driver(Slip::SlotNotZapped),
        "slots",
        "INV-2",
    ),
    bug(
        "sequence-not-rechecked",
        "a guest's page is mapped though it was invalidated since it was found",
        Bug::Machine(Plant::StaleSequence),
        "slots",
        "INV-2",
    ),
    bug("no-flush", "a TLB is not flushed", Bug::Machine(Plant::SkipFlush), "conversion", "INV-2"),
    bug(
        "lost-mapcount",
        "mapping a page does not count",
        Bug::Machine(Plant::LostMapcount),
        "conversion",
        "INV-2",
    ),
];
