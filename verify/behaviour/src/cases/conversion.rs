//! Conversions, asked for by the VMM.

use polder::units::{PAGE_SIZE, PageRange};
use polder::{Error, Holder, Memory, OnBusy, PinKind, Refusal, Slot, Visibility, Wish};
use polder_vmm::scenario::{HostAccess, Op, Outcome};

use crate::Section::Conversion;
use crate::world::{
    BASE, PASSED, World, all, all_are, byte, bytes, check, facts, fill, gfn, gfns, page, pages,
    probe, put, put_all, share_all, to, touch, zero,
};
use crate::{Case, Ran, Trouble};

pub(crate) const REFERENCED: &str = "a page that somebody unknown refers to is refused, named";

const SHARED: Visibility = Visibility::Shared;
const PRIVATE: Visibility = Visibility::Private;

pub(crate) const DISAGREE: &str =
    "what one VM wishes overrides no other's wish, and both are reported";

pub(crate) const STEP_FAILS: &str = "a step that fails changes nothing, and denies nobody";

pub(crate) const QUARANTINE: &str =
    "what can't be undone is put out of use, its neighbours are not";

pub(crate) const GUP: &str =
    "GUP-fast that began before a conversion does not end in a pin after it";
pub(crate) const AUDIT: &str =
    "what the kernel counts adds up after conversions, pins and discards";

pub(super) const CASES: &[Case] = &[
    Case::new(Conversion, GUP, gup),
    Case::new(Conversion, AUDIT, audit),
    Case::new(
        Conversion,
        "ten rounds of everything to and fro take up the guest's size and no more",
        bounded,
    ),
    Case::new(Conversion, "pages past the end, and no pages, are refused", beyond),
    Case::new(Conversion, "before allocation: it is recorded, and nothing is allocated", before),
    Case::new(Conversion, "pages that exist and pages that don't, mixed", mixed),
    Case::new(Conversion, "what is so already is left as it is, mappings and all", already_so),
    Case::new(
        Conversion,
        "pages that differ become one, and only those that changed count",
        differ,
    ),
    Case::new(Conversion, "private pages are in no mapping of the host view", unmapped),
    Case::new(Conversion, "a pinned page refuses the whole range, naming page and holder", pinned),
    Case::new(Conversion, "the other pages convert singly, and all after the unpin", unpinned),
    Case::new(Conversion, "a private page can't be pinned", private_pin),
    Case::new(Conversion, REFERENCED, referenced),
    Case::new(Conversion, "a request across two slots is all or nothing", two_slots),
    Case::new(Conversion, "a request across a gap between slots is refused", gap),
    Case::new(Conversion, "a wish alone changes nothing; a conversion grants it", wish),
    Case::new(Conversion, DISAGREE, disagree),
    Case::new(Conversion, STEP_FAILS, failed),
    Case::new(Conversion, QUARANTINE, quarantine),
];

fn beyond(w: &World<'_>) -> Ran {
    let memory = w.memory(8)?;
    let end = memory.pages().get();
    for range in [pages(0, end + 1), pages(end, end + 1), pages(end - 1, 1 << 52)] {
        for visibility in [SHARED, PRIVATE] {
            let beyond = Refusal::Beyond { range, pages: memory.pages() };
            assert_eq!(to(&memory, range, visibility), Err(beyond.into()));
        }
    }
    assert_eq!(PageRange::between(4, 4), None);
    assert!(PageRange::from_bytes(PAGE_SIZE, 0).is_err());
    assert_eq!(bytes(&memory, pages(0, 8)), [None; 8]);
    PASSED
}

fn before(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(1024)?)?;
    let memory = &bound.memory;
    assert_eq!(to(memory, pages(3, 1000), SHARED), Ok(997));
    assert_eq!(to(memory, pages(10, 20), PRIVATE), Ok(10));
    assert_eq!(memory.existing(), Ok(vec![]));
    assert_eq!([2, 3, 9, 10, 19, 20, 999].map(|page| byte(memory, page).is_some()), {
        [false, true, true, false, false, true, true]
    });
    bound.passes([zero(gfns(pages(0, 30)))]);
    PASSED
}

