//! `guest_memfd_conversions_test`: private to shared and back, in place.

use polder::kvm::{
    self, GUEST_MEMFD_FLAG_INIT_SHARED, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE, KVM_SET_MEMORY_ATTRIBUTES2_ZERO, kvm_memory_attributes2,
};
use polder::units::PAGE_SIZE;
use polder::{Errno, Holder, PinKind};

use super::{PUNCH, Test, errno};
use crate::Section::Selftests;
use crate::world::{PASSED, World, page};
use crate::{Case, Ran};

pub(super) const CASES: &[Case] = &[
    Case::new(Selftests, "guest_memfd_conversions_test: init_private", init_private),
    Case::new(Selftests, "guest_memfd_conversions_test: init_shared", init_shared),
    Case::new(Selftests, "guest_memfd_conversions_test: indexing", indexing),
    Case::new(Selftests, "guest_memfd_conversions_test: before_allocation_shared", before_shared),
    Case::new(Selftests, "guest_memfd_conversions_test: before_allocation_private", before_private),
    Case::new(Selftests, "guest_memfd_conversions_test: unallocated_folios", unallocated),
    Case::new(Selftests, "guest_memfd_conversions_test: truncate", truncate),
    Case::new(
        Selftests,
        "guest_memfd_conversions_test: elevated_refcount, by error_offset",
        pinned,
    ),
    Case::new(
        Selftests,
        "guest_memfd_conversions_test: arguments that are none are EINVAL, and change nothing",
        bad_attributes,
    ),
    Case::new(
        Selftests,
        "guest_memfd_conversions_test: contents are kept or zeros where offered, else EOPNOTSUPP",
        contents,
    ),
];

fn init_private(w: &World<'_>) -> Ran {
    let test = Test::new(w, 1, 0)?;
    test.private(0, 0, 1);
    test.to_shared(0, 1, 2, 3);
    test.to_private(0, 3, 4);
    PASSED
}

fn init_shared(w: &World<'_>) -> Ran {
    let test = Test::new(w, 1, GUEST_MEMFD_FLAG_INIT_SHARED)?;
    test.shared(0, 0, 1, 2);
    test.to_private(0, 2, 3);
    test.to_shared(0, 3, 4, 5);
    PASSED
}

fn indexing(w: &World<'_>) -> Ran {
    for tested in 0..4 {
        let test = Test::new(w, 4, GUEST_MEMFD_FLAG_INIT_SHARED)?;
        let word = |at, step| (at + 1) * 0x100 + step;
        (0..4).for_each(|at| test.shared(at, 0, word(at, 1), word(at, 2)));
        test.to_private(tested, word(tested, 2), word(tested, 3));
        for at in (0..4).filter(|&at| at != tested) {
            test.shared(at, word(at, 2), word(at, 3), word(at, 4));
        }
        test.to_shared(tested, word(tested, 3), word(tested, 4), word(tested, 5));
        for at in (0..4).filter(|&at| at != tested) {
            test.shared(at, word(at, 4), word(at, 5), word(at, 6));
        }
    }
    PASSED
}

fn before_shared(w: &World<'_>) -> Ran {
    let test = Test::new(w, 1, GUEST_MEMFD_FLAG_INIT_SHARED)?;
    test.to_private(0, 0, 1);
    PASSED
}

fn before_private(w: &World<'_>) -> Ran {
    let test = Test::new(w, 1, 0)?;
    test.to_shared(0, 0, 1, 2);
    PASSED
}

/// One page of eight has memory, each in its turn; the others become what they become without.
fn unallocated(w: &World<'_>) -> Ran {
    for tested in 0..8 {
        let test = Test::new(w, 8, GUEST_MEMFD_FLAG_INIT_SHARED)?;
        test.shared(tested, 0, 1, 2);
        let all = 8 * PAGE_SIZE;
        assert_eq!(errno(test.set(0, all, KVM_MEMORY_ATTRIBUTE_PRIVATE)), Ok(()));
        let kept = if test.keeps() { 2 } else { 0 };
        (0..8).for_each(|at| test.private(at, if at == tested { kept } else { 0 }, 3));
        assert_eq!(errno(test.set(0, all, 0)), Ok(()));
        let kept = if test.keeps() { 3 } else { 0 };
        [tested, (tested + 3) % 8].into_iter().for_each(|at| test.shared(at, kept, 4, 5));
    }
    PASSED
}

fn truncate(w: &World<'_>) -> Ran {
    let test = Test::new(w, 1, GUEST_MEMFD_FLAG_INIT_SHARED)?;
    assert!(test.host_write(0, 1));
    assert_eq!(errno(test.memfd.fallocate(PUNCH, 0, 4096)), Ok(()));
    assert_eq!(test.host_read(0), Some(0));
    assert!(test.host_write(0, 1));
    test.to_private(0, 1, 2);
    assert_eq!(errno(test.memfd.fallocate(PUNCH, 0, 4096)), Ok(()));
    test.private(0, 0, 1);
    PASSED
}

