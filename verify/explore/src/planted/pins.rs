//! Pins and DMA: who refers to a page that becomes private.

use polder_explored_engine::Bug as EngineBug;
use polder_machine::Plant;

use super::{PlantedBug, bug};
use crate::polder::{Bug, Slip};

pub(super) const BUGS: &[PlantedBug] = &[
    bug(
        "pins-forgotten",
        "a conversion does not look for pins",
        Bug::Engine(EngineBug::PinsForgotten),
        "pins",
        "INV-7",
    ),
    bug(
        "pinned-while-drained",
        "what an operation has claimed can be pinned by who does not ask the engine",
        Bug::Engine(EngineBug::PinnedWhileDrained),
        "pinners",
        "INV-7",
    ),
    bug(
        "looks-before-counting",
        "who pins without the lock looks first, and counts afterwards",
        Bug::Driver(Slip::LooksBeforeCounting),
        "pinners",
        "INV-7",
    ),
    bug(
        "gup-looks-once",
        "GUP-fast does not look at the page table again",
        Bug::Machine(Plant::StaleGup),
        "conversion",
        "INV-1",
    ),
    bug(
        "lost-pin",
        "pinning a page does not count",
        Bug::Machine(Plant::LostPin),
        "conversion",
        "INV-2",
    ),
    bug(
        "exclusive-unchecked",
        "an exclusive pin is granted without a look at pins that took no lock",
        Bug::Engine(EngineBug::ExclusiveUnchecked),
        "pinners",
        "INV-7",
    ),
    bug(
        "exclusive-beside-dma",
        "an exclusive pin is granted of what a device has mapped",
        Bug::Engine(EngineBug::ExclusiveBesideDma),
        "dma",
        "INV-7",
    ),
    bug(
        "exclusive-without-gup-fast",
        "GUP-fast does not look whether a page is pinned exclusively",
        Bug::Machine(Plant::GupFastIgnoresExclusive),
        "exclusive",
        "INV-7",
    ),
    bug(
        "dma-unmapped-late",
        "a device keeps what becomes private until after the check, and after the hardware was told",
        Bug::Engine(EngineBug::DmaUnmappedLate),
        "dma",
        "INV-1",
    ),
    bug(
        "dma-forgotten",
        "a device keeps what becomes private",
        Bug::Engine(EngineBug::DmaForgotten),
        "dma",
        "INV-1",
    ),
    bug(
        "iotlb-not-flushed",
        "a device's pages are taken out of its table, and its IOTLB keeps them",
        Bug::Driver(Slip::IotlbNotFlushed),
        "dma",
        "INV-1",
    ),
];
