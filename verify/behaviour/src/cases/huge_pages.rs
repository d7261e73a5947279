//! Memory of huge pages: each case on every page size that the host has.

use polder::units::{PageCount, PageRange};
use polder::{
    Contents, Error, Holder, HostKind, Memory, OnBusy, PageSize, PinKind, Refusal, Visibility,
};
use polder_require::{Facility, require};

use crate::Section::HugePages;
use crate::host::SetAside;
use crate::world::{PASSED, World, byte, page, pages, put, raw_touch, to};
use crate::{Case, Ran, Skipped};

pub(super) const CASES: &[Case] = &[
    Case::new(HugePages, "a size that is no multiple of the huge page is refused", unaligned),
    Case::new(HugePages, RESERVED, reserved),
    Case::new(HugePages, "one page of a huge one is shared, its neighbours are not", one_of_many),
    Case::new(HugePages, "bytes outlive sharing, and the way back", bytes_stay),
    Case::new(HugePages, "odd pages alone are shared, and all of them made private again", odd),
    Case::new(HugePages, "a whole huge page is shared: the host is shown all of it", whole),
    Case::new(HugePages, "a hole smaller than a huge page is zeros, a whole one frees it", holes),
    Case::new(HugePages, "a pin refuses what would take its page away, and names it", pinned),
    Case::new(HugePages, SPLIT, split),
];

pub(crate) const RESERVED: &str = "huge pages are promised when memory is made, or it is refused";
pub(crate) const SPLIT: &str = "a folio is split along the path alone, and merged level by level";

/// Runs a case on memory of each page size that the host has, of two huge pages; of one of 1G,
/// which a kernel seldom has to give.
fn each(w: &World<'_>, mut case: impl FnMut(&Memory, PageSize, u64)) -> Ran {
    let sizes: &[PageSize] = match w.kind() {
        HostKind::Machine => &[PageSize::Huge2M, PageSize::Huge1G],
        _ => &[PageSize::Thp, PageSize::Huge2M, PageSize::Huge1G],
    };
    for &size in sizes {
        let _held = match set_aside(w.kind(), size) {
            Err(lacks) if lacks.facility == Facility::GiganticPages => {
                let _ = require(lacks.facility, Err::<(), _>(lacks.why));
                continue;
            }
            held => held?,
        };
        let huge = if size == PageSize::Huge1G { 512 * 512 } else { 512 };
        let count = PageCount::from(if size == PageSize::Huge1G { huge } else { 2 * huge });
        let memory = w.try_build(Memory::builder(count).page_size(size))?;
        let memory = memory.expect("what it needs was set aside");
        assert_eq!(memory.page_size(), size);
        case(&memory, size, huge.into());
    }
    PASSED
}

/// Sets two huge pages aside, of 1G one.
pub(super) fn set_aside(host: HostKind, size: PageSize) -> Result<SetAside, Skipped> {
    SetAside::of(host, size, if size == PageSize::Huge1G { 1 } else { 2 })
}

fn share(memory: &Memory, range: PageRange) {
    to(memory, range, Visibility::Shared).expect("nobody is in the way");
}

/// Reads by the API's claim: also where the raw view shows a huge page as a whole or not at all.
fn read(memory: &Memory, at: u64) -> Option<u8> {
    if memory.is_shown(page(at).start()) { byte(memory, at) } else { None }
}

fn unaligned(w: &World<'_>) -> Ran {
    for size in [PageSize::Huge2M, PageSize::Huge1G] {
        let built = w.try_build(Memory::builder(PageCount::from(8)).page_size(size))?;
        assert!(matches!(built, Err(Error::Unaligned { .. })), "{built:?}");
    }
    PASSED
}

fn reserved(w: &World<'_>) -> Ran {
    each(w, |memory, size, _| {
        if size.reserved().is_some() {
            let pool = memory.pool().expect("it is of one");
            assert!(pool.free >= pool.reserved && pool.reserved > 0, "{pool:?}");
            assert_eq!(memory.existing(), Ok(vec![]), "promised, and not taken");
        }
    })?;
    if w.kind() == HostKind::Memfd {
        let many = Memory::builder(PageCount::new(1 << 31).expect("a count"));
        let refused = w.try_build(many.page_size(PageSize::Huge2M))?;
        assert!(matches!(refused, Err(Error::HugePages { .. })), "{refused:?}");
    }
    PASSED
}

