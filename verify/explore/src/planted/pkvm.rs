//! pKVM: donations, and pages that move.

use polder_explored_engine::Bug as EngineBug;
use polder_machine::Plant;

use super::{PlantedBug, engine, machine};

pub(super) const BUGS: &[PlantedBug] = &[
    engine(
        "wanted-is-granted",
        "what the VMM wishes counts as granted, and only the guest decides: one xarray for both",
        EngineBug::WantedIsGranted,
        "pkvm",
        "INV-4",
    ),
    machine(
        "half-a-donation",
        "a donation that fails half-way is left half-way",
        Plant::HalfDonation,
        "pkvm-failures",
        "INV-9",
    ),
    machine(
        "donation-leaves-the-iommu",
        "what becomes a guest's stays open to the host's devices",
        Plant::IommuForgotten,
        "pkvm",
        "INV-9",
    ),
    engine(
        "moved-while-mapped",
        "pages are moved while guest and host have them mapped",
        EngineBug::MovedMapped,
        "move",
        "INV-2",
    ),
    machine(
        "source-not-scrubbed",
        "the frame that a guest's page has moved from keeps what was in it",
        Plant::NotScrubbed,
        "pkvm-move",
        "INV-10",
    ),
];
