//! The traits of `vm-memory`: what a slice is refused for, what it holds, and who is told.

#![expect(clippy::unwrap_used, reason = "a failing test may panic anywhere")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use polder::guest_memory::{GuestMemory, refusal};
use polder::units::{Gfn, PAGE_SIZE, PageCount, PageRange};
use polder::vm_memory::{
    Bytes, GuestAddress, GuestMemory as _, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    MemoryRegionAddress, Permissions, VolatileMemory,
};
use polder::{
    Contents, Error, Holder, HostKind, Memory, OnBusy, PinKind, Refusal, Slot, Visibility, Vm, VmId,
};
use polder_require::{Facility, require};

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in the test")
}

fn at(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE_SIZE)
}

/// Shared memory of 64 pages that a VM sees at frames 0x100 on, but for pages 32 to 40, which it
/// sees at frame 0.
struct Rig {
    memory: Arc<Memory>,
    vm: VmId,
}

impl Rig {
    fn new() -> Option<Self> {
        let memory = Memory::builder(PageCount::from(64)).shared().build();
        let memory = Arc::new(require(Facility::Userfault, memory)?);
        let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
        let vm = memory.attach(Arc::new(require(Facility::Kvm, vm)?)).unwrap();
        memory.bind(vm, Slot(0), Gfn::from(0), pages(32, 40)).unwrap();
        memory.bind(vm, Slot(1), Gfn::from(0x100), pages(0, 32)).unwrap();
        memory.bind(vm, Slot(2), Gfn::from(0x120), pages(40, 64)).unwrap();
        Some(Self { memory, vm })
    }

    fn guest(&self, holder: &'static str) -> GuestMemory {
        self.memory.guest_memory(self.vm, Holder::new(holder), OnBusy::Wait).unwrap()
    }

    fn to(&self, range: PageRange, visibility: Visibility) -> Result<PageCount, Error> {
        self.memory.convert(range, visibility, Contents::Preserve, OnBusy::Wait)
    }

