//! `set_memory_region_test`: slots that show a guest_memfd.

use polder::Errno;
use polder::kvm::{
    GUEST_MEMFD_FLAG_INIT_SHARED, KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    kvm_userspace_memory_region2,
};
use polder::units::PAGE_SIZE;

use super::{SZ_2M, Test, errno, region};
use crate::Section::Selftests;
use crate::world::{PASSED, World};
use crate::{Case, Ran};

pub(super) const CASES: &[Case] = &[
    Case::new(
        Selftests,
        "set_memory_region_test: what is no guest_memfd of the VM's is refused, and odd offsets",
        invalid_memfd,
    ),
    Case::new(
        Selftests,
        "set_memory_region_test: overlaps are EEXIST, in frames and in the guest_memfd",
        overlaps,
    ),
    Case::new(
        Selftests,
        "set_memory_region_test: flags that can't go with it are EINVAL",
        region_flags,
    ),
    Case::new(
        Selftests,
        "set_memory_region_test: a slot is deleted by size 0, and changed by nothing",
        immutable,
    ),
];

fn invalid_memfd(w: &World<'_>) -> Ran {
    let test = Test::new(w, 4, 0)?;
    let (other, _guest) = w.kernel()?;
    // So that the numbers differ: a number of the other VM's is nothing here.
    let others = [0; 3].map(|_| w.guest_memfd(&other, 4 * PAGE_SIZE, 0));
    let others = others.into_iter().collect::<Result<Vec<_>, _>>()?;
    let foreign = others.last().expect("three").fd();
    let add = |fd, offset| {
        let size = PAGE_SIZE;
        errno(test.vm.set_user_memory_region2(region(2, 0x10_0000, size, (fd, offset))))
    };
    for fd in [foreign, 99, u32::MAX] {
        assert_eq!(add(fd, 0), Err(Errno::EBADF));
    }
    for offset in (1..PAGE_SIZE).step_by(61).chain([4 * PAGE_SIZE, u64::MAX, 1 << 63]) {
        assert_eq!(add(test.memfd.fd(), offset), Err(Errno::EINVAL), "{offset:#x}");
    }
    let mut elsewhere = region(2, 0x10_0000, PAGE_SIZE, (test.memfd.fd(), 0));
    elsewhere.userspace_addr = 0x1000;
    assert_eq!(errno(test.vm.set_user_memory_region2(elsewhere)), Err(Errno::EINVAL));
    assert_eq!(errno(test.slot(1, 0, 0, 0)), Ok(()));
    assert_eq!(add(test.memfd.fd(), 0), Ok(()));
    PASSED
}

fn overlaps(w: &World<'_>) -> Ran {
    let (vm, _guest) = w.kernel()?;
    let memfd = w.guest_memfd(&vm, 4 * SZ_2M, 0)?;
    let fd = memfd.fd();
    let set = |slot, at, size, offset| {
        errno(vm.set_user_memory_region2(region(slot, at, size, (fd, offset))))
    };
    assert_eq!(set(10, 4 * SZ_2M, 2 * SZ_2M, 0), Ok(()));
    assert_eq!(set(11, 8 * SZ_2M, 2 * SZ_2M, 2 * SZ_2M), Ok(()));
    assert_eq!(set(12, 5 * SZ_2M, SZ_2M, 0), Err(Errno::EEXIST));
    assert_eq!(set(10, 4 * SZ_2M, 0, 0), Ok(()));
    // The front half of the other slot, and its back half: frames and pages overlap.
    assert_eq!(set(10, 7 * SZ_2M, 2 * SZ_2M, 0), Err(Errno::EEXIST));
    assert_eq!(set(10, 9 * SZ_2M, 2 * SZ_2M, 0), Err(Errno::EEXIST));
    // Pages alone.
    assert_eq!(set(10, 20 * SZ_2M, 2 * SZ_2M, SZ_2M), Err(Errno::EEXIST));
    assert_eq!(set(10, 20 * SZ_2M, 2 * SZ_2M, 0), Ok(()));
    PASSED
}

fn region_flags(w: &World<'_>) -> Ran {
    let test = Test::new(w, 4, 0)?;
    let with = KVM_MEM_GUEST_MEMFD;
    for flags in [
        KVM_MEM_LOG_DIRTY_PAGES | with,
        KVM_MEM_READONLY | with,
        KVM_MEM_LOG_DIRTY_PAGES,
        0,
        (1 << 3) | with,
        u32::MAX,
    ] {
        let region = region(2, 0x10_0000, PAGE_SIZE, (test.memfd.fd(), 0));
        let region = kvm_userspace_memory_region2 { flags, ..region };
        assert_eq!(errno(test.vm.set_user_memory_region2(region)), Err(Errno::EINVAL), "{flags}");
    }
    PASSED
}

fn immutable(w: &World<'_>) -> Ran {
    let test = Test::new(w, 4, GUEST_MEMFD_FLAG_INIT_SHARED)?;
    test.shared(0, 0, 1, 2);
    // Moved, resized, elsewhere in the guest_memfd, the same again.
    for (at, size, offset) in
        [(0x10_0000, 4, 0), (0, 2, 0), (0, 2, 2), (0, 4, 0)].map(|(a, s, o)| (a, s * PAGE_SIZE, o))
    {
        let changed = errno(test.slot(1, at, size, offset * PAGE_SIZE));
        assert_eq!(changed, Err(Errno::EINVAL));
    }
    assert_eq!(errno(test.slot(2, 0, 0, 0)), Err(Errno::EINVAL), "there is none");
    assert_eq!(errno(test.slot(40_000, 0x10_0000, PAGE_SIZE, 0)), Err(Errno::EINVAL));
    for (at, size) in [(0x10_0001, PAGE_SIZE), (0x10_0000, PAGE_SIZE - 1), (0x10_0000, 1)] {
        assert_eq!(errno(test.slot(2, at, size, 0)), Err(Errno::EINVAL));
    }
    test.guest_rmw(0, 2, 3);
    assert_eq!(errno(test.slot(1, 0, 0, 0)), Ok(()));
    assert_eq!(errno(test.slot(1, 0, 0, 0)), Err(Errno::EINVAL));
    assert_eq!(test.host_read(0), Some(3), "deleting a slot frees nothing");
    assert_eq!(errno(test.slot(1, 0, 4 * PAGE_SIZE, 0)), Ok(()));
    test.guest_rmw(0, 3, 4);
    PASSED
}
