//! The guest's memory as it is before its first instruction.
//!
//! ```text
//! 0x1000  GDT    0x1200  IDT    0x1400  a TSS for each vCPU
//! 0x2000  code, two pages
//! 0x4000  a page of stacks for each vCPU
//! ...     page tables, then the ops of each vCPU; all below 2M, the layout's boot area
//! ```
//!
//! The tables map the gibibytes that the ops name, the first one and the hole, not all of a
//! terabyte: an image stays below 2 MiB whatever the memory.

use std::collections::BTreeSet;

use kvm_bindings::kvm_regs;
use polder_units::{Gpa, PAGE_SIZE};

use super::boot::{Table, VcpuStart};
use super::code::{self, Program, Transport};
use super::record;
use super::tables::{self, TSS_BYTES};
use crate::scenario::{BOOT_END, MMIO_END, MMIO_START, Op, Scenario};

const GDT: Gpa = Gpa::new(0x1000);
const IDT: Gpa = Gpa::new(0x1200);
const TSS: u64 = 0x1400;
const TSS_STRIDE: u64 = 0x80;
const CODE: Gpa = Gpa::new(0x2000);
const STACKS: u64 = 0x4000;

/// A vCPU's page of stacks, from its start: where each begins, growing down.
const STACK_0: u64 = 0x1000;
const STACK_3: u64 = 0x800;
const STACK_DOUBLE_FAULT: u64 = 0x400;

const RFLAGS_FIXED: u64 = 1 << 1;

/// Bytes that go to an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// The address of the first byte.
    pub gpa: Gpa,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// What to load into zeroed memory, and how to start each vCPU.
///
/// ```
/// use polder_vmm::guest::{Image, Program, Transport};
/// use polder_vmm::scenario::{Config, Conversions, Scenario};
/// let config = Config { memory: 64 << 20, vcpus: 1, seed: 1,
///     conversions: Conversions::KeepContents, virtqueue: true };
/// let scenario = Scenario::generate(&config)?;
/// let image = Image::new(&scenario, Program::SelfTest, Transport::Port)?;
/// assert_eq!(image.vcpus.len(), 1);
/// assert!(image.chunks.iter().all(|chunk| chunk.gpa.get() < 2 << 20));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, PartialEq, Debug)]
pub struct Image {
    /// The memory, in order; the rest is zero.
    pub chunks: Vec<Chunk>,
    /// The vCPUs, in order.
    pub vcpus: Vec<VcpuStart>,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The code does not assemble: a fault of ours.
    #[error("the guest's code does not assemble")]
    Code(#[from] iced_x86::IcedError),
    /// The boot area is too small for the ops.
    #[error("the image ends at {end}, past the {len:#x} bytes of the boot area")]
    Boot {
        /// The address after the image's last byte.
        end: Gpa,
        /// The boot area's length in bytes.
        len: u64,
    },
}

impl Image {
    /// The image of a guest with the memory, the vCPUs and the ops of `scenario`, that runs
    /// `program`.
    ///
    /// # Errors
    /// [`ImageError::Boot`] if the ops are more than fit.
    pub fn new(
        scenario: &Scenario,
        program: Program,
        transport: Transport,
    ) -> Result<Self, ImageError> {
        Self::of_programs(scenario.programs(), program, transport)
    }

