//! Devices that have what is shared mapped.

use super::*;

/// Attaches a device; its name, and the steps.
fn attach(engine: &mut Engine, granule: u32) -> (DeviceId, Vec<Step>) {
    let granule = PageCount::from(granule);
    let (id, attaching) = engine.attach(granule).unwrap();
    let mut steps = Vec::new();
    let attached = stage(engine, attaching, &mut steps, &mut None).unwrap();
    engine.finish_attach((id, attached), Holder::new("nic"), granule);
    (id, steps)
}

#[test]
fn a_device_is_given_what_is_shared_and_loses_it_before_anybody_is_looked_for() {
    let mut engine = plain();
    share(&mut engine, pages(4, 8));
    let (id, steps) = attach(&mut engine, 1);
    assert_eq!(steps, [Step::MapDma(id, pages(4, 8))]);
    let private = request(pages(4, 6), Visibility::Private, Contents::Preserve);
    let steps = convert(&mut engine, &private, None).unwrap();
    assert_eq!(
        steps[..3],
        [
            Step::UnmapDma(id, pages(4, 6)),
            Step::UnmapHost(pages(4, 6)),
            Step::CheckReferences(pages(4, 6)),
        ]
    );
    let shared = request(pages(4, 6), Visibility::Shared, Contents::Preserve);
    let steps = convert(&mut engine, &shared, None).unwrap();
    assert_eq!(steps.last(), Some(&Step::MapDma(id, pages(4, 6))), "last of all");
}

#[test]
fn a_conversion_that_fails_gives_the_device_back_what_it_took() {
    let mut engine = plain();
    share(&mut engine, pages(4, 8));
    let (id, _) = attach(&mut engine, 1);
    let private = request(pages(4, 6), Visibility::Private, Contents::Preserve);
    let undone = convert(&mut engine, &private, Some(2)).unwrap_err();
    assert_eq!(undone, [Step::MapDma(id, pages(4, 6))]);
    let undone = convert(&mut engine, &private, Some(3)).unwrap_err();
    let shared = Step::Protect(pages(4, 6), Visibility::Shared);
    assert_eq!(undone, [shared, Step::MapDma(id, pages(4, 6))]);
}

#[test]
fn what_a_device_has_is_neither_discarded_nor_moved_and_its_holder_is_named() {
    let mut engine = plain();
    share(&mut engine, pages(4, 8));
    let (id, _) = attach(&mut engine, 1);
    for refused in [
        engine.discard(pages(0, 8)).map(drop).unwrap_err(),
        engine.move_pages(pages(0, 8)).map(drop).unwrap_err(),
    ] {
        let Blocked::Refused(Refusal::Pinned { page: at, kind, holder }) = refused else {
            panic!("{refused:?}")
        };
        assert_eq!((at, kind), (page(4), PinKind::LongTerm));
        assert_eq!(holder, Holder::new("nic"));
    }
    let detaching = engine.detach(id).unwrap();
    let mut steps = Vec::new();
    let detached = stage(&mut engine, detaching, &mut steps, &mut None).unwrap();
    engine.finish_detach(id, detached);
    assert_eq!(steps, [Step::UnmapDma(id, pages(4, 8))]);
    drop(engine.move_pages(pages(0, 8)).unwrap());
    assert!(matches!(engine.detach(id), Err(Blocked::Abandoned(_))));
}

#[test]
fn nothing_cuts_a_granule() {
    let mut engine = plain();
    share(&mut engine, pages(4, 8));
    for granule in [0, 3, 8] {
        let refused = engine.attach(PageCount::from(granule)).map(drop).unwrap_err();
        assert!(matches!(refused, Blocked::Refused(Refusal::Granule { .. })), "{granule}");
    }
    attach(&mut engine, 4);
    for (start, end) in [(4, 6), (1, 2), (7, 9)] {
        let range = pages(start, end);
        let to = if start == 4 { Visibility::Private } else { Visibility::Shared };
        let refused = claim(&mut engine, &request(range, to, Contents::Preserve));
        assert!(matches!(refused, Err(Refusal::Granule { .. })), "{range}: {refused:?}");
    }
    share(&mut engine, pages(8, 12));
}

#[test]
fn a_device_waits_for_operations_and_for_what_is_owed() {
    let mut engine = plain();
    let private = request(pages(4, 6), Visibility::Shared, Contents::Preserve);
    let Ok(Start::Claimed(conversion)) = claim(&mut engine, &private) else { panic!() };
    assert!(matches!(engine.attach(PageCount::from(1)), Err(Blocked::Busy(_))));
    let undoing = engine.undo(conversion);
    undo(&mut engine, undoing, true);
    let mut owed = super::engine(Platform::Plain, Population::Owed);
    let refused = owed.attach(PageCount::from(1)).map(drop).unwrap_err();
    assert!(matches!(refused, Blocked::Refused(Refusal::Owed { .. })));
}