    /// Whether pages can be made private; they are shared again.
    fn converts(&self, range: PageRange) -> bool {
        match self.to(range, Visibility::Private) {
            Ok(_) => self.to(range, Visibility::Shared).is_ok(),
            Err(Error::Refused(Refusal::Pinned { .. })) => false,
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn bytes_are_the_ones_the_api_has_and_cross_from_slot_to_slot() {
    let Some(rig) = Rig::new() else { return };
    let guest = rig.guest("a device");
    let bytes: Vec<u8> = (0..3 * 4096_u32).map(|byte| byte.to_le_bytes()[0] ^ 0x55).collect();
    guest.write_slice(&bytes, GuestAddress(0x11f * PAGE_SIZE - 100)).unwrap();
    let mut read = vec![0; bytes.len()];
    let gpa = polder::units::Gpa::new(0x11f * PAGE_SIZE - 100);
    rig.memory.read(rig.vm, gpa, &mut read).unwrap();
    assert_eq!(read, bytes);
    let slices = guest.get_slices(GuestAddress(0x11f * PAGE_SIZE), 8192, Permissions::Read);
    let lengths: Vec<usize> = slices.unwrap().map(|slice| slice.unwrap().len()).collect();
    assert_eq!(lengths, [4096, 4096], "a slice ends with its slot");
    guest.write_obj(0x1234_5678_u32, GuestAddress(8)).unwrap();
    assert_eq!(guest.load::<u32>(GuestAddress(8), Ordering::Relaxed).unwrap(), 0x1234_5678);
}

#[test]
fn a_region_copies_in_every_way_that_the_traits_have() {
    let Some(rig) = Rig::new() else { return };
    let guest = rig.guest("a loader");
    let region = guest.regions().find_region(GuestAddress(0)).unwrap();
    rig.to(pages(38, 40), Visibility::Private).unwrap();
    let here = MemoryRegionAddress(4096);
    region.read_exact_volatile_from(here, &mut [7_u8; 64].as_slice(), 64).unwrap();
    let mut into = [0; 64];
    region.read_slice(&mut into, here).unwrap();
    assert_eq!(into, [7; 64]);
    region.store(9_u16, here, Ordering::Release).unwrap();
    assert_eq!(region.load::<u16>(here, Ordering::Acquire).unwrap(), 9);
    let mut out = Vec::new();
    region.write_all_volatile_to(here, &mut out, 2).unwrap();
    assert_eq!(out, [9, 0]);
    let whole = region.as_volatile_slice().unwrap_err();
    assert!(matches!(refusal(&whole), Some(Error::Refused(Refusal::Private { .. }))));
    assert_eq!(region.read(&mut [0; 64], MemoryRegionAddress(6 * 4096 - 8)).ok(), None, "private");
    rig.to(pages(38, 40), Visibility::Shared).unwrap();
    let end = MemoryRegionAddress(8 * 4096 - 8);
    assert_eq!(region.write(&[1; 64], end).unwrap(), 8, "as much as there is");
    assert!(region.write_slice(&[1; 64], end).is_err());
    assert_eq!(region.read_volatile_from(end, &mut [2_u8; 64].as_slice(), 64).unwrap(), 8);
    assert_eq!(region.write_volatile_to(end, &mut Vec::new(), 64).unwrap(), 8);
}

#[test]
fn a_private_page_is_refused_by_name_and_a_page_outside_differently() {
    let Some(rig) = Rig::new() else { return };
    let guest = rig.guest("a device");
    rig.to(pages(34, 35), Visibility::Private).unwrap();
    let error = guest.get_slice(at(1), 2 * 4096).unwrap_err();
    assert!(
        matches!(refusal(&error), Some(Error::Refused(Refusal::Private { page })) if page.get() == 34)
    );
    assert!(matches!(&error, GuestMemoryError::IOError(error)
        if error.kind() == std::io::ErrorKind::PermissionDenied));
    assert!(error.to_string().contains("page 0x22 is private to the guest"), "{error}");
    assert!(guest.read_obj::<u64>(at(2)).is_err());
    assert!(!guest.check_range(at(0), 4 * 4096, Permissions::Read));
    assert!(guest.check_range(at(0), 2 * 4096, Permissions::Read));
    assert!(guest.get_slice(at(1), 4096).is_ok() && guest.get_slice(at(3), 4096).is_ok());
    for (outside, count) in [(at(8), 1), (at(7), 4097), (GuestAddress(u64::MAX), 2)] {
        let error = guest.get_slice(outside, count).unwrap_err();
        assert!(refusal(&error).is_none(), "{error}");
    }
    assert_eq!(guest.get_slice(at(2), 0).unwrap().len(), 0, "of nothing, nothing is refused");
}

#[test]
fn a_check_says_why_a_ring_can_t_be_reached() {
    let Some(rig) = Rig::new() else { return };
    let guest = rig.guest("a device");
    rig.to(pages(5, 6), Visibility::Private).unwrap();
    assert_eq!(guest.check(at(0x100), 5 * 4096), Ok(()));
    assert_eq!(guest.check(at(0x11f), 2 * 4096), Ok(()), "from slot to slot");
    assert_eq!(guest.check(at(0x1000), 0), Ok(()), "no byte is anywhere");
    let private = Refusal::Private { page: 5u32.into() };
    assert_eq!(guest.check(at(0x104), 2 * 4096), Err(private.into()));
    let unbound = |start, end| {
        let gfns = polder::units::GfnRange::between(start, end).unwrap();
        Err(Error::Refused(Refusal::Unbound { gfns }))
    };
    assert_eq!(guest.check(at(7), 2 * 4096), unbound(8, 9));
    assert_eq!(guest.check(at(0x50), 6), unbound(0x50, 0x51));
    let nowhere = guest.check(GuestAddress(u64::MAX - 3), 6);
    assert!(matches!(nowhere, Err(Error::Refused(Refusal::Range(_)))), "{nowhere:?}");
    assert!(rig.converts(pages(0, 5)), "nothing is pinned");
}

#[test]
fn a_page_that_somebody_looks_at_all_the_time_is_converted_by_who_waits() {
    let Some(rig) = Rig::new() else { return };
    let guest = rig.guest("a poller");
    let stop = AtomicBool::new(false);
    // However long the poller is kept from its CPU amid a look.
    let patience = OnBusy::WaitForPins { at_most: Duration::from_secs(60) };
    let refused = std::thread::scope(|scope| {
        let (guest, stop) = (&guest, &stop);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let _ = guest.load::<u16>(at(0x103), Ordering::Relaxed);
            }
        });
        let to = |to| rig.memory.convert(pages(3, 4), to, Contents::Preserve, patience);
        let both = || to(Visibility::Private).and_then(|_| to(Visibility::Shared));
        let refused = (0..200).find_map(|round| Some((round, both().err()?)));
        stop.store(true, Ordering::Relaxed);
        refused
    });
    assert_eq!(refused, None);
}

