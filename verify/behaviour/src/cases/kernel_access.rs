//! KVM's own accesses to guest memory: each a fault like any other, which waits for what is owed
//! and survives what has failed.

use std::sync::Arc;

use kvm_bindings::{Msrs, kvm_msi, kvm_msr_entry, kvm_segment};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use polder::units::{Gpa, PAGE_BYTES, PAGE_SIZE};
use polder::{Memory, OnBusy, Slot, Visibility};
use polder_linux::{Exit, Kicker, Vcpu};

use super::population::waits;
use crate::Section::KernelAccess;
use crate::world::{PASSED, Scale, World, gfn, page, to, touch};
use crate::{Case, Ran, Skipped};

pub(super) const CASES: &[Case] = &[
    Case::new(KernelAccess, "kvmclock waits for its page, and is written there", clock),
    Case::new(KernelAccess, "kvmclock on a failed page: the guest runs on", clock_failed),
    Case::new(KernelAccess, "steal time waits for its page, and is written there", steal),
    Case::new(KernelAccess, "steal time on a failed page: the guest runs on", steal_failed),
    Case::new(KernelAccess, "PV EOI waits for its page, and is written there", eoi),
    Case::new(KernelAccess, "PV EOI on a failed page: the guest runs on", eoi_failed),
    Case::new(KernelAccess, "a walk of the guest's page tables waits for a table", walk),
    Case::new(KernelAccess, "a walk that meets a failed table ends the guest, not us", walk_failed),
    Case::new(KernelAccess, "the fetch of an instruction to emulate waits for it", fetch),
    Case::new(KernelAccess, "a fetch from a failed page ends the guest, not us", fetch_failed),
];

/// Where memory begins in the guest: above what a real-mode segment of 0 reaches with its tables.
const BASE: u64 = 0x10;
/// The page of the guest's code.
const CODE: u64 = 0;
/// The page that KVM touches.
const TARGET: u64 = 3;

/// `out 0xe0, al`, and again.
const OUT: [u8; 4] = [0xe6, 0xe0, 0xeb, 0xfc];
const PORT: u16 = 0xe0;

/// The code's page: [`OUT`], to which real mode's vector [`VECTOR`] leads, too.
fn code() -> Vec<u8> {
    let mut page = OUT.to_vec();
    page.resize(4 * usize::from(VECTOR), 0);
    page.extend([0, 0, 0x00, 0x10]);
    page
}

const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const MSR_KVM_STEAL_TIME: u32 = 0x4b56_4d03;
const MSR_KVM_PV_EOI_EN: u32 = 0x4b56_4d04;
const ENABLED: u64 = 1;

fn gpa(page: u64) -> Gpa {
    gfn(BASE + page).gpa()
}

/// A VM of KVM's, and memory that is owed. Each of its eight pages lies in a huge page of its own,
/// where the view has such: what is owed of one keeps all of it.
struct Setup {
    vm: Arc<VmFd>,
    memory: Memory,
    shown: Scale,
}

impl Setup {
    fn new(w: &World<'_>) -> Result<Self, Skipped> {
        let shown = w.granules();
        let memory = w.owed(shown.count(8))?;
        // That KVM can be had at all is seen by a guest.
        w.guest()?;
        let vm = Arc::new(Kvm::new().and_then(|kvm| kvm.create_vm()).expect("a VM more"));
        let id = memory.attach(Arc::clone(&vm)).expect("a VM of KVM's");
        for (slot, at) in (0..8).zip(0..) {
            let page = page(shown.first(at));
            memory.bind(id, Slot(slot), gfn(BASE + at), page).expect("a free slot");
        }
        Ok(Self { vm, memory, shown })
    }

    fn populate(&self, at: u64, bytes: &[u8]) {
        self.memory.populate(self.shown.page(at), bytes).expect("it is owed");
    }

    /// A vCPU in real mode, at the first byte of the code's page.
    fn vcpu(&self) -> VcpuFd {
        let vcpu = self.vm.create_vcpu(0).expect("a first vCPU");
        let cpuid = Kvm::new().and_then(|kvm| kvm.get_supported_cpuid(256)).expect("it has one");
        vcpu.set_cpuid2(&cpuid).expect("what is supported");
        let mut sregs = vcpu.get_sregs().expect("a vCPU has registers");
        (sregs.cs.base, sregs.cs.selector) = (gpa(CODE).get(), 0x1000);
        vcpu.set_sregs(&sregs).expect("real mode");
        let mut regs = vcpu.get_regs().expect("a vCPU has registers");
        (regs.rip, regs.rflags) = (0, 2);
        vcpu.set_regs(&regs).expect("an address");
        vcpu
    }

