//! `guest_memfd_test`: making one, mapping it, and holes in it.

use polder::Errno;
use polder::kvm::{
    self, FALLOC_FL_PUNCH_HOLE, GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, GuestMemfd,
    kvm_create_guest_memfd,
};
use polder::units::PAGE_SIZE;

use super::{BOTH, PUNCH, Test, errno};
use crate::Section::Selftests;
use crate::world::{PASSED, World};
use crate::{Case, Ran};

pub(super) const CASES: &[Case] = &[
    Case::new(Selftests, "guest_memfd_test: a size that is no number of pages is EINVAL", sizes),
    Case::new(Selftests, "guest_memfd_test: each known flag is taken, and no other", flags),
    Case::new(Selftests, "guest_memfd_test: two are of their own size, and of their own", two),
    Case::new(
        Selftests,
        "guest_memfd_test: holes are of whole pages, and may lie past the end",
        holes,
    ),
    Case::new(
        Selftests,
        "guest_memfd_test: mmap works with its flag only, and up to the end",
        mmap,
    ),
    Case::new(
        Selftests,
        "guest_memfd_test: a private page that is mapped can't be touched",
        private,
    ),
    Case::new(Selftests, "guest_memfd_test: guest and host see each other's bytes", guest),
];

fn sizes(w: &World<'_>) -> Ran {
    let (vm, _guest) = w.kernel()?;
    let odd = (1..PAGE_SIZE).step_by(97);
    for size in odd.chain([0, PAGE_SIZE + 1, u64::MAX, 1 << 63, PAGE_SIZE.wrapping_neg()]) {
        for flags in [0, BOTH] {
            let args = kvm_create_guest_memfd { size, flags, ..Default::default() };
            let made = vm.create_guest_memfd(args).map(|memfd| memfd.fd());
            assert_eq!(errno(made), Err(Errno::EINVAL), "{size:#x}");
        }
    }
    PASSED
}

fn flags(w: &World<'_>) -> Ran {
    let (vm, _guest) = w.kernel()?;
    w.guest_memfd(&vm, PAGE_SIZE, 0)?;
    assert_eq!(vm.check_extension(kvm::Capability::GuestMemfdFlags), BOTH);
    for flags in (0..64).map(|bit| 1 << bit) {
        let args = kvm_create_guest_memfd { size: PAGE_SIZE, flags, ..Default::default() };
        let made = vm.create_guest_memfd(args).map(|_| ());
        assert_eq!(errno(made), if flags & BOTH != 0 { Ok(()) } else { Err(Errno::EINVAL) });
    }
    PASSED
}

fn two(w: &World<'_>) -> Ran {
    let (vm, _guest) = w.kernel()?;
    let one = w.guest_memfd(&vm, PAGE_SIZE, BOTH)?;
    let other = w.guest_memfd(&vm, 2 * PAGE_SIZE, BOTH)?;
    let length = |memfd: &GuestMemfd| memfd.mmap().expect("by its flag").length();
    assert_eq!((length(&one), length(&other)), (PAGE_SIZE, 2 * PAGE_SIZE));
    assert_ne!(one.fd(), other.fd());
    one.mmap().expect("by its flag").touch_write(0, &[7]).expect("shared");
    let mut byte = [1];
    other.mmap().expect("by its flag").touch_read(0, &mut byte).expect("shared");
    assert_eq!(byte, [0]);
    PASSED
}

fn holes(w: &World<'_>) -> Ran {
    let test = Test::new(w, 4, GUEST_MEMFD_FLAG_INIT_SHARED)?;
    (0..4).for_each(|at| test.shared(at, 0, at + 1, at + 10));
    let page = i64::try_from(PAGE_SIZE).expect("4096");
    for (offset, len) in [
        (0, 1),
        (0, page - 1),
        (0, page + 1),
        (1, 1),
        (1, page - 1),
        (1, page),
        (1, page + 1),
        (page, 1),
        (page, page - 1),
        (page, page + 1),
        (0, 0),
        (-page, page),
        (0, -page),
    ] {
        let punched = errno(test.memfd.fallocate(PUNCH, offset, len));
        assert_eq!(punched, Err(Errno::EINVAL), "{offset} {len}");
    }
    for (offset, len) in [(4 * page, page), (5 * page, page), (page, page), (3 * page, 9 * page)] {
        assert_eq!(errno(test.memfd.fallocate(PUNCH, offset, len)), Ok(()), "{offset} {len}");
    }
    let huge = errno(test.memfd.fallocate(PUNCH, page, i64::MAX - 4095));
    assert_eq!(huge, Err(Errno::EFBIG));
    assert_eq!([0, 1, 2, 3].map(|at| test.host_read(at)), [10, 0, 12, 0].map(Some));
    for mode in [0, FALLOC_FL_PUNCH_HOLE, PUNCH | 0x10] {
        let other = errno(test.memfd.fallocate(mode, 0, page));
        assert_eq!(other, Err(Errno::EOPNOTSUPP), "{mode}");
    }
    PASSED
}

fn mmap(w: &World<'_>) -> Ran {
    let (vm, _guest) = w.kernel()?;
    let unmapped = w.guest_memfd(&vm, PAGE_SIZE, GUEST_MEMFD_FLAG_INIT_SHARED)?;
    assert_eq!(errno(unmapped.mmap()).map(|_| ()), Err(Errno::ENODEV));
    let memfd = w.guest_memfd(&vm, 4 * PAGE_SIZE, BOTH)?;
    let view = memfd.mmap().expect("by its flag");
    view.touch_write(0, &[0xaa; 4 * 4096]).expect("all of it is shared");
    assert!(view.touch_write(4 * PAGE_SIZE, &[1]).is_err(), "past the end");
    assert!(view.touch_read(4 * PAGE_SIZE - 1, &mut [0; 2]).is_err(), "across the end");
    let mut all = vec![0; 4 * 4096];
    view.touch_read(0, &mut all).expect("shared");
    assert_eq!(all, vec![0xaa; 4 * 4096]);
    assert_eq!(errno(memfd.fallocate(PUNCH, 0, 4096)), Ok(()));
    view.touch_read(0, &mut all).expect("shared");
    assert_eq!((&all[..4096], &all[4096..]), (&[0; 4096][..], &[0xaa; 3 * 4096][..]));
    PASSED
}

fn private(w: &World<'_>) -> Ran {
    let (vm, _guest) = w.kernel()?;
    let memfd = w.guest_memfd(&vm, 4 * PAGE_SIZE, GUEST_MEMFD_FLAG_MMAP)?;
    let view = memfd.mmap().expect("by its flag");
    for at in (0..4).map(|page| page * PAGE_SIZE) {
        assert!(view.touch_read(at, &mut [0]).is_err());
        assert!(view.touch_write(at, &[1]).is_err());
    }
    PASSED
}

fn guest(w: &World<'_>) -> Ran {
    let test = Test::new(w, 1, GUEST_MEMFD_FLAG_INIT_SHARED)?;
    test.shared(0, 0, 0xaaaa, 0xffff);
    PASSED
}
