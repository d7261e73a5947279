//! Conversions that meet others: operations, touches, vCPUs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use polder::units::{GfnRange, PAGE_SIZE};
use polder::{Error, Holder, Memory, OnBusy, PinKind, Refusal, Slot, Visibility};
use polder_vmm::scenario::{HostAccess, Op};

use crate::Section::Conversion;
use crate::world::{
    BASE, Bound, PASSED, Stop, World, all, byte, check, facts, fill, gfn, meanwhile, page, pages,
    probe, put, share_all, to, zero,
};
use crate::{Case, Ran, Skipped};

const SHARED: Visibility = Visibility::Shared;
const PRIVATE: Visibility = Visibility::Private;

pub(crate) const DENIED_WHILE_FAILING: &str =
    "touches of pinned pages are never denied by refused conversions";

pub(super) const CASES: &[Case] = &[
    Case::new(Conversion, "a range that is busy is refused, where the caller won't wait", busy),
    Case::new(Conversion, "a range that is busy is waited for, where the caller will", wait),
    Case::new(Conversion, "conversions of one range by two threads end as one of them asked", race),
    Case::new(
        Conversion,
        "touches meanwhile see right bytes or are denied; none maps late",
        touches,
    ),
    Case::new(Conversion, "so do touches of pages converted first of many", long_touches),
    Case::new(
        Conversion,
        "no answer to many touches comes too late for the last of them",
        last_of_many,
    ),
    Case::new(Conversion, DENIED_WHILE_FAILING, denied),
    Case::new(Conversion, "a guest at work on the pages loses none of its words", churned),
    Case::new(Conversion, "two vCPUs convert pages of their own, in one slot", |w| vcpus(w, 1)),
    Case::new(Conversion, "two vCPUs convert pages of their own, in two slots", |w| vcpus(w, 2)),
];

/// Pages of which every other one is shared: to share the others takes many steps.
const STRIPED: u64 = 2048;

fn striped(w: &World<'_>) -> Result<Memory, Skipped> {
    let memory = w.memory(STRIPED)?;
    stripe(&memory);
    Ok(memory)
}

fn stripe(memory: &Memory) {
    to(memory, all(memory), PRIVATE).expect("no pins");
    let odd = (1..STRIPED).step_by(2);
    assert!(odd.map(page).all(|page| to(memory, page, SHARED).is_ok()), "no pins");
}

/// Shares all pages in one go, and calls `beside` again and again until it says so or that is
/// over. Whether it ever did.
fn beside_a_conversion(memory: &Memory, mut beside: impl FnMut() -> bool) -> bool {
    let over = AtomicBool::new(false);
    let share = || {
        let shared = to(memory, all(memory), SHARED);
        over.store(true, Ordering::Release);
        shared
    };
    let (shared, met) = meanwhile(share, || {
        let mut met = false;
        while !met && !over.load(Ordering::Acquire) {
            met = beside();
        }
        met
    });
    assert!(shared.is_ok(), "the conversion is in nobody's way: {shared:?}");
    met
}

fn busy(w: &World<'_>) -> Ran {
    let memory = striped(w)?;
    // Until they meet: the case's time limit is the end of those that never do.
    loop {
        let mut next = SHARED;
        let met = beside_a_conversion(&memory, || {
            match memory.convert(page(7), next, memory.keeps_most(next), OnBusy::Refuse) {
                Ok(_) => {
                    next = next.other();
                    false
                }
                // The other waits for the page that this one has just converted: it is his turn.
                Err(Error::Refused(Refusal::Awaited { .. })) => false,
                Err(error) => {
                    assert_eq!(error.errno() as i32, 11, "EAGAIN");
                    let held = all(&memory);
                    let Error::Refused(Refusal::Busy { range, held: by, .. }) = error else {
                        panic!("{error}")
                    };
                    assert_eq!((range, by), (page(7), held));
                    true
                }
            }
        });
        if met {
            to(&memory, page(7), SHARED).expect("it is free again");
            assert!(byte(&memory, 7).is_some());
            return PASSED;
        }
        stripe(&memory);
    }
}