    /// The bytes of a page, which is shared for that.
    fn bytes(&self, at: u64) -> Vec<u8> {
        to(&self.memory, self.shown.page(at), Visibility::Shared).expect("no pins");
        touch(&self.memory, self.shown.first(at)).expect("it is shared")
    }
}

/// Runs a vCPU until it exits for something else than a signal.
fn run(vcpu: VcpuFd) -> Exit {
    let mut vcpu = Vcpu::new(vcpu, &Kicker::default());
    loop {
        match vcpu.run().expect("KVM_RUN") {
            Exit::Interrupted => {}
            exit => return exit,
        }
    }
}

fn is_out(exit: Exit) -> bool {
    matches!(exit, Exit::PortOut { port: PORT, .. })
}

fn set(vcpu: &VcpuFd, index: u32, data: u64) {
    let msrs = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]);
    let set = vcpu.set_msrs(&msrs.expect("one entry")).expect("a list of one");
    assert_eq!(set, 1, "KVM has MSR {index:#x}");
}

/// What the page is full of that KVM touches.
const FILL: u8 = 0x5a;

/// Has KVM write to a page that is owed by way of an MSR.
fn by_msr(w: &World<'_>, msr: u32, apic: bool) -> Ran {
    let setup = Setup::new(w)?;
    setup.populate(CODE, &code());
    if apic {
        setup.vm.create_irq_chip().expect("KVM has an APIC");
    }
    let vcpu = setup.vcpu();
    let go = || {
        set(&vcpu, msr, gpa(TARGET).get() | ENABLED);
        if apic {
            interrupt(&setup, &vcpu);
        }
        run(vcpu)
    };
    let exit = waits(go, || setup.populate(TARGET, &[FILL; PAGE_BYTES]));
    assert!(is_out(exit), "{exit:?}");
    let bytes = setup.bytes(TARGET);
    let written = bytes.iter().filter(|byte| **byte != FILL).count();
    assert!((1..=64).contains(&written), "{written} bytes were written");
    assert!(bytes[64..].iter().all(|byte| *byte == FILL), "the rest is what came");
    PASSED
}

/// The same, of a page whose contents could not be had.
fn by_msr_failed(w: &World<'_>, msr: u32, apic: bool) -> Ran {
    let setup = Setup::new(w)?;
    setup.populate(CODE, &code());
    setup.memory.fail(setup.shown.page(TARGET)).expect("it is owed");
    if apic {
        setup.vm.create_irq_chip().expect("KVM has an APIC");
    }
    let vcpu = setup.vcpu();
    set(&vcpu, msr, gpa(TARGET).get() | ENABLED);
    if apic {
        interrupt(&setup, &vcpu);
    }
    let exit = run(vcpu);
    assert!(is_out(exit), "{exit:?}");
    setup.memory.discard(setup.shown.page(TARGET), OnBusy::Wait).expect("no pins");
    assert!(setup.bytes(TARGET).iter().all(|byte| *byte == 0), "nothing was written there");
    PASSED
}

/// Has an interrupt wait for the vCPU, that is taken at once. Once it is in service KVM tells the
/// guest, by a bit in its memory, that it need not write to the APIC to end it.
fn interrupt(setup: &Setup, vcpu: &VcpuFd) {
    let mut lapic = vcpu.get_lapic().expect("there is an APIC");
    // The bit of the spurious vector register that enables it.
    lapic.regs[0xf1] |= 1;
    vcpu.set_lapic(&lapic).expect("a state of the APIC");
    let mut sregs = vcpu.get_sregs().expect("a vCPU has registers");
    // The table of vectors lies in the code's page, and so does the stack.
    sregs.idt.base = gpa(CODE).get();
    (sregs.ss.base, sregs.ss.selector) = (gpa(CODE).get(), 0x1000);
    vcpu.set_sregs(&sregs).expect("real mode");
    let mut regs = vcpu.get_regs().expect("a vCPU has registers");
    (regs.rsp, regs.rflags) = (0xf00, 2 | 1 << 9);
    vcpu.set_regs(&regs).expect("a stack, and interrupts on");
    let msi = kvm_msi { address_lo: 0xfee0_0000, data: u32::from(VECTOR), ..Default::default() };
    assert_eq!(setup.vm.signal_msi(msi).expect("there is an APIC"), 1, "it is delivered");
}

const VECTOR: u8 = 0x40;

