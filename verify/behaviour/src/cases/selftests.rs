//! What the kernel's own selftests assert of guest memory (Linux `tools/testing/selftests/kvm/`, and
//! `guest_memfd_conversions_test.c` of Ackerley Tng's series), tried through [`polder::kvm`]. A row
//! begins with the test's name.

mod pre_fault;

use std::collections::BTreeSet;

use polder::kvm::{
    self, Exit, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, Failed, GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP, GuestMemfd, KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_MEMORY_EXIT_FLAG_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE, KVM_SET_MEMORY_ATTRIBUTES2_ZERO, kvm_create_guest_memfd,
    kvm_memory_attributes2, kvm_userspace_memory_region2,
};
use polder::units::{Gpa, PAGE_SIZE};
use polder::{Contents, Errno, Holder, MemoryFault, PinKind, Visibility};
use polder_vmm::End;
use polder_vmm::scenario::Op;

use crate::Section::Selftests;
use crate::host::Guest;
use crate::world::{BASE, PASSED, World, gfn, page};
use crate::{Case, Ran, Skipped};

pub(super) const PRE_FAULT: &[Case] = pre_fault::CASES;

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
    Case::new(
        Selftests,
        "private_mem_conversions_test: 4K and 2M, at 0, 4K and 2M, and all else stays",
        patterns,
    ),
    Case::new(Selftests, "private_mem_kvm_exits_test: the slot is gone", gone),
    Case::new(Selftests, "private_mem_kvm_exits_test: what backs the slot is gone", closed),
    Case::new(Selftests, "private_mem_kvm_exits_test: the access is of the other kind", other_kind),
];

const BOTH: u64 = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
const PUNCH: u32 = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE;
const SZ_2M: u64 = 2 << 20;

/// Where a row's memory is in its guest.
fn gpa(offset: u64) -> Gpa {
    Gpa::new(gfn(BASE).gpa().get() + offset)
}

fn errno<T>(result: Result<T, Failed>) -> Result<T, Errno> {
    result.map_err(|failed| failed.errno)
}

/// A VM, and in it a guest_memfd of some pages in slot 1.
struct Test {
    vm: kvm::Vm,
    guest: Box<dyn Guest>,
    memfd: GuestMemfd,
}

impl Test {
    fn new(w: &World<'_>, pages: u64, flags: u64) -> Result<Self, Skipped> {
        let (vm, guest) = w.kernel()?;
        let flags = flags | GUEST_MEMFD_FLAG_MMAP;
        let memfd = w.guest_memfd(&vm, pages * PAGE_SIZE, flags)?;
        let test = Self { vm, guest, memfd };
        assert_eq!(errno(test.slot(1, 0, pages * PAGE_SIZE, 0)), Ok(()));
        Ok(test)
    }

    fn slot(&self, slot: u32, at: u64, memory_size: u64, offset: u64) -> Result<(), Failed> {
        self.vm.set_user_memory_region2(region(slot, at, memory_size, (self.memfd.fd(), offset)))
    }

    /// Makes pages private or shared, their contents kept where the host can, else zeros.
    fn set(&self, offset: u64, size: u64, attributes: u64) -> Result<(), Failed> {
        let private = attributes == KVM_MEMORY_ATTRIBUTE_PRIVATE;
        let to = if private { Visibility::Private } else { Visibility::Shared };
        let flags = match self.memfd.memory().keeps_most(to) {
            Contents::Preserve => KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
            Contents::Zero => KVM_SET_MEMORY_ATTRIBUTES2_ZERO,
            Contents::Unspecified => 0,
        };
        let mut args =
            kvm_memory_attributes2 { offset, size, attributes, flags, ..Default::default() };
        let set = self.memfd.set_memory_attributes2(&mut args);
        let told = set.as_ref().err().and_then(|failed| failed.error_offset);
        assert_eq!(args.error_offset, told.unwrap_or(0));
        set
    }

    fn keeps(&self) -> bool {
        crate::world::keeps(self.memfd.memory())
    }

    fn run(&self, ops: impl IntoIterator<Item = Op>) -> polder_vmm::Ended {
        let program = ops.into_iter().chain([Op::Done]).collect();
        self.guest.run((self.memfd.memory(), self.memfd.vm()), &[program])
    }

    /// The guest finds a word in a page, and leaves another.
    fn guest_rmw(&self, at: u64, expect: u64, write: u64) {
        let gpa = gpa(at * PAGE_SIZE);
        let ended = self.run([Op::Load { gpa, expect }, Op::Store { gpa, value: write }]);
        assert_eq!((ended.end, ended.faults.as_slice()), (End::Ok, [].as_slice()), "page {at}");
    }

    /// The word that the host finds in a page; `None` where it may not look.
    fn host_read(&self, at: u64) -> Option<u64> {
        let mut word = [0; 8];
        let view = self.memfd.mmap().expect("made to be mapped");
        view.touch_read(at * PAGE_SIZE, &mut word).ok()?;
        Some(u64::from_le_bytes(word))
    }

    fn host_write(&self, at: u64, word: u64) -> bool {
        let view = self.memfd.mmap().expect("made to be mapped");
        view.touch_write(at * PAGE_SIZE, &word.to_le_bytes()).is_ok()
    }

    fn shared(&self, at: u64, starting: u64, host: u64, guest: u64) {
        assert_eq!(self.host_read(at), Some(starting), "page {at}");
        assert!(self.host_write(at, host));
        self.guest_rmw(at, host, guest);
        assert_eq!(self.host_read(at), Some(guest), "page {at}");
    }

    fn private(&self, at: u64, starting: u64, guest: u64) {
        assert_eq!(self.host_read(at), None, "page {at}");
        assert!(!self.host_write(at, 0xbad));
        self.guest_rmw(at, starting, guest);
        assert_eq!(self.host_read(at), None, "page {at}");
    }

    fn to_private(&self, at: u64, starting: u64, guest: u64) {
        let set = self.set(at * PAGE_SIZE, PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE);
        assert_eq!(errno(set), Ok(()));
        self.private(at, if self.keeps() { starting } else { 0 }, guest);
    }

    fn to_shared(&self, at: u64, starting: u64, host: u64, guest: u64) {
        assert_eq!(errno(self.set(at * PAGE_SIZE, PAGE_SIZE, 0)), Ok(()));
        self.shared(at, if self.keeps() { starting } else { 0 }, host, guest);
    }
}

fn region(
    slot: u32,
    at: u64,
    memory_size: u64,
    (guest_memfd, guest_memfd_offset): (u32, u64),
) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        slot,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: gpa(at).get(),
        memory_size,
        guest_memfd_offset,
        guest_memfd,
        ..Default::default()
    }
}

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
