//! Showing memory to VMs.

use std::sync::atomic::{AtomicBool, Ordering};

use polder::units::{Geometry, GfnRange, Level};
use polder::{Error, Memory, MemoryFault, Refusal, Slot, Visibility};
use polder_vmm::scenario::{HostAccess, Op, Visibility as Side};

use crate::Section::Bind;
use crate::world::{
    BASE, PASSED, Stop, World, all, bytes, check, convert, count, facts, fill, gfn, gfns, holds,
    page, pages, probe, share_all, to,
};
use crate::{Case, Ran};

pub(crate) const SLOTS: &str = "every slot of the VM can be bound, and none past the last";

pub(crate) const ANOTHER: &str =
    "frames of another memory of the VM are refused, and it loses none of its pages";

pub(crate) const DROPPED: &str = "memory that is dropped leaves no slot behind";

pub(crate) const MOVED: &str = "a slot that moves under a guest at work shows it what it shows now";

pub(super) const CASES: &[Case] = &[
    Case::new(Bind, "pages past the object's end, or frames past the last, are refused", beyond),
    Case::new(Bind, "an overlap in guest frames is refused, in another VM it is not", frames),
    Case::new(Bind, "an overlap in pages is refused, in another VM it is not", overlap),
    Case::new(Bind, "a slot in use is refused; a slot unbound can be bound anew", rebind),
    Case::new(Bind, ANOTHER, another_memory),
    Case::new(Bind, SLOTS, slots),
    Case::new(Bind, MOVED, moved),
    Case::new(Bind, "unbinding frees no page and changes none", unbind),
    Case::new(Bind, DROPPED, dropped),
    Case::new(Bind, "two VMs see one object, and a conversion holds for both", two_vms),
    Case::new(Bind, "how large a page a binding can map is decided when it is made", levels),
];

fn beyond(w: &World<'_>) -> Ran {
    let memory = w.memory(8)?;
    let guest = w.guest()?;
    let vm = guest.attach(&memory);
    let end = memory.pages().get();
    for range in [pages(0, end + 1), pages(end, end + 1), pages(end - 1, 1 << 40)] {
        let refused = memory.bind(vm, Slot(0), gfn(BASE), range);
        assert_eq!(refused, Err(Refusal::Beyond { range, pages: memory.pages() }.into()));
    }
    let last = gfn((1 << 52) - 1);
    let refused = memory.bind(vm, Slot(0), last, pages(0, 2));
    assert!(matches!(refused, Err(Error::Refused(Refusal::Range(_)))), "{refused:?}");
    // Not even an empty range of frames, or one of parts of pages, can be named.
    assert_eq!(GfnRange::between(5, 5), None);
    assert!(GfnRange::from_bytes(0x800, 0x1000).is_err());
    assert_eq!(memory.bindings(), []);
    assert_eq!(memory.bind(vm, Slot(0), gfn(BASE), all(&memory)), Ok(()));
    PASSED
}

fn frames(w: &World<'_>) -> Ran {
    let memory = w.memory(16)?;
    let bound = w.bound(memory)?;
    let (memory, other) = (&bound.memory, w.guest()?);
    memory.unbind(bound.vm, Slot(0)).expect("it is bound");
    memory.bind(bound.vm, Slot(0), gfn(BASE), pages(0, 4)).expect("the slot is free");
    for (at, range) in [(0, pages(4, 8)), (3, pages(8, 9)), (0, pages(5, 6)), (2, pages(4, 16))] {
        let refused = memory.bind(bound.vm, Slot(1), gfn(BASE + at), range);
        let expected = GfnRange::new(gfn(BASE + at), range.count()).expect("small");
        let taken = Refusal::GfnsTaken { gfns: expected, slot: Slot(0) };
        assert_eq!(refused, Err(taken.into()));
    }
    let vm = other.attach(memory);
    assert_eq!(memory.bind(vm, Slot(1), gfn(BASE), pages(4, 8)), Ok(()));
    assert_eq!(memory.bind(bound.vm, Slot(1), gfn(BASE + 4), pages(4, 8)), Ok(()));
    assert_eq!(memory.bindings().len(), 3);
    PASSED
}

fn overlap(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let (memory, other) = (&bound.memory, w.guest()?);
    let elsewhere = gfn(BASE + memory.pages().get());
    for range in [pages(0, 16), page(0), page(15)] {
        let refused = memory.bind(bound.vm, Slot(1), elsewhere, range);
        assert_eq!(refused, Err(Refusal::PagesTaken { range, slot: Slot(0) }.into()));
    }
    let vm = other.attach(memory);
    assert_eq!(memory.bind(vm, Slot(1), elsewhere, page(15)), Ok(()));
    PASSED
}

