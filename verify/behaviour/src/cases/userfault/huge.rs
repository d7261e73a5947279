//! The same in huge pages: one is brought as a whole.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use polder::source::{Fault, FaultySource};
use polder::units::PageIndex;
use polder::{HostKind, Memory, OnBusy, PageSize, ReadAhead, Source};
use polder_require::patience;
use polder_vmm::End;

use super::{LONG, SEED, Written, byte_of, owed_in_time};
use crate::Section::Userfault;
use crate::cases::huge_pages::set_aside;
use crate::world::{
    Bound, PASSED, World, byte, check, count, gfns, holds, meanwhile, page, pages, raw_touch, zero,
};
use crate::{Case, Ran};

pub(super) const CASES: &[Case] = &[
    Case::new(Userfault, "a touch in a huge page brings all of it, whole, by any view", huge),
    Case::new(
        Userfault,
        "a huge page with a page that can't be read is denied, or that page",
        holed,
    ),
    Case::new(
        Userfault,
        "a huge page that is discarded, or a part of it, is not read",
        huge_forgotten,
    ),
    Case::new(
        Userfault,
        "a huge page that is being read can be discarded, and is zeros",
        huge_discarded,
    ),
    Case::new(Userfault, "nobody sees a torn huge page while a source fills it", huge_torn),
];

/// Pages of a huge page of 2M.
const HUGE: u64 = 512;

/// Runs a case on shared memory of two huge pages that `source` fills, of each size that the host
/// has.
fn each_huge<S: Source + 'static>(
    w: &World<'_>,
    source: impl Fn() -> Arc<S>,
    case: impl Fn(Bound, &S, PageSize),
) -> Ran {
    let sizes: &[PageSize] = match w.kind() {
        HostKind::Machine => &[PageSize::Huge2M],
        _ => &[PageSize::Thp, PageSize::Huge2M],
    };
    for &size in sizes {
        let _held = set_aside(w.kind(), size)?;
        let source = source();
        let of = Arc::clone(&source) as Arc<dyn Source>;
        let builder = Memory::builder(count(2 * HUGE)).shared().page_size(size).source(of);
        let builder = builder.read_ahead(ReadAhead::Off).fault_deadline(patience(LONG));
        let memory = w.try_build(builder)?.expect("what it needs was set aside");
        assert_eq!(memory.page_size(), size);
        case(w.bound(memory)?, &source, size);
    }
    PASSED
}

fn huge(w: &World<'_>) -> Ran {
    each_huge(w, Arc::<Written>::default, |bound, source, _| {
        let memory = &bound.memory;
        bound.passes([check(gfns(page(HUGE + 9)), SEED)]);
        assert!(owed_in_time(memory, count(HUGE)));
        assert_eq!(source.reads.load(Ordering::Relaxed), HUGE);
        assert!(holds(memory, pages(HUGE, 2 * HUGE), SEED));
        assert!(holds(memory, page(7), SEED), "by the host view");
        bound.passes([check(gfns(pages(0, HUGE)), SEED)]);
        assert_eq!(source.reads.load(Ordering::Relaxed), 2 * HUGE, "each page once");
        assert!(memory.owed().is_zero());
    })
}

fn holed(w: &World<'_>) -> Ran {
    let bad = 3;
    let source = || {
        let at = PageIndex::from(u32::try_from(bad).expect("few"));
        Arc::new(FaultySource::new(Written::default(), Fault::Fails, at, 0))
    };
    each_huge(w, source, |bound, _, size| {
        let memory = &bound.memory;
        // A hugetlb page is mapped as a whole, or not at all.
        let as_a_whole = size == PageSize::Huge2M && w.kind() == HostKind::Memfd;
        assert_eq!(byte_of(memory, bad), None);
        for at in [bad - 1, bad + 1, HUGE - 1] {
            assert_eq!(raw_touch(memory, at).is_err(), as_a_whole, "page {at} by the host view");
            let ended = bound.run([check(gfns(page(at)), SEED)]).end;
            assert_eq!(ended != End::Ok, as_a_whole, "page {at} by the guest: {ended:?}");
        }
        let failed: Vec<_> = memory.source_failures().iter().map(|it| it.pages).collect();
        assert_eq!(failed, [page(bad)], "no other is said to have failed");
        bound.passes([check(gfns(pages(HUGE, 2 * HUGE)), SEED)]);
        assert!(holds(memory, page(HUGE), SEED));
        memory.discard(page(bad), OnBusy::Wait).expect("no pins");
        bound.passes([zero(gfns(page(bad))), check(gfns(pages(bad + 1, HUGE)), SEED)]);
        assert!(holds(memory, pages(0, bad), SEED) && byte(memory, bad) == Some(0));
    })
}

fn huge_forgotten(w: &World<'_>) -> Ran {
    each_huge(w, Arc::<Written>::default, |bound, source, _| {
        let memory = &bound.memory;
        memory.discard(pages(0, HUGE), OnBusy::Wait).expect("no pins");
        assert_eq!(source.forgotten.load(Ordering::Relaxed), HUGE);
        bound.passes([zero(gfns(pages(0, HUGE)))]);
        assert_eq!((byte(memory, 9), source.reads.load(Ordering::Relaxed)), (Some(0), 0));
        memory.discard(pages(HUGE + 2, HUGE + 6), OnBusy::Wait).expect("no pins");
        bound.passes([zero(gfns(pages(HUGE + 2, HUGE + 6))), check(gfns(page(HUGE)), SEED)]);
        assert!(holds(memory, pages(HUGE + 6, 2 * HUGE), SEED));
        assert_eq!(source.reads.load(Ordering::Relaxed), HUGE - 4);
    })
}

fn huge_discarded(w: &World<'_>) -> Ran {
    each_huge(w, Arc::<Written>::default, |bound, source, _| {
        let memory = &bound.memory;
        source.held.store(true, Ordering::Release);
        let discard = || {
            while source.reads.load(Ordering::Relaxed) == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            memory.discard(pages(0, HUGE), OnBusy::Refuse).expect("a read holds nothing");
            source.held.store(false, Ordering::Release);
        };
        let (seen, ()) = meanwhile(|| byte(memory, 1), discard);
        assert_eq!(seen, Some(0));
        bound.passes([zero(gfns(pages(0, HUGE))), check(gfns(pages(HUGE, 2 * HUGE)), SEED)]);
    })
}

fn huge_torn(w: &World<'_>) -> Ran {
    each_huge(w, Arc::<Written>::default, |bound, _, _| {
        let memory = &bound.memory;
        std::thread::scope(|scope| {
            for first in [0, HUGE - 1] {
                scope.spawn(move || {
                    for at in [first, first + 1, HUGE + 7, 5] {
                        assert!(holds(memory, page(at), SEED), "page {at}");
                    }
                });
            }
            let (low, high) = (gfns(pages(0, 8)), gfns(pages(2 * HUGE - 8, 2 * HUGE)));
            bound.pass(vec![vec![check(low, SEED)], vec![check(high, SEED)]]);
        });
    })
}
