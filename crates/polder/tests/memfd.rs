//! The memfd host on this kernel's userfaultfd: what a VMM sees of it.

use std::sync::Arc;

use polder::units::{PageCount, PageRange};
use polder::{Contents, Error, Holder, Memory, OnBusy, PinKind, Refusal, Slot, Visibility};
use polder_require::{Facility, require};

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in the test")
}

fn memory(count: u32) -> Option<Memory> {
    require(Facility::Userfault, Memory::builder(PageCount::from(count)).build())
}

fn to(memory: &Memory, range: PageRange, visibility: Visibility) -> Result<PageCount, Error> {
    memory.convert(range, visibility, Contents::Preserve, OnBusy::Wait)
}

fn first_byte(memory: &Memory, page: u64) -> Result<u8, Error> {
    let mut byte = [0];
    memory.host_view().touch_read(page * 4096, &mut byte)?;
    Ok(byte[0])
}

#[test]
fn a_private_page_is_denied_and_a_shared_one_is_not() {
    let Some(memory) = memory(16) else { return };
    assert!(matches!(first_byte(&memory, 3), Err(Error::Copy(_))));
    assert_eq!(to(&memory, pages(3, 5), Visibility::Shared), Ok(PageCount::from(2)));
    assert_eq!(first_byte(&memory, 3), Ok(0), "the marker of the first touch is lifted");
    memory.host_view().touch_write(4 * 4096, &[7]).unwrap();
    assert!(first_byte(&memory, 2).is_err() && first_byte(&memory, 5).is_err());

    assert_eq!(to(&memory, pages(0, 16), Visibility::Private), Ok(PageCount::from(2)));
    assert!(first_byte(&memory, 3).is_err() && first_byte(&memory, 4).is_err());
    assert_eq!(to(&memory, pages(4, 5), Visibility::Shared), Ok(PageCount::ONE));
    assert_eq!(first_byte(&memory, 4), Ok(7), "contents are preserved");
    assert!(memory.statistics().denied >= 4);
}

#[test]
fn a_system_call_on_a_private_page_fails_and_the_process_lives() {
    let Some(memory) = memory(4) else { return };
    to(&memory, pages(1, 2), Visibility::Shared).unwrap();
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let view = memory.host_view();
    let denied = view.read_from(&zero, 0, 4096).unwrap_err();
    assert!(matches!(denied, Error::Host(error) if error.errno == rustix::io::Errno::FAULT));
    assert_eq!(view.read_from(&zero, 4096, 4096), Ok(4096));
    assert_eq!(view.read_from(&zero, 4096, 2 * 4096), Ok(4096), "it stops at the private page");
    assert!(view.read_from(&zero, 3 * 4096, 4097).is_err(), "beyond the object");
}

#[test]
fn a_pinned_page_stays_shared_and_its_holder_is_named() {
    let Some(memory) = memory(8) else { return };
    to(&memory, pages(0, 8), Visibility::Shared).unwrap();
    let pin = memory.pin(pages(5, 6), PinKind::LongTerm, Holder::new("virtio-net")).unwrap();
    let refused = to(&memory, pages(0, 8), Visibility::Private).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "page 0x5 is pinned (long-term) by virtio-net; try again once it is unpinned"
    );
    assert_eq!(first_byte(&memory, 0), Ok(0), "a refused conversion changed nothing");
    assert_eq!(to(&memory, pages(0, 5), Visibility::Private), Ok(PageCount::from(5)));
    drop(pin);
    assert_eq!(to(&memory, pages(0, 8), Visibility::Private), Ok(PageCount::from(3)));
    let private = memory.pin(pages(5, 6), PinKind::Short, Holder::new("virtio-net"));
    assert!(matches!(private, Err(Error::Refused(Refusal::Private { .. }))));
}

#[test]
fn discard_makes_zeros_frees_memory_and_keeps_visibility() {
    let Some(memory) = memory(8) else { return };
    to(&memory, pages(0, 4), Visibility::Shared).unwrap();
    memory.host_view().touch_write(0, &[1; 4 * 4096]).unwrap();
    assert_eq!(memory.existing().unwrap(), [pages(0, 4)]);
    memory.discard(pages(1, 3), OnBusy::Wait).unwrap();
    assert_eq!(memory.existing().unwrap(), [pages(0, 1), pages(3, 4)]);
    assert_eq!([0, 1, 2, 3].map(|page| first_byte(&memory, page).unwrap()), [1, 0, 0, 1]);
    assert!(first_byte(&memory, 4).is_err());
}

