//! Entries of 2M: where there is one, and when it is smashed or merged.

use polder::units::{GfnRange, Level, PageCount};
use polder::{Contents, OnBusy, Slot};

use super::{HUGE, LARGE, NOBODYS, PRIVATE, SHARED, SMALL, audit, entries, huge, index, to};
use crate::Section::Rmp;
use crate::world::{
    BASE, PASSED, World, all, bytes, check, convert, fill, gfn, gfns, page, pages, put, zero,
};
use crate::{Case, Ran};

pub(super) const CASES: &[Case] = &[
    Case::new(Rmp, "2M of one folio are one large entry, by a conversion or a fault", large),
    Case::new(Rmp, "a 1G folio is 512 large entries", gigabyte),
    Case::new(Rmp, "2M of 4K folios are 4K entries", small_folios),
    Case::new(Rmp, "where guest frames are not congruent, entries are 4K, and work", incongruent),
    Case::new(
        Rmp,
        "2M of which no binding shows all are 4K entries, and none is smashed",
        bindings,
    ),
    Case::new(Rmp, "a huge folio that was prefaulted is one entry, mapped at 2M", prefaulted),
    Case::new(Rmp, "a part of a large entry becomes shared, and its neighbours stay", part),
    Case::new(Rmp, "a folio that was split leaves a large entry, smashed when met", split),
    Case::new(
        Rmp,
        "a collapse leaves 4K entries, which work at 4K until they are merged",
        collapse,
    ),
    Case::new(Rmp, "vCPUs that meet the same large entry all go on", met_by_many),
    Case::new(
        Rmp,
        "2M that became private part by part are merged when asked, if they agree",
        merged,
    ),
];

fn large(w: &World<'_>) -> Ran {
    let bound = huge(w, 2)?;
    let memory = &bound.memory;
    let rmp = || entries(w.inside(), memory, all(memory));
    // One fault, one answer: the rest of the folio comes with it.
    bound.passes([fill(gfns(page(700)), 1)]);
    assert_eq!(rmp(), [(512, NOBODYS), (512, LARGE)]);
    to(memory, all(memory), SHARED).expect("no pins");
    assert_eq!(rmp(), [(1024, NOBODYS)]);
    to(memory, all(memory), PRIVATE).expect("no pins");
    assert_eq!(rmp(), [(1024, LARGE)]);
    bound.passes([fill(gfns(all(memory)), 2), check(gfns(all(memory)), 2)]);
    assert_eq!(rmp(), [(1024, LARGE)]);
    let rmp = memory.statistics().rmp;
    assert_eq!((rmp.large, rmp.smashed), (3, 0));
    audit(w, memory);
    PASSED
}

fn gigabyte(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(HUGE * HUGE)?)?;
    let memory = &bound.memory;
    w.inside().gigabyte_folio(memory);
    to(memory, all(memory), SHARED).expect("no pins");
    to(memory, all(memory), PRIVATE).expect("no pins");
    assert_eq!(memory.statistics().rmp.large, HUGE);
    let ends = [0, 511, 512, HUGE * HUGE - 1];
    assert_eq!(ends.map(|at| w.inside().rmp(memory, index(at))), [LARGE; 4]);
    bound.passes([fill(gfns(page(512)), 1), check(gfns(page(512)), 1), zero(gfns(page(513)))]);
    to(memory, page(513), SHARED).expect("no pins");
    let some = [511, 512, 513, 1023, 1024].map(|at| w.inside().rmp(memory, index(at)));
    assert_eq!(some, [LARGE, SMALL, NOBODYS, SMALL, LARGE]);
    bound.passes([check(gfns(page(512)), 1)]);
    audit(w, memory);
    PASSED
}

fn small_folios(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(HUGE)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    to(memory, all(memory), SHARED).expect("no pins");
    (0..HUGE).for_each(|at| put(memory, at, 1));
    to(memory, all(memory), PRIVATE).expect("no pins");
    assert_eq!(entries(w.inside(), memory, all(memory)), [(HUGE, SMALL)]);
    bound.passes([fill(gfns(all(memory)), 2), check(gfns(all(memory)), 2)]);
    PASSED
}

fn incongruent(w: &World<'_>) -> Ran {
    let bound = huge(w, 1)?;
    let memory = &bound.memory;
    memory.unbind(bound.vm, Slot(0)).expect("it is bound");
    memory.bind(bound.vm, Slot(0), gfn(BASE + 1), all(memory)).expect("it is free");
    to(memory, all(memory), SHARED).expect("no pins");
    to(memory, all(memory), PRIVATE).expect("no pins");
    assert_eq!(entries(w.inside(), memory, all(memory)), [(HUGE, SMALL)]);
    audit(w, memory);
    let seen = GfnRange::between(BASE + 1, BASE + 1 + HUGE).expect("a range");
    bound.passes([fill(seen, 1), check(seen, 1)]);
    audit(w, memory);
    PASSED
}

