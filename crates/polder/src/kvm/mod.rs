//! Guest memory by the names, words and error codes of the kernel's own interface.
//!
//! A VMM that is written against this can change between Polder and a kernel that converts a
//! guest_memfd in place, call by call: the arguments are the kernel's own structures
//! ([`kvm_bindings`]; [`kvm_memory_attributes2`] is not in them yet), and what fails, fails with
//! the error code that the kernel has for it.
//!
//! | here | in the kernel | source of the rule |
//! |---|---|---|
//! | [`Vm::create_guest_memfd`] | `KVM_CREATE_GUEST_MEMFD` | Linux 6.18, `virt/kvm/guest_memfd.c` |
//! | [`Vm::set_user_memory_region2`] | `KVM_SET_USER_MEMORY_REGION2` | `virt/kvm/kvm_main.c` |
//! | [`GuestMemfd::set_memory_attributes2`] | `KVM_SET_MEMORY_ATTRIBUTES2`, of the guest_memfd | Ackerley Tng's in-place conversion series, v4 to v8 |
//! | [`GuestMemfd::fallocate`] | `fallocate(2)` | `virt/kvm/guest_memfd.c` |
//! | [`GuestMemfd::mmap`] | `mmap(2)` | `GUEST_MEMFD_FLAG_MMAP` |
//! | [`Vm::pre_fault_memory`] | `KVM_PRE_FAULT_MEMORY`, of the vCPU | `Documentation/virt/kvm/api.rst` |
//! | [`Vm::exit`] | `KVM_EXIT_MEMORY_FAULT`, `KVM_EXIT_MMIO` | `Documentation/virt/kvm/api.rst` |
//! | [`Vm::check_extension`] | `KVM_CHECK_EXTENSION`, of the VM | the same |
//!
//! ```
//! use polder::kvm::{self, kvm_create_guest_memfd, kvm_memory_attributes2};
//! use polder::{HostKind, Platform};
//!
//! # fn main() -> Result<(), kvm::Failed> {
//! let vm = kvm::Vm::new(polder::Vm::Machine, HostKind::Machine, Platform::Plain);
//! let flags = kvm::GUEST_MEMFD_FLAG_MMAP | kvm::GUEST_MEMFD_FLAG_INIT_SHARED;
//! let memory = vm.create_guest_memfd(kvm_create_guest_memfd {
//!     size: 0x4000,
//!     flags,
//!     ..Default::default()
//! })?;
//! vm.set_user_memory_region2(kvm::kvm_userspace_memory_region2 {
//!     flags: kvm::KVM_MEM_GUEST_MEMFD,
//!     guest_phys_addr: 0x10_0000,
//!     memory_size: 0x4000,
//!     guest_memfd: memory.fd(),
//!     ..Default::default()
//! })?;
//! let mut private = kvm_memory_attributes2 {
//!     offset: 0x1000,
//!     size: 0x1000,
//!     attributes: kvm::KVM_MEMORY_ATTRIBUTE_PRIVATE,
//!     flags: kvm::KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
//!     ..Default::default()
//! };
//! memory.set_memory_attributes2(&mut private)?;
//! assert!(memory.mmap()?.touch_read(0x1000, &mut [0]).is_err());
//! # Ok(())
//! # }
//! ```
//!
//! # Where it differs
//! - A conversion is all or nothing here; and who can't have the contents kept is told before
//!   anything has changed (`EOPNOTSUPP`).
//! - A guest_memfd has a number here ([`GuestMemfd::fd`]) where the kernel has a descriptor, and
//!   `close(2)` is to drop it.
//! - `userspace_addr` is 0, or where [`GuestMemfd::mmap`] has the slot's first page: Polder brings
//!   the mapping that the guest is shown.
//! - `fallocate(2)` punches holes and allocates nothing: a page is made when it is touched.
//! - `KVM_SET_MEMORY_ATTRIBUTES`, of the VM, is [`Memory::want`](crate::Memory::want).

