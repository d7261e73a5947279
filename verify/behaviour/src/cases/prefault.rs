//! Mapping for a guest ahead of its touches.

use std::sync::atomic::{AtomicBool, Ordering};

use polder::units::{GfnRange, PageCount, PageRange};
use polder::{Error, Memory, OnBusy, PageSize, Platform, Prefaulted, Refusal, Slot, Visibility};
use polder_vmm::IdleVcpu;
use polder_vmm::scenario::Visibility as Side;

use super::population::{populate, waits};
use super::together::story;
use crate::Section::Prefault;
use crate::world::{
    BASE, Bound, PASSED, Stop, World, all, bytes, check, convert, fill, gfn, gfns, holds,
    meanwhile, page, pages, put, to, zero,
};
use crate::{Case, Ran};

pub(crate) const UNTOLD: &str =
    "while others are owed, a guest's first touches of what was prefaulted come to nobody";
pub(crate) const OWED_STOPS: &str = "it stops before a page that is owed, and never shows it";
pub(crate) const PART_STOPS: &str =
    "what counts as done of a huge page that is whole in part, its guest touches unasked";
pub(crate) const FAILED_STOPS: &str = "it stops before a page whose source failed, named";
pub(crate) const STILL_OWED: &str = "discards meanwhile leave zeros, also while others are owed";

pub(super) const CASES: &[Case] = &[
    Case::new(Prefault, "all pages are there, and the guest's first touches come to nobody", full),
    Case::new(Prefault, "shared pages keep what the host wrote", shared),
    Case::new(Prefault, "private pages stay denied to the host, and mapped to it nowhere", private),
    Case::new(Prefault, "what runs past the slot's end is done up to it, the rest told", partial),
    Case::new(Prefault, "neighbouring slots are done in one go, a gap between them ends it", slots),
    Case::new(Prefault, "frames in no slot are refused, by ENOENT, and nothing is made", beyond),
    Case::new(Prefault, "no part of a page can be named, nor none", no_range),
    Case::new(Prefault, "two vCPUs may have the same pages prefaulted at once", parallel),
    Case::new(Prefault, "what becomes of other pages meanwhile leaves none of it undone", others),
    Case::new(Prefault, "a slot deleted meanwhile ends it early, or in an error; none hangs", gone),
    Case::new(
        Prefault,
        "while a guest runs and converts, it sees no wrong byte and the host no page late",
        conversions,
    ),
    Case::new(Prefault, "discards meanwhile leave zeros", |w| discards(w, false)),
    Case::new(Prefault, STILL_OWED, |w| discards(w, true)),
    Case::new(Prefault, UNTOLD, untold),
    Case::new(Prefault, OWED_STOPS, owed),
    Case::new(Prefault, PART_STOPS, part_of_a_huge_page),
    Case::new(Prefault, FAILED_STOPS, failed),
];

fn vcpu(bound: &Bound) -> IdleVcpu {
    bound.guest.vcpu((&bound.memory, bound.vm))
}

/// Prefaults pages that are bound from [`BASE`] on.
fn prefault(bound: &Bound, vcpu: &IdleVcpu, range: PageRange) -> Result<Prefaulted, Error> {
    bound.guest.prefault((&bound.memory, bound.vm), vcpu, gfns(range))
}

/// All of a range was done.
fn whole(range: PageRange) -> Result<Prefaulted, Error> {
    Ok(Prefaulted { done: gfns(range), skipped: PageCount::ZERO, left: None })
}

/// A part was, and what follows on it was not.
fn part(done: PageRange, left: PageRange) -> Result<Prefaulted, Error> {
    Ok(Prefaulted { done: gfns(done), skipped: PageCount::ZERO, left: Some(gfns(left)) })
}

/// Checks that `pages` pages of memory were made since `before`, by the host's own account: whole
/// huge pages where it is made of those.
fn made(w: &World<'_>, memory: &Memory, before: u64, pages: u64) {
    // An account of the whole kernel's is kept in batches by each CPU, and so lags.
    let lag = if memory.resident().is_ok() { 0 } else { 128 };
    let whole = memory.page_size().reserved().map_or(1, |_| w.folios().count(1));
    let (made, pages) = (w.taken(memory).saturating_sub(before), pages.next_multiple_of(whole));
    assert!(made.abs_diff(pages) <= lag, "{made} pages were made, not {pages}");
}