fn bindings(w: &World<'_>) -> Ran {
    // The second half of it at other guest frames, at those that follow, or nowhere.
    for second in [Some(BASE + 3 * HUGE), Some(BASE + 256), None] {
        let bound = huge(w, 1)?;
        let (memory, vm) = (&bound.memory, bound.vm);
        memory.unbind(vm, Slot(0)).expect("it is bound");
        memory.bind(vm, Slot(0), gfn(BASE), pages(0, 256)).expect("it is free");
        let halves = [Some(BASE), second].into_iter().flatten();
        let seen = halves.map(|at| GfnRange::between(at, at + 256).expect("256 frames"));
        let seen: Vec<_> = seen.collect();
        if let Some(second) = second {
            memory.bind(vm, Slot(1), gfn(second), pages(256, 512)).expect("it is free");
        }
        // First by a guest's touch, then by a conversion.
        bound.passes([fill(gfns(page(0)), 1)]);
        assert!(!w.inside().rmp(memory, index(0)).1, "a large entry");
        to(memory, all(memory), SHARED).expect("no pins");
        to(memory, all(memory), PRIVATE).expect("no pins");
        let unseen = second.map_or(256, |_| 0);
        let runs = [(HUGE - unseen, SMALL), (unseen, NOBODYS)];
        let entries = entries(w.inside(), memory, all(memory));
        assert!(entries.iter().eq(runs.iter().filter(|run| run.0 > 0)), "{entries:?}");
        bound.passes(seen.iter().map(|&half| fill(half, 2)));
        bound.passes(seen.iter().map(|&half| check(half, 2)));
        let rmp = memory.statistics().rmp;
        assert_eq!((rmp.large, rmp.smashed), (0, 0));
        audit(w, memory);
    }
    PASSED
}

fn prefaulted(w: &World<'_>) -> Ran {
    let bound = huge(w, 2)?;
    let memory = &bound.memory;
    let vcpu = bound.guest.vcpu((memory, bound.vm));
    let done = memory.prefault(bound.vm, &vcpu, gfns(all(memory))).expect("they are bound");
    assert_eq!((done.done, done.left), (gfns(all(memory)), None));
    assert_eq!(entries(w.inside(), memory, all(memory)), [(1024, LARGE)]);
    let level = |at| w.inside().mapped_at(memory, index(at));
    assert_eq!([0, 7, 511, 512, 1023].map(level), [Some(Level::Size2M); 5]);
    let faults = memory.statistics().guest_faults;
    bound.passes([fill(gfns(all(memory)), 1), check(gfns(all(memory)), 1)]);
    let now = memory.statistics();
    assert_eq!((now.rmp.large, now.rmp.smashed, now.guest_faults), (2, 0, faults));
    assert_eq!([0, 7, 511, 512, 1023].map(level), [Some(Level::Size2M); 5]);
    audit(w, memory);
    PASSED
}

fn part(w: &World<'_>) -> Ran {
    let bound = huge(w, 2)?;
    let memory = &bound.memory;
    let rmp = || entries(w.inside(), memory, all(memory));
    bound.passes([fill(gfns(all(memory)), 1)]);
    assert_eq!(rmp(), [(1024, LARGE)]);
    // Asked for by the VMM, then by the guest; across two 2M pages, then in one.
    let zeros = memory.convert(pages(510, 514), SHARED, Contents::Zero, OnBusy::Wait);
    assert_eq!(zeros.map(PageCount::get), Ok(4));
    assert_eq!(rmp(), [(510, SMALL), (4, NOBODYS), (510, SMALL)]);
    assert_eq!(bytes(memory, pages(510, 514)), [Some(0); 4]);
    bound.passes([convert(gfns(page(7)), SHARED), fill(gfns(page(7)), 3)]);
    assert_eq!(rmp(), [(7, SMALL), (1, NOBODYS), (502, SMALL), (4, NOBODYS), (510, SMALL)]);
    let kept = [pages(0, 7), pages(8, 510), pages(514, 1024)];
    bound.passes(kept.map(|range| check(gfns(range), 1)));
    bound.passes([convert(gfns(page(7)), PRIVATE), zero(gfns(page(7)))]);
    bound.passes(kept.map(|range| check(gfns(range), 1)));
    audit(w, memory);
    PASSED
}

