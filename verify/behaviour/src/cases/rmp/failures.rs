//! What is in use or locked, and so can't be changed for now.

use polder::units::PageRange;
use polder::{Contents, Error, Memory, OnBusy, Refusal, Visibility};
use polder_require::patience;

use super::{HUGE, NOBODYS, PRIVATE, SHARED, SMALL, audit, entries, huge, index, to};
use crate::Section::Rmp;
use crate::cases::population::A_WHILE;
use crate::world::{PASSED, World, all, byte, bytes, check, facts, fill, gfns, page, pages, put};
use crate::{Case, Ran};

pub(super) const CASES: &[Case] = &[
    Case::new(Rmp, "an entry in use is waited for, however long that takes", in_use),
    Case::new(Rmp, "a conversion to private that fails leaves the RMP as it was", fails_to_private),
    Case::new(Rmp, "a conversion to shared that fails leaves the RMP as it was", fails_to_shared),
    Case::new(Rmp, "what could not be made zeros is its guest's no more", not_zeros),
];

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