#[test]
fn a_slice_is_in_the_way_of_a_conversion_and_of_a_discard_until_the_last_of_it_is_gone() {
    let Some(rig) = Rig::new() else { return };
    let guest = rig.guest("virtio-blk");
    let slice = guest.get_slice(at(0x101), 2 * 4096).unwrap();
    let refused = rig.to(pages(0, 8), Visibility::Private).unwrap_err();
    let holder = Holder::new("virtio-blk");
    let pinned = Refusal::Pinned { page: 1_u32.into(), kind: PinKind::Short, holder };
    assert_eq!(refused, pinned.clone().into());
    assert_eq!(rig.memory.discard(pages(2, 3), OnBusy::Wait).unwrap_err().errno(), pinned.errno());
    assert!(rig.converts(pages(3, 8)), "others convert");
    slice.copy_from(&[5_u8; 64]);

    let part = slice.subslice(4096, 16).unwrap();
    let (left, right) = part.split_at(8).unwrap();
    drop((slice, part, left));
    assert!(!rig.converts(pages(2, 3)), "a part is left");
    right.copy_from(&[3_u8; 8]);
    let reference = right.get_ref::<u32>(4).unwrap();
    assert_eq!(reference.load(), 0x0303_0303);
    drop(reference);
    assert!(!rig.converts(pages(1, 2)), "a part pins what the whole did");
    drop(right);
    assert!(rig.converts(pages(0, 8)));
}

#[test]
fn a_thread_holds_as_many_slices_as_it_likes_and_threads_are_told_apart() {
    let Some(rig) = Rig::new() else { return };
    let guest = rig.guest("virtio-net");
    let slices: Vec<_> = (0..32).map(|page| guest.get_slice(at(0x100 + page), 64)).collect();
    assert!((0..32).all(|page| !rig.converts(pages(page, page + 1))));
    std::thread::scope(|scope| {
        // More than there are places in a block.
        let hold = Arc::new(std::sync::Barrier::new(101));
        for thread in 0..100 {
            let (guest, hold) = (&guest, Arc::clone(&hold));
            scope.spawn(move || {
                let slice = guest.get_slice(at(0x120 + thread % 20), 64).unwrap();
                hold.wait();
                hold.wait();
                drop(slice);
            });
        }
        hold.wait();
        assert!((40..60).all(|page| !rig.converts(pages(page, page + 1))));
        assert!(rig.converts(pages(60, 64)));
        hold.wait();
    });
    assert!(rig.converts(pages(40, 64)));
    drop(slices);
    assert!(rig.converts(pages(0, 64)));
}