fn split(w: &World<'_>) -> Ran {
    let bound = huge(w, 1)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    assert_eq!(entries(w.inside(), memory, all(memory)), [(HUGE, LARGE)]);
    w.inside().split(memory, index(0));
    assert_eq!(entries(w.inside(), memory, all(memory)), [(HUGE, LARGE)], "nobody told the RMP");
    bound.passes([check(gfns(all(memory)), 1)]);
    let rmp = memory.statistics().rmp;
    assert_eq!((rmp.smashed, rmp.raced), (1, 0));
    assert_eq!(entries(w.inside(), memory, all(memory)), [(HUGE, SMALL)]);
    bound.passes([fill(gfns(all(memory)), 2), check(gfns(all(memory)), 2)]);
    assert_eq!(memory.statistics().rmp.smashed, 1, "once is enough");
    audit(w, memory);
    PASSED
}

fn collapse(w: &World<'_>) -> Ran {
    let bound = huge(w, 1)?;
    let memory = &bound.memory;
    let rmp = || entries(w.inside(), memory, all(memory));
    w.inside().split(memory, index(0));
    bound.passes([fill(gfns(all(memory)), 1)]);
    assert_eq!(rmp(), [(HUGE, SMALL)]);
    w.inside().collapse(memory, index(0));
    bound.passes([check(gfns(all(memory)), 1), fill(gfns(all(memory)), 2)]);
    assert_eq!((rmp(), memory.statistics().rmp.smashed), (vec![(HUGE, SMALL)], 0));
    audit(w, memory);
    memory.merge(all(memory), OnBusy::Wait).expect("nothing is in the way");
    assert_eq!(rmp(), [(HUGE, LARGE)]);
    bound.passes([check(gfns(all(memory)), 2)]);
    assert_eq!((rmp(), memory.statistics().rmp.smashed), (vec![(HUGE, LARGE)], 0));
    audit(w, memory);
    PASSED
}

fn met_by_many(w: &World<'_>) -> Ran {
    for _ in 0..8 {
        let bound = huge(w, 1)?;
        let memory = &bound.memory;
        bound.passes([fill(gfns(all(memory)), 1)]);
        w.inside().split(memory, index(0));
        let quarter = |at: u64| gfns(pages(at * 128, at * 128 + 128));
        bound.pass((0..4).map(|at| vec![check(quarter(at), 1), fill(quarter(at), 2)]).collect());
        assert_eq!(memory.statistics().rmp.smashed, 1);
        bound.passes([check(gfns(all(memory)), 2)]);
    }
    PASSED
}

fn merged(w: &World<'_>) -> Ran {
    let bound = huge(w, 1)?;
    let memory = &bound.memory;
    let rmp = || entries(w.inside(), memory, all(memory));
    let merge = || memory.merge(all(memory), OnBusy::Wait).expect("nothing is in the way");
    let merged = || {
        let rmp = memory.statistics().rmp;
        (rmp.merged, rmp.left_small)
    };
    let mapped_at = || w.inside().mapped_at(memory, index(4));
    to(memory, all(memory), SHARED).expect("no pins");
    to(memory, pages(0, 100), PRIVATE).expect("no pins");
    to(memory, all(memory), PRIVATE).expect("no pins");
    assert_eq!((rmp(), merged()), (vec![(512, SMALL)], (0, 0)), "a conversion merges nothing");
    bound.passes([fill(gfns(all(memory)), 1)]);
    to(memory, page(3), SHARED).expect("no pins");
    merge();
    assert_eq!(merged(), (0, 0), "it is not private as a whole");
    to(memory, page(3), PRIVATE).expect("no pins");
    bound.passes([check(gfns(pages(4, 512)), 1)]);
    merge();
    assert_eq!((rmp(), merged()), (vec![(512, SMALL)], (0, 1)), "page 3 is not validated");
    assert_eq!(mapped_at(), Some(Level::Size4K), "what can't be merged stays mapped");
    // Now they agree.
    bound.passes([zero(gfns(page(3))), check(gfns(pages(4, 512)), 1)]);
    merge();
    assert_eq!((rmp(), merged()), (vec![(512, LARGE)], (1, 1)));
    bound.passes([zero(gfns(page(3))), check(gfns(pages(4, 512)), 1)]);
    assert_eq!(mapped_at(), Some(Level::Size2M));
    merge();
    assert_eq!(
        (mapped_at(), merged()),
        (Some(Level::Size2M), (1, 1)),
        "what is large is left alone"
    );
    assert_eq!(rmp(), [(512, LARGE)], "and nobody smashed it");
    audit(w, memory);
    PASSED
}
