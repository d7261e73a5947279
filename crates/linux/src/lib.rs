//! The Linux interfaces that Polder uses, made safe. This is the only crate with `unsafe` in it.
//!
//! | file | interface |
//! |---|---|
//! | [`Memfd`] | `memfd_create(2)`, `fallocate(2)`, `lseek(2)` |
//! | [`View`] | `mmap(2)` and `madvise(2)` of a memfd, and copies through it |
//! | [`Userfault`], [`UserfaultOffer`] | `userfaultfd(2)` |
//! | [`KvmSlot`] | `KVM_SET_USER_MEMORY_REGION`, `KVM_SET_USER_MEMORY_REGION2`, `KVM_GET_DIRTY_LOG`, `KVM_CLEAR_DIRTY_LOG` |
//! | [`GuestMemfd`], [`set_private`] | `KVM_CREATE_GUEST_MEMFD`, `KVM_SET_MEMORY_ATTRIBUTES`, `cachestat(2)` |
//! | [`pre_fault()`], [`can_pre_fault`] | `KVM_PRE_FAULT_MEMORY` |
//! | [`vm_count`] | `KVM_GET_STATS_FD` |
//! | [`Vcpu`] | `KVM_RUN` |
//! | [`Ring`] | `io_uring(7)`, with pages of a view as buffers |
//! | [`inject_machine_check`], [`set_up_machine_checks`] | `KVM_X86_SET_MCE`, `KVM_X86_SETUP_MCE` |
//! | [`HugetlbPool`], [`shmem_huge_pages`] | sysfs, and `/proc/self/smaps` |
//! | [`Nudge`], [`wait()`], [`spawn`] | `eventfd(2)`, `poll(2)`, threads |
//! | [`barrier`] | `membarrier(2)` |
//! | [`sigbus`] | `sigaction(2)` of SIGBUS |
//!
//! # Rules
//! - Guest memory is never borrowed as a Rust slice: guest, kernel and other threads change it at
//!   any time. Bytes move by the one routine in `copy`, which is assembly and so opaque to the
//!   compiler, and which survives a SIGBUS in the middle.
//! - A mapping outlives everything that was told its address: a [`KvmSlot`] holds its [`View`], a
//!   [`Userfault`] its view too.
//! - Every call into the kernel goes through `call`: it is made again if interrupted, and its error
//!   names it and the range it was made for.
//!
//! # Holes
//! The copy routine and its way out of a SIGBUS are written for x86-64.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("polder-linux is written for Linux on x86-64");

mod call;
mod copy;
mod guest_memfd;
mod huge;
#[cfg(feature = "inject")]
pub mod inject;
mod kvm;
mod machine_check;
mod membarrier;
mod memfd;
mod pre_fault;
mod ring;
pub mod sigbus;
mod stats;
mod uapi;
mod userfault;
mod vcpu;
mod view;
mod wait;

use polder_units::ByteRange;

pub use guest_memfd::{GuestMemfd, PrivateMemory, set_private};
pub use huge::{HugetlbPool, shmem_huge_pages};
pub use kvm::KvmSlot;
pub use machine_check::{MACHINE_CHECK_BANK, inject_machine_check, set_up_machine_checks};
pub use membarrier::{barrier, can_barrier};
pub use memfd::Memfd;
pub use pre_fault::{can_pre_fault, pre_fault};
pub use ring::{Completion, Full, Ring, Transfer};
pub use rustix::io::Errno;
pub use sigbus::in_guest;
pub use stats::vm_count;
pub use userfault::{Continued, Userfault, UserfaultOffer, Way};
pub use vcpu::{Exit, FailedAt, Kicker, Vcpu};
pub use view::{Touched, View};
pub use wait::{Deadline, Nudge, now, spawn, wait};

/// A system call that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{call}{}", .range.map(|range| format!(" of bytes {range}")).unwrap_or_default())]
pub struct Error {
    /// The system call, or the ioctl's name.
    pub call: &'static str,
    /// The bytes of the object that it was for.
    pub range: Option<ByteRange>,
    /// What the kernel said.
    #[source]
    pub errno: Errno,
}
