//! `membarrier(2)`: the dear half of a fence, made for every thread of the process at once, so that
//! threads that come by often can do with the half that costs nothing.

use std::sync::OnceLock;

use rustix::thread::{MembarrierCommand, membarrier};

static REGISTERED: OnceLock<bool> = OnceLock::new();

/// Whether [`barrier`] can be used: Linux 4.14 and newer, and no filter of system calls against it.
pub fn can_barrier() -> bool {
    *REGISTERED.get_or_init(|| membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok())
}

/// Has every thread of the process pass a full memory barrier between this call's start and its
/// end. What the caller stored before is seen by all of them after it, and what they stored before
/// it is seen by the caller.
///
/// # Panics
/// Unless [`can_barrier`].
pub fn barrier() {
    assert!(can_barrier(), "the kernel was asked for before");
    // EPERM for a process that is not registered, EINVAL without the command: neither is so.
    let done = membarrier(MembarrierCommand::PrivateExpedited);
    assert_eq!(done, Ok(()), "membarrier works once it is registered");
}