fn another_memory(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    bound.passes(bound.converted(gfns(pages(4, 8)), Side::Shared, 1));
    for builder in [Memory::builder, |pages| Memory::builder(pages).shared()] {
        let other = w.try_build(builder(count(8)))?.expect("memory of a sensible size");
        let vm = bound.guest.attach(&other);
        for at in [0, 3, 7] {
            let refused = other.bind(vm, Slot(5), gfn(BASE + at), pages(0, 8));
            let refused = refused.expect_err("frames of another memory");
            assert_eq!(refused.errno() as i32, 17, "EEXIST: {refused}");
        }
        assert_eq!(other.bindings(), []);
        let free = gfn(BASE + memory.pages().get());
        let gone = other.bind(vm, Slot(5), free, pages(0, 8));
        assert_eq!(gone, Ok(()), "what was refused left nothing");
        other.unbind(vm, Slot(5)).expect("it is bound");
        bound.passes([
            check(gfns(all(memory)), 1),
            probe(gfns(pages(0, 4)), HostAccess::Denied),
            probe(gfns(pages(4, 8)), HostAccess::Readable),
        ]);
        assert!(holds(memory, pages(4, 8), 1));
    }
    PASSED
}

fn rebind(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    let taken = Error::Refused(Refusal::SlotTaken { slot: Slot(0) });
    assert_eq!(memory.bind(vm, Slot(0), gfn(BASE + 0x100), page(0)), Err(taken));
    let none = Error::Refused(Refusal::NoSuchSlot { slot: Slot(7) });
    assert_eq!(memory.unbind(vm, Slot(7)), Err(none));
    bound.passes([fill(gfns(pages(0, 8)), 1), fill(gfns(pages(8, 16)), 2)]);

    // The halves trade places: each page keeps its bytes, and is seen at its new frame.
    assert_eq!(memory.unbind(vm, Slot(0)), Ok(()));
    assert_eq!(memory.bind(vm, Slot(0), gfn(BASE), pages(8, 16)), Ok(()));
    assert_eq!(memory.bind(vm, Slot(3), gfn(BASE + 8), pages(0, 8)), Ok(()));
    let word = |page: u64, was: u64, seed| Op::Load {
        gpa: gfn(BASE + page).gpa(),
        expect: polder_vmm::scenario::pattern(gfn(BASE + was).gpa(), seed),
    };
    bound.passes([word(0, 8, 2), word(7, 15, 2), word(8, 0, 1), word(15, 7, 1)]);
    share_all(memory);
    for (at, seed) in [(0, 1), (8, 2)] {
        assert!(holds(memory, pages(at, at + 8), seed) || !crate::world::keeps(memory));
    }
    PASSED
}

fn slots(w: &World<'_>) -> Ran {
    let memory = w.memory(1026)?;
    let guest = w.guest()?;
    let (vm, slots) = (guest.attach(&memory), guest.slots());
    // Any number of them, and the very last.
    let some = (0..slots.min(1024)).chain([slots - 1]);
    for (slot, at) in some.clone().zip(0..) {
        assert_eq!(memory.bind(vm, Slot(slot), gfn(BASE + 2 * at), page(at)), Ok(()), "{slot}");
    }
    for slot in [0x8000, u32::MAX] {
        let refused = memory.bind(vm, Slot(slot), gfn(BASE + 2 * 1025), page(1025));
        assert!(matches!(refused, Err(Error::Host(_) | Error::Refused(_))), "{slot}: {refused:?}");
    }
    assert_eq!(memory.bindings().len(), some.clone().count());
    // What was refused left nothing: page and frame are free.
    memory.unbind(vm, Slot(0)).expect("it is bound");
    assert_eq!(memory.bind(vm, Slot(0), gfn(BASE + 2 * 1025), page(1025)), Ok(()));
    PASSED
}

fn unbind(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    bound.passes([fill(gfns(all(memory)), 3)]);
    bound.passes(bound.converted(gfns(pages(2, 4)), Side::Shared, 3));
    let (before, existing) = (facts(memory, all(memory)), memory.existing());
    memory.unbind(vm, Slot(0)).expect("it is bound");
    assert_eq!((facts(memory, all(memory)), memory.existing()), (before, existing));
    assert_eq!(memory.bind(vm, Slot(9), gfn(BASE), all(memory)), Ok(()));
    let host = probe(gfns(pages(0, 2)), HostAccess::Denied);
    bound.passes([check(gfns(all(memory)), 3), host]);
    assert!(holds(memory, pages(2, 4), 3));
    PASSED
}