    /// The image of a guest with a vCPU for each list of ops, that runs `program`.
    ///
    /// # Errors
    /// [`ImageError::Boot`] if the ops are more than fit.
    pub fn of_programs(
        programs: &[Vec<Op>],
        program: Program,
        transport: Transport,
    ) -> Result<Self, ImageError> {
        let vcpus = programs.len() as u64;
        let at = |base: u64, stride: u64, vcpu: u64| Gpa::new(base + stride * vcpu);
        let tss: Vec<Gpa> = (0..vcpus).map(|vcpu| at(TSS, TSS_STRIDE, vcpu)).collect();
        let code = code::assemble(CODE, program, transport)?;

        let mut chunks = Vec::new();
        let mut put = |gpa, bytes| chunks.push(Chunk { gpa, bytes });
        put(GDT, tables::gdt(&tss));
        put(IDT, tables::idt(&code.handlers));
        for (vcpu, tss) in (0..).zip(&tss) {
            let stack = |top| Gpa::new(STACKS + PAGE_SIZE * vcpu + top);
            put(*tss, tables::tss(stack(STACK_0), stack(STACK_DOUBLE_FAULT)));
        }
        put(CODE, code.bytes);
        let page_tables = at(STACKS, PAGE_SIZE, vcpus);
        let mut free = page_tables;
        let mut put_next = |bytes: Vec<u8>| {
            let gpa = free;
            free = Gpa::new(gpa.get() + (bytes.len() as u64).next_multiple_of(PAGE_SIZE));
            put(gpa, bytes);
            gpa
        };
        put_next(tables::page_tables(page_tables, &gibibytes(programs)));
        let programs: Vec<Gpa> = programs.iter().map(|ops| put_next(records(ops))).collect();
        fits(free)?;

        let idt_limit = if program == Program::TripleFault { 0 } else { limit(&chunks, IDT) };
        let gdt = Table { base: GDT, limit: limit(&chunks, GDT) };
        let idt = Table { base: IDT, limit: idt_limit };
        let vcpus = (0..)
            .zip(tss.iter().zip(&programs))
            .map(|(index, (tss, ops))| {
                let stack = STACKS + PAGE_SIZE * u64::from(index) + STACK_3;
                let regs = registers(code.start, *ops, stack);
                VcpuStart { regs, page_tables, gdt, idt, tss: *tss, index }
            })
            .collect();
        Ok(Self { chunks, vcpus })
    }
}

fn registers(start: u64, ops: Gpa, stack: u64) -> kvm_regs {
    kvm_regs {
        rip: start,
        rsp: stack,
        rbp: stack,
        r15: ops.get(),
        rflags: RFLAGS_FIXED,
        ..Default::default()
    }
}

fn records(ops: &[Op]) -> Vec<u8> {
    ops.iter().flat_map(|op| tables::bytes(&record::encode(op))).collect()
}

/// The offset of the last byte of the table at `base`.
fn limit(chunks: &[Chunk], base: Gpa) -> u16 {
    let table = chunks.iter().find(|chunk| chunk.gpa == base);
    let len = table.map_or(0, |chunk| chunk.bytes.len());
    u16::try_from(len.saturating_sub(1)).unwrap_or(u16::MAX)
}

/// The gibibytes to map.
fn gibibytes(programs: &[Vec<Op>]) -> BTreeSet<u64> {
    let mut gibibytes = BTreeSet::from([0, MMIO_START >> 30, (MMIO_END - 1) >> 30]);
    for op in programs.iter().flatten() {
        // What is converted or probed is not touched, and may be nowhere.
        if let Some((gpa, len)) = op.touched() {
            gibibytes.extend([gpa.get() >> 30, (gpa.get() + len.max(1) - 1) >> 30]);
        }
    }
    gibibytes
}

fn fits(end: Gpa) -> Result<(), ImageError> {
    if end.get() > BOOT_END { Err(ImageError::Boot { end, len: BOOT_END }) } else { Ok(()) }
}

const _: () = assert!(TSS_STRIDE >= TSS_BYTES as u64);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::{Config, Conversions};

    fn scenario(memory: u64, vcpus: u8, seed: u64) -> Scenario {
        // The one that is longer.
        Scenario::generate(&Config {
            memory,
            vcpus,
            seed,
            conversions: Conversions::LoseContents,
            virtqueue: true,
        })
        .unwrap()
    }

    #[test]
    fn every_image_fits_and_no_chunk_overlaps() {
        for (memory, vcpus) in [(16 << 20, 1), (64 << 20, 2), (8 << 30, 3), (1 << 40, 4)] {
            for seed in 0..4 {
                let scenario = scenario(memory, vcpus, seed);
                let image = Image::new(&scenario, Program::SelfTest, Transport::Port).unwrap();
                let mut end = 0;
                for Chunk { gpa, bytes } in &image.chunks {
                    assert!(gpa.get() >= end, "{gpa}");
                    end = gpa.get() + bytes.len() as u64;
                }
                assert!(end <= scenario.layout().boot.end() * PAGE_SIZE);
                assert_eq!(image.vcpus.len(), usize::from(vcpus));
            }
        }
    }

    #[test]
    fn every_program_assembles_for_every_transport() {
        let scenario = scenario(16 << 20, 1, 1);
        for program in [Program::SelfTest, Program::TripleFault, Program::Spin, Program::Flood] {
            for transport in [Transport::Port, Transport::Vmcall, Transport::Vmmcall] {
                let image = Image::new(&scenario, program, transport).unwrap();
                let code = image.chunks.iter().find(|chunk| chunk.gpa == CODE).unwrap();
                // The gate, at the address that the stub compares with.
                assert_eq!(code.bytes[..3], [0x0f, 0x0b, 0xc3]);
                let vmmcall = code.bytes.windows(3).any(|three| three == [0x0f, 0x01, 0xd9]);
                let asks = program != Program::Flood;
                assert_eq!(vmmcall, asks && transport == Transport::Vmmcall);
            }
        }
    }

    #[test]
    fn vcpus_have_stacks_and_segments_of_their_own() {
        let image =
            Image::new(&scenario(16 << 20, 4, 1), Program::SelfTest, Transport::Port).unwrap();
        for (i, a) in image.vcpus.iter().enumerate() {
            for b in &image.vcpus[i + 1..] {
                assert!(a.regs.rsp != b.regs.rsp && a.regs.r15 != b.regs.r15 && a.tss != b.tss);
                let sregs = [a, b].map(|vcpu| vcpu.sregs(&Default::default()).tr.selector);
                assert_ne!(sregs[0], sregs[1]);
            }
        }
    }
}
