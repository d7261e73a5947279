//! The guest's machine code, put together: the gate, a program for ring 3, the stub for ring 0.

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};
use polder_units::Gpa;

use super::interpreter::interpreter;
use super::request::KVM_HC_MAP_GPA_RANGE;
use super::stub::stub;
use crate::scenario::PATTERN_FACTOR;

/// What the guest runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Program {
    /// The scenario.
    SelfTest,
    /// One triple fault, at once: an undefined instruction, and no table of handlers.
    TripleFault,
    /// A loop in ring 3 that never leaves the guest.
    Spin,
    /// Requests without end that make no sense: any number, any argument, other ports and sizes.
    Flood,
}

/// How the guest asks for a conversion. All else goes by port, always.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Transport {
    /// The request by port, where KVM's hypercalls do not come back.
    Port,
    /// The hypercall, as Intel's instruction.
    Vmcall,
    /// The hypercall, as AMD's instruction.
    Vmmcall,
}

/// Vectors of exceptions: 0 to 31.
pub(super) const VECTORS: usize = 32;

/// The code, and where it is entered.
pub(super) struct Code {
    pub(super) bytes: Vec<u8>,
    /// Where a vCPU starts, in ring 3.
    pub(super) start: u64,
    /// Where each exception goes, in ring 0.
    pub(super) handlers: [u64; VECTORS],
}

/// Assembles the code for `base`, which must be below 2 GiB.
pub(super) fn assemble(
    base: Gpa,
    program: Program,
    transport: Transport,
) -> Result<Code, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut gate = a.create_label();
    let mut start = a.create_label();
    let abandon = a.create_label();
    // The gate is first, so that the stub knows its address.
    a.set_label(&mut gate)?;
    a.ud2()?;
    a.ret()?;
    a.set_label(&mut start)?;
    match program {
        Program::SelfTest => interpreter(&mut a, gate, start, abandon)?,
        Program::TripleFault => a.ud2()?,
        Program::Spin => a.jmp(start)?,
        Program::Flood => flood(&mut a, gate)?,
    }
    let abandons = (program == Program::SelfTest).then_some(abandon);
    let handlers = stub(&mut a, base, program, transport, abandons)?;
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let assembled = a.assemble_options(base.get(), options)?;
    let mut entries = [0; VECTORS];
    for (entry, label) in entries.iter_mut().zip(&handlers) {
        *entry = assembled.label_ip(label)?;
    }
    let start = assembled.label_ip(&start)?;
    Ok(Code { bytes: assembled.inner.code_buffer, start, handlers: entries })
}

/// Requests of which each is the last one's registers stirred. None is final, so that nobody who
/// plays by the protocol stops it: half are conversions, the rest are probes, doorbells and numbers
/// that no request has.
fn flood(a: &mut CodeAssembler, gate: CodeLabel) -> Result<(), IcedError> {
    let (mut again, mut any) = (a.create_label(), a.create_label());
    a.mov(r8, PATTERN_FACTOR)?;
    a.set_label(&mut again)?;
    for register in [rbx, rcx, rdx, rsi] {
        a.imul_2(r8, r8)?;
        a.lea(r8, ptr(r8 + r8 * 4 + 0x1235))?;
        a.mov(register, r8)?;
        a.rol(r8, 23)?;
    }
    // Aligned addresses now and then, and small counts, so that some of it nearly makes sense.
    a.and(rbx, !0xff)?;
    a.shr(rcx, 44)?;
    a.mov(rax, r8)?;
    a.shr(rax, 62)?;
    a.add(eax, 0xfe)?;
    a.test(r8d, 0x10_0000)?;
    a.jne(any)?;
    a.mov(rax, KVM_HC_MAP_GPA_RANGE)?;
    a.and(edx, 0x1f)?;
    a.set_label(&mut any)?;
    a.call(gate)?;
    a.jmp(again)
}