fn clock(w: &World<'_>) -> Ran {
    by_msr(w, MSR_KVM_SYSTEM_TIME_NEW, false)
}

fn clock_failed(w: &World<'_>) -> Ran {
    by_msr_failed(w, MSR_KVM_SYSTEM_TIME_NEW, false)
}

fn steal(w: &World<'_>) -> Ran {
    by_msr(w, MSR_KVM_STEAL_TIME, false)
}

fn steal_failed(w: &World<'_>) -> Ran {
    by_msr_failed(w, MSR_KVM_STEAL_TIME, false)
}

fn eoi(w: &World<'_>) -> Ran {
    by_msr(w, MSR_KVM_PV_EOI_EN, true)
}

fn eoi_failed(w: &World<'_>) -> Ran {
    by_msr_failed(w, MSR_KVM_PV_EOI_EN, true)
}

/// Present, writable, for ring 3, accessed and dirty.
const ENTRY: u64 = 0x67;
const LARGE: u64 = 0x80;
/// Within the first 2M, which are mapped to themselves, and where there is no memory.
const NOWHERE: u64 = 0x10_0000;

/// A vCPU in ring 3 of long mode, whose first table is the target's page. It loads from
/// [`NOWHERE`].
fn paging(setup: &Setup) -> VcpuFd {
    // mov rax, [NOWHERE]
    let mut load = vec![0x48, 0x8b, 0x04, 0x25];
    load.extend(u32::to_le_bytes(0x10_0000));
    setup.populate(CODE, &load);
    setup.populate(TARGET + 1, &u64::to_le_bytes(gpa(TARGET + 2).get() | ENTRY));
    setup.populate(TARGET + 2, &u64::to_le_bytes(ENTRY | LARGE));
    let vcpu = setup.vcpu();
    let mut sregs = vcpu.get_sregs().expect("a vCPU has registers");
    let segment = |selector, type_, long: bool| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(0x23, 0xb, true);
    let data = segment(0x1b, 3, false);
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 103, selector: 0x28, type_: 0xb, present: 1, ..sregs.tr };
    sregs.ldt = kvm_segment { unusable: 1, type_: 2, ..Default::default() };
    // Protection, paging, and what long mode wants beside them.
    sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    (sregs.cr3, sregs.cr4, sregs.efer) = (gpa(TARGET).get(), 1 << 5, 1 << 8 | 1 << 10);
    vcpu.set_sregs(&sregs).expect("long mode");
    let mut regs = vcpu.get_regs().expect("a vCPU has registers");
    (regs.rip, regs.rflags) = (gpa(CODE).get(), 2);
    vcpu.set_regs(&regs).expect("an address");
    vcpu
}

fn walk(w: &World<'_>) -> Ran {
    let setup = Setup::new(w)?;
    let vcpu = paging(&setup);
    let table = u64::to_le_bytes(gpa(TARGET + 1).get() | ENTRY);
    let exit = waits(|| run(vcpu), || setup.populate(TARGET, &table));
    assert!(matches!(exit, Exit::MmioRead { gpa, .. } if gpa.get() == NOWHERE), "{exit:?}");
    PASSED
}

fn walk_failed(w: &World<'_>) -> Ran {
    let setup = Setup::new(w)?;
    let vcpu = paging(&setup);
    setup.memory.fail(setup.shown.page(TARGET)).expect("it is owed");
    let exit = run(vcpu);
    assert!(ends(exit), "{exit:?}");
    PASSED
}

/// Whether an exit is one that ends a guest in a VMM.
fn ends(exit: Exit) -> bool {
    let failed = matches!(exit, Exit::MemoryFailure(_) | Exit::Shutdown | Exit::InternalError);
    failed
        || matches!(exit, Exit::MmioRead { .. } | Exit::MmioWrite { .. } | Exit::MemoryFault { .. })
}

fn fetch(w: &World<'_>) -> Ran {
    let setup = Setup::new(w)?;
    let vcpu = setup.vcpu();
    let exit = waits(|| run(vcpu), || setup.populate(CODE, &code()));
    assert!(is_out(exit), "{exit:?}");
    PASSED
}

fn fetch_failed(w: &World<'_>) -> Ran {
    let setup = Setup::new(w)?;
    setup.memory.fail(setup.shown.page(CODE)).expect("it is owed");
    let exit = run(setup.vcpu());
    assert!(ends(exit), "{exit:?}");
    PASSED
}

const _: () = assert!(BASE * PAGE_SIZE == 0x1_0000);
