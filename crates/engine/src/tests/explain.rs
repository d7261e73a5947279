//! What is told of a page is what holds for it.

use proptest::prelude::*;

use super::*;

/// The level of a range that was mapped.
fn level(range: PageRange) -> Level {
    let geometry = Geometry::new(4, 4).unwrap();
    let is = |level: &Level| geometry.pages(*level) == range.count();
    Level::ALL.into_iter().find(is).unwrap()
}

#[test]
fn the_clause_that_limits_the_level_is_named() {
    let mut engine = plain();
    let vm = VmId(0);
    // The second is off by a page; the third ends within a large page.
    engine.bind(vm, Slot(0), Gfn::from(0), pages(0, 16)).unwrap();
    engine.bind(vm, Slot(1), Gfn::from(0x101), pages(16, 32)).unwrap();
    engine.bind(vm, Slot(2), Gfn::from(0x200), pages(32, 42)).unwrap();
    let limit = |engine: &Engine, at: u32| engine.explain(page(at)).shown[0].limit;
    assert_eq!(limit(&engine, 5), LevelLimit { level: Level::Size1G, by: None });
    let alignment = LevelLimit { level: Level::Size4K, by: Some(Clause::Alignment) };
    assert_eq!(limit(&engine, 17), alignment);
    let fit = |level| LevelLimit { level, by: Some(Clause::Fit) };
    assert_eq!(limit(&engine, 33), fit(Level::Size2M));
    assert_eq!(limit(&engine, 41), fit(Level::Size4K));
    assert!(engine.explain(page(50)).shown.is_empty());

    share(&mut engine, pages(5, 6));
    let shared = Clause::Visibility { page: page(5), is: Visibility::Shared };
    assert_eq!(limit(&engine, 4), LevelLimit { level: Level::Size4K, by: Some(shared) });
    assert_eq!(limit(&engine, 0), LevelLimit { level: Level::Size2M, by: Some(shared) });
    let host = engine.explain(page(0)).host_view;
    assert_eq!(host, LevelLimit { level: Level::Size4K, by: Some(Clause::View) });

    let discard = engine.discard(pages(9, 10)).unwrap();
    let held = Clause::Operation { by: Activity::Discard, range: pages(9, 10) };
    assert_eq!(limit(&engine, 8), LevelLimit { level: Level::Size4K, by: Some(held) });
    let told = engine.explain(page(9)).held.unwrap();
    assert_eq!((told.by, told.undoing, told.abandoned), (Activity::Discard, false, false));
    drop(discard);
    assert!(engine.explain(page(9)).held.unwrap().abandoned);
}

#[test]
fn the_last_operations_are_told_with_what_came_of_them() {
    let mut engine = plain();
    share(&mut engine, pages(0, 8));
    let pin = engine.pin(pages(3, 4), PinKind::Short, Holder::new("disk")).unwrap();
    let private = request(pages(0, 8), Visibility::Private, Contents::Preserve);
    assert!(claim(&mut engine, &private).is_err());
    let known = engine.explain(page(3));
    assert_eq!(known.pins.len(), 1);
    let came: Vec<_> = known.past.iter().map(|past| (past.sequence, &past.came)).collect();
    let pinned = Came::Refused(Refusal::Pinned {
        page: page(3),
        kind: PinKind::Short,
        holder: Holder::new("disk"),
    });
    assert_eq!(came, [(1, &Came::Done), (2, &pinned)]);
    assert_eq!(engine.explain(page(9)).past, []);

    engine.unpin(pin);
    convert(&mut engine, &private, Some(0)).unwrap_err();
    assert_eq!(engine.explain(page(0)).past.last().unwrap().came, Came::Undone(None));
    // However much happens elsewhere, so much is kept and no more.
    for _ in 0..200 {
        share(&mut engine, pages(20, 21));
        convert(&mut engine, &request(pages(20, 21), Visibility::Private, Contents::Zero), None)
            .unwrap();
    }
    assert_eq!(engine.explain(page(20)).past.len(), 64);
    assert_eq!(engine.explain(page(0)).past, []);
}

proptest! {
    /// The level that is told is that of the answer to a fault (INV-5).
    #[test]
    fn the_level_that_is_told_is_the_level_that_is_mapped(
        shared in prop::collection::vec((0u64..64, 1u64..17), 0..6),
        (gfn, first, count) in (0u32..40, 0u64..60, 1u64..64),
        claimed in prop::option::of(0u64..64),
    ) {
        let mut engine = plain();
        for (start, count) in shared {
            share(&mut engine, pages(start, (start + count).min(64)));
        }
        let bound = pages(first, (first + count).min(64));
        engine.bind(VmId(0), Slot(0), Gfn::from(gfn), bound).unwrap();
        let discard = claimed.map(|page| engine.discard(pages(page, page + 1)).unwrap());
        for at in bound.frames().filter(|at| claimed != Some(at.get())) {
            let told = engine.explain(at).shown[0];
            let visibility = engine.pages().get(at).visibility;
            let access = GuestAccess { gfn: told.gfn, visibility };
            match engine.guest_fault(VmId(0), access) {
                GuestAnswer::Now(answer) => {
                    prop_assert_eq!(level(answer.range()), told.limit.level, "page {}", at);
                    engine.answered(answer, Some(Response::Map));
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
        drop(discard);
    }
}
