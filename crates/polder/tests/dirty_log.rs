//! The dirty log where the behaviour table does not reach: slices of `vm-memory`, io_uring, a
//! source, several VMs, and what huge pages become meanwhile.

#![expect(clippy::unwrap_used, reason = "a failing test may panic anywhere")]

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use polder::guest_memory::GuestMemory;
use polder::source::ZeroSource;
use polder::units::{Gfn, Gpa, Level, PAGE_SIZE, PageCount, PageRange};
use polder::vm_memory::bitmap::Bitmap;
use polder::vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, VolatileMemory,
};
use polder::{
    Contents, Error, Holder, HostKind, Memory, OnBusy, PageSize, Slot, Visibility, Vm, VmId,
};
use polder_require::{Facility, Thp, require};

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in the test")
}

fn taken(memory: &Memory) -> Vec<u64> {
    memory.take_dirty_log().unwrap().runs().flat_map(|run| run.start().get()..run.end()).collect()
}

/// Shared memory of 64 pages, logged, of which a VM sees pages 8 to 64 from frame 0x100 on.
fn logged() -> Option<(Arc<Memory>, VmId)> {
    let memory = Memory::builder(PageCount::from(64)).shared().build();
    let memory = Arc::new(require(Facility::Userfault, memory)?);
    let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    let vm = memory.attach(Arc::new(require(Facility::Kvm, vm)?)).unwrap();
    memory.bind(vm, Slot(1), Gfn::from(0x100), pages(8, 64)).unwrap();
    memory.start_dirty_log().unwrap();
    Some((memory, vm))
}

/// Where the VM sees a page.
fn at(page: u64) -> GuestAddress {
    GuestAddress((0x100 + page - 8) * PAGE_SIZE)
}

fn guest(memory: &Arc<Memory>, vm: VmId) -> GuestMemory {
    memory.guest_memory(vm, Holder::new("a device"), OnBusy::Wait).unwrap()
}

#[test]
fn what_slices_write_is_logged_and_what_they_read_is_not() {
    let Some((memory, vm)) = logged() else { return };
    let guest = guest(&memory, vm);
    guest.write_slice(&[1; 5000], GuestAddress(at(12).0 + 4000)).unwrap();
    assert_eq!(taken(&memory), [12, 13, 14]);
    guest.read_slice(&mut [0; 5000], at(12)).unwrap();
    guest.load::<u64>(at(20), Ordering::Relaxed).unwrap();
    assert!(taken(&memory).is_empty());
    guest.store(7u32, at(20), Ordering::Relaxed).unwrap();
    guest.write_obj(7u64, GuestAddress(at(22).0 - 4)).unwrap();
    assert_eq!(taken(&memory), [20, 21, 22]);
    let mut zeros = File::open("/dev/zero").unwrap();
    guest.read_exact_volatile_from(at(30), &mut zeros, 4097).unwrap();
    assert_eq!(taken(&memory), [30, 31]);
    guest.write_all_volatile_to(at(30), &mut File::create("/dev/null").unwrap(), 4096).unwrap();
    assert!(taken(&memory).is_empty());
}

#[test]
fn a_part_of_a_slice_is_logged_where_it_lies() {
    let Some((memory, vm)) = logged() else { return };
    let guest = guest(&memory, vm);
    let slice = guest.get_slice(GuestAddress(at(10).0 + 100), 8 * 4096).unwrap();
    let part = slice.subslice(4096 * 2, 4096).unwrap().offset(8).unwrap();
    part.write_obj(1u8, 0).unwrap();
    assert!(part.bitmap().dirty_at(0) && !slice.bitmap().dirty_at(0));
    assert_eq!(taken(&memory), [12]);
    assert!(!part.bitmap().dirty_at(0), "it was taken");
    part.get_array_ref::<u64>(0, 4).unwrap().copy_from(&[1, 2, 3, 4]);
    assert_eq!(taken(&memory), [12]);
    // Who writes by the pointer says so.
    slice.bitmap().mark_dirty(4096 * 4 - 101, 2);
    assert_eq!(taken(&memory), [13, 14]);
    let region = guest.regions().find_region(at(8)).unwrap();
    region.bitmap().mark_dirty(0, 1);
    region.store(1u8, MemoryRegionAddress(4096), Ordering::Relaxed).unwrap();
    assert_eq!(taken(&memory), [8, 9]);
}

