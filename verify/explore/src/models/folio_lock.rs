//! What thread 0 asks about: "the `folio_lock()` is probably important if we need to check
//! mapcount". No lock over the whole mapping: faults are forbidden first, and a fault looks again
//! once it has the folio's lock, under which the counts are read.

use super::{Do, Fault, Model};

pub(super) const MODEL: Model = Model {
    name: "folio-lock",
    about: "faultability first, counts under the folio lock, faults look under it too",
    two_pools: false,
    private_first: false,
    to_private: &[
        Do::Deny,
        Do::UnmapHost,
        Do::LockFolio,
        Do::CheckCounts,
        Do::ZapGuest,
        Do::SetPrivate,
        Do::UnlockFolio,
    ],
    to_private_failed: &[Do::UnlockFolio, Do::Allow],
    to_shared: &[Do::ZapGuest, Do::SetShared, Do::Allow],
    to_shared_failed: &[],
    fault: &[Fault::Look, Fault::LockFolio, Fault::Look, Fault::Map, Fault::UnlockFolio],
};

/// The same without the lock around the counts: a bug to be found.
pub const UNLOCKED: Model = Model {
    name: "mapcount-without-lock",
    about: "the map count is read without the folio lock",
    to_private: &[Do::Deny, Do::UnmapHost, Do::CheckCounts, Do::ZapGuest, Do::SetPrivate],
    to_private_failed: &[Do::Allow],
    ..MODEL
};
