//! KVM: opened, looked at, given a VM.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_VM_TYPES, KVM_MAX_CPUID_ENTRIES, KVM_X86_DEFAULT_VM,
    KVM_X86_SW_PROTECTED_VM, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use polder::units::{Gfn, PageCount, PageRange};
use polder::{Contents, HostKind, Memory, OnBusy, Slot, Visibility};
use polder_linux::{Exit, Kicker, PrivateMemory, Vcpu};

use crate::RunError;
use crate::error::os;
use crate::guest::{HypercallProbe, KVM_HC_MAP_GPA_RANGE, Transport, VcpuStart};
use crate::scenario::Conversions;

/// How the guest's requests to convert reach us.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Conversion {
    /// By `KVM_HC_MAP_GPA_RANGE`.
    Hypercall,
    /// By a port, because this KVM does not complete hypercalls.
    Port,
}

impl fmt::Display for Conversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Hypercall => "hypercall",
            Self::Port => "port",
        })
    }
}

/// How long a hypercall may take before this KVM is taken not to complete it.
const HYPERCALL_LIMIT: Duration = Duration::from_millis(200);

/// Opens `/dev/kvm`.
pub(crate) fn open() -> Result<Kvm, RunError> {
    let kvm = Kvm::new().map_err(|error| RunError::Kvm(os(error)))?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        ..0 => Err(RunError::Kvm(std::io::Error::other("what stands at /dev/kvm is not KVM"))),
        version => Err(RunError::Kvm(std::io::Error::other(format!(
            "/dev/kvm speaks version {version} of KVM's interface, not 12"
        )))),
    }
}

/// Whether a guest can run on KVM with memory of a host, and what its conversions would come to:
/// a VM is made, and a page of memory for it.
///
/// # Errors
/// What is missing, with the way out.
pub fn check_kvm(host: HostKind) -> Result<Conversions, RunError> {
    let kvm = open()?;
    let (vm, conversions) = create_vm_for(&kvm, host)?;
    let memory = || {
        let memory = Memory::builder(PageCount::ONE).host(host);
        let memory = match conversions.initial() {
            Visibility::Private => memory.build()?,
            Visibility::Shared => memory.shared().build()?,
        };
        let id = memory.attach(vm)?;
        memory.bind(id, Slot(0), Gfn::from(0), PageRange::one(0u32.into()))
    };
    memory().map_err(RunError::Memory)?;
    Ok(conversions)
}

/// A VM for memory of `host`, and what the guest's conversions come to there. A KVM without private
/// memory may have guest_memfds all of whose pages are shared.
pub(crate) fn create_vm_for(
    kvm: &Kvm,
    host: HostKind,
) -> Result<(Arc<VmFd>, Conversions), RunError> {
    match (create_vm(kvm, host), host) {
        (Ok((vm, _)), HostKind::GuestMemfd) => Ok((vm, Conversions::LoseContents)),
        (Err(RunError::NoPrivateMemory), _) => {
            let (vm, _) = create_vm(kvm, HostKind::Memfd)?;
            match PrivateMemory::of(&vm).can_be_shared() {
                true => Ok((vm, Conversions::Refused)),
                false => Err(RunError::NoPrivateMemory),
            }
        }
        (made, _) => Ok((made?.0, Conversions::KeepContents)),
    }
}

/// A VM for memory of `host` that hands `KVM_HC_MAP_GPA_RANGE` to us, if KVM can; whether it can.
pub(crate) fn create_vm(kvm: &Kvm, host: HostKind) -> Result<(Arc<VmFd>, bool), RunError> {
    let kind = match host {
        HostKind::Memfd | HostKind::Machine => KVM_X86_DEFAULT_VM,
        HostKind::GuestMemfd => KVM_X86_SW_PROTECTED_VM,
    };
    let types = kvm.check_extension_raw(KVM_CAP_VM_TYPES.into());
    // A kernel that does not say which types it has, has the default one.
    if kind != KVM_X86_DEFAULT_VM && types & (1 << kind) == 0 {
        return Err(RunError::NoPrivateMemory);
    }
    let vm = kvm.create_vm_with_type(kind.into()).map_err(RunError::vm("KVM_CREATE_VM"))?;
    let mut enable = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, ..Default::default() };
    enable.args[0] = 1 << KVM_HC_MAP_GPA_RANGE;
    let offered = vm.check_extension_raw(u64::from(KVM_CAP_EXIT_HYPERCALL));
    let offers = u64::try_from(offered).is_ok_and(|bits| bits & enable.args[0] != 0);
    let enabled = offers && vm.enable_cap(&enable).is_ok();
    Ok((Arc::new(vm), enabled))
}

