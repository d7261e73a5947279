//! Huge pages under guest_memfd, in the order of the first proposal (thread 0): what the host may
//! fault ("faultability") is changed first, then huge pages are split or merged, and a failure
//! goes back in reverse. Nothing keeps a fault that has looked already from mapping.

use super::{Do, Fault, Model};

pub(super) const MODEL: Model = Model {
    name: "hugetlb-rfc",
    about: "faultability first, then count and restructure, roll back in reverse",
    two_pools: false,
    private_first: true,
    to_private: &[Do::Deny, Do::UnmapHost, Do::CheckCounts, Do::SetPrivate, Do::Merge],
    to_private_failed: &[Do::Allow],
    to_shared: &[Do::SetShared, Do::Allow, Do::ZapGuest, Do::Split],
    to_shared_failed: &[Do::Deny, Do::SetPrivate],
    fault: &[Fault::Look, Fault::LockFolio, Fault::Map, Fault::UnlockFolio],
};
