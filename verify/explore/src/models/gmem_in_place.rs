//! guest_memfd converted in place, as the kernel's patches do it: all of it, and every fault,
//! under the mapping's invalidate lock. References are looked for once.

use super::{Do, Fault, Model};

pub(super) const MODEL: Model = Model {
    name: "gmem-in-place",
    about: "guest_memfd in place: unmap, count, commit, all under the invalidate lock",
    two_pools: false,
    private_first: false,
    to_private: &[
        Do::TakeLock,
        Do::UnmapHost,
        Do::CheckCounts,
        Do::ZapGuest,
        Do::Deny,
        Do::SetPrivate,
        Do::DropLock,
    ],
    to_private_failed: &[Do::DropLock],
    to_shared: &[Do::TakeLock, Do::ZapGuest, Do::SetShared, Do::Allow, Do::DropLock],
    to_shared_failed: &[Do::DropLock],
    fault: &[
        Fault::TakeLock,
        Fault::Look,
        Fault::LockFolio,
        Fault::Map,
        Fault::UnlockFolio,
        Fault::DropLock,
    ],
};