fn mixed(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let memory = &bound.memory;
    let touched: Vec<_> = [1, 2, 5, 9, 10, 11].map(page).to_vec();
    bound.passes(touched.iter().map(|&page| fill(gfns(page), 1)));
    let expected = |at: u64| crate::world::keeps(memory) && touched.contains(&page(at));
    assert_eq!(to(memory, pages(0, 16), SHARED), Ok(16));
    for at in 0..16 {
        let is = touch(memory, at).expect("a shared page");
        assert_eq!(is == vec![0; is.len()], !expected(at), "page {at}");
    }
    assert_eq!(to(memory, pages(0, 16), PRIVATE), Ok(16));
    let look = |at| if expected(at) { check(gfns(page(at)), 1) } else { zero(gfns(page(at))) };
    bound.passes((0..16).map(look));
    PASSED
}

fn already_so(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let memory = w.memory(shown.count(8))?;
    assert_eq!(to(&memory, shown.pages(0, 8), PRIVATE), Ok(0));
    assert_eq!(to(&memory, shown.pages(0, 4), SHARED), Ok(shown.count(4)));
    put_all(&memory, shown.pages(0, 4), 4);
    let mapped = w.mapped(&memory, all(&memory));
    assert_eq!(mapped.len() as u64, shown.count(4));
    assert_eq!(to(&memory, shown.pages(1, 3), SHARED), Ok(0));
    // A part that is so already stays mapped also when the rest is converted.
    assert_eq!(to(&memory, shown.pages(2, 6), SHARED), Ok(shown.count(2)));
    assert_eq!(w.mapped(&memory, all(&memory)), mapped);
    let statistics = memory.statistics();
    assert_eq!((statistics.converted_pages, statistics.refused), (shown.count(6), 0));
    PASSED
}

fn differ(w: &World<'_>) -> Ran {
    let memory = w.memory(64)?;
    for at in (0..64).step_by(2) {
        assert_eq!(to(&memory, page(at), SHARED), Ok(1));
        put(&memory, at, 9);
    }
    assert_eq!(facts(&memory, pages(0, 64)).len(), 64);
    assert_eq!(to(&memory, pages(1, 63), SHARED), Ok(31));
    assert_eq!(facts(&memory, pages(0, 64)).len(), 2);
    let expected = (0..64).map(|at| (at < 63).then_some(if at % 2 == 0 { 9 } else { 0 }));
    assert_eq!(bytes(&memory, pages(0, 64)), expected.collect::<Vec<_>>());
    PASSED
}

fn unmapped(w: &World<'_>) -> Ran {
    // Where huge pages are split, what is next to a split is mapped anew when it is touched.
    let whole = w.folios();
    let memory = w.memory(whole.count(4).max(64))?;
    let quarter = memory.pages().get() / 4;
    let [first, middle, last] =
        [(0, 1), (1, 3), (3, 4)].map(|(from, to)| pages(from * quarter, to * quarter));
    share_all(&memory);
    put_all(&memory, all(&memory), 1);
    assert_eq!(w.mapped(&memory, all(&memory)).len() as u64, 4 * quarter);
    to(&memory, middle, PRIVATE).expect("no pins");
    let expected: Vec<_> = first.frames().chain(last.frames()).collect();
    assert_eq!(w.mapped(&memory, all(&memory)), expected);
    assert!(all_are(&memory, middle, None));
    assert_eq!(w.mapped(&memory, middle), [], "nor after they were touched");
    PASSED
}

fn pinned(w: &World<'_>) -> Ran {
    let memory = w.memory(16)?;
    to(&memory, pages(0, 12), SHARED).expect("no pins");
    put_all(&memory, pages(0, 12), 6);
    let mapped = w.mapped(&memory, all(&memory));
    for kind in [PinKind::Short, PinKind::LongTerm] {
        let holder = Holder::new("virtio-blk");
        let late = memory.pin(page(9), kind, Holder::new("late")).expect("a shared page");
        let pin = memory.pin(pages(5, 7), kind, holder.clone()).expect("shared pages");
        assert_eq!(pin.range(), pages(5, 7));
        let named = Error::Refused(Refusal::Pinned { page: 5u32.into(), kind, holder });
        assert_eq!(named.errno() as i32, 11, "EAGAIN");
        for range in [pages(0, 16), page(5), pages(4, 6)] {
            assert_eq!(to(&memory, range, PRIVATE), Err(named.clone()), "{range}");
        }
        drop((pin, late));
    }
    assert_eq!(w.mapped(&memory, all(&memory)), mapped, "nothing was unmapped");
    assert_eq!(bytes(&memory, pages(0, 12)), [Some(6); 12]);
    assert_eq!(bytes(&memory, pages(12, 16)), [None; 4]);
    PASSED
}