fn pinned(w: &World<'_>) -> Ran {
    for tested in 0..4 {
        let test = Test::new(w, 4, GUEST_MEMFD_FLAG_INIT_SHARED)?;
        let pin = test.memfd.memory().pin(page(tested), PinKind::Short, Holder::new("a pipe"));
        let pin = pin.expect("shared pages");
        (0..4).for_each(|at| test.shared(at, 0, 1, 2));
        let fails = |offset, size| {
            let set = test.set(offset, size, KVM_MEMORY_ATTRIBUTE_PRIVATE);
            let failed = set.expect_err("a page is pinned");
            let at = Some(tested * PAGE_SIZE);
            assert_eq!((failed.errno, failed.error_offset), (Errno::EAGAIN, at));
            let why = failed.why.expect("the holder").to_string();
            assert!(why.contains("a pipe"), "{why}");
        };
        fails(0, 4 * PAGE_SIZE);
        assert_eq!([0, 1, 2, 3].map(|at| test.host_read(at)), [Some(2); 4], "none of them");
        fails(tested * PAGE_SIZE, PAGE_SIZE);
        (0..4).filter(|&at| at != tested).for_each(|at| test.to_private(at, 2, 3));
        drop(pin);
        let all = test.set(0, 4 * PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE);
        assert_eq!(errno(all), Ok(()));
        let kept = if test.keeps() { 2 } else { 0 };
        (0..4).for_each(|at| test.private(at, if at == tested { kept } else { 3 }, 4));
    }
    PASSED
}

fn bad_attributes(w: &World<'_>) -> Ran {
    let test = Test::new(w, 4, GUEST_MEMFD_FLAG_INIT_SHARED)?;
    let good = kvm_memory_attributes2 {
        size: PAGE_SIZE,
        attributes: KVM_MEMORY_ATTRIBUTE_PRIVATE,
        ..Default::default()
    };
    let both = KVM_SET_MEMORY_ATTRIBUTES2_ZERO | KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE;
    let mut reserved = [0; 11];
    reserved[10] = 1;
    for bad in [
        kvm_memory_attributes2 { size: 0, ..good },
        kvm_memory_attributes2 { size: PAGE_SIZE - 1, ..good },
        kvm_memory_attributes2 { offset: 1, ..good },
        kvm_memory_attributes2 { offset: 4 * PAGE_SIZE, ..good },
        kvm_memory_attributes2 { size: 5 * PAGE_SIZE, ..good },
        kvm_memory_attributes2 { offset: PAGE_SIZE.wrapping_neg(), ..good },
        kvm_memory_attributes2 { offset: PAGE_SIZE, size: PAGE_SIZE.wrapping_neg(), ..good },
        kvm_memory_attributes2 { attributes: 1, ..good },
        kvm_memory_attributes2 { attributes: 7 | KVM_MEMORY_ATTRIBUTE_PRIVATE, ..good },
        kvm_memory_attributes2 { flags: both, ..good },
        kvm_memory_attributes2 { flags: 4, ..good },
        kvm_memory_attributes2 { error_offset: 1, ..good },
        kvm_memory_attributes2 { reserved, ..good },
    ] {
        let mut args = bad;
        let set = errno(test.memfd.set_memory_attributes2(&mut args));
        assert_eq!((set, args), (Err(Errno::EINVAL), bad));
    }
    (0..4).for_each(|at| test.shared(at, 0, 1, 2));
    PASSED
}

fn contents(w: &World<'_>) -> Ran {
    for flags in [0, KVM_SET_MEMORY_ATTRIBUTES2_ZERO, KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE] {
        let test = Test::new(w, 2, GUEST_MEMFD_FLAG_INIT_SHARED)?;
        let offered = test.vm.check_extension(kvm::Capability::MemoryAttributes2Flags);
        test.shared(0, 0, 1, 2);
        let size = PAGE_SIZE;
        let attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE;
        let mut args = kvm_memory_attributes2 { size, attributes, flags, ..Default::default() };
        let set = errno(test.memfd.set_memory_attributes2(&mut args));
        if flags & !offered != 0 {
            assert_eq!(set, Err(Errno::EOPNOTSUPP));
            assert_eq!(test.host_read(0), Some(2), "nothing has changed");
            continue;
        }
        assert_eq!(set, Ok(()));
        match flags {
            KVM_SET_MEMORY_ATTRIBUTES2_ZERO => test.private(0, 0, 3),
            KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE => test.private(0, 2, 3),
            _ => assert_eq!(test.host_read(0), None),
        }
    }
    PASSED
}