/// A vCPU of a VM, ready to start.
pub(crate) fn create_vcpu(
    kvm: &Kvm,
    vm: &VmFd,
    index: u32,
    start: &VcpuStart,
) -> Result<VcpuFd, RunError> {
    let vcpu = idle_vcpu(kvm, vm, index)?;
    let reset = vcpu.get_sregs().map_err(RunError::vm("KVM_GET_SREGS"))?;
    vcpu.set_sregs(&start.sregs(&reset)).map_err(RunError::vm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&start.regs).map_err(RunError::vm("KVM_SET_REGS"))?;
    Ok(vcpu)
}

/// A vCPU of a VM that has nowhere to start. Its CPUID decides what stage 2 looks like.
pub(crate) fn idle_vcpu(kvm: &Kvm, vm: &VmFd, index: u32) -> Result<VcpuFd, RunError> {
    let vcpu = vm.create_vcpu(u64::from(index)).map_err(RunError::vm("KVM_CREATE_VCPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(RunError::vm("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(RunError::vm("KVM_SET_CPUID2"))?;
    Ok(vcpu)
}

/// Finds by which instruction, if any, this KVM completes a hypercall: it is tried on a throw-away
/// vCPU, because a KVM may offer it and never come back from the instruction. The CPU's own
/// instruction goes first: KVM emulates the other one.
pub(crate) fn transport(kvm: &Kvm) -> Result<Transport, RunError> {
    let mut transports = [Transport::Vmcall, Transport::Vmmcall];
    if is_amd(kvm)? {
        transports.reverse();
    }
    for transport in transports {
        let Some(probe) = HypercallProbe::new(transport) else { continue };
        let (vm, enabled) = create_vm(kvm, HostKind::Memfd)?;
        if !enabled {
            break;
        }
        if completes(&vm, &probe)? {
            return Ok(transport);
        }
    }
    Ok(Transport::Port)
}

/// Whether the CPU is AMD's, or of its kind.
fn is_amd(kvm: &Kvm) -> Result<bool, RunError> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(RunError::vm("KVM_GET_SUPPORTED_CPUID"))?;
    let vendor = cpuid.as_slice().iter().find(|entry| entry.function == 0);
    let vendor = vendor.map(|entry| [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes));
    Ok(vendor.is_some_and(|vendor| {
        [*b"AuthenticAMD", *b"HygonGenuine"]
            .contains(vendor.as_flattened().first_chunk().unwrap_or(&[0; 12]))
    }))
}

fn completes(vm: &Arc<VmFd>, probe: &HypercallProbe) -> Result<bool, RunError> {
    let pages =
        PageRange::from_bytes(0, HypercallProbe::MEMORY).expect("a constant of whole pages");
    let memory = Memory::builder(pages.count()).build().map_err(RunError::Memory)?;
    let id = memory.attach(Arc::clone(vm)).map_err(RunError::Memory)?;
    let load = || {
        memory.bind(id, Slot(0), Gfn::from(0), pages)?;
        memory.convert(pages, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
        memory.write(id, probe.chunk.gpa, &probe.chunk.bytes)
    };
    load().map_err(RunError::Memory)?;
    let fd = vm.create_vcpu(0).map_err(RunError::vm("KVM_CREATE_VCPU"))?;
    let reset = fd.get_sregs().map_err(RunError::vm("KVM_GET_SREGS"))?;
    fd.set_sregs(&probe.sregs(&reset)).map_err(RunError::vm("KVM_SET_SREGS"))?;
    fd.set_regs(&probe.regs).map_err(RunError::vm("KVM_SET_REGS"))?;

    let kicker = Kicker::default();
    let exit = std::thread::scope(|scope| {
        let vcpu = std::thread::Builder::new().spawn_scoped(scope, || Vcpu::new(fd, &kicker).run());
        let vcpu = vcpu.map_err(RunError::Thread)?;
        let pause = Duration::from_millis(1);
        let mut waited = Duration::ZERO;
        while !vcpu.is_finished() {
            std::thread::sleep(pause);
            waited += pause;
            if waited >= HYPERCALL_LIMIT {
                kicker.kick();
            }
        }
        vcpu.join().map_err(|_| RunError::Panicked)
    })?;
    let number = KVM_HC_MAP_GPA_RANGE;
    Ok(matches!(exit, Ok(Exit::Hypercall { number: called, .. }) if called == number))
}

/// The pages of `memory` behind each of the VM's ranges of guest frames, in order.
pub(crate) fn bind(
    memory: &Memory,
    vm: polder::VmId,
    ram: impl Iterator<Item = polder::units::GfnRange>,
) -> Result<(), polder::Error> {
    let mut next = PageCount::ZERO;
    for (slot, gfns) in (0..).map(Slot).zip(ram) {
        let end = next.checked_add(gfns.count()).expect("the scenario's memory is below 2^52");
        let pages = PageRange::between(next.get(), end.get()).expect("a range of RAM has pages");
        memory.bind(vm, slot, gfns.start(), pages)?;
        next = end;
    }
    Ok(())
}
