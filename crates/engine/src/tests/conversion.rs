//! Conversions: their steps, what refuses them, and how they are undone.

use std::string::ToString;

use super::*;

#[test]
fn everybody_is_cut_off_before_anybody_is_looked_for() {
    let mut engine = plain();
    share(&mut engine, pages(4, 12));
    let to_private = request(pages(0, 8), Visibility::Private, Contents::Preserve);
    let part = pages(4, 8);
    assert_eq!(
        convert(&mut engine, &to_private, None).unwrap(),
        [
            Step::UnmapHost(part),
            Step::CheckReferences(part),
            Step::Protect(part, Visibility::Private)
        ],
        "pages that are private already are left alone"
    );
    assert!(convert(&mut engine, &to_private, None).unwrap().is_empty(), "nothing is left to do");
}

#[test]
fn an_answer_in_flight_is_waited_for_and_no_other_is_given() {
    let mut engine = plain();
    share(&mut engine, pages(0, 8));
    let early = now(engine.touch(View::Host, page(3)));
    assert_eq!((early.response(), early.range()), (Response::Map, pages(3, 4)));
    let copying = engine.copy(&[pages(5, 6)]).unwrap();
    let to_private = request(pages(0, 8), Visibility::Private, Contents::Preserve);
    let Start::Claimed(draining) = claim(&mut engine, &to_private).unwrap() else { panic!() };
    assert!(!engine.is_drained(&draining));
    assert!(waits(&mut engine, page(4)), "faults in a draining range wait");
    assert!(matches!(engine.copy(&[pages(7, 9)]), Err(Blocked::Busy(_))));
    engine.answered(early, Some(Response::Map));
    assert!(!engine.is_drained(&draining));
    engine.copied(copying);
    assert!(engine.is_drained(&draining));
    drop(draining);
}

#[test]
#[should_panic(expected = "before the range was drained")]
fn no_step_is_given_before_the_range_is_drained() {
    let mut engine = plain();
    share(&mut engine, pages(0, 8));
    let _early = now(engine.touch(View::Host, page(3)));
    let to_private = request(pages(0, 8), Visibility::Private, Contents::Preserve);
    let Start::Claimed(draining) = claim(&mut engine, &to_private).unwrap() else { panic!() };
    engine.next_step(&draining);
}

#[test]
fn a_pinned_page_refuses_the_whole_range_and_is_named() {
    let mut engine = plain();
    share(&mut engine, pages(0, 8));
    let blk = engine.pin(pages(6, 8), PinKind::LongTerm, Holder::new("virtio-blk")).unwrap();
    let net = engine.pin(pages(5, 6), PinKind::Short, Holder::new("virtio-net")).unwrap();
    let to_private = request(pages(0, 8), Visibility::Private, Contents::Preserve);
    let refusal = claim(&mut engine, &to_private).unwrap_err();
    assert_eq!(refusal.errno(), Errno::EAGAIN);
    assert!(refusal.to_string().starts_with("page 0x5 is pinned (short) by virtio-net"));
    assert!(engine.is_idle(), "nothing was claimed");
    engine.unpin(net);
    engine.unpin(blk);
    assert_eq!(convert(&mut engine, &to_private, None).unwrap().len(), 3);
    let private = engine.pin(pages(0, 1), PinKind::Short, Holder::new("virtio-net"));
    assert!(matches!(private, Err(Blocked::Refused(Refusal::Private { .. }))));
}

#[test]
fn a_failed_step_is_undone_with_all_before_it_last_first() {
    let mut engine = plain();
    for range in [pages(1, 2), pages(3, 4)] {
        share(&mut engine, range);
    }
    // Steps: 2 x unmap, 2 x check references, 2 x protect; the last one fails.
    let to_private = request(pages(0, 8), Visibility::Private, Contents::Preserve);
    let undone = convert(&mut engine, &to_private, Some(5)).unwrap_err();
    assert_eq!(
        undone,
        [
            Step::Protect(pages(3, 4), Visibility::Shared),
            Step::Protect(pages(1, 2), Visibility::Shared)
        ],
        "the failed step may have been done in part"
    );
    assert_eq!(engine.pages().get(page(1)).visibility, Visibility::Shared);
    assert!(engine.is_idle() && engine.quarantine().is_empty());
    let mapped = now(engine.touch(View::Host, page(1)));
    assert_eq!(mapped.response(), Response::Map, "nobody is denied because of it");
    engine.answered(mapped, Some(Response::Map));
}