/// Calls `again` until `until` has ended; what that returned.
fn beside<T>(again: impl Fn() + Sync, until: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    let looped = || {
        while !stop.load(Ordering::Relaxed) {
            again();
        }
    };
    let ((), until) = meanwhile(looped, || {
        let _stop = Stop(&stop);
        until()
    });
    until
}

fn full(w: &World<'_>) -> Ran {
    for platform in [Platform::Plain, Platform::SwProtected] {
        // More than is done at once.
        let bound = w.bound(w.memory_for(platform, 700)?)?;
        let memory = &bound.memory;
        let before = w.taken(memory);
        assert_eq!(prefault(&bound, &vcpu(&bound), all(memory)), whole(all(memory)));
        made(w, memory, before, memory.pages().get());
        let faults = memory.statistics().guest_faults;
        bound.passes([zero(gfns(pages(0, 300))), fill(gfns(pages(300, 700)), 1)]);
        bound.passes([zero(gfns(pages(0, 300))), check(gfns(pages(300, 700)), 1)]);
        assert_eq!(memory.statistics().guest_faults, faults);
        // Once more it does nothing, and is right.
        assert_eq!(prefault(&bound, &vcpu(&bound), all(memory)), whole(all(memory)));
        bound.passes([check(gfns(pages(300, 700)), 1)]);
    }
    PASSED
}

fn shared(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(64)?)?;
    let memory = &bound.memory;
    let half = pages(16, 48);
    to(memory, half, Visibility::Shared).expect("no pins");
    let words: Vec<u8> = gfns(half).frames().flat_map(|at| crate::world::seeded(at, 3)).collect();
    memory.write(bound.vm, gfns(half).start().gpa(), &words).expect("shared pages");
    assert_eq!(prefault(&bound, &vcpu(&bound), all(memory)), whole(all(memory)));
    let faults = memory.statistics().guest_faults;
    bound.passes([check(gfns(half), 3), zero(gfns(pages(0, 16))), zero(gfns(pages(48, 64)))]);
    assert_eq!(memory.statistics().guest_faults, faults);
    bound.passes([fill(gfns(half), 4)]);
    assert!(holds(memory, half, 4));
    PASSED
}

fn private(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let memory = &bound.memory;
    to(memory, page(4), Visibility::Shared).expect("no pins");
    assert_eq!(prefault(&bound, &vcpu(&bound), all(memory)), whole(all(memory)));
    assert_eq!(w.mapped(memory, all(memory)), []);
    let mut seen = [None; 16];
    seen[4] = Some(0);
    assert_eq!(bytes(memory, pages(0, 16)), seen);
    bound.passes([fill(gfns(all(memory)), 1), check(gfns(all(memory)), 1)]);
    assert!(holds(memory, page(4), 1));
    PASSED
}

fn partial(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(256)?)?;
    let (memory, vcpu) = (&bound.memory, vcpu(&bound));
    let before = w.taken(memory);
    let end = memory.pages().get();
    let (done, left) = (pages(end - 128, end), pages(end, end + 128));
    assert_eq!(prefault(&bound, &vcpu, pages(end - 128, end + 128)), part(done, left));
    made(w, memory, before, 128);
    let none = Refusal::NoSlot { gfn: gfns(left).start() };
    assert_eq!(prefault(&bound, &vcpu, left), Err(none.into()));
    assert_eq!(prefault(&bound, &vcpu, pages(end - 1, end + 1)), part(page(end - 1), page(end)));
    made(w, memory, before, 128);
    bound.passes([zero(gfns(all(memory)))]);
    PASSED
}

fn slots(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(64)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    bound.passes([fill(gfns(all(memory)), 1)]);
    memory.unbind(vm, Slot(0)).expect("it is bound");
    // The third quarter shows nowhere.
    for (slot, range) in [(3, pages(0, 16)), (1, pages(16, 32)), (2, pages(48, 64))] {
        memory.bind(vm, Slot(slot), gfns(range).start(), range).expect("free");
    }
    let vcpu = vcpu(&bound);
    assert_eq!(prefault(&bound, &vcpu, pages(4, 64)), part(pages(4, 32), pages(32, 64)));
    assert_eq!(
        prefault(&bound, &vcpu, pages(40, 64)).map_err(|error| error.errno() as i32),
        Err(2)
    );
    assert_eq!(prefault(&bound, &vcpu, pages(50, 64)), whole(pages(50, 64)));
    PASSED
}