#[test]
fn owed_pages_are_seen_whole_or_not_at_all() {
    let owed = Memory::builder(PageCount::from(8)).owed().build();
    let Some(memory) = require(Facility::Userfault, owed) else { return };
    to(&memory, pages(0, 8), Visibility::Shared).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut bytes = [0; 4096];
            memory.host_view().touch_read(2 * 4096, &mut bytes).unwrap();
            bytes
        });
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!reader.is_finished(), "the page is owed: its reader waits");
        memory.populate(pages(2, 4), &[9; 5000]).unwrap();
        assert_eq!(reader.join().unwrap(), [9; 4096]);
    });
    assert_eq!(
        memory.populate(pages(3, 5), &[]).unwrap_err(),
        Error::Refused(Refusal::Whole { page: 3u32.into() })
    );
    assert!(matches!(
        memory.populate(pages(5, 6), &[0; 4097]),
        Err(Error::TooManyBytes { bytes: 4097, .. })
    ));
    memory.settle().unwrap();
    assert_eq!(first_byte(&memory, 5), Ok(0));
}

#[test]
fn zeroing_conversion_leaves_nothing_of_the_old_bytes() {
    let Some(memory) = memory(4) else { return };
    to(&memory, pages(0, 4), Visibility::Shared).unwrap();
    memory.host_view().touch_write(0, &[5; 4 * 4096]).unwrap();
    let zero = |to| memory.convert(pages(1, 2), to, Contents::Zero, OnBusy::Wait);
    zero(Visibility::Private).unwrap();
    zero(Visibility::Shared).unwrap();
    assert_eq!([0, 1, 2].map(|page| first_byte(&memory, page).unwrap()), [5, 0, 5]);
}

#[test]
fn impossible_sizes_are_refused() {
    assert!(matches!(
        Memory::builder(PageCount::ZERO).build(),
        Err(Error::Refused(Refusal::Range(_)))
    ));
    for shift in [51, 52] {
        let huge = Memory::builder(PageCount::new(1 << shift).unwrap()).build();
        assert!(matches!(huge, Err(Error::Host(_))), "{huge:?}");
    }
}

/// A VM of KVM's with slots of the given gfns and pages, two pages each.
fn bound(memory: &Memory, slots: &[(u32, u64)]) -> Option<polder::VmId> {
    let kvm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    let vm = require(Facility::Kvm, kvm)?;
    let vm = memory.attach(Arc::new(vm)).expect("a VM of KVM's");
    for (slot, &(gfn, page)) in (0..).zip(slots) {
        memory.bind(vm, Slot(slot), gfn.into(), pages(page, page + 1)).expect("a free slot");
    }
    Some(vm)
}

#[test]
fn a_copy_over_two_slots_and_a_conversion_of_both_do_not_wait_for_each_other() {
    let Some(memory) = memory(16) else { return };
    // Neighbours for the guest, apart in the object, the later one first.
    let Some(vm) = bound(&memory, &[(0, 8), (1, 2)]) else { return };
    let both = polder::units::GfnRange::between(0, 2).unwrap();
    let to = |to| memory.convert_gfns(vm, both, to, Contents::Preserve, OnBusy::Wait);
    std::thread::scope(|scope| {
        let copies = scope.spawn(|| {
            let across = polder::units::Gpa::new(4096 - 8);
            let copy = |_: &u32| memory.read(vm, across, &mut [0; 16]).is_ok();
            // However the threads get their turns: how often it has to be tried is by chance.
            (0..10_000_000).filter(copy).take(2_000).count()
        });
        while !copies.is_finished() {
            to(Visibility::Shared).unwrap();
            to(Visibility::Private).unwrap();
        }
        assert_eq!(copies.join().unwrap(), 2_000);
    });
}

#[test]
fn a_slot_bound_and_unbound_by_two_threads_is_there_or_not() {
    let Some(memory) = memory(16) else { return };
    let Some(vm) = bound(&memory, &[]) else { return };
    std::thread::scope(|scope| {
        for page in [0, 8] {
            let memory = &memory;
            scope.spawn(move || {
                for _ in 0..2_000 {
                    match memory.bind(vm, Slot(0), 0u32.into(), pages(page, page + 4)) {
                        Ok(()) | Err(Error::Refused(Refusal::SlotTaken { .. })) => {}
                        Err(other) => panic!("{other}"),
                    }
                    match memory.unbind(vm, Slot(0)) {
                        Ok(()) | Err(Error::Refused(Refusal::NoSuchSlot { .. })) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            });
        }
    });
    memory.bind(vm, Slot(0), 0u32.into(), pages(0, 16)).expect("nobody has the slot");
}
