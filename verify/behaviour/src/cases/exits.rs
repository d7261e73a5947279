//! Guest accesses that end in the VMM.

use polder::units::{GfnRange, PageRange};
use polder::{Contents, Error, MemoryFault, OnBusy, Refusal, Slot, Visibility};
use polder_vmm::scenario::{Op, Visibility as Side};
use polder_vmm::{End, Failure};

use crate::Section::Exits;
use crate::world::{
    BASE, Bound, PASSED, World, all, check, fill, gfn, gfns, page, pages, share_all, to,
};
use crate::{Case, Ran, Trouble};

pub(crate) const MISMATCH: &str = "a guest's access of the other kind than granted comes as that";
pub(crate) const FAILED: &str = "memory that fails reaches the VMM as a typed exit, page named";

pub(crate) const PLAIN_VM: &str = "a plain VM's accesses are of no kind, and never differ";

pub(crate) const QUARANTINE_EXIT: &str =
    "a page in quarantine reaches the VMM as a typed exit, page named";

pub(super) const CASES: &[Case] = &[
    Case::new(Exits, "a guest's access beyond its memory comes to the VMM, unbound", beyond),
    Case::new(Exits, "a guest's access to a slot that is gone comes to the VMM, unbound", gone),
    Case::new(
        Exits,
        "the fault for an access of the other kind says what was wanted",
        api_mismatch,
    ),
    Case::new(Exits, PLAIN_VM, plain),
    Case::new(Exits, MISMATCH, mismatch),
    Case::new(Exits, QUARANTINE_EXIT, quarantine),
    Case::new(Exits, FAILED, failed),
];

/// Loads that find nothing, and a store that goes nowhere.
fn lost(bound: &Bound, at: GfnRange) {
    let gpa = at.start().gpa();
    let load = Op::Load { gpa, expect: u64::MAX };
    let ended = bound.run([load, Op::Store { gpa, value: 5 }, load]);
    assert_eq!((ended.end, ended.checks_passed), (End::Ok, 2));
    assert_eq!(ended.faults, [MemoryFault::Unbound(at); 3]);
}

fn beyond(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(4)?)?;
    let end = BASE + bound.memory.pages().get();
    for at in [end, BASE - 1, end + 0x3000] {
        lost(&bound, GfnRange::one(gfn(at)));
    }
    assert_eq!(bound.memory.existing(), Ok(vec![]));
    PASSED
}

fn gone(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    bound.passes([fill(gfns(all(memory)), 1)]);
    bound.passes(bound.converted(gfns(pages(4, 8)), Side::Shared, 1));
    memory.unbind(vm, Slot(0)).expect("it is bound");
    // The guest had them mapped, a private one and a shared one.
    for at in [0, 7] {
        lost(&bound, gfns(page(at)));
    }
    memory.bind(vm, Slot(1), gfn(BASE), all(memory)).expect("free");
    bound.passes([check(gfns(all(memory)), 1)]);
    PASSED
}

fn api_mismatch(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory_apart(4)?)?;
    let memory = &bound.memory;
    let ask = |at: u64, wanted| memory.guest_fault(bound.vm, gfn(BASE + at).gpa(), wanted);
    to(memory, page(1), Visibility::Shared).expect("no pins");
    for (at, granted) in [(0, Visibility::Private), (1, Visibility::Shared)] {
        let wanted = granted.other();
        let mismatch = MemoryFault::Mismatch { gfns: gfns(page(at)), wanted };
        assert_eq!(ask(at, wanted), Ok(Some(mismatch)));
        assert_eq!(ask(at, granted), Ok(None));
    }
    let end = memory.pages().get();
    let unbound = MemoryFault::Unbound(gfns(page(end)));
    assert_eq!(ask(end, Visibility::Private), Ok(Some(unbound)));
    PASSED
}

fn plain(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(4)?)?;
    to(&bound.memory, page(1), Visibility::Shared).expect("no pins");
    for at in [0, 1] {
        for wanted in [Visibility::Private, Visibility::Shared] {
            let gpa = gfn(BASE + at).gpa();
            assert_eq!(bound.memory.guest_fault(bound.vm, gpa, wanted), Ok(None));
            let memory = (&bound.memory, bound.vm);
            assert_eq!(bound.guest.access(memory, gpa, wanted, Some(7)), Ok(7));
        }
    }
    PASSED
}

fn mismatch(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory_apart(4)?)?;
    let memory = (&bound.memory, bound.vm);
    to(memory.0, page(1), Visibility::Shared).expect("no pins");
    for (at, granted) in [(0, Visibility::Private), (1, Visibility::Shared)] {
        let (gpa, wanted) = (gfn(BASE + at).gpa(), granted.other());
        assert_eq!(bound.guest.access(memory, gpa, granted, Some(5)), Ok(5));
        let mismatch = MemoryFault::Mismatch { gfns: gfns(page(at)), wanted };
        for value in [Some(6), None] {
            assert_eq!(bound.guest.access(memory, gpa, wanted, value), Err(mismatch));
        }
        assert_eq!(bound.guest.access(memory, gpa, granted, None), Ok(5), "it wrote nothing");
    }
    PASSED
}

/// The guest meets the first page of `out`, which is out of use, and no other.
fn out_of_use(bound: &Bound, out: PageRange, seed: u64) {
    let memory = &bound.memory;
    let first = PageRange::one(out.start());
    let gpa = gfns(first).start().gpa();
    for op in [Op::Load { gpa, expect: 0 }, Op::Store { gpa, value: 1 }] {
        let ended = bound.run([check(gfns(pages(0, 2)), seed), op]);
        let page = Some(out.start());
        let fault = MemoryFault::Quarantined(gfns(first));
        let failures =
            [Failure::MemoryFailure { vcpu: 0, page }, Failure::MemoryFault { vcpu: 0, fault }];
        let is_named = failures.map(End::Failed).contains(&ended.end);
        assert!(is_named, "{:?}", ended.end);
    }
    let met = MemoryFault::Quarantined(gfns(first));
    assert_eq!(memory.guest_fault(bound.vm, gpa, Visibility::Private), Ok(Some(met)));
    let read = memory.read(bound.vm, gpa, &mut [0]);
    assert_eq!(read, Err(Error::Refused(Refusal::Quarantined { page: out.start() })));
    assert_eq!(memory.quarantined(), [out]);
    let rest = gfns(pages(out.end(), memory.pages().get()));
    bound.passes([check(rest, seed), fill(rest, seed + 1), check(rest, seed + 1)]);
}

fn quarantine(w: &World<'_>) -> Ran {
    for to in [Visibility::Shared, Visibility::Private] {
        // A part of a huge page is made zeros by writing them, which does not fail.
        let whole = w.folios();
        let bound = w.bound(w.memory(whole.count(4).max(8))?)?;
        let memory = &bound.memory;
        if to == Visibility::Private {
            share_all(memory);
        }
        // The guest has it mapped.
        bound.passes([fill(gfns(all(memory)), 1)]);
        let failed = w.in_trouble(Trouble::Free, || {
            memory.convert(whole.page(2), to, Contents::Zero, OnBusy::Wait)
        })?;
        assert!(matches!(failed, Err(Error::Quarantined { .. })), "{failed:?}");
        out_of_use(&bound, whole.page(2), 1);
    }
    PASSED
}

fn failed(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    bound.passes([fill(gfns(all(&bound.memory)), 1)]);
    w.inside().fail(&bound.memory, 2u32.into());
    out_of_use(&bound, page(2), 1);
    PASSED
}
