//! Contents: who sees a page, and when.

use polder_explored_engine::Bug as EngineBug;

use super::{PlantedBug, driver, engine};
use crate::polder::Slip;

pub(super) const BUGS: &[PlantedBug] = &[
    engine(
        "exists-while-claimed",
        "a second populator is told that pages exist whose bytes are being written",
        EngineBug::ExistsWhileClaimed,
        "population",
        "INV-3",
    ),
    engine(
        "folio-populated",
        "contents of some pages of a folio count for all of it",
        EngineBug::FolioPopulated,
        "population",
        "INV-3",
    ),
    engine(
        "owed-shown",
        "a touch of a page whose contents are to come is answered",
        EngineBug::OwedShown,
        "population",
        "INV-3",
    ),
    engine(
        "discard-keeps-source",
        "what is discarded stays owed: the source brings contents that were dropped",
        EngineBug::DiscardKeepsSource,
        "population",
        "INV-3",
    ),
    engine(
        "hole-populated-twice",
        "a 4K hole in a huge page is filled again while another page of it is owed",
        EngineBug::HolePopulatedTwice,
        "holes",
        "INV-3",
    ),
    driver(
        "missing-only",
        "a view traps missing pages only, and shows a page that another mapping is writing",
        Slip::MissingOnly,
        "population",
        "INV-3",
    ),
    driver(
        "publish-before-bytes",
        "a page is shown before its bytes are written",
        Slip::PublishBeforeBytes,
        "population",
        "INV-2",
    ),
    driver(
        "direct-map-late",
        "a page is taken off the kernel's direct map after it was mapped",
        Slip::DirectMapLate,
        "direct-map",
        "INV-3",
    ),
];
