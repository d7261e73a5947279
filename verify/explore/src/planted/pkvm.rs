//! pKVM: donations, and pages that move.

use polder_explored_engine::Bug as EngineBug;
use polder_machine::Plant;

use super::{PlantedBug, bug};
use crate::polder::Bug;

pub(super) const BUGS: &[PlantedBug] = &[
    bug(
        "wanted-is-granted",
        "what the VMM wishes counts as granted, and only the guest decides: one xarray for both",
        Bug::Engine(EngineBug::WantedIsGranted),
        "pkvm",
        "INV-4",
    ),
    bug(
        "half-a-donation",
        "a donation that fails half-way is left half-way",
        Bug::Machine(Plant::HalfDonation),
        "pkvm-failures",
        "INV-9",
    ),
    bug(
        "donation-leaves-the-iommu",
        "what becomes a guest's stays open to the host's devices",
        Bug::Machine(Plant::IommuForgotten),
        "pkvm",
        "INV-9",
    ),
    bug(
        "moved-while-mapped",
        "pages are moved while guest and host have them mapped",
        Bug::Engine(EngineBug::MovedMapped),
        "move",
        "INV-2",
    ),
    bug(
        "source-not-scrubbed",
        "the frame that a guest's page has moved from keeps what was in it",
        Bug::Machine(Plant::NotScrubbed),
        "pkvm-move",
        "INV-10",
    ),
];