fn unpinned(w: &World<'_>) -> Ran {
    // A pin of a part of a huge page is in the way of all of it.
    let whole = w.folios();
    let bound = w.bound(w.memory(whole.count(8))?)?;
    let memory = &bound.memory;
    share_all(memory);
    bound.passes([fill(gfns(all(memory)), 1)]);
    let holder = || Holder::new("vhost-net");
    let pin = memory.pin(whole.pages(3, 5), PinKind::LongTerm, holder()).expect("shared pages");
    let again = memory.pin(whole.page(4), PinKind::Short, holder()).expect("pins add up");
    // By guest frames as by pages: the caller is to try again.
    let everything = gfns(all(memory));
    let kept = memory.keeps_most(PRIVATE);
    let refused = memory.convert_gfns(bound.vm, everything, PRIVATE, kept, OnBusy::Wait);
    assert_eq!(refused.map_err(|error| error.errno() as i32), Err(11), "EAGAIN");
    for at in 0..8 {
        assert_eq!(to(memory, whole.page(at), PRIVATE).is_ok(), !(3..5).contains(&at), "page {at}");
    }
    bound.passes([
        probe(gfns(whole.pages(3, 5)), HostAccess::Readable),
        check(gfns(whole.pages(3, 5)), 1),
    ]);
    drop(pin);
    assert_eq!(to(memory, whole.page(3), PRIVATE), Ok(whole.count(1)));
    assert!(to(memory, whole.page(4), PRIVATE).is_err(), "one pin is left");
    drop(again);
    assert_eq!(to(memory, all(memory), PRIVATE), Ok(whole.count(1)));
    bound.refill(all(memory), 1);
    bound.passes([probe(gfns(all(memory)), HostAccess::Denied), check(gfns(all(memory)), 1)]);
    PASSED
}

fn private_pin(w: &World<'_>) -> Ran {
    let memory = w.memory(8)?;
    to(&memory, pages(0, 4), SHARED).expect("no pins");
    let pin = |range| memory.pin(range, PinKind::Short, Holder::new("virtio-blk")).map(drop);
    assert_eq!(pin(pages(2, 6)), Err(Refusal::Private { page: 4u32.into() }.into()));
    assert!(matches!(
        pin(pages(0, memory.pages().get() + 1)),
        Err(Error::Refused(Refusal::Beyond { .. }))
    ));
    // A refused pin holds nothing.
    assert_eq!(to(&memory, pages(0, 8), PRIVATE), Ok(4));
    PASSED
}

fn referenced(w: &World<'_>) -> Ran {
    let memory = w.memory(8)?;
    share_all(&memory);
    put_all(&memory, pages(0, 8), 2);
    let reference = w.inside().refer(&memory, 5u32.into());
    match to(&memory, pages(0, 8), PRIVATE) {
        Err(Error::Refused(Refusal::Referenced { page, .. })) => assert_eq!(page.get(), 5),
        other => panic!("{other:?}"),
    }
    assert_eq!(bytes(&memory, pages(0, 8)), [Some(2); 8]);
    drop(reference);
    assert_eq!(to(&memory, pages(0, 8), PRIVATE), Ok(8));
    PASSED
}

fn two_slots(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    // Neighbours in the guest that are none in the object.
    memory.unbind(vm, Slot(0)).expect("it is bound");
    memory.bind(vm, Slot(0), gfn(BASE), pages(8, 12)).expect("free");
    memory.bind(vm, Slot(1), gfn(BASE + 4), pages(0, 4)).expect("free");
    let both = gfns(pages(0, 8));
    bound.passes([fill(both, 1)]);
    bound.passes(bound.converted(gfns(pages(2, 6)), SHARED, 1));
    let shared = |memory: &Memory| {
        let shared = (0..16).filter(|page| touch(memory, *page).is_ok());
        shared.collect::<Vec<u64>>()
    };
    assert_eq!(shared(memory), [0, 1, 10, 11]);
    let pin = memory.pin(page(1), PinKind::Short, Holder::new("virtio-blk")).expect("shared");
    let request = |visibility| {
        let contents = memory.keeps_most(visibility);
        memory.convert_gfns(vm, gfns(pages(2, 6)), visibility, contents, OnBusy::Wait)
    };
    let named = matches!(request(PRIVATE), Err(Error::Refused(Refusal::Pinned { page, .. }))
        if page.get() == 1);
    assert!(named, "the page in the second slot is in the way");
    assert_eq!(shared(memory), [0, 1, 10, 11]);
    drop(pin);
    assert_eq!(request(PRIVATE).map(polder::units::PageCount::get), Ok(4));
    assert_eq!(shared(memory), [0; 0]);
    bound.refill(pages(2, 6), 1);
    bound.passes([check(both, 1)]);
    PASSED
}

