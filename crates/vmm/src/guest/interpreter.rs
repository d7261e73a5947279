//! The program of ring 3: a loop over the records of ops.
//!
//! | register | holds |
//! |---|---|
//! | R15 | the record's address |
//! | R14 | the op's index |
//! | R13 | the checks passed |
//! | R12 | the seed of a churn's pass |
//! | RBP | the stack's top |
//!
//! The gate changes RAX only. An op that meets a machine check is abandoned, wherever it was.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::record::{self, code};
use super::request::{DEVICE_PENDING, STATUS_WORD, number};
use crate::scenario::PATTERN_FACTOR;

/// Word `index` of the record.
fn word(index: i32) -> AsmMemoryOperand {
    qword_ptr(r15 + 8 * index)
}

/// The labels of the interpreter that more than one op jumps to.
struct Labels {
    gate: CodeLabel,
    /// Runs the record that R15 is at.
    run: CodeLabel,
    passed: CodeLabel,
    next: CodeLabel,
    /// Fails with gpa in RDI, expected in RAX, found in RBX.
    fail: CodeLabel,
    /// Fills `[rdi..rcx)` from pattern R8 (offset), R9 (seed), R10 (factor), R11 (invert).
    fill: CodeLabel,
    /// Checks the same, or fails.
    check: CodeLabel,
}

/// The loop over the records; `run` is its first instruction, the caller's to place. At `next` it
/// goes on with the next record.
pub(super) fn interpreter(
    a: &mut CodeAssembler,
    gate: CodeLabel,
    run: CodeLabel,
    next: CodeLabel,
) -> Result<(), IcedError> {
    let mut labels = Labels {
        gate,
        run,
        passed: a.create_label(),
        next,
        fail: a.create_label(),
        fill: a.create_label(),
        check: a.create_label(),
    };
    let codes: [(i32, Emit); 15] = [
        (code::FILL, fill_op),
        (code::CHECK, check_op),
        (code::REQUEST, request_op),
        (code::DEVICE, device_op),
        (code::LOAD, load_op),
        (code::STORE, store_op),
        (code::CHURN, churn_op),
        (code::SET_FLAG, set_flag_op),
        (code::WAIT_FLAG, wait_flag_op),
        (code::DONE, done_op),
        (code::ROAM, roam_op),
        (code::TIME, time_op),
        (code::STAND_STILL, stand_still_op),
        (code::DIGEST, digest_op),
        (code::TIME_REQUEST, time_request_op),
    ];
    let mut targets = codes.map(|_| a.create_label());

    a.mov(rax, word(0))?;
    a.mov(rdi, word(1))?;
    for ((code, _), target) in codes.iter().zip(&targets) {
        a.cmp(rax, *code)?;
        a.je(*target)?;
    }
    // No op has this code: reported as a stray #UD.
    a.ud2()?;
    a.set_label(&mut labels.passed)?;
    a.inc(r13)?;
    a.set_label(&mut labels.next)?;
    a.add(r15, record::BYTES)?;
    a.inc(r14)?;
    a.jmp(run)?;
    for ((_, emit), target) in codes.iter().zip(&mut targets) {
        a.set_label(target)?;
        emit(a, &labels)?;
    }
    fill_words(a, &mut labels)?;
    check_words(a, &mut labels)?;
    fail(a, &mut labels)
}

/// Writes the instructions of one op. RDI is word 1 of the record.
type Emit = fn(&mut CodeAssembler, &Labels) -> Result<(), IcedError>;

fn fill_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    load_pattern(a)?;
    a.call(labels.fill)?;
    a.jmp(labels.next)
}

fn check_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    load_pattern(a)?;
    a.call(labels.check)?;
    a.jmp(labels.passed)
}

fn load_pattern(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rcx, word(2))?;
    a.add(rcx, rdi)?;
    for (register, index) in [(r8, 3), (r9, 4), (r10, 5), (r11, 6)] {
        a.mov(register, word(index))?;
    }
    Ok(())
}

fn request_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    request(a, labels)?;
    a.mov(rbx, rax)?;
    judge(a, labels)
}

/// RAX = the answer to the request of this record.
fn request(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    a.mov(rbx, rdi)?;
    a.mov(rcx, word(2))?;
    a.mov(rdx, word(3))?;
    a.xor(esi, esi)?;
    a.mov(rax, word(5))?;
    a.call(labels.gate)
}

