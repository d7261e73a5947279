//! SEV-SNP: the RMP, its large entries, and PSMASH.

use polder_explored_engine::{Bug as EngineBug, NotLarge};
use polder_machine::Plant;

use super::{PlantedBug, bug};
use crate::polder::{Bug, Slip};

pub(super) const BUGS: &[PlantedBug] = &[
    bug(
        "psmash-forgotten",
        "a fault for its size smashes nothing",
        Bug::Driver(Slip::SmashForgotten),
        "snp-folio",
        "INV-8",
    ),
    bug(
        "psmash-forgotten-by-conversion",
        "a part of a large RMP entry is taken away, and the rest not smashed before",
        Bug::Engine(EngineBug::ForgottenSmash),
        "snp",
        "INV-9",
    ),
    bug(
        "psmash-error-fatal",
        "PSMASH that is refused because another was faster ends the vCPU",
        Bug::Driver(Slip::SmashErrorFatal),
        "snp-folio",
        "INV-8",
    ),
    bug(
        "psmash-not-zapped",
        "after PSMASH stage 2 keeps the 2M page",
        Bug::Driver(Slip::SmashNotZapped),
        "snp",
        "INV-5",
    ),
    bug(
        "mapped-above-rmp",
        "stage 2 maps as large as folio and slot allow, whatever the RMP has",
        Bug::Driver(Slip::MappedAboveRmp),
        "snp-merge",
        "INV-5",
    ),
    bug(
        "large-without-congruence",
        "a large RMP entry is made for an unaligned guest frame",
        Bug::Driver(Slip::Clause(NotLarge::Gfn)),
        "snp-apart",
        "INV-5",
    ),
    bug(
        "large-without-range",
        "a large RMP entry is made for a part of its pages",
        Bug::Driver(Slip::Clause(NotLarge::Range)),
        "snp-taken",
        "INV-9",
    ),
    bug(
        "large-over-assigned",
        "a large RMP entry is made of which a part is assigned already",
        Bug::Driver(Slip::Clause(NotLarge::Assigned)),
        "snp-discard",
        "INV-9",
    ),
    bug(
        "large-over-split",
        "a large RMP entry is made over small folios",
        Bug::Driver(Slip::Clause(NotLarge::Folio)),
        "snp-holes",
        "INV-9",
    ),
    bug(
        "unassigned-small",
        "a large RMP entry is taken away as 4K",
        Bug::Driver(Slip::UnassignedSmall),
        "snp-taken",
        "INV-9",
    ),
    bug(
        "assigned-before-cut-off",
        "the RMP gives pages to the guest before the host is cut off",
        Bug::Engine(EngineBug::AssignedBeforeCutOff),
        "snp",
        "INV-9",
    ),
    bug(
        "assigned-uncut",
        "pages are assigned that another process may have touched again since it was cut off",
        Bug::Driver(Slip::AssignedUncut),
        "snp-other",
        "INV-1",
    ),
    bug(
        "undo-leaves-rmp",
        "undoing leaves the RMP as it is",
        Bug::Engine(EngineBug::NotReverted),
        "snp-contention",
        "INV-9",
    ),
    bug(
        "merged-unzapped",
        "RMP entries are merged while stage 2 maps them",
        Bug::Driver(Slip::MergedUnzapped),
        "snp-merge",
        "INV-2",
    ),
    bug(
        "one-table-unclaimed",
        "one table says what is wished and granted, and faults take its word for it at once",
        Bug::Engine(EngineBug::OneTableUnclaimed),
        "snp",
        "INV-1",
    ),
    bug(
        "rmp-no-flush",
        "a TLB is not flushed before the RMP changes",
        Bug::Machine(Plant::SkipFlush),
        "snp",
        "INV-2",
    ),
    bug(
        "smash-unvalidates",
        "PSMASH takes what a neighbour has validated",
        Bug::Machine(Plant::SmashUnvalidates),
        "snp",
        "INV-2",
    ),
];
