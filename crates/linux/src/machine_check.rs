//! Machine checks: what tells a guest that memory of its has failed.
//!
//! The error is one that software can recover from, of data that an instruction was about to load
//! (SRAR: Intel SDM volume 3, 16.9.3): the instruction at the saved RIP was not done, and the bank
//! has the address of the page.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::kvm_x86_mce;
use kvm_ioctls::{Kvm, VcpuFd};
use polder_units::{Gpa, PAGE_SHIFT};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Setter, ioctl};

use crate::Error;
use crate::call::Call;
use crate::uapi::kvm::{KVM_X86_GET_MCE_CAP_SUPPORTED, KVM_X86_SET_MCE, KVM_X86_SETUP_MCE};

/// The bank that an injected error is reported in.
pub const MACHINE_CHECK_BANK: u8 = 0;

/// Banks that a vCPU has.
const BANKS: u64 = 1;

/// `IA32_MCG_CAP`: there is an `IA32_MCG_CTL`; errors that software can recover from are told.
const MCG_CTL_P: u64 = 1 << 8;
const MCG_SER_P: u64 = 1 << 24;

/// `IA32_MCG_STATUS`: the saved RIP can be gone on from, it is the one concerned, and a machine
/// check is being handled.
const MCG_STATUS: u64 = 1 | 1 << 1 | 1 << 2;

/// `IA32_MCi_STATUS`: valid, uncorrected, enabled, MISC and ADDR valid, signalled, action required;
/// and the code of a data load.
const STATUS: u64 = 1 << 63 | 1 << 61 | 1 << 60 | 1 << 59 | 1 << 58 | 1 << 56 | 1 << 55 | 0x134;

/// `IA32_MCi_MISC`: a physical address, of which these low bits say nothing.
const MISC: u64 = 2 << 6 | PAGE_SHIFT as u64;

/// Gives a vCPU a bank for machine checks. Its guest also has to set CR4.MCE: one that is told of
/// an error without that shuts down.
///
/// # Errors
/// Those of `KVM_X86_GET_MCE_CAP_SUPPORTED` and `KVM_X86_SETUP_MCE`: where this KVM has no machine
/// checks.
pub fn set_up_machine_checks(kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), Error> {
    // SAFETY: the descriptor is `kvm`'s, and lives as long.
    let system = unsafe { BorrowedFd::borrow_raw(kvm.as_raw_fd()) };
    let supported = Call::new("KVM_X86_GET_MCE_CAP_SUPPORTED").make(|| {
        // SAFETY: the opcode goes with a u64, which the kernel writes.
        let request = unsafe { Getter::<KVM_X86_GET_MCE_CAP_SUPPORTED, u64>::new() };
        // SAFETY: as above.
        unsafe { ioctl(system, request) }
    })?;
    let capability = supported & (MCG_CTL_P | MCG_SER_P) | BANKS;
    // SAFETY: the opcode goes with a u64, which the kernel reads.
    let request = || unsafe { Setter::<KVM_X86_SETUP_MCE, u64>::new(capability) };
    Call::new("KVM_X86_SETUP_MCE").make(|| ask(vcpu, request()))
}

/// Has a vCPU take a machine check for a page that has failed, when it is run next.
///
/// # Errors
/// Those of `KVM_X86_SET_MCE`: `EINVAL` for a vCPU that was given no bank.
pub fn inject_machine_check(vcpu: &VcpuFd, at: Gpa) -> Result<(), Error> {
    let error = kvm_x86_mce {
        status: STATUS,
        addr: at.get(),
        misc: MISC,
        mcg_status: MCG_STATUS,
        bank: MACHINE_CHECK_BANK,
        ..Default::default()
    };
    // SAFETY: the opcode goes with this structure, which the kernel reads.
    let request = || unsafe { Setter::<KVM_X86_SET_MCE, kvm_x86_mce>::new(error) };
    Call::new("KVM_X86_SET_MCE").make(|| ask(vcpu, request()))
}

/// Asks something of a vCPU.
fn ask<const CODE: Opcode, T>(vcpu: &VcpuFd, request: Setter<CODE, T>) -> Result<(), Errno> {
    // SAFETY: the descriptor is the vCPU's, and lives as long as `vcpu`.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    // SAFETY: who made the request knows that its opcode goes with its argument.
    unsafe { ioctl(fd, request) }
}