fn gap(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    memory.unbind(vm, Slot(0)).expect("it is bound");
    memory.bind(vm, Slot(0), gfn(BASE), pages(0, 4)).expect("free");
    memory.bind(vm, Slot(1), gfn(BASE + 5), pages(5, 9)).expect("free");
    let (gpa, expect) = (gfn(BASE).gpa(), Outcome::Invalid);
    let across = [SHARED, PRIVATE].map(|to| Op::Convert { gpa, pages: 9, to, expect });
    bound.passes(across);
    assert_eq!(bytes(memory, pages(0, 16)), [None; 16]);
    assert_eq!(memory.statistics().converted_pages, 0);
    PASSED
}

fn wish(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    let before = facts(memory, all(memory));
    let wished = gfns(pages(2, 4));
    memory.want(vm, wished, SHARED).expect("it is bound");
    let wish = Wish { pages: pages(2, 4), granted: PRIVATE, wanted: SHARED };
    assert_eq!(memory.wanted(vm, wished), Ok(vec![wish]));
    assert_eq!((facts(memory, all(memory)), bytes(memory, pages(2, 4))), (before, vec![None; 2]));
    bound.passes([Op::Convert {
        gpa: wished.start().gpa(),
        pages: 2,
        to: SHARED,
        expect: Outcome::Done,
    }]);
    assert_eq!(memory.unmet(), []);
    memory.want(vm, gfns(page(3)), PRIVATE).expect("it is bound");
    let unmet = Wish { pages: page(3), granted: SHARED, wanted: PRIVATE };
    assert_eq!(memory.unmet(), [(vm, Slot(0), unmet)]);
    assert!(byte(memory, 3).is_some());
    PASSED
}

fn disagree(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let (memory, guest) = (&bound.memory, w.guest()?);
    let other = guest.attach(memory);
    memory.bind(other, Slot(2), gfn(BASE), all(memory)).expect("another VM's slot");
    let ask = |vm, range, to| {
        let contents = memory.keeps_most(to);
        memory.convert_gfns(vm, gfns(range), to, contents, OnBusy::Wait).expect("no pins");
    };
    ask(bound.vm, pages(0, 4), SHARED);
    let unmet = Wish { pages: pages(0, 4), granted: SHARED, wanted: PRIVATE };
    assert_eq!(memory.unmet(), [(other, Slot(2), unmet)]);
    ask(other, pages(0, 2), SHARED);
    let unmet = Wish { pages: pages(2, 4), ..unmet };
    assert_eq!(memory.unmet(), [(other, Slot(2), unmet)], "of the rest it wishes what it wished");
    ask(other, pages(2, 4), PRIVATE);
    let unmet = Wish { pages: pages(2, 4), granted: PRIVATE, wanted: SHARED };
    assert_eq!(memory.unmet(), [(bound.vm, Slot(0), unmet)]);
    to(memory, all(memory), PRIVATE).expect("no pins");
    assert_eq!(memory.unmet(), [], "the VMM has decided for both");
    PASSED
}

fn failed(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    share_all(memory);
    bound.passes([fill(gfns(all(memory)), 1)]);
    let before = facts(memory, all(memory));
    let failed = w.in_trouble(Trouble::Unmap, || to(memory, pages(2, 6), PRIVATE))?;
    assert!(matches!(failed, Err(Error::Host(_))), "{failed:?}");
    assert_eq!(facts(memory, all(memory)), before);
    assert_eq!(memory.quarantined(), []);
    assert!(crate::world::holds(memory, all(memory), 1));
    assert_eq!(to(memory, pages(2, 6), PRIVATE), Ok(4), "it can be tried again");
    bound.refill(pages(2, 6), 1);
    bound.passes([probe(gfns(pages(2, 6)), HostAccess::Denied), check(gfns(all(memory)), 1)]);
    PASSED
}