fn beyond(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let (memory, vcpu) = (&bound.memory, vcpu(&bound));
    let after = BASE + memory.pages().get();
    for (start, end) in [(after, after + 1), (BASE - 1, after), (1 << 30, 1 << 31)] {
        let gfns = GfnRange::between(start, end).expect("frames");
        let refused = bound.guest.prefault((memory, bound.vm), &vcpu, gfns);
        let refused = refused.expect_err("no slot is there");
        assert_eq!(refused, Refusal::NoSlot { gfn: gfn(start) }.into());
        assert_eq!(refused.errno() as i32, 2, "ENOENT");
    }
    assert_eq!(memory.existing(), Ok(vec![]));
    memory.unbind(bound.vm, Slot(0)).expect("it is bound");
    let none = Refusal::NoSlot { gfn: gfn(BASE) };
    assert_eq!(prefault(&bound, &vcpu, all(memory)), Err(none.into()));
    assert_eq!(memory.existing(), Ok(vec![]));
    PASSED
}

fn no_range(_: &World<'_>) -> Ran {
    assert_eq!(GfnRange::between(BASE, BASE), None);
    for (address, size) in
        [(0x800, 0x1000), (0x1000, 0x800), (0x1000, 0), (u64::MAX - 0xfff, 0x2000)]
    {
        assert!(GfnRange::from_bytes(address, size).is_err(), "{size:#x} bytes at {address:#x}");
    }
    PASSED
}

fn parallel(w: &World<'_>) -> Ran {
    for _ in 0..w.rounds(4) {
        let bound = w.bound(w.memory(1200)?)?;
        let memory = &bound.memory;
        let before = w.taken(memory);
        let (one, other) = (vcpu(&bound), vcpu(&bound));
        let done = meanwhile(
            || prefault(&bound, &one, all(memory)),
            || prefault(&bound, &other, all(memory)),
        );
        assert_eq!(done, (whole(all(memory)), whole(all(memory))));
        made(w, memory, before, memory.pages().get());
        bound.passes([zero(gfns(pages(1000, 1200)))]);
    }
    PASSED
}

fn others(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(192)?)?;
    let (memory, vcpu) = (&bound.memory, vcpu(&bound));
    let (ours, theirs) = (pages(0, 128), pages(128, 192));
    bound.passes([fill(gfns(theirs), 1)]);
    let again = || memory.discard(theirs, OnBusy::Wait).expect("no pins");
    beside(again, || {
        for _ in 0..w.rounds(20) {
            memory.discard(ours, OnBusy::Wait).expect("no pins");
            assert_eq!(prefault(&bound, &vcpu, ours), whole(ours));
            let faults = memory.statistics().guest_faults;
            bound.passes([zero(gfns(ours))]);
            assert_eq!(memory.statistics().guest_faults, faults);
        }
    });
    PASSED
}

fn gone(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(1200)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    let half = |second: bool| if second { pages(600, 1200) } else { pages(0, 600) };
    memory.unbind(vm, Slot(0)).expect("it is bound");
    memory.bind(vm, Slot(0), gfn(BASE), half(false)).expect("free");
    bound.passes([fill(gfns(page(7)), 1)]);
    let (met, refused) = (AtomicBool::new(false), AtomicBool::new(false));
    let vcpu = vcpu(&bound);
    let again = || match prefault(&bound, &vcpu, pages(0, 600)) {
        Ok(Prefaulted { done, left, .. }) => {
            assert_eq!(done.start(), gfn(BASE));
            assert_eq!(left.map_or(done.end(), |left| left.end()), BASE + 600);
            met.store(true, Ordering::Relaxed);
        }
        Err(error) => {
            assert!([2, 11].contains(&(error.errno() as i32)), "ENOENT or EAGAIN: {error}");
            refused.store(true, Ordering::Relaxed);
        }
    };
    beside(again, || {
        let mut round = 0;
        while round < 200 || !met.load(Ordering::Relaxed) || !refused.load(Ordering::Relaxed) {
            memory.unbind(vm, Slot(0)).expect("it is bound");
            std::thread::yield_now();
            memory.bind(vm, Slot(0), gfn(BASE), half(round % 2 == 0)).expect("it is free");
            round += 1;
        }
    });
    // Of a slot that stays it never says EAGAIN.
    memory.unbind(vm, Slot(0)).expect("it is bound");
    memory.bind(vm, Slot(0), gfn(BASE), half(false)).expect("it is free");
    assert_eq!(prefault(&bound, &vcpu, pages(0, 600)), whole(pages(0, 600)));
    bound.passes([check(gfns(page(7)), 1), zero(gfns(pages(8, 20)))]);
    PASSED
}

