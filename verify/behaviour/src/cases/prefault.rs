//! Mapping for a guest ahead of its touches.

use std::sync::atomic::{AtomicBool, Ordering};

use polder::units::{GfnRange, PageCount, PageRange};
use polder::{Error, Memory, OnBusy, Platform, Prefaulted, Refusal, Slot, Visibility};
use polder_vmm::IdleVcpu;
use polder_vmm::scenario::Visibility as Side;

use super::population::{populate, waits};
use super::together::story;
use crate::Section::Prefault;
use crate::world::{
    BASE, Bound, PASSED, Stop, World, all, bytes, check, convert, fill, gfn, gfns, holds,
    meanwhile, page, pages, to, zero,
};
use crate::{Case, Ran};

pub(crate) const UNTOLD: &str =
    "while others are owed, a guest's first touches of what was prefaulted come to nobody";
pub(crate) const OWED_STOPS: &str = "it stops before a page that is owed, and never shows it";
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

/// Checks that `pages` pages of memory were made since `before`, by the host's own account.
fn made(w: &World<'_>, memory: &Memory, before: u64, pages: u64) {
    // An account of the whole kernel's is kept in batches by each CPU, and so lags.
    let lag = if memory.resident().is_ok() { 0 } else { 128 };
    let made = w.taken(memory).saturating_sub(before);
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
        made(w, memory, before, 700);
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
    assert_eq!(bytes(memory, all(memory)), seen);
    bound.passes([fill(gfns(all(memory)), 1), check(gfns(all(memory)), 1)]);
    assert!(holds(memory, page(4), 1));
    PASSED
}

fn partial(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(256)?)?;
    let (memory, vcpu) = (&bound.memory, vcpu(&bound));
    let before = w.taken(memory);
    let (done, left) = (pages(128, 256), pages(256, 384));
    assert_eq!(prefault(&bound, &vcpu, pages(128, 384)), part(done, left));
    made(w, memory, before, 128);
    let none = Refusal::NoSlot { gfn: gfns(left).start() };
    assert_eq!(prefault(&bound, &vcpu, left), Err(none.into()));
    assert_eq!(prefault(&bound, &vcpu, pages(255, 257)), part(page(255), page(256)));
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
    for (start, end) in [(BASE + 16, BASE + 17), (BASE - 1, BASE + 16), (1 << 30, 1 << 31)] {
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
    for _ in 0..4 {
        let bound = w.bound(w.memory(1200)?)?;
        let memory = &bound.memory;
        let before = w.taken(memory);
        let (one, other) = (vcpu(&bound), vcpu(&bound));
        let done = meanwhile(
            || prefault(&bound, &one, all(memory)),
            || prefault(&bound, &other, all(memory)),
        );
        assert_eq!(done, (whole(all(memory)), whole(all(memory))));
        made(w, memory, before, 1200);
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
        for _ in 0..20 {
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
        for round in 0..100 {
            let range = pages(round % 16, round % 16 + 16);
            to(memory, range, Visibility::Shared).expect("no pins");
            memory.host_view().touch_write(range.start().offset(), &[1]).expect("it is shared");
            to(memory, range, Visibility::Private).expect("no pins");
            assert_eq!(bytes(memory, range), [None; 16]);
        }
    });
    assert_eq!(w.mapped(memory, all(memory)), []);
    // Nothing is left on a side that was abandoned.
    memory.discard(all(memory), OnBusy::Wait).expect("no pins");
    made(w, memory, before, 0);
    bound.passes([zero(gfns(all(memory))), convert(gfns(all(memory)), Side::Shared)]);
    assert_eq!(bytes(memory, all(memory)), [Some(0); 32]);
    PASSED
}

