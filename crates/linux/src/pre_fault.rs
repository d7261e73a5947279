//! Guest memory mapped ahead of the guest.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{KVM_CAP_PRE_FAULT_MEMORY, kvm_pre_fault_memory};
use kvm_ioctls::{VcpuFd, VmFd};
use polder_units::{GfnRange, Gpa, PAGE_SIZE};
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl};

use crate::Error;
use crate::call::Call;
use crate::uapi::kvm::KVM_PRE_FAULT_MEMORY;

/// Whether vCPUs of `vm` can have memory mapped ahead (`KVM_CAP_PRE_FAULT_MEMORY`). Asked of the
/// VM itself.
pub fn can_pre_fault(vm: &VmFd) -> bool {
    vm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0
}

/// Maps guest frames for a vCPU as reads by its guest would (Linux 6.11, with TDP). Returns where
/// it stopped: at the end of the frames, or before, where something stood in the way after some
/// had been mapped.
///
/// # Errors
/// Those of `KVM_PRE_FAULT_MEMORY` (Linux `Documentation/virt/kvm/api.rst`), where not one page was
/// mapped: `ENOENT` outside of any slot, `EINTR` for a signal, `EAGAIN` for a slot that is being
/// deleted, `EOPNOTSUPP` without TDP, `EFAULT` for private memory without a guest_memfd,
/// `EHWPOISON`.
pub fn pre_fault(vcpu: &VcpuFd, gfns: GfnRange) -> Result<Gpa, Error> {
    let call = Call::new("KVM_PRE_FAULT_MEMORY");
    let size = gfns.count().get().checked_mul(PAGE_SIZE);
    let mut memory = kvm_pre_fault_memory {
        gpa: gfns.start().gpa().get(),
        size: size.ok_or(call.error(Errno::INVAL))?,
        ..Default::default()
    };
    // SAFETY: the descriptor is the vCPU's, and lives as long as `vcpu`.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    call.once(|| {
        // SAFETY: the opcode goes with this structure, which the kernel reads and advances; no
        // memory of ours but it is touched.
        let request = unsafe { Updater::<KVM_PRE_FAULT_MEMORY, _>::new(&mut memory) };
        // SAFETY: as above.
        unsafe { ioctl(fd, request) }
    })?;
    Ok(Gpa::new(memory.gpa))
}
