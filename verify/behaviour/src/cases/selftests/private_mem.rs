//! `private_mem_conversions_test` and `private_mem_kvm_exits_test`: ranges of 4K and 2M, and
//! accesses that end in the VMM.

use std::collections::BTreeSet;

use polder::kvm::{Exit, KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_MEMORY_EXIT_FLAG_PRIVATE};
use polder::units::PAGE_SIZE;
use polder::{Errno, MemoryFault};
use polder_vmm::End;
use polder_vmm::scenario::Op;

use super::{PUNCH, SZ_2M, Test, errno, gpa};
use crate::Section::Selftests;
use crate::world::{PASSED, World};
use crate::{Case, Ran};

pub(super) const CASES: &[Case] = &[
    Case::new(
        Selftests,
        "private_mem_conversions_test: 4K and 2M, at 0, 4K and 2M, and all else stays",
        patterns,
    ),
    Case::new(Selftests, "private_mem_kvm_exits_test: the slot is gone", gone),
    Case::new(Selftests, "private_mem_kvm_exits_test: what backs the slot is gone", closed),
    Case::new(Selftests, "private_mem_kvm_exits_test: the access is of the other kind", other_kind),
];

fn patterns(w: &World<'_>) -> Ran {
    let size = SZ_2M + 2 * PAGE_SIZE;
    for (offset, len) in
        [(0, PAGE_SIZE), (0, SZ_2M), (PAGE_SIZE, PAGE_SIZE), (PAGE_SIZE, SZ_2M), (SZ_2M, PAGE_SIZE)]
    {
        let test = Test::new(w, size / PAGE_SIZE, 0)?;
        // The first and the last page of what is converted, and those next to it.
        let first = offset / PAGE_SIZE;
        let last = first + len / PAGE_SIZE - 1;
        let within = [first, last];
        let without = [first.checked_sub(1), Some(last + 1)].into_iter().flatten();
        let all: BTreeSet<u64> = within.into_iter().chain(without.clone()).collect();
        all.into_iter().for_each(|at| test.private(at, 0, 1));
        assert_eq!(errno(test.set(offset, len, 0)), Ok(()));
        let kept = if test.keeps() { 1 } else { 0 };
        test.shared(first, kept, 2, 3);
        if last != first {
            test.shared(last, kept, 2, 3);
        }
        without.clone().for_each(|at| test.private(at, 1, 4));
        assert_eq!(errno(test.set(offset, len, KVM_MEMORY_ATTRIBUTE_PRIVATE)), Ok(()));
        let kept = if test.keeps() { 3 } else { 0 };
        test.private(first, kept, 5);
        without.for_each(|at| test.private(at, 4, 5));
        assert_eq!(errno(test.memfd.fallocate(PUNCH, 0, i64::MAX - 4095)), Ok(()));
        test.private(first, 0, 1);
    }
    PASSED
}

fn gone(w: &World<'_>) -> Ran {
    let test = Test::new(w, 4, 0)?;
    test.private(0, 0, 1);
    assert_eq!(errno(test.slot(1, 0, 0, 0)), Ok(()));
    unbacked(&test);
    let gpa = gpa(0);
    let ended = test.run([Op::Load { gpa, expect: u64::MAX }, Op::Store { gpa, value: 2 }]);
    let unbound = MemoryFault::Unbound(polder::units::GfnRange::one(gpa.gfn()));
    assert_eq!((ended.end, ended.faults), (End::Ok, vec![unbound; 2]));
    PASSED
}

/// An access to private memory is a memory fault, any other is MMIO.
fn unbacked(test: &Test) {
    let at = gpa(0).get();
    let fault = Exit::MemoryFault {
        errno: Errno::EFAULT,
        flags: KVM_MEMORY_EXIT_FLAG_PRIVATE,
        gpa: at,
        size: 4096,
    };
    assert_eq!(errno(test.vm.exit(at + 5, true)), Ok(Some(fault)));
    assert_eq!(errno(test.vm.exit(at + 5, false)), Ok(Some(Exit::Mmio { phys_addr: at })));
}

fn closed(w: &World<'_>) -> Ran {
    let mut test = Test::new(w, 4, 0)?;
    test.memfd = w.guest_memfd(&test.vm, PAGE_SIZE, 0)?;
    unbacked(&test);
    // The slot is there still, and can be deleted.
    assert_eq!(errno(test.slot(2, 0, PAGE_SIZE, 0)), Err(Errno::EEXIST));
    assert_eq!(errno(test.slot(1, 0, 0, 0)), Ok(()));
    assert_eq!(errno(test.slot(2, 0, PAGE_SIZE, 0)), Ok(()));
    test.guest_rmw(0, 0, 1);
    PASSED
}

fn other_kind(w: &World<'_>) -> Ran {
    let test = Test::new(w, 2, 0)?;
    assert_eq!(errno(test.set(PAGE_SIZE, PAGE_SIZE, 0)), Ok(()));
    let apart = test.memfd.memory().platform().tells_accesses_apart();
    for (at, is_private) in [(0, true), (1, false)] {
        let gpa = gpa(at * PAGE_SIZE).get();
        assert_eq!(errno(test.vm.exit(gpa, is_private)), Ok(None));
        let flags = if is_private { 0 } else { KVM_MEMORY_EXIT_FLAG_PRIVATE };
        let fault = Exit::MemoryFault { errno: Errno::EFAULT, flags, gpa, size: 4096 };
        assert_eq!(errno(test.vm.exit(gpa, !is_private)), Ok(apart.then_some(fault)));
    }
    PASSED
}
