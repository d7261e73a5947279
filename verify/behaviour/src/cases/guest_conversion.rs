//! Conversions that a guest asks for: the rows of the kernel's `private_mem_conversions_test`.

use std::collections::BTreeSet;

use polder::units::{Gpa, PAGE_SIZE};
use polder::{MemoryFault, Visibility};
use polder_vmm::scenario::{HostAccess, Op, Outcome};

use crate::Section::Conversion;
use crate::world::{
    BASE, Bound, PASSED, World, all, check, convert, facts, fill, gfn, gfns, holds, page, pages,
    probe, share_all, to, touch, zero,
};
use crate::{Case, Ran};

pub(crate) const IMPLICIT: &str =
    "an access of the other kind exits, the VMM converts, and the access succeeds";

const SHARED: Visibility = Visibility::Shared;
const PRIVATE: Visibility = Visibility::Private;

/// Pages of 2 MiB.
const HUGE: u64 = 512;

pub(super) const CASES: &[Case] = &[
    Case::new(Conversion, "private first: shared when the guest asks, and private again", first),
    Case::new(
        Conversion,
        "shared first: what the host wrote stays when it becomes private",
        second,
    ),
    Case::new(Conversion, "by request: 4K at 0", |w| pattern(w, 0, 1)),
    Case::new(Conversion, "by request: 2M at 0", |w| pattern(w, 0, HUGE)),
    Case::new(Conversion, "by request: 4K at 4K", |w| pattern(w, 1, 1)),
    Case::new(Conversion, "by request: 2M at 4K", |w| pattern(w, 1, HUGE)),
    Case::new(Conversion, "by request: 4K at 2M", |w| pattern(w, HUGE, 1)),
    Case::new(Conversion, IMPLICIT, implicit),
    Case::new(Conversion, "one page of four, each in its turn, from private", |w| {
        each_of_four(w, PRIVATE)
    }),
    Case::new(Conversion, "one page of four, each in its turn, from shared", |w| {
        each_of_four(w, SHARED)
    }),
    Case::new(Conversion, "the odd pages only", odd_pages),
    Case::new(
        Conversion,
        "a request for no range of memory is refused and changes nothing",
        invalid,
    ),
];

fn first(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(64)?)?;
    let all = gfns(all(&bound.memory));
    bound.passes([fill(all, 1), probe(all, HostAccess::Denied)]);
    bound.passes(bound.converted(all, SHARED, 1));
    bound.passes([check(all, 1), probe(all, HostAccess::Readable), fill(all, 2)]);
    assert!(holds(&bound.memory, pages(0, 64), 2));
    bound.passes(bound.converted(all, PRIVATE, 2));
    bound.passes([probe(all, HostAccess::Denied), check(all, 2)]);
    bound.passes([fill(all, 3), check(all, 3), probe(all, HostAccess::Denied)]);
    PASSED
}

fn second(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(64)?)?;
    let memory = &bound.memory;
    share_all(memory);
    for page in 0..64 {
        let bytes = crate::world::seeded(gfn(BASE + page), 1);
        memory.host_view().touch_write(page * PAGE_SIZE, &bytes).expect("shared pages");
    }
    let all = gfns(pages(0, 64));
    bound.passes([
        check(all, 1),
        convert(all, PRIVATE),
        probe(all, HostAccess::Denied),
        check(all, 1),
        fill(all, 2),
        convert(all, SHARED),
        check(all, 2),
    ]);
    assert!(holds(memory, pages(0, 64), 2));
    PASSED
}

/// `length` pages at page `offset` of 4 MiB, to shared and back, seen from both sides at each step.
fn pattern(w: &World<'_>, offset: u64, length: u64) -> Ran {
    let bound = w.bound(w.memory(2 * HUGE)?)?;
    let memory = &bound.memory;
    let part = pages(offset, offset + length);
    let rest = pages(0, 2 * HUGE).without(part);
    let rest = || rest.into_iter().flatten().map(gfns);
    let denied = || rest().map(|rest| probe(rest, HostAccess::Denied));
    let kept = || rest().map(|rest| check(rest, 1));

    bound.passes([fill(gfns(all(memory)), 1), probe(gfns(all(memory)), HostAccess::Denied)]);
    bound.passes(bound.converted(gfns(part), SHARED, 1));
    let shared = [probe(gfns(part), HostAccess::Readable)];
    bound.passes(shared.into_iter().chain(denied()).chain(kept()));
    assert!(holds(memory, part, 1));
    let filled = [check(gfns(part), 1), fill(gfns(part), 2)];
    bound.passes(filled.into_iter().chain(kept()));
    assert!(holds(memory, part, 2));
    bound.passes(bound.converted(gfns(part), PRIVATE, 2));
    let private = [probe(gfns(part), HostAccess::Denied)];
    bound.passes(private.into_iter().chain([check(gfns(part), 2)]).chain(kept()));
    bound.passes([fill(gfns(part), 3), check(gfns(part), 3)].into_iter().chain(kept()));
    PASSED
}