fn wait(w: &World<'_>) -> Ran {
    let memory = striped(w)?;
    for round in 0..w.rounds(8) {
        let mut next = SHARED;
        let range = pages(2 * round, 2 * round + 2);
        to(&memory, range, PRIVATE).expect("no pins");
        beside_a_conversion(&memory, || {
            // The other one may have shared them first.
            let converted = to(&memory, range, next);
            assert!(converted == Ok(2) || next == SHARED, "it waits, and is done: {converted:?}");
            next = next.other();
            false
        });
        to(&memory, range, SHARED).expect("no pins");
        assert!((2 * round..2 * round + 2).all(|at| byte(&memory, at).is_some()));
        stripe(&memory);
    }
    PASSED
}

fn race(w: &World<'_>) -> Ran {
    let memory = w.memory(256)?;
    share_all(&memory);
    (0..256).for_each(|at| put(&memory, at, 8));
    for round in 0..w.rounds(100) {
        let (low, high) = (pages(0, 160), pages(96, 256));
        let (one, other) = meanwhile(|| to(&memory, low, PRIVATE), || to(&memory, high, PRIVATE));
        assert_eq!(one.and_then(|one| Ok(one + other?)), Ok(256), "each page changed once");
        let (one, other) = meanwhile(|| to(&memory, low, SHARED), || to(&memory, high, PRIVATE));
        assert_eq!(other.map(|pages| pages <= 64), Ok(true), "round {round}");
        assert!(one.is_ok_and(|pages| pages == 160));
        let runs = facts(&memory, all(&memory));
        let visibility = |at: u64| runs.iter().find(|(run, _)| run.contains(frame(at)));
        let visibility = |at| visibility(at).expect("all pages").1.visibility;
        assert!((0..96).all(|at| visibility(at) == SHARED));
        assert!((96..160).all(|at| visibility(at) == visibility(96)), "a part was converted");
        assert!((160..256).all(|at| visibility(at) == PRIVATE));
        share_all(&memory);
    }
    let left = if crate::world::keeps(&memory) { 8 } else { 0 };
    assert!((0..256).all(|at| byte(&memory, at) == Some(left)));
    PASSED
}

fn frame(at: u64) -> polder::units::PageIndex {
    page(at).start()
}

/// What every word of a page holds, always.
fn word(page: u64) -> [u8; 8] {
    (page + 1).wrapping_mul(0x0123_4567_89ab_cdef).to_le_bytes()
}

/// Reads and writes words of the pages from `target` on until told to stop. Counts the touches that
/// were denied.
fn toucher(memory: &Memory, target: &AtomicU64, denied: &AtomicU64, stop: &AtomicBool) {
    let mut step = 0;
    while !stop.load(Ordering::Relaxed) {
        step = (step + 3) % 4;
        let page = target.load(Ordering::Relaxed) + step;
        let mut read = [0; 8];
        match memory.host_view().touch_read(page * PAGE_SIZE + 64, &mut read) {
            Ok(()) if read == [0; 8] && !crate::world::keeps(memory) => {}
            Ok(()) => assert_eq!(read, word(page), "page {page}"),
            Err(_) => drop(denied.fetch_add(1, Ordering::Relaxed)),
        }
        let wrote = memory.host_view().touch_write(page * PAGE_SIZE + 128, &word(page));
        denied.fetch_add(u64::from(wrote.is_err()), Ordering::Relaxed);
    }
}