fn discards(w: &World<'_>, owed: bool) -> Ran {
    let bound = w.bound(if owed { w.owed(65)? } else { w.memory(64)? })?;
    let (memory, vcpu) = (&bound.memory, vcpu(&bound));
    let some = pages(0, 64);
    if owed {
        populate(memory, some, 9).expect("it is owed");
    }
    let expected = if owed { part(some, page(64)) } else { whole(some) };
    let again = || assert_eq!(prefault(&bound, &vcpu, all(memory)), expected);
    beside(again, || {
        for round in 0..20 {
            bound.passes([fill(gfns(some), round), check(gfns(some), round)]);
            for _ in 0..50 {
                memory.discard(some, OnBusy::Wait).expect("no pins");
            }
            bound.passes([zero(gfns(some))]);
        }
    });
    PASSED
}

fn untold(w: &World<'_>) -> Ran {
    let bound = w.bound(w.owed(65)?)?;
    let memory = &bound.memory;
    populate(memory, pages(0, 48), 1).expect("it is owed");
    // Pages that are whole, and nowhere.
    memory.discard(pages(32, 64), OnBusy::Wait).expect("no pins");
    let done = prefault(&bound, &vcpu(&bound), all(memory));
    assert_eq!(done, part(pages(0, 64), page(64)));
    let faults = memory.statistics().guest_faults;
    bound.passes([check(gfns(pages(0, 32)), 1), zero(gfns(pages(32, 64)))]);
    assert_eq!(memory.statistics().guest_faults, faults);
    PASSED
}

fn owed(w: &World<'_>) -> Ran {
    let bound = w.bound(w.owed(16)?)?;
    let (memory, vcpu) = (&bound.memory, vcpu(&bound));
    let refused = |at: u32| Err(Refusal::Owed { page: at.into() }.into());
    assert_eq!(prefault(&bound, &vcpu, all(memory)), refused(0));
    populate(memory, pages(0, 8), 1).expect("it is owed");
    populate(memory, pages(12, 14), 1).expect("it is owed");
    assert_eq!(prefault(&bound, &vcpu, all(memory)), part(pages(0, 8), pages(8, 16)));
    assert_eq!(prefault(&bound, &vcpu, pages(8, 16)), refused(8));
    assert_eq!(prefault(&bound, &vcpu, pages(12, 16)), part(pages(12, 14), pages(14, 16)));
    // Who touches one waits, and sees it whole.
    for at in [8, 15] {
        waits(
            || bound.passes([check(gfns(page(at)), 2)]),
            || populate(memory, page(at), 2).expect("it is owed"),
        );
    }
    bound.passes([check(gfns(pages(0, 8)), 1), check(gfns(pages(12, 14)), 1)]);
    memory.settle().expect("nothing is in the way");
    assert_eq!(prefault(&bound, &vcpu, all(memory)), whole(all(memory)));
    bound.passes([zero(gfns(pages(9, 12))), zero(gfns(page(14))), check(gfns(page(15)), 2)]);
    PASSED
}

fn failed(w: &World<'_>) -> Ran {
    let bound = w.bound(w.owed(16)?)?;
    let (memory, vcpu) = (&bound.memory, vcpu(&bound));
    populate(memory, pages(0, 4), 1).expect("it is owed");
    memory.fail(pages(4, 8)).expect("it is owed");
    for settled in [false, true] {
        if settled {
            memory.settle().expect("nothing is in the way");
        }
        assert_eq!(prefault(&bound, &vcpu, all(memory)), part(pages(0, 4), pages(4, 16)));
        let named = Refusal::SourceFailed { page: 5u32.into() };
        assert_eq!(prefault(&bound, &vcpu, pages(5, 16)), Err(named.into()));
    }
    assert_eq!(prefault(&bound, &vcpu, pages(8, 16)), whole(pages(8, 16)));
    // Discarded, they are zeros among others, and as good.
    memory.discard(pages(4, 6), OnBusy::Wait).expect("no pins");
    assert_eq!(prefault(&bound, &vcpu, all(memory)), part(pages(0, 6), pages(6, 16)));
    let faults = memory.statistics().guest_faults;
    bound.passes([check(gfns(pages(0, 4)), 1), zero(gfns(pages(4, 6))), zero(gfns(pages(8, 16)))]);
    assert_eq!(memory.statistics().guest_faults, faults);
    PASSED
}
