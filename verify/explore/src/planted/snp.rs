//! SEV-SNP: the RMP, its large entries, and PSMASH.

use polder_explored_engine::{Bug as EngineBug, NotLarge};
use polder_machine::Plant;

use super::{PlantedBug, driver, engine, machine};
use crate::polder::Slip;

pub(super) const BUGS: &[PlantedBug] = &[
    driver(
        "psmash-forgotten",
        "a fault for its size smashes nothing",
        Slip::SmashForgotten,
        "snp-folio",
        "INV-8",
    ),
    engine(
        "psmash-forgotten-by-conversion",
        "a part of a large RMP entry is taken away, and the rest not smashed before",
        EngineBug::ForgottenSmash,
        "snp",
        "INV-9",
    ),
    driver(
        "psmash-error-fatal",
        "PSMASH that is refused because another was faster ends the vCPU",
        Slip::SmashErrorFatal,
        "snp-folio",
        "INV-8",
    ),
    driver(
        "psmash-not-zapped",
        "after PSMASH stage 2 keeps the 2M page",
        Slip::SmashNotZapped,
        "snp",
        "INV-5",
    ),
    driver(
        "mapped-above-rmp",
        "stage 2 maps as large as folio and slot allow, whatever the RMP has",
        Slip::MappedAboveRmp,
        "snp-merge",
        "INV-5",
    ),
    driver(
        "large-without-congruence",
        "a large RMP entry is made for an unaligned guest frame",
        Slip::Clause(NotLarge::Gfn),
        "snp-apart",
        "INV-5",
    ),
    driver(
        "large-without-range",
        "a large RMP entry is made for a part of its pages",
        Slip::Clause(NotLarge::Range),
        "snp-taken",
        "INV-9",
    ),
    driver(
        "large-over-assigned",
        "a large RMP entry is made of which a part is assigned already",
        Slip::Clause(NotLarge::Assigned),
        "snp-discard",
        "INV-9",
    ),
    driver(
        "large-over-split",
        "a large RMP entry is made over small folios",
        Slip::Clause(NotLarge::Folio),
        "snp-holes",
        "INV-9",
    ),
    driver(
        "unassigned-small",
        "a large RMP entry is taken away as 4K",
        Slip::UnassignedSmall,
        "snp-taken",
        "INV-9",
    ),
    engine(
        "assigned-before-cut-off",
        "the RMP gives pages to the guest before the host is cut off",
        EngineBug::AssignedBeforeCutOff,
        "snp",
        "INV-9",
    ),
    driver(
        "assigned-uncut",
        "pages are assigned that another process may have touched again since it was cut off",
        Slip::AssignedUncut,
        "snp-other",
        "INV-1",
    ),
    engine(
        "undo-leaves-rmp",
        "undoing leaves the RMP as it is",
        EngineBug::NotReverted,
        "snp-contention",
        "INV-9",
    ),
    driver(
        "merged-unzapped",
        "RMP entries are merged while stage 2 maps them",
        Slip::MergedUnzapped,
        "snp-merge",
        "INV-2",
    ),
    engine(
        "one-table-unclaimed",
        "one table says what is wished and granted, and faults take its word for it at once",
        EngineBug::OneTableUnclaimed,
        "snp",
        "INV-1",
    ),
    machine(
        "rmp-no-flush",
        "a TLB is not flushed before the RMP changes",
        Plant::SkipFlush,
        "snp",
        "INV-2",
    ),
    machine(
        "smash-unvalidates",
        "PSMASH takes what a neighbour has validated",
        Plant::SmashUnvalidates,
        "snp",
        "INV-2",
    ),
];
