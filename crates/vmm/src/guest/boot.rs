//! How a vCPU starts: in ring 3 of long mode, tables and all in place.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use polder_units::Gpa;

use super::tables::{CODE_3, DATA_3, TSS, TSS_BYTES, TSS_DESCRIPTOR};

const CR0_PE_MP_ET_NE_WP_PG: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// With machine checks: a guest that is told of failed memory without that shuts down.
const CR4_PAE_MCE: u64 = 1 << 5 | 1 << 6;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// The state a vCPU starts in.
///
/// The VMM gives the vCPU a CPUID first (`KVM_SET_CPUID2`): without one, KVM takes physical
/// addresses to be 36 bits wide, and memory above 64 GiB faults. A vCPU other than the first waits
/// for an INIT if there is an in-kernel APIC; then `KVM_SET_MP_STATE` makes it runnable.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct VcpuStart {
    /// For `KVM_SET_REGS`.
    pub regs: kvm_regs,
    pub(crate) page_tables: Gpa,
    pub(super) gdt: Table,
    pub(super) idt: Table,
    pub(super) tss: Gpa,
    /// Which of the GDT's TSSs it is.
    pub(super) index: u8,
}

/// Where a descriptor table lies, and the offset of its last byte.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Table {
    pub(super) base: Gpa,
    pub(super) limit: u16,
}

impl VcpuStart {
    /// For `KVM_SET_SREGS`: `reset`, which `KVM_GET_SREGS` gave, made long mode and ring 3. What a
    /// guest has no word in, the APIC's base first of all, stays as it was.
    pub fn sregs(&self, reset: &kvm_sregs) -> kvm_sregs {
        let data = segment(DATA_3, 0x3, false);
        let table = |Table { base, limit }| kvm_dtable { base: base.get(), limit, padding: [0; 3] };
        kvm_sregs {
            cs: segment(CODE_3, 0xb, true),
            ss: data,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            tr: kvm_segment {
                base: self.tss.get(),
                limit: TSS_BYTES - 1,
                selector: TSS + u16::from(self.index) * TSS_DESCRIPTOR,
                type_: 0xb,
                present: 1,
                ..Default::default()
            },
            ldt: kvm_segment { unusable: 1, type_: 2, ..Default::default() },
            gdt: table(self.gdt),
            idt: table(self.idt),
            cr0: CR0_PE_MP_ET_NE_WP_PG,
            cr2: 0,
            cr3: self.page_tables.get(),
            cr4: CR4_PAE_MCE,
            efer: EFER_LME_LMA,
            ..*reset
        }
    }
}

/// A flat segment of ring 3.
fn segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}
