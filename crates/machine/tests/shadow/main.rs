//! Roots that shadow tables in guest memory: sentences, and a naive oracle that walks the guest's
//! own tables each time.

#![expect(clippy::unwrap_used, reason = "a test")]

mod naive;
mod oracle;
mod rig;
mod roots;

use polder_units::Geometry;

/// Large pages of 4 and 16 pages.
fn geometry() -> Geometry {
    Geometry::new(4, 4).unwrap()
}
