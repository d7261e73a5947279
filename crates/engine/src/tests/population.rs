//! Contents that are owed, and copies.

use super::*;

#[test]
fn a_population_is_seen_whole_or_not_at_all() {
    let mut engine = engine(Platform::Plain, Population::Owed);
    share(&mut engine, pages(0, 8));
    assert!(waits(&mut engine, page(0)), "it is owed");
    let writing = engine.populate(pages(0, 4)).unwrap();
    assert!(matches!(engine.populate(pages(3, 5)), Err(Blocked::Busy(_))));
    let published = stage(&mut engine, writing, &mut Vec::new(), &mut None).unwrap();
    assert!(waits(&mut engine, page(0)), "it is published, not shown");
    let shown = engine.finish_population(published).unwrap();
    assert_eq!((shown.view(), shown.range()), (View::Guest, pages(0, 4)));
    engine.answered(shown, None);
    let answer = now(engine.touch(View::Host, page(0)));
    engine.answered(answer, Some(Response::Map));
    let whole = engine.populate(pages(3, 5));
    assert!(matches!(whole, Err(Blocked::Refused(refusal)) if refusal.errno() == Errno::EEXIST));

    let writing = engine.populate(pages(4, 8)).unwrap();
    let operation = engine.undo(writing);
    assert_eq!(undo(&mut engine, operation, true), [Step::Free(pages(4, 8))], "bytes may be there");
    assert!(waits(&mut engine, page(5)), "it is still owed");
    engine.settle().unwrap();
    let answer = now(engine.touch(View::Host, page(5)));
    engine.answered(answer, Some(Response::Map));
}

#[test]
fn what_could_not_be_brought_is_denied_until_it_is_discarded() {
    let (mut engine, vm) = (engine(Platform::Plain, Population::Owed), VmId(0));
    engine.bind(vm, Slot(0), 0u32.into(), pages(0, 64)).unwrap();
    share(&mut engine, pages(0, 8));
    engine.fail(pages(2, 4)).unwrap();
    for view in [View::Host, View::Guest] {
        let answer = now(engine.touch(view, page(3)));
        assert_eq!(answer.response(), Response::Poison);
        engine.answered(answer, Some(Response::Poison));
        assert!(engine.markers(view).contains(page(3)));
    }
    let access = GuestAccess { gfn: 2u32.into(), visibility: Visibility::Shared };
    let exit = engine.guest_fault(vm, access);
    assert!(matches!(exit, GuestAnswer::Exit(MemoryFault::SourceFailed(_))));
    assert!(waits(&mut engine, page(4)), "others go on waiting");
    let refused = engine.copy(&[pages(2, 3)]);
    assert!(matches!(refused, Err(Blocked::Refused(refusal)) if refusal.errno() == Errno::EIO));
    assert!(matches!(engine.populate(pages(3, 5)), Err(Blocked::Refused(_))));
    engine.settle().unwrap();
    assert_eq!(engine.pages().get(page(3)).population, Population::Owed, "it is not zeros");
    assert_eq!(engine.pages().get(page(4)).population, Population::Whole);

    let discard = engine.discard(pages(0, 8)).unwrap();
    let cleared = stage(&mut engine, discard, &mut Vec::new(), &mut None).unwrap();
    engine.finish_discard(cleared);
    assert!(engine.markers(View::Host).is_empty() && engine.markers(View::Guest).is_empty());
    let answer = now(engine.touch(View::Host, page(3)));
    assert_eq!(answer.response(), Response::Map);
    engine.answered(answer, Some(Response::Map));
}

#[test]
fn zeroed_pages_are_owed_nothing() {
    let mut engine = engine(Platform::Plain, Population::Owed);
    convert(&mut engine, &request(pages(0, 4), Visibility::Shared, Contents::Zero), None).unwrap();
    assert!(matches!(engine.populate(pages(0, 4)), Err(Blocked::Refused(Refusal::Whole { .. }))));
}

#[test]
fn a_copy_of_several_runs_holds_all_of_them_or_none() {
    let mut engine = plain();
    share(&mut engine, pages(0, 16));
    let to_private = request(pages(8, 12), Visibility::Private, Contents::Preserve);
    let Start::Claimed(draining) = claim(&mut engine, &to_private).unwrap() else { panic!() };
    assert!(matches!(engine.copy(&[pages(0, 4), pages(8, 9)]), Err(Blocked::Busy(_))));
    let other = request(pages(0, 4), Visibility::Private, Contents::Preserve);
    let Start::Claimed(other) = claim(&mut engine, &other).unwrap() else { panic!() };
    assert!(engine.is_drained(&other), "the copy that waits holds nothing");
    drop((draining, other));
}

#[test]
fn what_can_be_brought_is_found_around_what_is_whole_failed_or_held() {
    let mut engine = engine(Platform::Plain, Population::Owed);
    let all = pages(0, 64);
    assert_eq!(engine.first_owed(all), Some(all));
    let writing = engine.populate(pages(2, 4)).unwrap();
    engine.fail(pages(0, 1)).unwrap();
    engine.fail(pages(4, 6)).unwrap();
    assert_eq!(engine.first_owed(pages(0, 8)), Some(pages(1, 2)));
    assert_eq!(engine.first_owed(pages(2, 8)), Some(pages(6, 8)));
    assert_eq!(engine.first_owed(pages(2, 6)), None);
    let published = stage(&mut engine, writing, &mut Vec::new(), &mut None).unwrap();
    let shown = engine.finish_population_showing(published, pages(3, 9)).unwrap();
    assert_eq!(shown.range(), pages(3, 4));
    engine.answered(shown, None);
    assert_eq!(engine.first_owed(pages(2, 64)), Some(pages(6, 64)));
}

#[test]
fn that_nothing_is_owed_any_more_is_noticed_whatever_failed() {
    let mut engine = engine(Platform::Plain, Population::Owed);
    let mut from = page(0);
    assert!(engine.is_owed(&mut from));
    engine.fail(pages(0, 8)).unwrap();
    assert!(engine.is_owed(&mut from) && from == page(8));
    let writing = engine.populate(pages(8, 64)).unwrap();
    assert!(engine.is_owed(&mut from), "it is being brought");
    let published = stage(&mut engine, writing, &mut Vec::new(), &mut None).unwrap();
    assert!(engine.finish_population_showing(published, pages(0, 1)).is_none());
    assert!(!engine.is_owed(&mut from));
}

#[test]
fn a_page_is_late_only_while_it_is_owed_and_nobody_is_at_work_on_it() {
    let mut engine = engine(Platform::Plain, Population::Owed);
    let writing = engine.populate(pages(0, 1)).unwrap();
    assert!(matches!(engine.fail_late(page(0)), Err(Blocked::Busy(_))));
    let published = stage(&mut engine, writing, &mut Vec::new(), &mut None).unwrap();
    let shown = engine.finish_population(published).unwrap();
    engine.answered(shown, None);
    assert_eq!(engine.fail_late(page(0)).unwrap(), None);
    assert_eq!(engine.fail_late(page(1)).unwrap(), Some(page(1)));
    assert_eq!(engine.fail_late(page(1)).unwrap(), None);
    assert!(engine.failed().contains(page(1)));
}
