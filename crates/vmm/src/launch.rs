//! Launch: the image brought into memory that the host can't write.
//!
//! Private pages of a guest_memfd are their guest's alone. So a vCPU brings the image there before
//! the guest begins: the bytes are laid out in memory that is shared, where the guest has none
//! later, and the vCPU copies them, by one instruction in flat 32-bit mode.
//!
//! ```text
//! 0 ... boot, private        3G: the copying code   3G + 4K: a chunk's bytes     a slot of
//!       ^------- rep movsb ------------------------/                             its own
//! ```

use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use polder::units::{Gpa, PAGE_SIZE, PageRange};
use polder::{Contents, HostKind, Memory, OnBusy, Slot, Visibility};

use crate::RunError;
use crate::guest::Chunk;
use crate::scenario::{BOOT_END, MMIO_START};

/// Where the code and the bytes lie meanwhile: no scenario has memory there.
const STAGE: Gpa = Gpa::new(MMIO_START);
const BYTES: Gpa = Gpa::new(MMIO_START + PAGE_SIZE);

/// rep movsb, hlt.
const CODE: [u8; 3] = [0xf3, 0xa4, 0xf4];

const CR0_PE_ET: u64 = 1 | 1 << 4;

/// Copies an image into guest memory below 4 GiB, by a vCPU that has not run yet; its registers
/// are as before afterwards. `slot` is free, and is so again.
pub(crate) fn load(
    vm: &Arc<VmFd>,
    slot: Slot,
    vcpu: &mut VcpuFd,
    chunks: &[Chunk],
) -> Result<(), RunError> {
    let pages = PageRange::between(0, 1 + BOOT_END / PAGE_SIZE).expect("more than no page");
    let stage = Memory::builder(pages.count()).host(HostKind::Memfd).build();
    let stage = stage.map_err(RunError::Memory)?;
    let id = stage.attach(Arc::clone(vm)).map_err(RunError::Memory)?;
    stage
        .convert(pages, Visibility::Shared, Contents::Preserve, OnBusy::Wait)
        .and_then(|_| stage.bind(id, slot, STAGE.gfn(), pages))
        .and_then(|()| stage.write(id, STAGE, &CODE))
        .map_err(RunError::Memory)?;

    let sregs = vcpu.get_sregs().map_err(RunError::vm("KVM_GET_SREGS"))?;
    let regs = vcpu.get_regs().map_err(RunError::vm("KVM_GET_REGS"))?;
    vcpu.set_sregs(&flat(&sregs)).map_err(RunError::vm("KVM_SET_SREGS"))?;
    for chunk in chunks {
        stage.write(id, BYTES, &chunk.bytes).map_err(RunError::Memory)?;
        let copy = kvm_regs {
            rip: STAGE.get(),
            rsi: BYTES.get(),
            rdi: chunk.gpa.get(),
            rcx: chunk.bytes.len() as u64,
            rflags: 1 << 1,
            ..Default::default()
        };
        vcpu.set_regs(&copy).map_err(RunError::vm("KVM_SET_REGS"))?;
        run(vcpu)?;
    }
    vcpu.set_sregs(&sregs).map_err(RunError::vm("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(RunError::vm("KVM_SET_REGS"))
}

/// Runs until the copy has ended.
fn run(vcpu: &mut VcpuFd) -> Result<(), RunError> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(()),
            Ok(VcpuExit::Intr) => {}
            Err(error) if std::io::Error::from(error).kind() == std::io::ErrorKind::Interrupted => {
            }
            Ok(other) => return Err(RunError::Launch { exit: format!("{other:?}") }),
            Err(error) => return Err(RunError::vm("KVM_RUN")(error)),
        }
    }
}

/// Flat 32-bit segments, no paging.
fn flat(sregs: &kvm_sregs) -> kvm_sregs {
    let segment = |type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 8,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = segment(0x3);
    kvm_sregs {
        cs: segment(0xb),
        ss: data,
        ds: data,
        es: data,
        cr0: CR0_PE_ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
        ..*sregs
    }
}