mod exit;
mod guest_memfd;
mod vm;

pub use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_create_guest_memfd,
    kvm_pre_fault_memory, kvm_userspace_memory_region2,
};

pub use exit::Exit;
pub use guest_memfd::{GuestMemfd, kvm_memory_attributes2};
pub use vm::{Capability, Vm};

use polder_engine::Refusal;
use polder_units::PAGE_SIZE;

use crate::{Errno, Error};

/// The guest_memfd can be mapped (Linux 6.18).
pub const GUEST_MEMFD_FLAG_MMAP: u64 = 1 << 0;
/// All of its pages are shared at first (Linux 6.18).
pub const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 1 << 1;
/// The pages are the guest's alone.
pub const KVM_MEMORY_ATTRIBUTE_PRIVATE: u64 = kvm_bindings::KVM_MEMORY_ATTRIBUTE_PRIVATE as u64;
/// Whoever may access the pages after their conversion reads zeros.
pub const KVM_SET_MEMORY_ATTRIBUTES2_ZERO: u64 = 1 << 0;
/// What was written to the pages last is in them after their conversion.
pub const KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE: u64 = 1 << 1;
/// The access that came to the VMM was to private memory.
pub const KVM_MEMORY_EXIT_FLAG_PRIVATE: u64 = kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE as u64;
/// `fallocate(2)`: the size stays.
pub const FALLOC_FL_KEEP_SIZE: u32 = 1;
/// `fallocate(2)`: the contents go.
pub const FALLOC_FL_PUNCH_HOLE: u32 = 2;

/// A call that failed, as the kernel says it; and what Polder knows of the reason.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{call}: {errno}{}", .error_offset.map(|at| format!(" at offset {at:#x}")).unwrap_or_default())]
pub struct Failed {
    /// The call, by the kernel's name for it.
    pub call: &'static str,
    /// The error code.
    pub errno: Errno,
    /// The offset of the first page in the way, of a conversion.
    pub error_offset: Option<u64>,
    /// The reason in full, with page and holder, where there is more to it than the arguments.
    #[source]
    pub why: Option<Error>,
}

impl Failed {
    /// The arguments say it all.
    fn bad(call: &'static str, errno: Errno) -> Self {
        Self { call, errno, error_offset: None, why: None }
    }

    fn of(call: &'static str, why: Error) -> Self {
        let errno = match &why {
            // What this VM has not is to the kernel an argument that it does not know.
            Error::NotOffered { .. } => Errno::EINVAL,
            why => why.errno(),
        };
        Self { call, errno, error_offset: None, why: Some(why) }
    }

    /// The same, with the offset of the page in the way: the first of the range where none is
    /// named.
    fn at(self, start: u64) -> Self {
        let page = self.why.as_ref().and_then(page_in_the_way);
        let error_offset = Some(page.map_or(start, |page| page.max(start)));
        Self { error_offset, ..self }
    }
}

/// The offset of the page that an error is about.
fn page_in_the_way(error: &Error) -> Option<u64> {
    match error {
        Error::Refused(
            Refusal::Pinned { page, .. }
            | Refusal::Referenced { page, .. }
            | Refusal::Quarantined { page },
        )
        | Error::Rmp { page, .. }
        | Error::Firmware { page, .. } => Some(page.offset()),
        Error::Refused(Refusal::Busy { range, held, .. } | Refusal::Awaited { range, held }) => {
            range.intersection(*held).map(|part| part.start().offset())
        }
        Error::Quarantined { source, .. } => page_in_the_way(source),
        Error::Host(error) => error.range.map(|bytes| bytes.start()),
        _ => None,
    }
}

/// Whether a number of bytes is a multiple of the page size.
const fn aligned(bytes: u64) -> bool {
    bytes.is_multiple_of(PAGE_SIZE)
}
