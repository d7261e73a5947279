//! Folios: how large a page is mapped, and what is split.

use polder_explored_engine::Bug as EngineBug;

use super::{PlantedBug, bug};
use crate::polder::Bug;

pub(super) const BUGS: &[PlantedBug] = &[
    bug(
        "no-congruence",
        "a large page is mapped where gfns and pages are not congruent",
        Bug::Engine(EngineBug::NoCongruence),
        "apart",
        "INV-5",
    ),
    bug(
        "no-fit",
        "a large page is mapped of which the slot has a part only",
        Bug::Engine(EngineBug::NoFit),
        "levels",
        "INV-5",
    ),
    bug(
        "large-over-claimed",
        "a large page is mapped while an operation holds a part of it",
        Bug::Engine(EngineBug::LargeOverClaimed),
        "levels",
        "INV-5",
    ),
    bug(
        "stale-level",
        "a page is mapped at the level of its folio, whatever else is in it",
        Bug::Engine(EngineBug::StaleLevel),
        "levels",
        "INV-5",
    ),
    bug(
        "split-not-minimal",
        "a folio is split though all of it is converted",
        Bug::Engine(EngineBug::SplitNotMinimal),
        "folios",
        "INV-5",
    ),
    bug(
        "neighbours-unclaimed",
        "of a folio that is split or merged the rest is not claimed",
        Bug::Engine(EngineBug::NeighboursUnclaimed),
        "folios",
        "INV-4",
    ),
    bug(
        "reshaped-while-pinned",
        "a folio with a pinned page in it is split",
        Bug::Engine(EngineBug::ReshapedWhilePinned),
        "pieces",
        "INV-7",
    ),
];