fn conversions(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(32)?)?;
    let memory = &bound.memory;
    let before = w.taken(memory);
    let vcpu = vcpu(&bound);
    let again = || assert_eq!(prefault(&bound, &vcpu, all(memory)), whole(all(memory)));
    let area = |start| GfnRange::between(start, start + 16).expect("16 frames");
    beside(again, || {
        bound.pass(vec![story(&bound, area(BASE), 1), story(&bound, area(BASE + 16), 100)]);
        // The VMM converts, too, more than the guest is at.
        for round in 0..w.rounds(100) {
            let range = pages(round % 16, round % 16 + 16);
            to(memory, range, Visibility::Shared).expect("no pins");
            put(memory, range.start().get(), 1);
            to(memory, range, Visibility::Private).expect("no pins");
            assert_eq!(bytes(memory, range), [None; 16]);
        }
    });
    assert_eq!(w.mapped(memory, all(memory)), []);
    // Nothing is left on a side that was abandoned.
    memory.discard(all(memory), OnBusy::Wait).expect("no pins");
    made(w, memory, before, 0);
    bound.passes([zero(gfns(pages(0, 32))), convert(gfns(pages(0, 32)), Side::Shared)]);
    assert_eq!(bytes(memory, pages(0, 32)), [Some(0); 32]);
    PASSED
}

fn discards(w: &World<'_>, owed: bool) -> Ran {
    let shown = w.granules();
    // Of huge pages few: what is owed of one keeps all of it.
    let count = if shown.is_small() { 64 } else { 1 };
    let next = shown.page(count);
    let bound = w.bound(if owed { w.owed(next.end())? } else { w.memory(shown.count(count))? })?;
    let (memory, vcpu) = (&bound.memory, vcpu(&bound));
    let some = shown.pages(0, count);
    if owed {
        populate(memory, some, 9).expect("it is owed");
    }
    let asked = if owed { pages(0, next.end()) } else { some };
    let expected = if owed { part(some, next) } else { whole(some) };
    let again = || assert_eq!(prefault(&bound, &vcpu, asked), expected);
    beside(again, || {
        for round in 0..w.rounds(20) {
            bound.passes([fill(gfns(some), round), check(gfns(some), round)]);
            for _ in 0..w.rounds(50) {
                memory.discard(some, OnBusy::Wait).expect("no pins");
            }
            bound.passes([zero(gfns(some))]);
        }
    });
    PASSED
}

fn untold(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let (some, next) = (if shown.is_small() { 16 } else { 1 }, shown.count(1));
    let bound = w.bound(w.owed(shown.count(4 * some) + next)?)?;
    let memory = &bound.memory;
    populate(memory, shown.pages(0, 3 * some), 1).expect("it is owed");
    // Pages that are whole, and nowhere.
    memory.discard(shown.pages(2 * some, 4 * some), OnBusy::Wait).expect("no pins");
    let done = prefault(&bound, &vcpu(&bound), pages(0, shown.first(4 * some) + next));
    assert_eq!(done, part(shown.pages(0, 4 * some), shown.page(4 * some)));
    let faults = memory.statistics().guest_faults;
    bound.passes([
        check(gfns(shown.pages(0, 2 * some)), 1),
        zero(gfns(shown.pages(2 * some, 4 * some))),
    ]);
    assert_eq!(memory.statistics().guest_faults, faults);
    PASSED
}

