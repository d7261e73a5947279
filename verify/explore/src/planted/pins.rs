//! Pins and DMA: who refers to a page that becomes private.

use polder_explored_engine::Bug as EngineBug;
use polder_machine::Plant;

use super::{PlantedBug, driver, engine, machine};
use crate::polder::Slip;

pub(super) const BUGS: &[PlantedBug] = &[
    engine(
        "pins-forgotten",
        "a conversion does not look for pins",
        EngineBug::PinsForgotten,
        "pins",
        "INV-7",
    ),
    engine(
        "pinned-while-drained",
        "what an operation has claimed can be pinned by who does not ask the engine",
        EngineBug::PinnedWhileDrained,
        "pinners",
        "INV-7",
    ),
    driver(
        "looks-before-counting",
        "who pins without the lock looks first, and counts afterwards",
        Slip::LooksBeforeCounting,
        "pinners",
        "INV-7",
    ),
    machine(
        "gup-looks-once",
        "GUP-fast does not look at the page table again",
        Plant::StaleGup,
        "conversion",
        "INV-1",
    ),
    machine("lost-pin", "pinning a page does not count", Plant::LostPin, "conversion", "INV-2"),
    engine(
        "exclusive-unchecked",
        "an exclusive pin is granted without a look at pins that took no lock",
        EngineBug::ExclusiveUnchecked,
        "pinners",
        "INV-7",
    ),
    engine(
        "exclusive-beside-dma",
        "an exclusive pin is granted of what a device has mapped",
        EngineBug::ExclusiveBesideDma,
        "dma",
        "INV-7",
    ),
    machine(
        "exclusive-without-gup-fast",
        "GUP-fast does not look whether a page is pinned exclusively",
        Plant::GupFastIgnoresExclusive,
        "exclusive",
        "INV-7",
    ),
    engine(
        "dma-unmapped-late",
        "a device keeps what becomes private until after the check, and after the hardware was told",
        EngineBug::DmaUnmappedLate,
        "dma",
        "INV-1",
    ),
    engine(
        "dma-forgotten",
        "a device keeps what becomes private",
        EngineBug::DmaForgotten,
        "dma",
        "INV-1",
    ),
    driver(
        "iotlb-not-flushed",
        "a device's pages are taken out of its table, and its IOTLB keeps them",
        Slip::IotlbNotFlushed,
        "dma",
        "INV-1",
    ),
];