fn one_of_many(w: &World<'_>) -> Ran {
    each(w, |memory, size, _| {
        share(memory, page(5));
        assert_eq!(byte(memory, 4), None);
        assert_eq!(byte(memory, 6), None);
        let whole = size.reserved().is_some() && w.kind() == HostKind::Memfd;
        assert_eq!(raw_touch(memory, 5).is_ok(), !whole, "a hugetlb page is shown as a whole");
        let pin = memory.pin(page(5), PinKind::Short, Holder::new("a device"));
        assert!(pin.is_ok(), "by the API it is reached");
        drop(pin);
    })
}

fn bytes_stay(w: &World<'_>) -> Ran {
    each(w, |memory, _, huge| {
        share(memory, pages(0, huge));
        [0, 5, huge - 1].into_iter().for_each(|at| put(memory, at, 7));
        to(memory, pages(0, huge), Visibility::Private).expect("no pins");
        assert_eq!(byte(memory, 5), None);
        share(memory, page(5));
        to(memory, page(5), Visibility::Private).expect("no pins");
        share(memory, pages(0, huge));
        assert_eq!([0, 5, huge - 1].map(|at| byte(memory, at)), [Some(7); 3]);
    })
}

fn odd(w: &World<'_>) -> Ran {
    each(w, |memory, _, _| {
        for at in (1..64).step_by(2) {
            share(memory, page(at));
        }
        assert!((0..64).all(|at| read(memory, at).is_none() || at % 2 == 1));
        let changed = to(memory, pages(0, 64), Visibility::Private).expect("no pins");
        assert_eq!(changed, 32);
        assert!((0..64).all(|at| byte(memory, at).is_none()));
    })
}

fn whole(w: &World<'_>) -> Ran {
    each(w, |memory, size, huge| {
        share(memory, pages(0, huge));
        let before = memory.statistics().host_faults;
        assert_eq!([0, 1, huge - 1].map(|at| byte(memory, at)), [Some(0); 3]);
        if size.reserved().is_some() && w.kind() == HostKind::Memfd {
            assert_eq!(memory.statistics().host_faults, before + 1, "by one entry");
        }
        let limits = memory.level_limits(polder::View::Host, page(1).start(), None);
        assert!(limits.is_ok_and(|limits| limits.limiting() != Some(polder::Limit::Visibility)));
    })
}

fn holes(w: &World<'_>) -> Ran {
    each(w, |memory, _, huge| {
        share(memory, pages(0, huge));
        [0, 1, 2].into_iter().for_each(|at| put(memory, at, 7));
        let there = memory.existing();
        memory.discard(page(1), OnBusy::Wait).expect("no pins");
        assert_eq!([0, 1, 2].map(|at| byte(memory, at)), [Some(7), Some(0), Some(7)]);
        assert_eq!(memory.existing(), there, "a part of it frees none");
        memory.discard(pages(0, huge), OnBusy::Wait).expect("no pins");
        assert_eq!(memory.existing(), Ok(vec![]));
        assert_eq!(byte(memory, 0), Some(0));
    })
}

fn pinned(w: &World<'_>) -> Ran {
    each(w, |memory, _, huge| {
        share(memory, pages(0, huge));
        let pin = memory.pin(page(9), PinKind::LongTerm, Holder::new("a device"));
        let pin = pin.expect("it is shared");
        let refused = to(memory, pages(8, 12), Visibility::Private);
        let named = |error: &Error| matches!(error, Error::Refused(Refusal::Pinned { page, .. }) if page.get() == 9);
        assert!(refused.as_ref().is_err_and(named), "{refused:?}");
        assert_eq!(byte(memory, 8), Some(0), "nothing has changed");
        drop(pin);
        to(memory, pages(8, 12), Visibility::Private).expect("no pins");
    })
}

fn split(w: &World<'_>) -> Ran {
    each(w, |memory, size, huge| {
        let levels = |memory: &Memory| {
            let levels = memory.levels();
            [levels.size_4k, levels.size_2m, levels.size_1g]
        };
        let before = levels(memory);
        share(memory, page(5));
        let of_1g = u64::from(size == PageSize::Huge1G);
        assert_eq!(levels(memory), [512, before[1] + of_1g * 512 - 1, before[2] - of_1g]);
        assert_eq!(memory.reshape_counts().splits, 1 + of_1g);
        let zeros =
            memory.convert(pages(0, huge), Visibility::Private, Contents::Zero, OnBusy::Wait);
        assert_eq!(zeros, Ok(PageCount::ONE));
        assert_eq!((levels(memory), memory.reshape_counts().merges), (before, 1 + of_1g));
    })
}
