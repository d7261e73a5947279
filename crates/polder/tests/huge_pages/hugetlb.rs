//! Of hugetlb pages: what becomes of one that is shared in part.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use polder::units::{Gfn, Gpa, Level, PageCount};
use polder::vm_memory::{Bytes, GuestAddress};
use polder::{
    Error, Holder, Limit, Memory, OnBusy, PageSize, PinKind, Refusal, Slot, View, Visibility,
};
use polder_require::{Facility, HugetlbPages, require};

use super::{first_byte, pages, to};

/// Memory of `count` 2M pages on a memfd, of hugetlb pages set aside for it.
pub(crate) fn hugetlb(count: u32) -> Option<(Memory, HugetlbPages)> {
    let set_aside = require(Facility::HugePages, HugetlbPages::of_2m(count.into()))?;
    let memory = Memory::builder(PageCount::from(count * 512)).page_size(PageSize::Huge2M);
    let memory = require(Facility::Userfault, memory.build())?;
    Some((memory, set_aside))
}

#[test]
fn a_slice_of_a_single_shared_page_of_a_hugetlb_page_can_be_touched_and_pins_it() {
    let Some((memory, _set_aside)) = hugetlb(1) else { return };
    let memory = Arc::new(memory);
    let kvm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    let Some(kvm) = require(Facility::Kvm, kvm) else { return };
    let vm = memory.attach(Arc::new(kvm)).unwrap();
    memory.bind(vm, Slot(0), Gfn::from(0), pages(0, 512)).unwrap();
    to(&memory, pages(3, 4), Visibility::Shared).unwrap();
    let guest = memory.guest_memory(vm, Holder::new("virtio-net"), OnBusy::Wait).unwrap();
    memory.write(vm, Gpa::new(0x3000), b"hello").unwrap();
    let slice = guest.get_slice(GuestAddress(0x3000), 5).unwrap();
    assert!(!memory.is_shown(3u32.into()), "the raw view does not have it");
    let mut bytes = [0; 5];
    slice.read_slice(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"hello");
    slice.write_slice(b"there", 0).unwrap();
    memory.read(vm, Gpa::new(0x3000), &mut bytes).unwrap();
    assert_eq!(&bytes, b"there");
    let pinned = to(&memory, pages(3, 4), Visibility::Private).unwrap_err();
    assert!(matches!(pinned, Error::Refused(Refusal::Pinned { .. })), "{pinned}");
    drop(slice);
    // The kernel's transfers go the same way.
    let zeros = std::fs::File::open("/dev/zero").unwrap();
    let ring = memory.ring(Holder::new("virtio-blk"), 4, OnBusy::Wait);
    if let Some(mut ring) = require(Facility::IoUring, ring) {
        ring.read(zeros.as_fd(), 0, 0x3000, 5, 1).unwrap();
        ring.submit(1).unwrap();
        assert_eq!(ring.complete().unwrap().result, Ok(5));
        memory.read(vm, Gpa::new(0x3000), &mut bytes).unwrap();
        assert_eq!(bytes, [0; 5]);
    }
    to(&memory, pages(3, 4), Visibility::Private).unwrap();
    let private = guest.get_slice(GuestAddress(0x3000), 5).unwrap_err();
    assert!(polder::guest_memory::refusal(&private).is_some(), "{private}");
}