/// Converts the pages from a target on to private and back, by `convert`, under the touches of two
/// threads that look for just those. Private pages are in no mapping, right away and later.
fn under_touches(w: &World<'_>, rounds: u64, convert: impl Fn(&Memory, u64, Visibility)) -> Ran {
    const PAGES: u64 = 128;
    let memory = w.memory(PAGES)?;
    share_all(&memory);
    for page in 0..PAGES {
        let bytes = word(page).repeat(512);
        memory.host_view().touch_write(page * PAGE_SIZE, &bytes).expect("all is shared");
    }
    let (target, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let denied = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let touch = || toucher(&memory, &target, &denied, &stop);
        let touchers = [touch; 2].map(|touch| scope.spawn(touch));
        let stopping = Stop(&stop);
        for round in 0..rounds {
            let first = round / 20 * 4 % 64;
            target.store(first, Ordering::Relaxed);
            convert(&memory, first, PRIVATE);
            for _ in 0..2 {
                let late = w.mapped(&memory, pages(first, first + 4));
                assert!(late.is_empty(), "private pages {late:x?} are mapped, in round {round}");
                std::thread::yield_now();
            }
            convert(&memory, first, SHARED);
            // So that answers are under way, one time more of them than the other.
            (0..round % 4).for_each(|_| std::thread::yield_now());
        }
        // However little the touchers came to run meanwhile, now they get their denial, or the case
        // its time limit.
        convert(&memory, target.load(Ordering::Relaxed), PRIVATE);
        let before = denied.load(Ordering::Relaxed);
        while denied.load(Ordering::Relaxed) == before {
            std::thread::yield_now();
        }
        drop(stopping);
        for toucher in touchers {
            toucher.join().expect("it sees right bytes");
        }
    });
    share_all(&memory);
    for page in (0..PAGES).filter(|_| crate::world::keeps(&memory)) {
        assert!(crate::world::touch(&memory, page) == Ok(word(page).repeat(512)), "page {page}");
    }
    PASSED
}

fn touches(w: &World<'_>) -> Ran {
    under_touches(w, w.rounds(3000), |memory, first, visibility| {
        to(memory, pages(first, first + 4), visibility).expect("no pins");
    })
}

fn long_touches(w: &World<'_>) -> Ran {
    under_touches(w, w.rounds(150), |memory, first, visibility| {
        // Behind the four pages, every other one is private: a conversion takes many steps, and
        // the four have lost their mapping long before it is over.
        let behind = (first + 5..first + 64).step_by(2);
        match visibility {
            PRIVATE => behind.map(page).for_each(|page| {
                to(memory, page, PRIVATE).expect("no pins");
            }),
            SHARED => {}
        }
        to(memory, pages(first, first + 64), visibility).expect("no pins");
    })
}

fn last_of_many(w: &World<'_>) -> Ran {
    const PAGES: [u64; 5] = [0, 2, 4, 6, 8];
    let memory = w.memory(9)?;
    share_all(&memory);
    let (last, stop) = (PAGES[PAGES.len() - 1], AtomicBool::new(false));
    let round = AtomicU64::new(0);
    // Once a round, for more would only keep the others from the processor.
    let touch = |page: u64| {
        let mut seen = 0;
        while !stop.load(Ordering::Relaxed) {
            let now = round.load(Ordering::Acquire);
            if now == seen {
                std::thread::yield_now();
                continue;
            }
            seen = now;
            let _ = memory.host_view().touch_read(page * PAGE_SIZE, &mut [0]);
        }
    };
    let wait = |turns: u64| (0..turns).for_each(|_| std::hint::spin_loop());
    std::thread::scope(|scope| {
        let touch = &touch;
        PAGES.iter().for_each(|&page| drop(scope.spawn(move || touch(page))));
        let _stopping = Stop(&stop);
        for now in 1..w.rounds(3000) {
            // All of them are touched anew, and answered one after the other; meanwhile the last
            // becomes private.
            to(&memory, all(&memory), PRIVATE).expect("no pins");
            to(&memory, all(&memory), SHARED).expect("no pins");
            round.store(now, Ordering::Release);
            std::thread::yield_now();
            wait(now * 37 % 4000);
            to(&memory, page(last), PRIVATE).expect("no pins");
            for _ in 0..2 {
                let late = w.mapped(&memory, page(last));
                assert!(late.is_empty(), "the private page is mapped, in round {now}");
                std::thread::yield_now();
            }
        }
    });
    PASSED
}

