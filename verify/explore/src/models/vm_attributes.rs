//! `KVM_SET_MEMORY_ATTRIBUTES` over two memories: guest_memfd for what is private, any other for
//! what is shared. A conversion changes which of the two the guest sees; neither is emptied.

use super::{Do, Fault, Model};

pub(super) const MODEL: Model = Model {
    name: "vm-attributes",
    about: "two memories, and an attribute that says which one the guest sees",
    two_pools: true,
    private_first: false,
    to_private: &[Do::BeginZap, Do::SetPrivate, Do::EndZap],
    to_private_failed: &[],
    to_shared: &[Do::BeginZap, Do::SetShared, Do::EndZap],
    to_shared_failed: &[],
    fault: &[Fault::LockFolio, Fault::Map, Fault::UnlockFolio],
};
