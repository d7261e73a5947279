//! The stub of ring 0: the gate's other side, and the handlers of exceptions.
//!
//! Where ring 0 is emulated, each instruction here costs, and only plain ones exist.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use polder_units::Gpa;

use super::code::{Program, Transport, VECTORS};
use super::request::{KVM_HC_MAP_GPA_RANGE, PORT, number};
use polder_linux::MACHINE_CHECK_BANK;

/// The vector of an undefined instruction, which the gate's UD2 is.
const UNDEFINED: usize = 6;

/// The vector of a machine check.
const MACHINE_CHECK: usize = 18;

/// MSRs (Intel SDM volume 4, table 2-2): `IA32_MCG_STATUS`, and the first bank's `IA32_MC0_STATUS`
/// and `IA32_MC0_ADDR`; each bank has four.
const MCG_STATUS: u32 = 0x17a;
const MC_STATUS: u32 = 0x401 + 4 * MACHINE_CHECK_BANK as u32;
const MC_ADDR: u32 = MC_STATUS + 1;

/// The handlers of all exceptions, by vector. With `abandon`, ring 3 goes on there after a machine
/// check; else that is an exception like any other.
pub(super) fn stub(
    a: &mut CodeAssembler,
    gate: Gpa,
    program: Program,
    transport: Transport,
    abandon: Option<CodeLabel>,
) -> Result<[CodeLabel; VECTORS], IcedError> {
    let mut handlers = [(); VECTORS].map(|()| a.create_label());
    let (mut report, mut stray) = (a.create_label(), a.create_label());

    a.set_label(&mut handlers[UNDEFINED])?;
    a.cmp(qword_ptr(rsp), immediate(gate.get()))?;
    a.jne(stray)?;
    if program == Program::Flood {
        nonsense(a)?;
    } else {
        ask(a, transport)?;
    }
    // Past the two bytes of the gate's UD2.
    a.add(qword_ptr(rsp), 2)?;
    a.iretq()?;

    if let Some(abandon) = abandon {
        a.set_label(&mut handlers[MACHINE_CHECK])?;
        machine_check(a, abandon)?;
    }
    for (vector, handler) in handlers.iter_mut().enumerate() {
        if vector == MACHINE_CHECK && abandon.is_some() {
            continue;
        }
        a.set_label(if vector == UNDEFINED { &mut stray } else { handler })?;
        if !matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30) {
            // No error code comes with this one.
            a.push(0)?;
        }
        a.push(immediate(vector as u64))?;
        a.jmp(report)?;
    }
    a.set_label(&mut report)?;
    a.pop(rbx)?;
    a.pop(rsi)?;
    a.mov(rcx, qword_ptr(rsp))?;
    a.mov(rdx, cr2)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.mov(rax, number::EXCEPTION)?;
    a.in_(eax, i32::from(PORT))?;
    a.jmp(again)?;
    Ok(handlers)
}

/// Tells of a machine check, clears it, and leaves what ring 3 was at.
fn machine_check(a: &mut CodeAssembler, abandon: CodeLabel) -> Result<(), IcedError> {
    for (register, msr) in [(rbx, MC_ADDR), (rsi, MC_STATUS)] {
        a.mov(ecx, msr)?;
        a.rdmsr()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(register, rax)?;
    }
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    // RCX is the bank's status still. Until the other is cleared, too, a second one is a shutdown.
    a.wrmsr()?;
    a.mov(ecx, MCG_STATUS)?;
    a.wrmsr()?;
    a.mov(rcx, rsi)?;
    a.mov(rax, number::MACHINE_CHECK)?;
    a.in_(eax, i32::from(PORT))?;
    a.lea(rax, ptr(abandon))?;
    a.mov(qword_ptr(rsp), rax)?;
    a.mov(qword_ptr(rsp + 24), rbp)?;
    a.iretq()
}

/// The request in the registers; RAX = the answer.
fn ask(a: &mut CodeAssembler, transport: Transport) -> Result<(), IcedError> {
    let (mut by_port, mut answered) = (a.create_label(), a.create_label());
    if transport != Transport::Port {
        a.cmp(rax, immediate(KVM_HC_MAP_GPA_RANGE))?;
        a.jne(by_port)?;
        if transport == Transport::Vmcall {
            a.vmcall()?
        } else {
            a.vmmcall()?
        }
        a.jmp(answered)?;
    }
    a.set_label(&mut by_port)?;
    a.in_(eax, i32::from(PORT))?;
    a.cdqe()?;
    if transport != Transport::Port {
        a.set_label(&mut answered)?;
        a.nop()?;
    }
    Ok(())
}

/// The registers as a request, and as accesses of any port in any size.
fn nonsense(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.in_(eax, i32::from(PORT))?;
    a.out(dx, eax)?;
    a.in_(al, dx)?;
    a.in_(ax, i32::from(PORT))?;
    a.out(i32::from(PORT), al)
}

/// A constant of ours as an immediate operand. It fits: a test assembles every program.
fn immediate(value: u64) -> i32 {
    i32::try_from(value).unwrap_or_else(|_| panic!("{value:#x} is no immediate operand"))
}