#[test]
fn a_thread_that_panics_lets_its_slices_go() {
    let Some(rig) = Rig::new() else { return };
    let guest = rig.guest("virtio-net");
    let died = std::thread::scope(|scope| {
        let holder = scope.spawn(|| {
            let _slice = guest.get_slice(at(0x100), 64).unwrap();
            panic!("a device model's bug");
        });
        holder.join()
    });
    assert!(died.is_err());
    assert!(rig.converts(pages(0, 1)));
}

#[test]
fn the_simulated_machine_has_nothing_to_point_to_and_says_so() {
    let memory = Memory::builder(PageCount::from(8)).host(HostKind::Machine).shared().build();
    let memory = Arc::new(memory.unwrap());
    let vm = memory.attach(Vm::Machine).unwrap();
    let refused = memory.guest_memory(vm, Holder::new("a device"), OnBusy::Wait).unwrap_err();
    assert!(refused.way_out().is_some_and(|way| way.contains("Memory::read")), "{refused}");
}

#[test]
fn a_vm_without_slots_has_no_guest_memory() {
    let Some(rig) = Rig::new() else { return };
    let refused =
        rig.memory.guest_memory(VmId(7), Holder::new("a device"), OnBusy::Wait).unwrap_err();
    assert_eq!(refused, Refusal::NoSlots { vm: VmId(7) }.into());
}

/// What the `virtio-queue` crate's device side holds of a chain is pinned as long as it holds it.
#[test]
fn a_chain_of_a_virtqueue_is_in_the_way_of_a_conversion() {
    use virtio_queue::{Queue, QueueT};
    let Some(rig) = Rig::new() else { return };
    let guest = rig.guest("virtio-blk");
    let mut queue = Queue::new(16).unwrap();
    queue.set_size(16);
    queue.try_set_desc_table_address(at(0)).unwrap();
    queue.try_set_avail_ring_address(at(1)).unwrap();
    queue.try_set_used_ring_address(at(2)).unwrap();
    queue.set_ready(true);
    // Two descriptors: 64 bytes at page 0x104 to be read, 64 at page 0x108 to be written.
    for (index, gpa, flags) in [(0, at(0x104), 1_u64), (1, at(0x108), 2)] {
        let place = GuestAddress(16 * index);
        let rest = 64 | flags << 32 | (1 - index) << 48;
        guest.write_slice(&[gpa.0.to_le_bytes(), rest.to_le_bytes()].concat(), place).unwrap();
    }
    guest.write_slice(&[5; 64], at(0x104)).unwrap();
    guest.write_obj(1_u16, GuestAddress(4096 + 2)).unwrap();
    let chain = queue.pop_descriptor_chain(&guest).unwrap();
    let head = chain.head_index();
    let mut reader = chain.clone().reader(&guest).unwrap();
    let mut writer = chain.writer(&guest).unwrap();
    assert!(!rig.converts(pages(4, 5)), "the reader is there");
    let refused = rig.to(pages(8, 9), Visibility::Private).unwrap_err();
    assert!(refused.to_string().contains("page 0x8 is pinned (short) by virtio-blk"), "{refused}");
    let bytes: [u64; 8] = reader.read_obj().unwrap();
    writer.write_obj(bytes).unwrap();
    drop((reader, writer));
    queue.add_used(&guest, head, 64).unwrap();
    assert_eq!(guest.read_obj::<u16>(GuestAddress(2 * 4096 + 2)).unwrap(), 1, "the used index");
    assert_eq!(guest.read_obj::<[u8; 32]>(at(0x108)).unwrap(), [5; 32]);
    assert!(rig.converts(pages(4, 9)), "the chain is done");

    rig.to(pages(4, 5), Visibility::Private).unwrap();
    guest.write_obj(2_u16, GuestAddress(4096 + 2)).unwrap();
    let chain = queue.pop_descriptor_chain(&guest).unwrap();
    assert!(chain.reader(&guest).is_err(), "a page of it is private");
}