fn denied(w: &World<'_>) -> Ran {
    let memory = w.memory(w.folios().count(4).max(64))?;
    let quarter = memory.pages().get() / 4;
    let (rest, last) = (pages(0, 3 * quarter), pages(3 * quarter, 4 * quarter));
    let touched = || (0..64).map(|at| at * quarter / 16);
    share_all(&memory);
    touched().for_each(|at| put(&memory, at, 5));
    let pin = memory.pin(last, PinKind::LongTerm, Holder::new("vhost-net"));
    let pin = pin.expect("shared pages");
    let stop = AtomicBool::new(false);
    let touch = || {
        loop {
            for at in touched() {
                let mut byte = [0];
                let touched = memory.host_view().touch_read(at * PAGE_SIZE, &mut byte);
                assert_eq!((touched, byte), (Ok(()), [5]), "page {at}");
            }
            if stop.load(Ordering::Relaxed) {
                return;
            }
        }
    };
    let ((), ran) = meanwhile(touch, || {
        let _stop = Stop(&stop);
        for _ in 0..w.rounds(2000) {
            assert!(to(&memory, all(&memory), PRIVATE).is_err(), "some of it is pinned");
        }
        // Also where it is not refused at once, but fails half-way.
        for _ in 0..20 {
            let failed = w.in_trouble(crate::Trouble::Unmap, || to(&memory, rest, PRIVATE))?;
            assert!(matches!(failed, Err(Error::Host(_))), "{failed:?}");
        }
        PASSED
    });
    ran?;
    drop(pin);
    assert_eq!(to(&memory, all(&memory), PRIVATE), Ok(4 * quarter));
    PASSED
}

fn churned(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(34)?)?;
    let memory = &bound.memory;
    let flag = page(33);
    to(memory, flag, SHARED).expect("no pins");
    let (gpa, until) = (gfn(BASE).gpa(), gfn(BASE + 33).gpa());
    let churn = [Op::Churn { gpa, len: 32 * PAGE_SIZE, seed: 1, until }];
    let ((), ()) = meanwhile(
        || bound.passes(churn),
        || {
            for round in 0..w.rounds(400) {
                let range = pages(round % 28, round % 28 + 5);
                for visibility in [SHARED, PRIVATE] {
                    to(memory, range, visibility).expect("no pins");
                }
            }
            let one = 1u64.to_le_bytes();
            memory.write(bound.vm, until, &one).expect("a shared page");
        },
    );
    bound.passes([zero(GfnRange::one(gfn(BASE + 32)))]);
    PASSED
}

/// A vCPU's story on an area of its own.
pub(super) fn story(bound: &Bound, area: GfnRange, seed: u64) -> Vec<Op> {
    let mut ops = vec![fill(area, seed)];
    for round in 0..24 {
        let start = area.start().get() + round % 12;
        let part = GfnRange::between(start, start + 1 + round % 4).expect("in the area");
        ops.extend(bound.converted(part, SHARED, seed));
        ops.extend([probe(part, HostAccess::Readable), check(area, seed)]);
        ops.extend([fill(part, seed + 1), check(part, seed + 1)]);
        ops.extend(bound.converted(part, PRIVATE, seed + 1));
        ops.extend([probe(area, HostAccess::Denied), check(part, seed + 1), fill(part, seed)]);
    }
    ops.push(check(area, seed));
    ops
}

fn vcpus(w: &World<'_>, slots: u32) -> Ran {
    let bound = w.bound(w.memory(32)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    let second = if slots == 2 { BASE + 0x400 } else { BASE + 16 };
    if slots == 2 {
        memory.unbind(vm, Slot(0)).expect("it is bound");
        memory.bind(vm, Slot(0), gfn(BASE), pages(0, 16)).expect("free");
        memory.bind(vm, Slot(1), gfn(second), pages(16, 32)).expect("free");
    }
    let area = |start: u64| GfnRange::between(start, start + 16).expect("16 frames");
    let stop = AtomicBool::new(false);
    let intrude = || {
        let mut read = [0];
        while !stop.load(Ordering::Relaxed) {
            for at in 0..32 {
                // Whether it is denied, the guest's probes say; it is in their way here.
                let _ = memory.host_view().touch_read(at * PAGE_SIZE, &mut read);
            }
        }
    };
    meanwhile(intrude, || {
        let _stop = Stop(&stop);
        bound.pass(vec![story(&bound, area(BASE), 1), story(&bound, area(second), 100)]);
    });
    assert!(memory.statistics().to_shared >= 48);
    PASSED
}
