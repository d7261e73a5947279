//! SEV-SNP's reverse map table, as it follows what is granted.

mod failures;
mod large;

use polder::units::{Level, PageCount, PageIndex, PageRange};
use polder::{
    Contents, Error, GuestExit, Memory, MemoryFault, OnBusy, Platform, Population, Refusal, Slot,
    Visibility,
};
use polder_vmm::scenario::HostAccess;

use crate::Section::Rmp;
use crate::host::Inside;
use crate::world::{
    BASE, Bound, PASSED, World, all, byte, bytes, check, count, facts, fill, gfn, gfns, page,
    pages, probe, put, seeded, zero,
};
use crate::{Case, Ran, Skipped};

pub(super) const FILES: [&[Case]; 3] = [CASES, large::CASES, failures::CASES];

const CASES: &[Case] = &[
    Case::new(Rmp, "a private page with memory is the guest's, a shared one nobody's", owners),
    Case::new(Rmp, "nothing is preserved, and zeros can be had to shared only", contents),
    Case::new(Rmp, "what was shared is not what the guest finds, nor the other way", ciphertext),
    Case::new(Rmp, "an access of the other kind exits if it writes, and reads no contents", kinds),
    Case::new(Rmp, "private pages can't be populated by the host, and are named", populated),
    Case::new(Rmp, "private pages are never owed: they are the guest's to fill", never_owed),
    Case::new(Rmp, "a second VM is refused: a page is assigned to one", one_vm),
    Case::new(Rmp, "what is discarded is nobody's before it is free", discarded),
];

const SHARED: Visibility = Visibility::Shared;
const PRIVATE: Visibility = Visibility::Private;

/// Pages of 2 MiB.
const HUGE: u64 = 512;

fn index(page: u64) -> PageIndex {
    PageIndex::new(page).expect("a page of a case")
}

/// Memory of as many 2M folios, bound from [`BASE`] on.
fn huge(w: &World<'_>, folios: u64) -> Result<Bound, Skipped> {
    let bound = w.bound(w.memory(folios * HUGE)?)?;
    (0..folios).for_each(|at| w.inside().huge_folio(&bound.memory, index(at * HUGE)));
    Ok(bound)
}

/// Assigned, and by a large entry.
const LARGE: (bool, bool) = (true, true);
/// Assigned, by a 4K entry.
const SMALL: (bool, bool) = (true, false);
/// Not assigned.
const NOBODYS: (bool, bool) = (false, false);

/// Converts; what memory there is stays.
fn to(memory: &Memory, range: PageRange, to: Visibility) -> Result<u64, Error> {
    memory.convert(range, to, Contents::Unspecified, OnBusy::Wait).map(PageCount::get)
}

/// The entries of pages, in runs.
fn entries(inside: &dyn Inside, memory: &Memory, range: PageRange) -> Vec<(u64, (bool, bool))> {
    let mut runs: Vec<(u64, (bool, bool))> = Vec::new();
    for page in range.frames() {
        let entry = inside.rmp(memory, page);
        match runs.last_mut().filter(|last| last.1 == entry) {
            Some(last) => last.0 += 1,
            None => runs.push((1, entry)),
        }
    }
    runs
}

fn audit(w: &World<'_>, memory: &Memory) {
    assert_eq!(w.inside().audit(memory), Ok(()));
}
fn owners(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    let rmp = || entries(w.inside(), memory, all(memory));
    assert_eq!(rmp(), [(8, SMALL)]);
    to(memory, pages(2, 5), SHARED).expect("no pins");
    assert_eq!(rmp(), [(2, SMALL), (3, NOBODYS), (3, SMALL)]);
    to(memory, pages(3, 4), PRIVATE).expect("no pins");
    assert_eq!(rmp(), [(2, SMALL), (1, NOBODYS), (1, SMALL), (1, NOBODYS), (3, SMALL)]);
    bound.passes([check(gfns(pages(0, 2)), 1), zero(gfns(page(3))), check(gfns(pages(5, 8)), 1)]);
    bound.passes([probe(gfns(page(3)), HostAccess::Denied)]);
    audit(w, memory);
    PASSED
}