#[test]
fn what_a_ring_reads_into_memory_is_logged_once_it_is_there() {
    let Some((memory, _)) = logged() else { return };
    let (zeros, null) = (File::open("/dev/zero").unwrap(), File::create("/dev/null").unwrap());
    let ring = memory.ring(Holder::new("virtio-blk"), 4, OnBusy::Wait);
    let Some(mut ring) = require(Facility::IoUring, ring) else { return };
    for fixed in [false, true] {
        if fixed {
            ring.register(&[pages(0, 16)]).unwrap();
        }
        ring.read(zeros.as_fd(), 0, 4 * PAGE_SIZE + 5, 4096, 1).unwrap();
        ring.write(null.as_fd(), 0, 9 * PAGE_SIZE, 4096, 2).unwrap();
        ring.submit(2).unwrap();
        assert!(taken(&memory).is_empty(), "nobody has been told that it is over");
        while ring.complete().is_some() {}
        assert_eq!(taken(&memory), [4, 5]);
    }
    // What is in flight when the ring goes is over then.
    ring.read(zeros.as_fd(), 0, 7 * PAGE_SIZE, 4096, 3).unwrap();
    ring.submit(0).unwrap();
    drop(ring);
    assert_eq!(taken(&memory), [7]);
}

#[test]
fn what_a_source_brings_is_logged() {
    let memory = Memory::builder(PageCount::from(16)).host(HostKind::Machine).shared();
    let memory = memory.source(Arc::new(ZeroSource)).build().unwrap();
    memory.start_dirty_log().unwrap();
    memory.fetch(pages(3, 4)).unwrap();
    let brought = taken(&memory);
    assert!(brought.contains(&3), "with what was read ahead: {brought:?}");
    memory.fetch(pages(3, 4)).unwrap();
    memory.fetch(pages(0, 16)).unwrap();
    let rest = taken(&memory);
    assert!(brought.iter().all(|page| !rest.contains(page)) && brought.len() + rest.len() == 16);
}

/// A VM of the machine that sees all of memory from frame 0x1000 on.
fn on_machine(memory: &Memory) -> VmId {
    let vm = memory.attach(Vm::Machine).unwrap();
    memory.bind(vm, Slot(0), Gfn::from(0x1000), memory.all_pages()).unwrap();
    vm
}

#[test]
fn pages_that_two_vms_see_are_logged_whichever_writes() {
    let memory = Memory::builder(PageCount::from(16)).host(HostKind::Machine).build().unwrap();
    let [one, other] = [(); 2].map(|()| on_machine(&memory));
    memory.start_dirty_log().unwrap();
    let write = |vm, page: u64| {
        let vcpu = memory.machine_vcpu(vm).unwrap();
        vcpu.write(Gpa::new((0x1000 + page) * PAGE_SIZE), Visibility::Private, &[1]).unwrap();
    };
    write(one, 3);
    write(other, 5);
    write(other, 3);
    assert_eq!(taken(&memory), [3, 5]);
    write(other, 3);
    assert_eq!(taken(&memory), [3]);
}

#[test]
fn huge_pages_are_mapped_by_4k_while_it_is_on_and_explain_says_so() {
    let memory = Memory::builder(PageCount::from(1024)).page_size(PageSize::Huge2M);
    let memory = memory.host(HostKind::Machine).build().unwrap();
    let vm = on_machine(&memory);
    let vcpu = memory.machine_vcpu(vm).unwrap();
    let mapped = || {
        vcpu.write(Gpa::new(0x1003 * PAGE_SIZE), Visibility::Private, &[1]).unwrap();
        let seen = memory.explain(3u32.into()).unwrap().bindings.remove(0);
        (seen.mapped_at.unwrap(), seen.limit.level, seen.limit.clause)
    };
    let [large, small] = [Level::Size2M, Level::Size4K].map(|level| level.to_string());
    assert_eq!(mapped().0, large);
    memory.start_dirty_log().unwrap();
    assert_eq!(mapped(), (small.clone(), small, Some("dirty log".to_owned())));
    memory.stop_dirty_log().unwrap();
    let (at, limit, clause) = mapped();
    assert_eq!((at, limit), (large.clone(), large));
    assert_ne!(clause.as_deref(), Some("dirty log"));
}

#[test]
fn transparent_huge_pages_stay_in_one_piece_under_it() {
    let Some(_allowed) = require(Facility::HugePages, Thp::allow()) else { return };
    let memory = Memory::builder(PageCount::from(2 * 512)).page_size(PageSize::Thp).owed();
    let Some(memory) = require(Facility::Userfault, memory.build()) else { return };
    let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    let Some(vm) = require(Facility::Kvm, vm) else { return };
    let vm = memory.attach(Arc::new(vm)).unwrap();
    memory.bind(vm, Slot(0), Gfn::from(0x1000), memory.all_pages()).unwrap();
    memory.populate(pages(0, 1024), &vec![3; 1024 * 4096]).unwrap();
    memory.settle().unwrap();
    assert_eq!(memory.levels().size_2m, 2);
    memory.start_dirty_log().unwrap();
    memory.convert(pages(3, 4), Visibility::Shared, Contents::Preserve, OnBusy::Wait).unwrap();
    memory.host_view().touch_write(3 * PAGE_SIZE, &[1]).unwrap();
    assert_eq!(taken(&memory), [3]);
    memory.stop_dirty_log().unwrap();
    assert_eq!(memory.levels().size_2m, 2, "it is KVM alone who maps by 4K");
}