/// Passes if RBX is the answer that was expected.
fn judge(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    a.mov(rax, word(4))?;
    a.cmp(rax, rbx)?;
    a.jne(labels.fail)?;
    a.jmp(labels.passed)
}

fn device_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    let mut outcome = a.create_label();
    for index in 0..STATUS_WORD {
        a.mov(rax, word(2 + index))?;
        a.mov(qword_ptr(rdi + 8 * index), rax)?;
    }
    let status = qword_ptr(rdi + 8 * STATUS_WORD);
    a.mov(rax, DEVICE_PENDING.cast_unsigned())?;
    a.mov(status, rax)?;
    a.mov(rbx, rdi)?;
    a.mov(rax, number::DOORBELL)?;
    a.call(labels.gate)?;
    a.mov(rbx, rax)?;
    a.test(rbx, rbx)?;
    a.jne(outcome)?;
    a.mov(rbx, status)?;
    a.set_label(&mut outcome)?;
    a.mov(rax, word(6))?;
    a.cmp(rax, rbx)?;
    a.jne(labels.fail)?;
    a.jmp(labels.passed)
}

fn load_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    a.mov(rbx, qword_ptr(rdi))?;
    a.mov(rax, word(2))?;
    a.cmp(rax, rbx)?;
    a.jne(labels.fail)?;
    a.jmp(labels.passed)
}

fn store_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    a.mov(rax, word(2))?;
    a.mov(qword_ptr(rdi), rax)?;
    a.jmp(labels.next)
}

fn churn_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    let mut pass = a.create_label();
    a.mov(r12, word(3))?;
    a.xor(r8d, r8d)?;
    a.mov(r10, PATTERN_FACTOR)?;
    a.xor(r11d, r11d)?;
    a.set_label(&mut pass)?;
    a.mov(r9, r12)?;
    for words in [labels.fill, labels.check] {
        a.mov(rdi, word(1))?;
        a.mov(rcx, word(2))?;
        a.add(rcx, rdi)?;
        a.call(words)?;
    }
    a.inc(r13)?;
    a.inc(r12)?;
    a.mov(rax, word(4))?;
    a.cmp(qword_ptr(rax), 0)?;
    a.je(pass)?;
    a.jmp(labels.next)
}

/// Places are of Marsaglia's xorshift64: 13, 7, 17.
fn roam_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    let mut each = a.create_label();
    for (register, index) in [(r9, 2), (rcx, 3), (r8, 4)] {
        a.mov(register, word(index))?;
    }
    a.test(rcx, rcx)?;
    a.je(labels.next)?;
    a.set_label(&mut each)?;
    for (shift, left) in [(13, true), (7, false), (17, true)] {
        a.mov(rax, r8)?;
        if left {
            a.shl(rax, shift)?;
        } else {
            a.shr(rax, shift)?;
        }
        a.xor(r8, rax)?;
    }
    a.mov(rax, r8)?;
    a.and(rax, r9)?;
    a.mov(rbx, qword_ptr(rdi + rax))?;
    a.dec(rcx)?;
    a.jne(each)?;
    a.jmp(labels.next)
}

fn set_flag_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    a.mov(qword_ptr(rdi), 1)?;
    a.jmp(labels.next)
}

fn wait_flag_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    a.cmp(qword_ptr(rdi), 0)?;
    a.jne(labels.next)?;
    a.pause()?;
    a.jmp(labels.run)
}

fn time_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    let mut each = a.create_label();
    a.mov(rcx, word(2))?;
    a.add(rcx, rdi)?;
    a.mov(rsi, word(3))?;
    a.set_label(&mut each)?;
    a.cmp(rdi, rcx)?;
    a.jae(labels.next)?;
    ticks(a)?;
    a.mov(r8, rax)?;
    a.mov(rbx, qword_ptr(rdi))?;
    ticks(a)?;
    a.sub(rax, r8)?;
    a.mov(qword_ptr(rsi), rax)?;
    a.add(rsi, 8)?;
    a.add(rdi, 0x1000)?;
    a.jmp(each)
}

fn time_request_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    ticks(a)?;
    a.mov(r8, rax)?;
    request(a, labels)?;
    a.mov(rbx, rax)?;
    ticks(a)?;
    a.sub(rax, r8)?;
    a.mov(rsi, word(6))?;
    a.mov(qword_ptr(rsi), rax)?;
    judge(a, labels)
}

