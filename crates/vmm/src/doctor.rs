//! What this KVM offers, asked of KVM itself, and beside it [`UserfaultOffer`].
//!
//! Some capabilities are true of a VM only, and some differ from one type of VM to another: on a
//! kernel built for SEV, `/dev/kvm` reports `KVM_CAP_MEMORY_ATTRIBUTES` though no VM may use it.
//! So each is asked of a throw-away VM of each type.

use std::io;

use kvm_bindings as sys;
use kvm_ioctls::{Kvm, VmFd};
pub use polder_linux::{Errno, UserfaultOffer, Way};

use crate::RunError;
use crate::error::os;
use crate::guest::Transport;
use crate::kvm;

/// The capabilities that matter to Polder, by the names that they have after `KVM_CAP_`.
pub const CAPABILITIES: [(&str, u32); 19] = [
    ("USER_MEMORY2", sys::KVM_CAP_USER_MEMORY2),
    ("GUEST_MEMFD", sys::KVM_CAP_GUEST_MEMFD),
    ("GUEST_MEMFD_FLAGS", KVM_CAP_GUEST_MEMFD_FLAGS),
    ("MEMORY_ATTRIBUTES", sys::KVM_CAP_MEMORY_ATTRIBUTES),
    ("MEMORY_FAULT_INFO", sys::KVM_CAP_MEMORY_FAULT_INFO),
    ("PRE_FAULT_MEMORY", sys::KVM_CAP_PRE_FAULT_MEMORY),
    ("EXIT_HYPERCALL", sys::KVM_CAP_EXIT_HYPERCALL),
    ("VM_TYPES", sys::KVM_CAP_VM_TYPES),
    ("NR_MEMSLOTS", sys::KVM_CAP_NR_MEMSLOTS),
    ("NR_VCPUS", sys::KVM_CAP_NR_VCPUS),
    ("MAX_VCPUS", sys::KVM_CAP_MAX_VCPUS),
    ("MULTI_ADDRESS_SPACE", sys::KVM_CAP_MULTI_ADDRESS_SPACE),
    ("READONLY_MEM", sys::KVM_CAP_READONLY_MEM),
    ("DIRTY_LOG_RING", sys::KVM_CAP_DIRTY_LOG_RING),
    ("SYNC_REGS", sys::KVM_CAP_SYNC_REGS),
    ("IMMEDIATE_EXIT", sys::KVM_CAP_IMMEDIATE_EXIT),
    ("X86_USER_SPACE_MSR", sys::KVM_CAP_X86_USER_SPACE_MSR),
    ("X86_SMM", sys::KVM_CAP_X86_SMM),
    ("X86_GUEST_MODE", sys::KVM_CAP_X86_GUEST_MODE),
];

/// `include/uapi/linux/kvm.h` of Linux 6.18; `kvm-bindings` does not have it yet.
const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = 244;

/// Types of VMs, by the names that they have between `KVM_X86_` and `_VM`.
const TYPES: [(&str, u32); 6] = [
    ("DEFAULT", sys::KVM_X86_DEFAULT_VM),
    ("SW_PROTECTED", sys::KVM_X86_SW_PROTECTED_VM),
    ("SEV", sys::KVM_X86_SEV_VM),
    ("SEV_ES", sys::KVM_X86_SEV_ES_VM),
    ("SNP", sys::KVM_X86_SNP_VM),
    ("TDX", sys::KVM_X86_TDX_VM),
];

/// What KVM offers.
#[derive(Debug)]
pub struct KvmOffer {
    /// `KVM_GET_API_VERSION`.
    pub api_version: i32,
    /// The types of VMs that KVM says it has; the default one is first and always there.
    pub types: Vec<VmTypeOffer>,
    /// By which instruction a guest's hypercall reaches the VMM: tried on a throw-away vCPU.
    /// [`Transport::Port`] is by none.
    pub hypercalls: Result<Transport, RunError>,
}

/// What KVM offers to VMs of one type.
#[derive(Debug)]
pub struct VmTypeOffer {
    /// Its number.
    pub number: u32,
    /// The value of each of [`CAPABILITIES`] on a VM of this type, 0 where it is not there; or why
    /// no VM of this type could be made.
    pub capabilities: io::Result<Vec<(&'static str, i32)>>,
}

impl KvmOffer {
    /// Asks KVM. Takes up to half a second where hypercalls do not come back.
    ///
    /// # Errors
    /// [`RunError::Kvm`] where `/dev/kvm` can't be opened or is not KVM's.
    pub fn ask() -> Result<Self, RunError> {
        let kvm = kvm::open()?;
        let types = kvm.check_extension_raw(u64::from(sys::KVM_CAP_VM_TYPES));
        Ok(Self {
            api_version: kvm.get_api_version(),
            types: numbers(types).map(|number| VmTypeOffer::ask(&kvm, number)).collect(),
            hypercalls: kvm::transport(&kvm),
        })
    }

    /// The greatest value of a capability on any VM that could be made, 0 if none has it.
    pub fn on_any(&self, capability: &str) -> i32 {
        self.types.iter().map(|of| of.value(capability)).max().unwrap_or(0)
    }
}

impl VmTypeOffer {
    fn ask(kvm: &Kvm, number: u32) -> Self {
        let vm = kvm.create_vm_with_type(u64::from(number)).map_err(os);
        Self { number, capabilities: vm.map(|vm| capabilities(&vm)) }
    }

    /// The name that it has between `KVM_X86_` and `_VM`, or its number where it has none yet.
    pub fn name(&self) -> String {
        let known = TYPES.iter().find(|(_, number)| *number == self.number);
        known.map_or_else(|| format!("type {}", self.number), |(name, _)| (*name).to_owned())
    }

    /// The value of a capability, by its name in [`CAPABILITIES`]; 0 if it is not there.
    pub fn value(&self, capability: &str) -> i32 {
        let found = self.capabilities.iter().flatten().find(|(name, _)| *name == capability);
        found.map_or(0, |(_, value)| *value)
    }
}

/// A negative answer is an ioctl that failed: the capability can't be used.
fn capabilities(vm: &VmFd) -> Vec<(&'static str, i32)> {
    let value = |number| vm.check_extension_raw(u64::from(number)).max(0);
    CAPABILITIES.iter().map(|(name, number)| (*name, value(*number))).collect()
}

/// The types in an answer to `KVM_CAP_VM_TYPES`. A kernel older than it has the default type.
fn numbers(types: i32) -> impl Iterator<Item = u32> {
    (0..31).filter(move |bit| *bit == 0 || (types > 0 && types & (1 << bit) != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_type_is_always_there() {
        for (answer, expected) in
            [(-1, vec![0]), (0, vec![0]), (1, vec![0]), (3, vec![0, 1]), (0x21, vec![0, 5])]
        {
            assert_eq!(numbers(answer).collect::<Vec<_>>(), expected, "{answer:#x}");
        }
    }

    #[test]
    fn a_type_without_a_name_has_its_number() {
        let of = |number, capabilities| VmTypeOffer { number, capabilities };
        let made = of(1, Ok(vec![("GUEST_MEMFD", 1)]));
        assert_eq!(made.name(), "SW_PROTECTED");
        assert_eq!((made.value("GUEST_MEMFD"), made.value("X86_SMM")), (1, 0));
        let refused = of(9, Err(io::Error::from_raw_os_error(22)));
        assert_eq!((refused.name(), refused.value("GUEST_MEMFD")), ("type 9".into(), 0));
    }
}