/// A kernel that the `linux-loader` crate loads.
#[test]
fn an_elf_image_is_loaded_into_shared_memory_and_refused_into_private() {
    use linux_loader::loader::{Elf, KernelLoader};
    let Some(rig) = Rig::new() else { return };
    let guest = rig.guest("linux-loader");
    let image = elf(0x10_2000, &[0x90; 100]);
    let load = || Elf::load(guest.regions(), None, &mut std::io::Cursor::new(&image), None);
    let loaded = load().unwrap();
    assert_eq!(loaded.kernel_load, GuestAddress(0x10_2000));
    assert_eq!(guest.read_obj::<[u8; 32]>(GuestAddress(0x10_2000)).unwrap(), [0x90; 32]);
    assert!(rig.converts(pages(0, 64)), "nothing is held");
    rig.to(pages(2, 3), Visibility::Private).unwrap();
    assert!(load().is_err());
}

/// A 64-bit ELF image with one segment of `bytes`, to be loaded and entered at `at`.
fn elf(at: u64, bytes: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 64 + 56];
    let mut put =
        |place: usize, bytes: &[u8]| image[place..place + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    // Executable, x86-64, version, entry, program headers at 64: one of 56 bytes.
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &at.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 1, 0]);
    // PT_LOAD, readable and executable: offset, virtual and physical address, sizes.
    put(64, &[1, 0, 0, 0, 5, 0, 0, 0]);
    for (place, value) in
        [(72, 120), (80, at), (88, at), (96, bytes.len() as u64), (104, bytes.len() as u64)]
    {
        put(place, &value.to_le_bytes());
    }
    image.extend_from_slice(bytes);
    image
}

/// INV-1 and INV-7 under load: what is in a slice is shared as long as the slice is there, and its
/// bytes are those of its page.
#[test]
fn slices_are_of_shared_pages_while_others_convert_them() {
    let Some(rig) = Rig::new() else { return };
    let word = |page: u64| (page + 1).wrapping_mul(0x0123_4567_89ab_cdef);
    let guest = rig.guest("a device");
    for page in 0..32 {
        guest.write_obj(word(page), at(0x100 + page)).unwrap();
    }
    let (stop, held, refused) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let converted = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for offset in [0, 5, 11] {
            let (rig, guest, stop, held, refused) = (&rig, &guest, &stop, &held, &refused);
            scope.spawn(move || {
                let mut page = offset;
                while !stop.load(Ordering::Relaxed) {
                    page = (page * 5 + 3) % 32;
                    match guest.get_slice(at(0x100 + page), 8) {
                        Ok(slice) => {
                            let facts = rig.memory.facts(pages(page, page + 1)).unwrap();
                            assert_eq!(facts[0].1.visibility, Visibility::Shared, "it is pinned");
                            assert_eq!(slice.get_ref::<u64>(0).unwrap().load(), word(page));
                            held.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) => {
                            let private = Some(Error::Refused(Refusal::Private {
                                page: u32::try_from(page).unwrap().into(),
                            }));
                            assert_eq!(refusal(&error), private.as_ref());
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        for offset in [0_u64, 7] {
            let (rig, stop, converted) = (&rig, &stop, &converted);
            scope.spawn(move || {
                let mut page = offset;
                while !stop.load(Ordering::Relaxed) {
                    page = (page * 13 + 5) % 30;
                    for to in [Visibility::Private, Visibility::Shared] {
                        match rig.to(pages(page, page + 2), to) {
                            Ok(_) => converted.fetch_add(1, Ordering::Relaxed),
                            Err(Error::Refused(Refusal::Pinned { .. })) => 0,
                            Err(other) => panic!("{other}"),
                        };
                    }
                }
            });
        }
        std::thread::sleep(Duration::from_millis(1500));
        stop.store(true, Ordering::Relaxed);
    });
    let counts = [held, refused, converted].map(AtomicU64::into_inner);
    assert!(counts.iter().all(|count| *count > 100), "{counts:?}");
}
