//! What the tests of the machine and of its RMP both stand on: their geometry and short names.

use polder_machine::{LockOwner, VpnRange};
use polder_units::{Geometry, GfnRange, PageIndex, PageRange};

pub(crate) const OWNER: LockOwner = LockOwner(1);

/// Two huge pages of four pages each make a 1G page here.
pub(crate) fn geometry() -> Geometry {
    Geometry::new(4, 2).unwrap()
}

pub(crate) fn page(number: u32) -> PageIndex {
    PageIndex::from(number)
}

pub(crate) fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

pub(crate) fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange::between(start, end).unwrap()
}

pub(crate) fn vpns(start: u64, end: u64) -> VpnRange {
    VpnRange::between(start, end).unwrap()
}