fn implicit(w: &World<'_>) -> Ran {
    for (offset, length) in [(0, 1), (0, HUGE), (1, 1), (1, HUGE), (HUGE, 1)] {
        let bound = w.bound(w.memory_apart(2 * HUGE)?)?;
        let part = pages(offset, offset + length);
        for visibility in [SHARED, PRIVATE] {
            let ends = [part.start().get(), part.end() - 1];
            for page in BTreeSet::from(ends) {
                converted_by_access(&bound, page, visibility);
            }
            to(&bound.memory, part, visibility).expect("no pins");
            let outside = part.end();
            let neighbour = bound.memory.facts(page(outside)).expect("it is in the object");
            assert_eq!(neighbour[0].1.visibility, PRIVATE, "page {outside:#x}");
        }
    }
    PASSED
}

fn converted_by_access(bound: &Bound, page: u64, wanted: Visibility) {
    let gfns = gfns(pages(page, page + 1));
    let memory = (&bound.memory, bound.vm);
    let gpa = gfns.start().gpa();
    let found = bound.guest.access(memory, gpa, wanted, Some(page));
    assert_eq!(found, Err(MemoryFault::Mismatch { gfns, wanted }), "page {page:#x}");
    to(memory.0, pages(page, page + 1), wanted).expect("no pins");
    assert_eq!(bound.guest.access(memory, gpa, wanted, Some(page)), Ok(page));
}

fn each_of_four(w: &World<'_>, from: Visibility) -> Ran {
    let bound = w.bound(w.memory(4)?)?;
    let memory = &bound.memory;
    to(memory, all(memory), from).expect("no pins");
    let of = |visibility| match visibility {
        PRIVATE => HostAccess::Denied,
        SHARED => HostAccess::Readable,
    };
    bound.passes([fill(gfns(all(memory)), 1)]);
    for turn in 0..4 {
        let others = (0..4).filter(|other| *other != turn).map(|other| gfns(page(other)));
        let others: Vec<_> = others.collect();
        let this = gfns(page(turn));
        let mut ops = bound.converted(this, from.other(), 1);
        ops.push(probe(this, of(from.other())));
        ops.extend(others.iter().map(|other| probe(*other, of(from))));
        ops.extend([check(this, 1), fill(this, 2)]);
        ops.extend(others.iter().map(|other| check(*other, 1)));
        ops.extend(bound.converted(this, from, 2));
        ops.extend([probe(this, of(from)), check(this, 2), fill(this, 1)]);
        bound.passes(ops);
    }
    bound.passes([check(gfns(all(memory)), 1)]);
    PASSED
}

fn odd_pages(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(64)?)?;
    let each = |first: u64| (first..64).step_by(2).map(|at| gfns(page(at)));
    let (odd, even) = (|| each(1), || each(0));
    bound.passes(std::iter::once(fill(gfns(pages(0, 64)), 1)));
    bound.passes(odd().flat_map(|odd| bound.converted(odd, SHARED, 1)));
    bound.passes(odd().map(|odd| probe(odd, HostAccess::Readable)));
    bound.passes(even().map(|even| probe(even, HostAccess::Denied)));
    bound.passes(odd().flat_map(|odd| [check(odd, 1), fill(odd, 2)]));
    bound.passes(even().map(|even| check(even, 1)));
    assert_eq!(facts(&bound.memory, pages(0, 64)).len(), 64, "no run is longer than a page");
    // Back at a stroke: what is private already is passed over.
    bound.passes([convert(gfns(pages(0, 64)), PRIVATE)]);
    bound.passes([probe(gfns(pages(0, 64)), HostAccess::Denied)]);
    (1..64).step_by(2).for_each(|at| bound.refill(page(at), 2));
    bound.passes(odd().map(|odd| check(odd, 2)).chain(even().map(|even| check(even, 1))));
    PASSED
}

fn invalid(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(pages(0, 4)), 1)]);
    bound.passes(bound.converted(gfns(pages(2, 4)), SHARED, 1));
    let before = facts(memory, all(memory));
    let start = BASE * PAGE_SIZE;
    let end = start + memory.pages().get() * PAGE_SIZE;
    let last = 0u64.wrapping_sub(PAGE_SIZE);
    let requests = [
        (start + 8, 1),
        (start + PAGE_SIZE - 1, 1),
        (start, 0),
        (end, 1),
        (end - PAGE_SIZE, 2),
        (start - PAGE_SIZE, 2),
        (start, 1 << 40),
        (start, u64::MAX),
        (1 << 50, 1),
        (last, 1),
        (last, 2),
    ];
    let refused = requests.iter().flat_map(|&(gpa, pages)| {
        let expect = Outcome::Invalid;
        [SHARED, PRIVATE].map(|to| Op::Convert { gpa: Gpa::new(gpa), pages, to, expect })
    });
    bound.passes(refused);
    assert_eq!(facts(memory, all(memory)), before);
    assert!(touch(memory, 0).is_err() && holds(memory, pages(2, 4), 1));
    bound.passes([check(gfns(pages(0, 4)), 1), zero(gfns(pages(4, 8)))]);
    PASSED
}
