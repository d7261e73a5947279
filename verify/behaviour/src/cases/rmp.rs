//! SEV-SNP's reverse map table, as it follows what is granted.

use polder::units::{GfnRange, Level, PageCount, PageIndex, PageRange};
use polder::{
    Contents, Error, GuestExit, Memory, MemoryFault, OnBusy, Platform, Population, Refusal, Slot,
    Visibility,
};
use polder_require::patience;
use polder_vmm::scenario::HostAccess;

use super::population::A_WHILE;
use crate::Section::Rmp;
use crate::host::Inside;
use crate::world::{
    BASE, Bound, PASSED, World, all, byte, bytes, check, convert, count, facts, fill, gfn, gfns,
    page, pages, probe, put, seeded, zero,
};
use crate::{Case, Ran, Skipped};

pub(super) const CASES: &[Case] = &[
    Case::new(Rmp, "a private page with memory is the guest's, a shared one nobody's", owners),
    Case::new(Rmp, "nothing is preserved, and zeros can be had to shared only", contents),
    Case::new(Rmp, "what was shared is not what the guest finds, nor the other way", ciphertext),
    Case::new(Rmp, "an access of the other kind exits if it writes, and reads no contents", kinds),
    Case::new(Rmp, "private pages can't be populated by the host, and are named", populated),
    Case::new(Rmp, "private pages are never owed: they are the guest's to fill", never_owed),
    Case::new(Rmp, "a second VM is refused: a page is assigned to one", one_vm),
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
    Case::new(Rmp, "an entry in use is waited for, however long that takes", in_use),
    Case::new(Rmp, "a conversion to private that fails leaves the RMP as it was", fails_to_private),
    Case::new(Rmp, "a conversion to shared that fails leaves the RMP as it was", fails_to_shared),
    Case::new(Rmp, "what could not be made zeros is its guest's no more", not_zeros),
    Case::new(
        Rmp,
        "2M that became private part by part are merged when asked, if they agree",
        merged,
    ),
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

fn in_use(w: &World<'_>) -> Ran {
    let bound = huge(w, 1)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    w.inside().split(memory, index(0));
    // By who would smash the large entry, for another page of it; then by who uses the page itself.
    for (at, smashed) in [(5, 0), (0, 1)] {
        std::thread::scope(|scope| {
            let mut guest = None;
            w.inside().while_in_use(memory, index(at), &mut || {
                let running = scope.spawn(|| bound.passes([check(gfns(page(0)), 1)]));
                std::thread::sleep(patience(A_WHILE));
                assert!(!running.is_finished(), "page {at:#x} is in use");
                assert_eq!(memory.statistics().rmp.smashed, smashed);
                guest = Some(running);
            });
            guest
                .expect("it was called")
                .join()
                .expect("it passes as soon as nobody is in the way");
        });
    }
    bound.passes([check(gfns(all(memory)), 1)]);
    PASSED
}

/// A conversion that meets an entry in use, and so fails.
fn fails(w: &World<'_>, memory: &Memory, range: PageRange, visibility: Visibility, at: u64) {
    let mut failed = None;
    w.inside().while_in_use(memory, index(at), &mut || {
        failed = Some(to(memory, range, visibility));
    });
    let named = matches!(failed, Some(Err(Error::Rmp { page, .. })) if page == index(at));
    assert!(named, "{failed:?}");
    assert_eq!(memory.quarantined(), []);
}

fn fails_to_private(w: &World<'_>) -> Ran {
    // A part of the 2M page is private by 4K entries; the pages after it have 4K folios, one of
    // which is in use.
    let bound = w.bound(w.memory(2 * HUGE)?)?;
    let memory = &bound.memory;
    w.inside().huge_folio(memory, index(0));
    to(memory, all(memory), SHARED).expect("no pins");
    (0..2 * HUGE).for_each(|at| put(memory, at, 5));
    to(memory, pages(0, 256), PRIVATE).expect("no pins");
    let before = (facts(memory, all(memory)), entries(w.inside(), memory, all(memory)));
    assert_eq!(before.1, [(256, SMALL), (768, NOBODYS)]);
    fails(w, memory, all(memory), PRIVATE, 700);
    assert_eq!((facts(memory, all(memory)), entries(w.inside(), memory, all(memory))), before);
    for at in [256, 511, 512, 699, 700, 701, 1023] {
        assert_eq!(byte(memory, at), Some(5), "page {at}");
        put(memory, at, 6);
    }
    audit(w, memory);
    to(memory, all(memory), PRIVATE).expect("it is no longer in use");
    assert_eq!(entries(w.inside(), memory, all(memory)), [(1024, SMALL)]);
    bound.passes([fill(gfns(all(memory)), 1), check(gfns(all(memory)), 1)]);
    PASSED
}

fn fails_to_shared(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(2 * HUGE)?)?;
    let memory = &bound.memory;
    w.inside().huge_folio(memory, index(0));
    bound.passes([fill(gfns(all(memory)), 1)]);
    let before = facts(memory, all(memory));
    fails(w, memory, pages(256, 2 * HUGE), SHARED, 700);
    assert_eq!(facts(memory, all(memory)), before);
    assert_eq!(entries(w.inside(), memory, all(memory)), [(1024, SMALL)], "smashed, and assigned");
    assert_eq!([255, 256, 511, 512, 700, 1023].map(|at| byte(memory, at)), [None; 6]);
    // What was taken unasked and given back the guest has to accept again.
    bound.passes([check(gfns(pages(0, 256)), 1), fill(gfns(all(memory)), 2)]);
    bound.passes([check(gfns(all(memory)), 2)]);
    audit(w, memory);
    assert_eq!(to(memory, pages(256, 2 * HUGE), SHARED), Ok(768));
    assert_eq!(entries(w.inside(), memory, all(memory)), [(256, SMALL), (768, NOBODYS)]);
    PASSED
}

fn not_zeros(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    let mut failed = None;
    w.inside().while_locked(memory, index(2), &mut || {
        failed = Some(memory.convert(pages(2, 5), SHARED, Contents::Zero, OnBusy::Wait));
    });
    let named = matches!(&failed, Some(Err(Error::Quarantined { pages: out, .. })) if *out == [pages(2, 5)]);
    assert!(named, "{failed:?}");
    let rmp = || entries(w.inside(), memory, all(memory));
    assert_eq!(rmp(), [(2, SMALL), (3, NOBODYS), (3, SMALL)]);
    assert_eq!(bytes(memory, all(memory)), [None; 8], "nor the host's");
    bound.passes([check(gfns(pages(0, 2)), 1), check(gfns(pages(5, 8)), 1)]);
    let refused = to(memory, all(memory), SHARED);
    assert_eq!(refused, Err(Refusal::Quarantined { page: index(2) }.into()));
    audit(w, memory);
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