#[test]
fn single_pages_of_a_hugetlb_page_are_shared_by_the_api_and_the_raw_view_shows_it_as_a_whole() {
    let Some((memory, _set_aside)) = hugetlb(2) else { return };
    let vm = None;
    to(&memory, pages(3, 5), Visibility::Shared).unwrap();
    let pin = memory.pin(pages(3, 4), PinKind::Short, Holder::new("virtio-net")).unwrap();
    assert!(first_byte(&memory, 3).is_err() && !memory.is_shown(3u32.into()));
    let limits = memory.level_limits(View::Host, 3u32.into(), vm).unwrap();
    assert_eq!(limits.limiting(), Some(Limit::Visibility));
    to(&memory, pages(5, 6), Visibility::Shared).unwrap();
    to(&memory, pages(5, 6), Visibility::Private).unwrap();
    drop(pin);

    // All of the first huge page: the raw view shows it by one entry.
    to(&memory, pages(0, 512), Visibility::Shared).unwrap();
    memory.host_view().touch_write(4096 * 7, &[7]).unwrap();
    assert!(memory.is_shown(3u32.into()) && first_byte(&memory, 511).is_ok());
    assert!(first_byte(&memory, 512).is_err());
    to(&memory, pages(511, 512), Visibility::Private).unwrap();
    assert!(first_byte(&memory, 7).is_err(), "its neighbour is private");
    to(&memory, pages(511, 512), Visibility::Shared).unwrap();
    assert_eq!(first_byte(&memory, 7), Ok(7), "contents are preserved");
    let levels = memory.levels();
    assert_eq!((levels.size_4k, levels.size_2m, levels.size_1g), (0, 2, 0));
}

#[test]
fn a_discard_of_less_than_a_hugetlb_page_makes_zeros_and_one_of_all_frees_it_and_keeps_it_promised()
{
    let Some((memory, set_aside)) = hugetlb(2) else { return };
    to(&memory, pages(0, 1024), Visibility::Shared).unwrap();
    memory.host_view().touch_write(0, &vec![1; 1024 * 4096]).unwrap();
    assert_eq!(memory.existing().unwrap(), [pages(0, 1024)]);
    memory.discard(pages(1, 3), OnBusy::Wait).unwrap();
    assert_eq!(memory.existing().unwrap(), [pages(0, 1024)]);
    assert_eq!([0, 1, 2, 3].map(|page| first_byte(&memory, page).unwrap()), [1, 0, 0, 1]);
    let reserved = set_aside.reserved();
    memory.discard(pages(511, 1024), OnBusy::Wait).unwrap();
    assert_eq!(memory.existing().unwrap(), [pages(0, 512)]);
    assert!(set_aside.reserved() > reserved, "its promise stands");
    assert_eq!([510, 511, 512, 1023].map(|page| first_byte(&memory, page).unwrap()), [1, 0, 0, 0]);
}

#[test]
fn owed_hugetlb_pages_are_seen_once_all_of_one_is_whole() {
    let Some(set_aside) = require(Facility::HugePages, HugetlbPages::of_2m(2)) else { return };
    let owed = Memory::builder(PageCount::from(1024)).page_size(PageSize::Huge2M).owed().shared();
    let Some(memory) = require(Facility::Userfault, owed.build()) else { return };
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| first_byte(&memory, 5));
        memory.populate(pages(0, 6), &[9; 6 * 4096]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!toucher.is_finished(), "the rest of the huge page is owed");
        memory.populate(pages(6, 512), &[]).unwrap();
        assert_eq!(toucher.join().unwrap(), Ok(9));
    });
    memory.fail(pages(700, 701)).unwrap();
    assert!(first_byte(&memory, 512).is_err(), "its huge page can't be shown");
    memory.settle().unwrap();
    memory.discard(pages(700, 701), OnBusy::Wait).unwrap();
    assert_eq!(first_byte(&memory, 512), Ok(0));
    drop(set_aside);
}

#[test]
fn memory_of_1g_pages_is_shown_by_one_entry_if_all_of_it_is_shared() {
    let Some(_set_aside) = require(Facility::GiganticPages, HugetlbPages::of_1g(1)) else { return };
    let plain = Memory::builder(PageCount::from(512 * 512)).page_size(PageSize::Huge1G).shared();
    let Some(memory) = require(Facility::Userfault, plain.build()) else { return };
    memory.host_view().touch_write(4096 * 99_999, &[5]).unwrap();
    assert_eq!(memory.statistics().host_faults, 1);
    assert_eq!(first_byte(&memory, 99_999), Ok(5));
    assert_eq!(memory.statistics().host_faults, 1, "one answer for all of it");
    assert_eq!(memory.levels().size_1g, 1);
    let limits = memory.level_limits(View::Host, 7u32.into(), None).unwrap();
    assert_eq!((limits.level(), limits.limiting()), (Level::Size1G, None));
}