#[test]
fn pages_whose_undo_fails_are_kept_from_everybody() {
    let mut engine = plain();
    share(&mut engine, pages(0, 4));
    let to_private = request(pages(0, 4), Visibility::Private, Contents::Preserve);
    let Start::Claimed(operation) = claim(&mut engine, &to_private).unwrap() else { panic!() };
    let mut taken = Vec::new();
    let operation = stage(&mut engine, operation, &mut taken, &mut None).unwrap();
    let operation = stage(&mut engine, operation, &mut taken, &mut None).unwrap();
    let operation = stage(&mut engine, operation, &mut taken, &mut None).unwrap();
    assert_eq!(engine.next_step(&operation), Some(Step::Protect(pages(0, 4), Visibility::Private)));
    let operation = engine.undo(operation);
    assert_eq!(
        undo(&mut engine, operation, false),
        [Step::Protect(pages(0, 4), Visibility::Shared), Step::Quarantine(pages(0, 4))]
    );
    assert_eq!(engine.quarantine().runs().collect::<Vec<_>>(), [pages(0, 4)]);
    for view in [View::Host, View::Guest] {
        let answer = now(engine.touch(view, page(2)));
        assert_eq!(answer.response(), Response::Poison);
        engine.answered(answer, Some(Response::Poison));
    }
    let quarantined = Refusal::Quarantined { page: page(2) };
    let again = request(pages(2, 8), Visibility::Shared, Contents::Preserve);
    assert_eq!(claim(&mut engine, &again).unwrap_err(), quarantined);
    let copy = engine.copy(&[pages(2, 3)]);
    assert!(matches!(copy, Err(Blocked::Refused(refusal)) if refusal == quarantined));
    assert!(matches!(engine.discard(pages(2, 3)), Err(Blocked::Refused(_))));
}

#[test]
fn an_abandoned_operation_is_undone_by_who_meets_it() {
    let mut engine = plain();
    share(&mut engine, pages(0, 4));
    let to_private = request(pages(0, 4), Visibility::Private, Contents::Zero);
    let Start::Claimed(draining) = claim(&mut engine, &to_private).unwrap() else { panic!() };
    let unmapped = stage(&mut engine, draining, &mut Vec::new(), &mut None).unwrap();
    assert!(waits(&mut engine, page(1)), "it is being driven");
    drop(unmapped);
    let TouchAnswer::Undo(operation) = engine.touch(View::Host, page(1)) else { panic!() };
    assert!(waits(&mut engine, page(1)), "it is being undone");
    drop(operation);
    let Err(Blocked::Abandoned(operation)) = engine.convert(&to_private) else { panic!() };
    assert_eq!(undo(&mut engine, operation, true), []);
    let answer = now(engine.touch(View::Host, page(1)));
    assert_eq!(answer.response(), Response::Map);
    engine.answered(answer, None);
}

#[test]
fn contents_that_are_lost_half_way_put_the_pages_out_of_use() {
    let mut engine = plain();
    share(&mut engine, pages(0, 4));
    let zero = request(pages(0, 4), Visibility::Private, Contents::Zero);
    let undone = convert(&mut engine, &zero, Some(3)).unwrap_err();
    assert_eq!(
        undone,
        [Step::Quarantine(pages(0, 4)), Step::Protect(pages(0, 4), Visibility::Shared)]
    );
    assert!(engine.quarantine().contains(page(3)));
}

#[test]
fn a_marker_is_lifted_when_its_page_becomes_shared_and_only_then() {
    let mut engine = plain();
    let poison = now(engine.touch(View::Host, page(2)));
    assert_eq!(poison.response(), Response::Poison);
    engine.answered(poison, Some(Response::Poison));
    assert!(engine.markers(View::Host).contains(page(2)));
    let to_shared = request(pages(0, 2), Visibility::Shared, Contents::Preserve);
    assert!(
        !convert(&mut engine, &to_shared, None).unwrap().contains(&Step::UnmapHost(pages(0, 2)))
    );
    let to_shared = request(pages(2, 4), Visibility::Shared, Contents::Preserve);
    let taken = convert(&mut engine, &to_shared, None).unwrap();
    assert_eq!(taken.last(), Some(&Step::UnmapHost(pages(2, 4))));
    assert!(engine.markers(View::Host).is_empty());
}

#[test]
fn what_can_not_be_offered_is_refused_before_anything_changed() {
    let two_pools = Config { in_place: false, ..*plain().config() };
    let mut engine = Engine::new(two_pools);
    let preserve = request(pages(0, 1), Visibility::Shared, Contents::Preserve);
    assert_eq!(claim(&mut engine, &preserve).unwrap_err().errno(), Errno::EOPNOTSUPP);
    let beyond = request(pages(63, 65), Visibility::Shared, Contents::Zero);
    assert_eq!(claim(&mut engine, &beyond).unwrap_err().errno(), Errno::EINVAL);
    assert!(engine.is_idle());
}

#[test]
fn two_pools_free_the_side_that_is_left_once_all_is_protected() {
    for contents in [Contents::Zero, Contents::Unspecified] {
        let mut engine = Engine::new(Config { in_place: false, ..*plain().config() });
        let to_shared = request(pages(2, 4), Visibility::Shared, contents);
        let steps = convert(&mut engine, &to_shared, None).unwrap();
        let protect = Step::Protect(pages(2, 4), Visibility::Shared);
        assert_eq!(steps, [Step::UnmapGuest(pages(2, 4)), protect, Step::Free(pages(2, 4))]);
    }
}
