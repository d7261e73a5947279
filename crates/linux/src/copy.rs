//! Bytes to and from memory that may not be there.
//!
//! A touch of a mapping can raise SIGBUS: the page is poisoned, or the system is out of memory.
//! [`copy`] is the one routine that touches guest memory, and it survives that. Its copying
//! instruction stands between two labels; the SIGBUS handler ([`crate::sigbus`]) asks
//! [`way_out`] whether the fault happened there, and if so goes on at the exit, where the
//! count of bytes not copied is returned.

use core::arch::global_asm;

// `rep movsb` keeps its progress in rdi, rsi and rcx, so that at a fault rcx is what is left.
global_asm!(
    ".pushsection .text.polder_copy, \"ax\", @progbits",
    ".hidden polder_copy",
    ".globl polder_copy",
    ".type polder_copy, @function",
    "polder_copy:",
    "    mov rcx, rdx",
    ".hidden polder_copy_touch",
    ".globl polder_copy_touch",
    "polder_copy_touch:",
    "    rep movsb",
    ".hidden polder_copy_exit",
    ".globl polder_copy_exit",
    "polder_copy_exit:",
    "    mov rax, rcx",
    "    ret",
    ".size polder_copy, . - polder_copy",
    ".popsection",
);

unsafe extern "C" {
    fn polder_copy(to: *mut u8, from: *const u8, count: usize) -> usize;
    fn polder_copy_touch();
    fn polder_copy_exit();
}

/// Copies `count` bytes upwards and returns how many were **not** copied: 0, unless a SIGBUS
/// ended it early.
///
/// # Safety
/// Both ranges are mapped for the duration (a SIGBUS is survived, a SIGSEGV is not), they do not
/// overlap, and [`crate::sigbus::install`] was called. A concurrent change of either by a guest,
/// the kernel or another thread is allowed for: the instruction is not the compiler's.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, count: usize) -> usize {
    // SAFETY: as the caller guarantees.
    unsafe { polder_copy(to, from, count) }
}

/// Where to go on after a SIGBUS at instruction `at`, if that was a copy's.
pub(crate) fn way_out(at: usize) -> Option<usize> {
    let touch = polder_copy_touch as *const () as usize;
    (at == touch).then_some(polder_copy_exit as *const () as usize)
}