fn contents(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    let before = facts(memory, all(memory));
    let ask = |to, contents| memory.convert(pages(0, 4), to, contents, OnBusy::Wait);
    let refused = |contents, to| {
        let platform = Platform::Snp;
        Err(Error::Refused(Refusal::Contents { contents, to, platform }))
    };
    assert_eq!(ask(SHARED, Contents::Preserve), refused(Contents::Preserve, SHARED));
    assert_eq!(facts(memory, all(memory)), before);
    bound.passes([check(gfns(all(memory)), 1)]);
    assert_eq!(ask(SHARED, Contents::Zero).map(PageCount::get), Ok(4));
    assert_eq!(bytes(memory, pages(0, 4)), [Some(0); 4]);
    (0..4).for_each(|page| put(memory, page, 5));
    for contents in [Contents::Preserve, Contents::Zero] {
        assert_eq!(ask(PRIVATE, contents), refused(contents, PRIVATE));
    }
    assert_eq!(bytes(memory, pages(0, 4)), [Some(5); 4], "nothing has changed");
    assert_eq!(ask(PRIVATE, Contents::Unspecified).map(PageCount::get), Ok(4));
    bound.passes([zero(gfns(pages(0, 4))), check(gfns(pages(4, 8)), 1)]);
    PASSED
}

fn ciphertext(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(4)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    to(memory, page(1), SHARED).expect("no pins");
    assert!(!crate::world::holds(memory, page(1), 1), "the host reads what the guest wrote");
    put(memory, 1, 5);
    to(memory, page(1), PRIVATE).expect("no pins");
    assert_eq!(byte(memory, 1), None);
    bound.passes([zero(gfns(page(1))), check(gfns(pages(2, 4)), 1)]);
    PASSED
}

fn kinds(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(2)?)?;
    let memory = (&bound.memory, bound.vm);
    to(memory.0, page(1), SHARED).expect("no pins");
    for (at, granted) in [(0, PRIVATE), (1, SHARED)] {
        let (gpa, wanted) = (gfn(BASE + at).gpa(), granted.other());
        let mismatch = MemoryFault::Mismatch { gfns: gfns(page(at)), wanted };
        assert_eq!(bound.guest.access(memory, gpa, wanted, None), Err(mismatch), "unmapped");
        assert_eq!(bound.guest.access(memory, gpa, granted, Some(5)), Ok(5));
        assert_eq!(bound.guest.access(memory, gpa, wanted, Some(6)), Err(mismatch));
        let read = bound.guest.access(memory, gpa, wanted, None);
        assert!(read != Ok(5) && (granted == PRIVATE) == read.is_ok(), "{read:?}");
        assert_eq!(bound.guest.access(memory, gpa, granted, None), Ok(5), "it wrote nothing");
    }
    PASSED
}

fn populated(w: &World<'_>) -> Ran {
    let bound = w.bound(w.owed(4)?)?;
    let memory = &bound.memory;
    to(memory, pages(2, 4), PRIVATE).expect("no pins");
    let platform = Platform::Snp;
    let named = Error::Refused(Refusal::GuestFills { page: index(2), platform });
    assert_eq!(named.errno() as i32, 95, "EOPNOTSUPP");
    assert_eq!(memory.populate(all(memory), &[7; 4096]), Err(named));
    assert_eq!(memory.populate(page(1), &[7; 4096]), Ok(()));
    assert_eq!(byte(memory, 1), Some(7));
    bound.passes([zero(gfns(pages(2, 4)))]);
    PASSED
}