fn quarantine(w: &World<'_>) -> Ran {
    // A part of a huge page is made zeros by writing them, which does not fail.
    let whole = w.folios();
    let memory = w.memory(whole.count(8))?;
    share_all(&memory);
    put_all(&memory, all(&memory), 7);
    let [first, middle, last] = [(0, 2), (2, 4), (4, 8)].map(|(from, to)| whole.pages(from, to));
    let failed = w.in_trouble(Trouble::Free, || {
        memory.convert(middle, PRIVATE, polder::Contents::Zero, OnBusy::Wait)
    })?;
    let Err(Error::Quarantined { pages: out, .. }) = failed else { panic!("{failed:?}") };
    assert_eq!((&out, &memory.quarantined()), (&vec![middle], &vec![middle]));
    assert!(all_are(&memory, first, Some(7)) && all_are(&memory, last, Some(7)));
    assert!(all_are(&memory, middle, None));
    let refused = Error::Refused(Refusal::Quarantined { page: middle.start() });
    for visibility in [SHARED, PRIVATE] {
        assert_eq!(to(&memory, all(&memory), visibility), Err(refused.clone()));
    }
    assert_eq!(memory.discard(all(&memory), OnBusy::Wait), Err(refused.clone()));
    let pin = memory
        .pin(PageRange::one(middle.start()), PinKind::Short, Holder::new("virtio-blk"))
        .map(drop);
    assert_eq!(pin, Err(refused));
    assert_eq!(to(&memory, last, PRIVATE), Ok(whole.count(4)));
    PASSED
}

fn bounded(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(1024)?)?;
    let memory = &bound.memory;
    let size = memory.pages().get();
    bound.passes([zero(gfns(page(0)))]);
    // What that has taken up is this memory's, where it can be told.
    let own = memory.resident().map_or(1, polder::units::PageCount::get);
    let before = w.taken(memory) - own;
    let mut most = 0;
    for round in 0..w.rounds(10).max(2) {
        bound.passes([fill(gfns(all(memory)), round)]);
        most = most.max(w.taken(memory));
        share_all(memory);
        put_all(memory, all(memory), 1);
        bound.passes([fill(gfns(all(memory)), round)]);
        most = most.max(w.taken(memory));
        to(memory, all(memory), PRIVATE).expect("no pins");
        // The stray touches of a host that has lost them make no page.
        assert_eq!(bytes(memory, pages(0, 64)), [None; 64]);
        most = most.max(w.taken(memory));
    }
    let taken = most - before;
    // An account of the whole kernel's is kept in batches by each CPU, and so lags.
    let lag = if memory.resident().is_ok() { 0 } else { 64 };
    let most = size + size / 50 + lag;
    assert!(taken <= most, "{taken} pages for a guest of {size}");
    assert!(taken + lag >= size, "all of it was there at times: {taken}");
    PASSED
}

fn gup(w: &World<'_>) -> Ran {
    let memory = w.memory(4)?;
    share_all(&memory);
    let at = page(1);
    let alone = w.inside().gup_fast_across(&memory, at.start(), &mut || {});
    assert!(alone, "with nothing between its steps it pins");
    let mut converted = None;
    let pinned = w.inside().gup_fast_across(&memory, at.start(), &mut || {
        converted = Some(to(&memory, at, PRIVATE));
    });
    assert_eq!(converted, Some(Ok(1)));
    assert!(!pinned, "the private page is pinned");
    PASSED
}

fn audit(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    share_all(memory);
    bound.refill(all(memory), 1);
    assert!(crate::world::holds(memory, all(memory), 1));
    let reference = w.inside().refer(memory, 5u32.into());
    assert_eq!(w.inside().audit(memory), Ok(()));
    assert!(to(memory, pages(4, 8), PRIVATE).is_err(), "page 5 is referred to");
    drop(reference);
    assert_eq!(to(memory, pages(4, 8), PRIVATE), Ok(4));
    memory.discard(pages(0, 2), OnBusy::Wait).expect("no pins");
    assert_eq!(w.inside().audit(memory), Ok(()));
    PASSED
}
