//! `pre_fault_memory_test`: memory of 2M and a page, mapped ahead while its slot is deleted and
//! made again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::yield_now;

use polder::Errno;
use polder::kvm::{GUEST_MEMFD_FLAG_INIT_SHARED, kvm_pre_fault_memory};
use polder::units::PAGE_SIZE;
use polder_vmm::scenario::{Op, Pattern};
use polder_vmm::{End, IdleVcpu};

use super::{SZ_2M, Test, errno, gpa};
use crate::Section::Selftests;
use crate::world::{PASSED, World, meanwhile};
use crate::{Case, Ran};

pub(super) const CASES: &[Case] = &[
    Case::new(
        Selftests,
        "pre_fault_memory_test: private memory, while its slot is deleted and made again",
        |w| of_kind(w, 0),
    ),
    Case::new(
        Selftests,
        "pre_fault_memory_test: shared memory, while its slot is deleted and made again",
        |w| of_kind(w, GUEST_MEMFD_FLAG_INIT_SHARED),
    ),
    Case::new(Selftests, "pre_fault_memory_test: flags, and what is no range, are EINVAL", invalid),
];

const SIZE: u64 = SZ_2M + PAGE_SIZE;

fn range(offset: u64, size: u64) -> kvm_pre_fault_memory {
    kvm_pre_fault_memory { gpa: gpa(offset).get(), size, ..Default::default() }
}

fn of_kind(w: &World<'_>, flags: u64) -> Ran {
    let test = Test::new(w, SIZE / PAGE_SIZE, flags)?;
    let vcpu = test.guest.vcpu((test.memfd.memory(), test.memfd.vm()));
    // More often than the kernel has it, for a race that is not met shows nothing.
    for _ in 0..4 {
        check(&test, &vcpu, (0, SZ_2M), 0);
        check(&test, &vcpu, (SZ_2M, 2 * PAGE_SIZE), PAGE_SIZE);
        check(&test, &vcpu, (SIZE, PAGE_SIZE), PAGE_SIZE);
    }
    let all = Op::Check { gpa: gpa(0), len: SIZE, pattern: Pattern::Zero };
    let ended = test.run([all]);
    assert_eq!((ended.end, ended.faults.as_slice()), (End::Ok, [].as_slice()));
    PASSED
}

/// Maps a range ahead until it is done, or fails, with so many bytes left. Meanwhile the slot is
/// deleted; it is made again once the first call has ended.
fn check(test: &Test, vcpu: &IdleVcpu, (offset, size): (u64, u64), expected_left: u64) {
    let (ready, recreate) = (AtomicBool::new(false), AtomicBool::new(false));
    let wait_for = |flag: &AtomicBool| {
        while !flag.load(Ordering::Acquire) {
            yield_now();
        }
    };
    let deletes_slot = || {
        wait_for(&ready);
        assert_eq!(errno(test.slot(1, 0, 0, 0)), Ok(()));
        wait_for(&recreate);
        assert_eq!(errno(test.slot(1, 0, SIZE, 0)), Ok(()));
    };
    let mut range = range(offset, size);
    let mut prefault = || {
        let before = range.size;
        let done = errno(test.vm.pre_fault_memory(vcpu, &mut range));
        assert_ne!(range.size < before, done.is_err(), "it moves on if it succeeds, and only then");
        (done, range.size)
    };
    let ((), (first, left)) = meanwhile(deletes_slot, || {
        ready.store(true, Ordering::Release);
        let first = prefault();
        recreate.store(true, Ordering::Release);
        first
    });
    if let Err(errno) = first {
        assert!([Errno::ENOENT, Errno::EAGAIN].contains(&errno), "the slot has gone: {errno:?}");
    }
    // Of a slot that stays what it comes to is the same each time.
    let (mut last, mut left) = (first, left);
    while left > 0 {
        (last, left) = prefault();
        if last.is_err() {
            break;
        }
    }
    assert_eq!(left, expected_left);
    let expected = if expected_left == 0 { Ok(()) } else { Err(Errno::ENOENT) };
    assert_eq!(last, expected, "{size:#x} bytes at {offset:#x}");
}

fn invalid(w: &World<'_>) -> Ran {
    let test = Test::new(w, 2, 0)?;
    let vcpu = test.guest.vcpu((test.memfd.memory(), test.memfd.vm()));
    let mut flagged = range(0, PAGE_SIZE);
    flagged.flags = 1;
    let ranges =
        [(0, 0), (0, 1), (1, PAGE_SIZE), (0, PAGE_SIZE - 1), (0, PAGE_SIZE.wrapping_neg())];
    for mut range in ranges.map(|(offset, size)| range(offset, size)).into_iter().chain([flagged]) {
        let before = (range.gpa, range.size);
        assert_eq!(errno(test.vm.pre_fault_memory(&vcpu, &mut range)), Err(Errno::EINVAL));
        assert_eq!((range.gpa, range.size), before, "nothing has moved");
    }
    PASSED
}