fn owed(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let bound = w.bound(w.owed(shown.count(8))?)?;
    let (memory, vcpu) = (&bound.memory, vcpu(&bound));
    let refused = |at| Err(Refusal::Owed { page: shown.page(at).start() }.into());
    assert_eq!(prefault(&bound, &vcpu, shown.pages(0, 8)), refused(0));
    populate(memory, shown.pages(0, 4), 1).expect("it is owed");
    populate(memory, shown.page(6), 1).expect("it is owed");
    assert_eq!(
        prefault(&bound, &vcpu, shown.pages(0, 8)),
        part(shown.pages(0, 4), shown.pages(4, 8))
    );
    assert_eq!(prefault(&bound, &vcpu, shown.pages(4, 8)), refused(4));
    assert_eq!(prefault(&bound, &vcpu, shown.pages(6, 8)), part(shown.page(6), shown.page(7)));
    // Who touches one waits, and sees it whole.
    for at in [4, 7] {
        waits(
            || bound.passes([check(gfns(shown.page(at)), 2)]),
            || populate(memory, shown.page(at), 2).expect("it is owed"),
        );
    }
    bound.passes([check(gfns(shown.pages(0, 4)), 1), check(gfns(shown.page(6)), 1)]);
    memory.settle().expect("nothing is in the way");
    assert_eq!(prefault(&bound, &vcpu, shown.pages(0, 8)), whole(shown.pages(0, 8)));
    bound.passes([zero(gfns(shown.page(5))), check(gfns(shown.page(7)), 2)]);
    PASSED
}

fn part_of_a_huge_page(w: &World<'_>) -> Ran {
    let bound = w.bound(w.owed(w.folios().count(1).max(16))?)?;
    let (memory, vcpu) = (&bound.memory, vcpu(&bound));
    let (come, rest) = (pages(0, 8), pages(8, memory.pages().get()));
    populate(memory, come, 1).expect("it is owed");
    // The kernel may take the mappings of transparent huge pages away in between, as it did once; not
    // each time.
    let tries = if memory.page_size() == PageSize::Thp { 4 } else { 1 };
    let prefaults = || {
        assert_eq!(prefault(&bound, &vcpu, come).map(|it| it.left.is_some()), Ok(false));
    };
    let touches_unasked = || {
        (0..tries).any(|tried| {
            if tried > 0 {
                prefaults();
            }
            let faults = memory.statistics().guest_faults;
            bound.passes([check(gfns(come), 1)]);
            memory.statistics().guest_faults == faults
        })
    };
    let done = prefault(&bound, &vcpu, come);
    match w.granules().is_small() {
        true => {
            assert_eq!(done, whole(come));
            assert!(touches_unasked());
        }
        // It is mapped as a whole or not at all.
        false => assert_eq!(done, Err(Refusal::Owed { page: rest.start() }.into())),
    }
    memory.populate(rest, &[]).expect("it is owed");
    if crate::world::keeps(memory) {
        // Two kinds in one huge page: it is mapped all the same.
        let facts = memory.facts(come).expect("pages of the object");
        to(memory, pages(2, 4), facts[0].1.visibility.other()).expect("no pins");
    }
    prefaults();
    assert!(touches_unasked());
    PASSED
}

fn failed(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let bound = w.bound(w.owed(shown.count(8))?)?;
    let (memory, vcpu) = (&bound.memory, vcpu(&bound));
    populate(memory, shown.pages(0, 2), 1).expect("it is owed");
    memory.fail(shown.pages(2, 4)).expect("it is owed");
    for settled in [false, true] {
        if settled {
            memory.settle().expect("nothing is in the way");
        }
        assert_eq!(
            prefault(&bound, &vcpu, shown.pages(0, 8)),
            part(shown.pages(0, 2), shown.pages(2, 8))
        );
        let named = Refusal::SourceFailed { page: shown.page(3).start() };
        assert_eq!(prefault(&bound, &vcpu, shown.pages(3, 8)), Err(named.into()));
    }
    assert_eq!(prefault(&bound, &vcpu, shown.pages(4, 8)), whole(shown.pages(4, 8)));
    // Discarded, they are zeros among others, and as good.
    memory.discard(shown.page(2), OnBusy::Wait).expect("no pins");
    assert_eq!(
        prefault(&bound, &vcpu, shown.pages(0, 8)),
        part(shown.pages(0, 3), shown.pages(3, 8))
    );
    let faults = memory.statistics().guest_faults;
    bound.passes([
        check(gfns(shown.pages(0, 2)), 1),
        zero(gfns(shown.page(2))),
        zero(gfns(shown.pages(4, 8))),
    ]);
    assert_eq!(memory.statistics().guest_faults, faults);
    PASSED
}