fn stand_still_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    let (mut pass, mut each, mut shorter) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(rsi, word(3))?;
    a.mov(r9, word(4))?;
    ticks(a)?;
    a.mov(r8, rax)?;
    a.set_label(&mut pass)?;
    a.mov(rdi, word(1))?;
    a.mov(rcx, word(2))?;
    a.add(rcx, rdi)?;
    a.set_label(&mut each)?;
    a.mov(rbx, qword_ptr(rdi))?;
    ticks(a)?;
    a.mov(r10, rax)?;
    a.sub(rax, r8)?;
    a.mov(r8, r10)?;
    a.cmp(rax, qword_ptr(rsi + 8))?;
    a.jbe(shorter)?;
    a.mov(qword_ptr(rsi + 8), rax)?;
    a.set_label(&mut shorter)?;
    a.inc(qword_ptr(rsi))?;
    a.cmp(qword_ptr(r9), 0)?;
    a.jne(labels.next)?;
    a.add(rdi, 0x1000)?;
    a.cmp(rdi, rcx)?;
    a.jb(each)?;
    a.jmp(pass)
}

/// RAX = the time-stamp counter, once all loads before are done. Changes RDX.
fn ticks(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.lfence()?;
    a.rdtsc()?;
    a.lfence()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)
}

fn digest_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    let mut each = a.create_label();
    a.mov(rcx, word(2))?;
    a.mov(rbx, rdi)?;
    a.lea(r8, ptr(rdi + rcx))?;
    a.mov(r10, PATTERN_FACTOR)?;
    a.xor(edx, edx)?;
    a.set_label(&mut each)?;
    a.xor(rdx, qword_ptr(rbx))?;
    a.imul_2(rdx, r10)?;
    a.rol(rdx, 29)?;
    a.add(rbx, 8)?;
    a.cmp(rbx, r8)?;
    a.jb(each)?;
    a.mov(rbx, rdi)?;
    a.mov(rsi, r14)?;
    a.mov(rax, number::DIGEST)?;
    a.call(labels.gate)?;
    a.mov(rbx, rax)?;
    a.xor(eax, eax)?;
    a.cmp(rax, rbx)?;
    a.jne(labels.fail)?;
    a.jmp(labels.passed)
}

fn done_op(a: &mut CodeAssembler, labels: &Labels) -> Result<(), IcedError> {
    a.mov(rbx, r13)?;
    a.mov(rax, number::DONE)?;
    a.call(labels.gate)?;
    a.jmp(labels.run)
}

fn fill_words(a: &mut CodeAssembler, labels: &mut Labels) -> Result<(), IcedError> {
    let (mut each, mut end) = (a.create_label(), a.create_label());
    a.set_label(&mut labels.fill)?;
    a.lea(rdx, ptr(rdi + r8))?;
    a.cmp(rdi, rcx)?;
    a.jae(end)?;
    a.set_label(&mut each)?;
    pattern_word(a)?;
    a.mov(qword_ptr(rdi), rax)?;
    a.add(rdi, 8)?;
    a.cmp(rdi, rcx)?;
    a.jb(each)?;
    a.set_label(&mut end)?;
    a.ret()
}

fn check_words(a: &mut CodeAssembler, labels: &mut Labels) -> Result<(), IcedError> {
    let (mut each, mut end) = (a.create_label(), a.create_label());
    a.set_label(&mut labels.check)?;
    a.lea(rdx, ptr(rdi + r8))?;
    a.cmp(rdi, rcx)?;
    a.jae(end)?;
    a.set_label(&mut each)?;
    pattern_word(a)?;
    // Into a register first: what is reported is what was compared.
    a.mov(rbx, qword_ptr(rdi))?;
    a.cmp(rbx, rax)?;
    a.jne(labels.fail)?;
    a.add(rdi, 8)?;
    a.cmp(rdi, rcx)?;
    a.jb(each)?;
    a.set_label(&mut end)?;
    a.ret()
}

/// RAX = the pattern's word at RDX, and RDX on to the next.
fn pattern_word(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, rdx)?;
    a.add(rdx, 8)?;
    a.xor(rax, r9)?;
    a.imul_2(rax, r10)?;
    a.xor(rax, r11)
}

fn fail(a: &mut CodeAssembler, labels: &mut Labels) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut labels.fail)?;
    a.mov(rcx, rdi)?;
    a.mov(rdx, rax)?;
    a.mov(rsi, rbx)?;
    a.mov(rbx, r14)?;
    a.mov(rdi, r13)?;
    a.set_label(&mut again)?;
    a.mov(rax, number::FAILED)?;
    a.call(labels.gate)?;
    a.jmp(again)
}
