//! Folios: how large a page is mapped, and what is split.

use polder_explored_engine::Bug as EngineBug;

use super::{PlantedBug, engine};

pub(super) const BUGS: &[PlantedBug] = &[
    engine(
        "no-congruence",
        "a large page is mapped where gfns and pages are not congruent",
        EngineBug::NoCongruence,
        "apart",
        "INV-5",
    ),
    engine(
        "no-fit",
        "a large page is mapped of which the slot has a part only",
        EngineBug::NoFit,
        "levels",
        "INV-5",
    ),
    engine(
        "large-over-claimed",
        "a large page is mapped while an operation holds a part of it",
        EngineBug::LargeOverClaimed,
        "levels",
        "INV-5",
    ),
    engine(
        "stale-level",
        "a page is mapped at the level of its folio, whatever else is in it",
        EngineBug::StaleLevel,
        "levels",
        "INV-5",
    ),
    engine(
        "split-not-minimal",
        "a folio is split though all of it is converted",
        EngineBug::SplitNotMinimal,
        "folios",
        "INV-5",
    ),
    engine(
        "neighbours-unclaimed",
        "of a folio that is split or merged the rest is not claimed",
        EngineBug::NeighboursUnclaimed,
        "folios",
        "INV-4",
    ),
    engine(
        "reshaped-while-pinned",
        "a folio with a pinned page in it is split",
        EngineBug::ReshapedWhilePinned,
        "pieces",
        "INV-7",
    ),
];