fn never_owed(w: &World<'_>) -> Ran {
    let refused = w.try_build(Memory::builder(count(8)).owed())?;
    let error = refused.expect_err("nobody could fill it");
    assert_eq!(error.errno() as i32, 95, "EOPNOTSUPP");
    assert!(error.way_out().is_some_and(|way_out| way_out.contains("shared")), "{error}");

    // What is owed, or failed, or neither: the guest has it as soon as it is private.
    let bound = w.bound(w.owed(8)?)?;
    let memory = &bound.memory;
    memory.populate(pages(0, 2), &[7; 8192]).expect("it is owed");
    memory.fail(pages(4, 6)).expect("it is owed");
    to(memory, pages(1, 7), PRIVATE).expect("no pins");
    let owed: Vec<_> = facts(memory, all(memory))
        .into_iter()
        .filter_map(|(run, facts)| (facts.population == Population::Owed).then_some(run))
        .collect();
    assert_eq!(owed, [page(7)]);
    bound.passes([zero(gfns(pages(1, 7))), fill(gfns(pages(1, 7)), 1)]);
    // Nobody can say any more that it will not come.
    let whole = |page| Err(Error::Refused(Refusal::Whole { page }));
    assert_eq!(memory.fail(pages(4, 8)), whole(index(4)));
    memory.fail(page(7)).expect("it is owed");
    memory.settle().expect("the machine can");
    bound.passes([check(gfns(pages(1, 7)), 1)]);
    // Shared again, it is owed no more; discarded, what failed is zeros.
    to(memory, page(2), SHARED).expect("no pins");
    assert_eq!(memory.populate(page(2), &[7]), whole(index(2)));
    memory.discard(pages(2, 8), OnBusy::Wait).expect("no pins");
    assert_eq!([2, 7].map(|at| byte(memory, at)), [Some(0); 2]);
    bound.passes([zero(gfns(pages(2, 8))), check(gfns(page(1)), 1)]);
    PASSED
}

fn one_vm(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(4)?)?;
    let other = w.guest()?;
    let vm = other.attach(&bound.memory);
    let refused = bound.memory.bind(vm, Slot(0), gfn(BASE), page(0));
    assert_eq!(refused, Err(Error::OneVm { owner: bound.vm, vm }));
    bound.passes([fill(gfns(page(0)), 1), check(gfns(page(0)), 1)]);
    PASSED
}

fn discarded(w: &World<'_>) -> Ran {
    let bound = huge(w, 1)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    memory.discard(pages(5, 9), OnBusy::Wait).expect("no pins");
    assert_eq!(entries(w.inside(), memory, all(memory)), [(5, SMALL), (4, NOBODYS), (503, SMALL)]);
    bound.passes([check(gfns(pages(0, 5)), 1), zero(gfns(pages(5, 9))), check(gfns(page(9)), 1)]);
    memory.discard(all(memory), OnBusy::Wait).expect("no pins");
    assert_eq!(memory.existing(), Ok(vec![]));
    audit(w, memory);
    // Who validates and does not clear finds garbage, not zeros; and nothing of what was there.
    let vcpu = memory.machine_vcpu(bound.vm).expect("memory of this host");
    let mut words = [0; 8];
    let not_validated = Err(GuestExit::NotValidated(gfn(BASE)));
    assert_eq!(vcpu.read(gfn(BASE).gpa(), PRIVATE, &mut words), not_validated);
    assert_eq!(vcpu.pvalidate(gfn(BASE), Level::Size4K, true), Ok(Ok(true)));
    assert_eq!(vcpu.read(gfn(BASE).gpa(), PRIVATE, &mut words), Ok(()));
    assert!(words != [0; 8] && words[..] != seeded(gfn(BASE), 1)[..8], "{words:?}");
    // Who has the page shared finds zeros.
    memory.discard(page(0), OnBusy::Wait).expect("no pins");
    to(memory, page(0), SHARED).expect("no pins");
    assert_eq!(byte(memory, 0), Some(0));
    to(memory, page(0), PRIVATE).expect("no pins");
    bound.passes([zero(gfns(all(memory))), fill(gfns(all(memory)), 2)]);
    audit(w, memory);
    PASSED
}
