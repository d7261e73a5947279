//! What the kernel's own selftests assert of guest memory (Linux `tools/testing/selftests/kvm/`,
//! and `guest_memfd_conversions_test.c` of Ackerley Tng's series), tried through [`polder::kvm`]: a
//! file for each test. A row begins with the test's name.

mod conversions;
mod guest_memfd;
mod pre_fault;
mod private_mem;
mod set_memory_region;

use polder::kvm::{
    self, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, Failed, GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP, GuestMemfd, KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE, KVM_SET_MEMORY_ATTRIBUTES2_ZERO, kvm_memory_attributes2,
    kvm_userspace_memory_region2,
};
use polder::units::{Gpa, PAGE_SIZE};
use polder::{Contents, Errno, Visibility};
use polder_vmm::End;
use polder_vmm::scenario::Op;

use crate::host::Guest;
use crate::world::{BASE, World, gfn};
use crate::{Case, Skipped};

pub(super) const FILES: [&[Case]; 5] = [
    guest_memfd::CASES,
    set_memory_region::CASES,
    conversions::CASES,
    private_mem::CASES,
    pre_fault::CASES,
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