fn dropped(w: &World<'_>) -> Ran {
    let other = w.bound(w.memory(2)?)?;
    let memory = w.memory(8)?;
    let vm = other.guest.attach(&memory);
    let at = GfnRange::one(gfn(BASE + other.memory.pages().get()));
    memory.bind(vm, Slot(1), at.start(), all(&memory)).expect("a free slot");
    other.passes([fill(at, 4), check(at, 4)]);
    drop(memory);
    let load = Op::Load { gpa: at.start().gpa(), expect: u64::MAX };
    let ended = other.run([load]);
    assert_eq!((ended.checks_passed, ended.faults), (1, vec![MemoryFault::Unbound(at)]));
    PASSED
}

fn two_vms(w: &World<'_>) -> Ran {
    let one = w.bound(w.memory(16)?)?;
    let (memory, guest) = (&one.memory, w.guest()?);
    let vm = guest.attach(memory);
    memory.bind(vm, Slot(0), gfn(BASE), all(memory)).expect("another VM's first slot");
    let other = |mut ops: Vec<Op>| {
        ops.push(Op::Done);
        let ended = guest.run((memory, vm), &[ops]);
        assert_eq!((ended.end, ended.faults), (polder_vmm::End::Ok, vec![]), "the other guest");
    };
    let (some, rest) = (gfns(pages(0, 8)), gfns(pages(8, 16)));
    one.passes([fill(some, 1), fill(rest, 2), convert(some, Side::Shared)]);
    other(vec![probe(some, HostAccess::Readable), check(some, 1), check(rest, 2)]);
    // What one shared, the other makes private: the host is cut off.
    other(vec![convert(some, Side::Private), fill(some, 3)]);
    assert_eq!(bytes(memory, pages(0, 16)), [None; 16]);
    one.passes([probe(some, HostAccess::Denied), check(some, 3)]);
    memory.unbind(one.vm, Slot(0)).expect("it is bound");
    other(vec![check(some, 3), check(rest, 2), fill(rest, 4)]);
    assert_eq!(to(memory, page(15), Visibility::Shared), Ok(1));
    assert!(holds(memory, page(15), 4));
    PASSED
}

fn levels(w: &World<'_>) -> Ran {
    let memory = w.memory(2048)?;
    let guest = w.guest()?;
    let vm = guest.attach(&memory);
    let level_at = |gfn_number, range, at: u32| {
        memory.bind(vm, Slot(0), gfn(gfn_number), range).expect("nothing else is bound");
        let (_, _, binding) = memory.bindings()[0];
        memory.unbind(vm, Slot(0)).expect("it was bound");
        binding.level(at.into(), Geometry::X86_64)
    };
    let aligned = 0x2000;
    assert_eq!(level_at(aligned, pages(0, 2048), 700), Level::Size2M);
    assert_eq!(level_at(aligned + 1, pages(0, 2048), 700), Level::Size4K, "not congruent");
    assert_eq!(level_at(aligned + 1, pages(1, 2048), 700), Level::Size2M, "congruent again");
    assert_eq!(level_at(aligned + 1, pages(1, 2048), 511), Level::Size4K, "reaches out");
    assert_eq!(level_at(aligned, pages(0, 1000), 700), Level::Size4K, "reaches out above");
    PASSED
}

fn moved(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    bound.passes([fill(gfns(pages(0, 4)), 1), fill(gfns(pages(4, 8)), 2)]);
    let gpa = gfn(BASE).gpa();
    let look = || bound.guest.access((memory, vm), gpa, polder::Visibility::Private, None);
    let first = look().expect("it is bound");
    let stop = AtomicBool::new(false);
    let mut words = [first, first];
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        for _ in 0..2 {
            scope.spawn(|| {
                // Each look is by a new vCPU, of which a VM has 1024 at most on some kernels.
                for _ in 0..300 {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let seen = look();
                    assert!(seen.is_ok() || seen.is_err_and(is_unbound), "{seen:?}");
                }
            });
        }
        for round in 0..200_usize {
            let start = 4 * ((round as u64 + 1) % 2);
            memory.unbind(vm, Slot(0)).expect("it is bound");
            memory.bind(vm, Slot(0), gfn(BASE), pages(start, start + 4)).expect("it is free");
            let word = look().expect("it is bound");
            let known = &mut words[round % 2];
            if round < 2 {
                *known = word;
            }
            assert_eq!(word, *known, "in round {round}");
        }
    });
    assert_ne!(words[0], words[1]);
    PASSED
}

fn is_unbound(fault: MemoryFault) -> bool {
    matches!(fault, MemoryFault::Unbound(_))
}
