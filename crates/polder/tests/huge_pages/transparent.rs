//! Of transparent huge pages.

use polder::units::PageCount;
use polder::{Error, Holder, HostKind, Memory, OnBusy, PageSize, PinKind, Refusal, Visibility};
use polder_require::{Facility, Thp, require};

use super::{first_byte, pages, to};

#[test]
fn transparent_huge_pages_stay_huge_in_the_guests_view_while_single_pages_are_shared() {
    let Some(_allowed) = require(Facility::HugePages, Thp::allow()) else { return };
    let memory = Memory::builder(PageCount::from(4 * 512)).page_size(PageSize::Thp).owed();
    let Some(memory) = require(Facility::Userfault, memory.build()) else { return };
    assert_eq!(memory.page_size(), PageSize::Thp);
    memory.populate(pages(0, 2048), &vec![3; 2048 * 4096]).unwrap();
    memory.settle().unwrap();
    assert_eq!(memory.levels().size_2m, 4, "once nothing is owed it is mapped huge");

    for page in [0, 5, 511, 700] {
        to(&memory, pages(page, page + 1), Visibility::Shared).unwrap();
        assert_eq!(first_byte(&memory, page), Ok(3));
        assert!(first_byte(&memory, page ^ 1).is_err());
        to(&memory, pages(page, page + 1), Visibility::Private).unwrap();
        assert!(first_byte(&memory, page).is_err());
    }
    assert_eq!(memory.levels().size_2m, 4, "conversions and faults of the host leave it");
    memory.discard(pages(8, 10), OnBusy::Wait).unwrap();
    assert_eq!(memory.collapse_all(), Ok(PageCount::from(2048)), "zeros, and no hole");
    to(&memory, pages(7, 9), Visibility::Shared).unwrap();
    assert_eq!((first_byte(&memory, 7), first_byte(&memory, 8)), (Ok(3), Ok(0)));
    memory.discard(pages(1024, 1536), OnBusy::Wait).unwrap();
    assert_eq!(memory.existing().unwrap(), [pages(0, 1024), pages(1536, 2048)]);
}

#[test]
fn a_huge_page_is_regained_as_a_move_and_what_is_pinned_does_not_move() {
    let Some(_allowed) = require(Facility::HugePages, Thp::allow()) else { return };
    let memory = Memory::builder(PageCount::from(1100)).page_size(PageSize::Thp).shared();
    let Some(memory) = require(Facility::Userfault, memory.build()) else { return };
    assert_eq!(memory.page_size(), PageSize::Thp);
    for page in [3, 600] {
        memory.host_view().touch_write(page * 4096, &[7]).unwrap();
    }
    assert_eq!(memory.levels().size_2m, 0, "no guest has touched it");
    let holder = Holder::new("vhost-net");
    let pin = memory.pin(pages(600, 601), PinKind::LongTerm, holder.clone()).unwrap();
    let kind = PinKind::LongTerm;
    let pinned: Error = Refusal::Pinned { page: 600u32.into(), kind, holder }.into();
    assert_eq!(memory.collapse(700u32.into(), OnBusy::Refuse), Err(pinned.clone()));
    let waits = OnBusy::WaitForPins { at_most: std::time::Duration::from_millis(5) };
    assert_eq!(memory.collapse(700u32.into(), waits), Err(pinned));
    memory.collapse(5u32.into(), OnBusy::Refuse).unwrap();
    assert_eq!(memory.levels().size_2m, 1);
    assert_eq!(memory.collapse_all(), Ok(PageCount::from(512)), "but what is pinned");
    drop(pin);
    assert_eq!(memory.collapse_all(), Ok(PageCount::from(1024)));
    assert_eq!((first_byte(&memory, 3), first_byte(&memory, 600)), (Ok(7), Ok(7)));
    let beyond = memory.collapse(1050u32.into(), OnBusy::Refuse).unwrap_err();
    assert!(matches!(beyond, Error::Refused(Refusal::Beyond { .. })), "{beyond}");
    let small = Memory::builder(PageCount::from(512)).shared().build().unwrap();
    let refused = small.collapse(0u32.into(), OnBusy::Refuse).unwrap_err();
    assert!(matches!(refused, Error::NotOffered { .. }), "{refused}");
}

#[test]
fn where_transparent_huge_pages_are_not_allowed_memory_is_of_4k_and_says_so() {
    let Some(allowed) = require(Facility::HugePages, Thp::allow()) else { return };
    drop(allowed);
    let thp = Memory::builder(PageCount::from(512)).page_size(PageSize::Thp);
    let Some(memory) = require(Facility::Userfault, thp.build()) else { return };
    let [page_size, asked] = [memory.page_size(), PageSize::Thp];
    // Another test may allow them meanwhile.
    assert!(page_size == PageSize::Small || page_size == asked);
    for (host, size) in
        [(HostKind::Machine, PageSize::Thp), (HostKind::GuestMemfd, PageSize::Huge2M)]
    {
        let refused = Memory::builder(PageCount::from(512)).host(host).page_size(size).build();
        assert!(matches!(refused, Err(Error::NotOffered { .. })), "{refused:?}");
    }
}
