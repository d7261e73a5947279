//! What KVM counts (`KVM_GET_STATS_FD`, Linux 5.14; `Documentation/virt/kvm/api.rst`).

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VmFd;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

use crate::Error;
use crate::call::Call;
use crate::uapi::kvm::KVM_GET_STATS_FD;

/// Bytes of `kvm_stats_header`, and of a `kvm_stats_desc` before its name.
const HEADER: usize = 24;
const DESCRIPTOR: u32 = 16;

/// One of KVM's counts of a VM by its name, such as `pages_2m`: how often its guests' tables map
/// 2M. `None` if this KVM has none of that name.
///
/// # Errors
/// Those of `KVM_GET_STATS_FD`, `ENOTTY` before Linux 5.14 among them, and of reading it.
pub fn vm_count(vm: &VmFd, name: &str) -> Result<Option<u64>, Error> {
    let call = Call::new("KVM_GET_STATS_FD");
    // SAFETY: the descriptor is the VM's, and lives as long as `vm`.
    let fd = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
    // SAFETY: the request has no argument.
    let stats = File::from(call.make(|| unsafe { ioctl(fd, GetStats) })?);
    let failed =
        |error: &std::io::Error| call.error(Errno::from_io_error(error).unwrap_or(Errno::IO));
    let read = |bytes: &mut [u8], at: u32| {
        stats.read_exact_at(bytes, at.into()).map_err(|error| failed(&error))
    };
    let mut header = [0; HEADER];
    read(&mut header, 0)?;
    let [name_size, count, descriptors, data] = [4, 8, 16, 20].map(|at| word(&header, at));
    let size = DESCRIPTOR.saturating_add(name_size);
    for nth in 0..count {
        let mut descriptor = vec![0; size as usize];
        read(&mut descriptor, descriptors.saturating_add(nth.saturating_mul(size)))?;
        let named = descriptor[DESCRIPTOR as usize..].split(|&byte| byte == 0).next();
        if named == Some(name.as_bytes()) {
            let mut value = [0; size_of::<u64>()];
            read(&mut value, data.saturating_add(word(&descriptor, 8)))?;
            return Ok(Some(u64::from_ne_bytes(value)));
        }
    }
    Ok(None)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + size_of::<u32>()].try_into().expect("4 bytes"))
}

struct GetStats;

// SAFETY: the opcode takes no argument, and its non-negative result is a descriptor that nobody
// else has.
unsafe impl Ioctl for GetStats {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        KVM_GET_STATS_FD
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        core::ptr::null_mut()
    }

    unsafe fn output_from_ptr(
        result: IoctlOutput,
        _: *mut core::ffi::c_void,
    ) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the ioctl succeeded, and so returned a new descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(result) })
    }
}
