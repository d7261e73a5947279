//! [`Exit`]: how a guest's access reaches the VMM.

use polder_engine::{MemoryFault, Visibility};
use polder_units::{GfnRange, PAGE_SIZE};

use super::KVM_MEMORY_EXIT_FLAG_PRIVATE;
use crate::Errno;

/// How a guest's access that memory did not let through comes to the VMM (`kvm_run`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// `KVM_EXIT_MMIO`: no slot, and the access is not to private memory.
    Mmio {
        /// The guest-physical address of the page.
        phys_addr: u64,
    },
    /// `KVM_EXIT_MEMORY_FAULT`, with `KVM_RUN` failing.
    MemoryFault {
        /// What `KVM_RUN` fails with: `EFAULT`, or `EHWPOISON` for a page that is out of use.
        errno: Errno,
        /// [`KVM_MEMORY_EXIT_FLAG_PRIVATE`], or 0.
        flags: u64,
        /// The guest-physical address.
        gpa: u64,
        /// How many bytes from there on.
        size: u64,
    },
}

impl Exit {
    /// The exit for a fault of an access of this kind.
    pub fn new(fault: MemoryFault, visibility: Visibility) -> Self {
        let (errno, gfns) = match fault {
            MemoryFault::Unbound(gfns) if visibility == Visibility::Shared => {
                return Self::Mmio { phys_addr: gfns.start().gpa().get() };
            }
            MemoryFault::Unbound(gfns) | MemoryFault::Mismatch { gfns, .. } => {
                (Errno::EFAULT, gfns)
            }
            MemoryFault::Quarantined(gfns) | MemoryFault::SourceFailed(gfns) => {
                (Errno::EHWPOISON, gfns)
            }
        };
        let flags = match visibility {
            Visibility::Private => KVM_MEMORY_EXIT_FLAG_PRIVATE,
            Visibility::Shared => 0,
        };
        Self::MemoryFault { errno, flags, gpa: gfns.start().gpa().get(), size: size(gfns) }
    }
}

fn size(gfns: GfnRange) -> u64 {
    gfns.count().get().saturating_mul(PAGE_SIZE)
}
