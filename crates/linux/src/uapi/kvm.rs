//! `include/uapi/linux/kvm.h`, where `kvm-bindings` and `kvm-ioctls` are behind it.

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_pre_fault_memory, kvm_x86_mce};
use rustix::ioctl::{Opcode, opcode};

/// The flags of a guest_memfd, as bits.
pub(crate) const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = 244;

#[expect(clippy::cast_possible_truncation, reason = "an ioctl's group is one byte")]
const GROUP: u8 = KVMIO as u8;

pub(crate) const KVM_CLEAR_DIRTY_LOG: Opcode =
    opcode::read_write::<kvm_clear_dirty_log>(GROUP, 0xc0);

pub(crate) const KVM_GET_STATS_FD: Opcode = opcode::none(GROUP, 0xce);

pub(crate) const KVM_PRE_FAULT_MEMORY: Opcode =
    opcode::read_write::<kvm_pre_fault_memory>(GROUP, 0xd5);

pub(crate) const KVM_X86_SETUP_MCE: Opcode = opcode::write::<u64>(GROUP, 0x9c);
pub(crate) const KVM_X86_GET_MCE_CAP_SUPPORTED: Opcode = opcode::read::<u64>(GROUP, 0x9d);
pub(crate) const KVM_X86_SET_MCE: Opcode = opcode::write::<kvm_x86_mce>(GROUP, 0x9e);
