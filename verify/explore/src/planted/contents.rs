//! Contents: who sees a page, and when.

use polder_explored_engine::Bug as EngineBug;

use super::{PlantedBug, bug};
use crate::polder::{Bug, Slip};

pub(super) const BUGS: &[PlantedBug] = &[
    bug(
        "exists-while-claimed",
        "a second populator is told that pages exist whose bytes are being written",
        Bug::Engine(EngineBug::ExistsWhileClaimed),
        "population",
        "INV-3",
    ),
    bug(
        "folio-populated",
        "contents of some pages of a folio count for all of it",
        Bug::Engine(EngineBug::FolioPopulated),
        "population",
        "INV-3",
    ),
    bug(
        "owed-shown",
        "a touch of a page whose contents are to come is answered",
        Bug::Engine(EngineBug::OwedShown),
        "population",
        "INV-3",
    ),
    bug(
        "discard-keeps-source",
        "what is discarded stays owed: the source brings contents that were dropped",
        Bug::Engine(EngineBug::DiscardKeepsSource),
        "population",
        "INV-3",
    ),
    bug(
        "hole-populated-twice",
        "a 4K hole in a huge page is filled again while another page of it is owed",
        Bug::Engine(EngineBug::HolePopulatedTwice),
        "holes",
        "INV-3",
    ),
    bug(
        "missing-only",
        "a view traps missing pages only, and shows a page that another mapping is writing",
        Bug::Driver(Slip::MissingOnly),
        "population",
        "INV-3",
    ),
    bug(
        "publish-before-bytes",
        "a page is shown before its bytes are written",
        Bug::Driver(Slip::PublishBeforeBytes),
        "population",
        "INV-2",
    ),
    bug(
        "direct-map-late",
        "a page is taken off the kernel's direct map after it was mapped",
        Bug::Driver(Slip::DirectMapLate),
        "direct-map",
        "INV-3",
    ),
];