#[test]
fn a_copy_that_follows_writers_by_the_log_misses_none_of_their_words() {
    const PAGES: u64 = 8;
    let Some((memory, vm)) = logged() else { return };
    let (guest, done) = (guest(&memory, vm), AtomicBool::new(false));
    let mut copy = vec![0u8; 8 << 12];
    memory.mark_dirty(pages(8, 8 + PAGES)).unwrap();
    follow(&memory, vm, &mut copy);
    std::thread::scope(|scope| {
        // Each has words of its own, in pages that all write to.
        for writer in 0..2u64 {
            let (guest, done) = (guest.clone(), &done);
            scope.spawn(move || {
                for count in 1..20_000u64 {
                    let place = at(8 + count % PAGES).0 + (writer * 64 + count / PAGES % 64) * 8;
                    guest.write_obj(count, GuestAddress(place)).unwrap();
                }
                if writer == 0 {
                    done.store(true, Ordering::Relaxed);
                }
            });
        }
        while !done.load(Ordering::Relaxed) {
            follow(&memory, vm, &mut copy);
        }
    });
    follow(&memory, vm, &mut copy);
    let mut now = vec![0; copy.len()];
    memory.read(vm, Gpa::new(at(8).0), &mut now).unwrap();
    assert!(copy == now, "a write was lost");
}

fn follow(memory: &Memory, vm: VmId, copy: &mut [u8]) {
    for page in taken(memory) {
        let place = usize::try_from((page - 8) << 12).unwrap();
        memory.read(vm, Gpa::new(at(page).0), &mut copy[place..][..4096]).unwrap();
    }
}

#[test]
fn a_vm_with_a_dirty_ring_is_refused_with_nothing_changed() {
    let memory = Memory::builder(PageCount::from(4)).shared().build();
    let Some(memory) = require(Facility::Userfault, memory) else { return };
    let Some(kvm) = require(Facility::Kvm, kvm_ioctls::Kvm::new()) else { return };
    let vm = kvm.create_vm().unwrap();
    // Where it can't be had the log is what it is elsewhere.
    let cap = kvm_bindings::KVM_CAP_DIRTY_LOG_RING;
    let ring = kvm_bindings::kvm_enable_cap { cap, args: [4096, 0, 0, 0], ..Default::default() };
    let has_ring = vm.enable_cap(&ring).is_ok();
    let vm = memory.attach(Arc::new(vm)).unwrap();
    let bind = || memory.bind(vm, Slot(0), Gfn::from(0), memory.all_pages());
    bind().unwrap();
    match memory.start_dirty_log() {
        Err(refused) => {
            assert!(has_ring && matches!(refused, Error::NotOffered { .. }), "{refused}");
            assert_eq!(memory.take_dirty_log(), Err(Error::DirtyLog { on: false }));
            memory.unbind(vm, Slot(0)).unwrap();
            memory.start_dirty_log().unwrap();
            // The other way round.
            assert_eq!(bind(), Err(refused));
            assert!(memory.bindings().is_empty());
            memory.mark_dirty(pages(2, 3)).unwrap();
            assert!(taken(&memory).contains(&2));
        }
        Ok(()) => assert!(!has_ring),
    }
}

#[test]
fn of_a_vm_whose_log_is_cleared_by_hand_each_write_is_told_once() {
    let (enable, all_set) = (
        kvm_bindings::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
        kvm_bindings::KVM_DIRTY_LOG_INITIALLY_SET,
    );
    for how in [enable, enable | all_set] {
        let memory = Memory::builder(PageCount::from(4)).shared().build();
        let Some(memory) = require(Facility::Userfault, memory) else { return };
        let Some(kvm) = require(Facility::Kvm, kvm_ioctls::Kvm::new()) else { return };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let cap = kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
        let args = [how.into(), 0, 0, 0];
        vm.enable_cap(&kvm_bindings::kvm_enable_cap { cap, args, ..Default::default() }).unwrap();
        let id = memory.attach(Arc::clone(&vm)).unwrap();
        memory.bind(id, Slot(0), Gfn::from(0), memory.all_pages()).unwrap();
        // In real mode: mov [0x2000], al; hlt.
        memory.write(id, Gpa::new(PAGE_SIZE), &[0xa2, 0x00, 0x20, 0xf4]).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let mut segments = vcpu.get_sregs().unwrap();
        (segments.cs.base, segments.cs.selector) = (0, 0);
        vcpu.set_sregs(&segments).unwrap();

        let mut run = || {
            let start = kvm_bindings::kvm_regs { rip: PAGE_SIZE, rflags: 2, ..Default::default() };
            vcpu.set_regs(&start).unwrap();
            assert!(matches!(vcpu.run().unwrap(), kvm_ioctls::VcpuExit::Hlt));
        };
        // The page of the code is mapped for writing as it is first read, and would be logged.
        run();
        memory.start_dirty_log().unwrap();
        for round in 0..3 {
            run();
            assert_eq!(taken(&memory), [2], "round {round}");
            assert!(taken(&memory).is_empty(), "round {round}: it was cleared");
        }
    }
}
