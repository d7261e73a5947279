//! An SNP guest's memory: the changes of the RMP as steps.

use super::*;

fn snp() -> Engine {
    engine(Platform::Snp, Population::Whole)
}

#[test]
fn an_snp_guest_loses_its_mappings_before_the_rmp_changes_and_a_part_is_smashed_first() {
    let mut engine = snp();
    let to_shared = request(pages(2, 9), Visibility::Shared, Contents::Zero);
    assert_eq!(
        convert(&mut engine, &to_shared, None).unwrap(),
        [
            Step::UnmapGuest(pages(2, 9)),
            Step::Smash(pages(0, 4)),
            Step::Unassign(pages(2, 4)),
            Step::Unassign(pages(4, 8)),
            Step::Smash(pages(8, 12)),
            Step::Unassign(pages(8, 9)),
            Step::Free(pages(2, 9)),
        ]
    );
    let to_private = request(pages(0, 12), Visibility::Private, Contents::Unspecified);
    assert_eq!(
        convert(&mut engine, &to_private, None).unwrap(),
        [
            Step::UnmapHost(pages(2, 9)),
            Step::UnmapGuest(pages(2, 9)),
            Step::CheckReferences(pages(2, 9)),
            Step::Assign(pages(2, 4)),
            Step::Assign(pages(4, 8)),
            Step::Assign(pages(8, 9)),
        ]
    );
}

#[test]
fn the_rmp_is_undone_last_first_and_the_step_that_failed_with_it() {
    let mut engine = snp();
    let share = request(pages(2, 9), Visibility::Shared, Contents::Unspecified);
    convert(&mut engine, &share, None).unwrap();
    let to_private = request(pages(0, 12), Visibility::Private, Contents::Unspecified);
    let undone = convert(&mut engine, &to_private, Some(4)).unwrap_err();
    assert_eq!(undone, [Step::Unassign(pages(4, 8)), Step::Unassign(pages(2, 4))]);
    let undone = convert(
        &mut engine,
        &request(pages(0, 4), Visibility::Shared, Contents::Unspecified),
        Some(2),
    );
    assert_eq!(undone.unwrap_err(), [Step::Reassign(pages(0, 2))], "4K entries are left 4K");
}

#[test]
fn rmp_steps_that_can_not_be_undone_quarantine_their_2m_page_and_no_more() {
    let mut engine = snp();
    convert(&mut engine, &request(pages(0, 8), Visibility::Shared, Contents::Unspecified), None)
        .unwrap();
    let to_private = request(pages(0, 8), Visibility::Private, Contents::Unspecified);
    let Start::Claimed(draining) = claim(&mut engine, &to_private).unwrap() else { panic!() };
    let (mut taken, mut fail) = (Vec::new(), None);
    let unmapped = stage(&mut engine, draining, &mut taken, &mut fail).unwrap();
    let unpinned = stage(&mut engine, unmapped, &mut taken, &mut fail).unwrap();
    let reshaped = stage(&mut engine, unpinned, &mut taken, &mut fail).unwrap();
    let protected = stage(&mut engine, reshaped, &mut taken, &mut fail).unwrap();
    let operation = engine.undo(protected);
    let mut undone = Vec::new();
    while let Some(step) = engine.next_undo(&operation) {
        undone.push(step);
        engine.undo_taken(&operation, step != Step::Unassign(pages(4, 8)));
    }
    assert_eq!(engine.finish_undo(operation), [pages(4, 8)]);
    assert_eq!(
        undone,
        [Step::Unassign(pages(4, 8)), Step::Quarantine(pages(4, 8)), Step::Unassign(pages(0, 4))]
    );
    assert!(engine.quarantine().first_in(pages(0, 4)).is_none());
}

#[test]
fn contents_of_an_snp_guest_are_refused_before_anything_is_claimed() {
    let mut engine = snp();
    for (to, contents) in [
        (Visibility::Shared, Contents::Preserve),
        (Visibility::Private, Contents::Preserve),
        (Visibility::Private, Contents::Zero),
    ] {
        let refusal = claim(&mut engine, &request(pages(0, 4), to, contents)).unwrap_err();
        assert_eq!(refusal.errno(), Errno::EOPNOTSUPP, "{contents} to {to}");
    }
    assert!(engine.is_idle());
    let most = |to| engine.config().platform.keeps_most(to, true);
    assert_eq!(most(Visibility::Shared), Contents::Zero);
    assert_eq!(most(Visibility::Private), Contents::Unspecified);
}

#[test]
fn a_discard_takes_private_pages_back_before_they_are_freed() {
    let mut engine = snp();
    let share = request(pages(0, 4), Visibility::Shared, Contents::Unspecified);
    convert(&mut engine, &share, None).unwrap();
    let discard = engine.discard(pages(2, 6)).unwrap();
    let mut taken = Vec::new();
    let cleared = stage(&mut engine, discard, &mut taken, &mut None).unwrap();
    engine.finish_discard(cleared);
    assert_eq!(
        taken,
        [
            Step::UnmapHost(pages(2, 6)),
            Step::UnmapGuest(pages(2, 6)),
            Step::Smash(pages(4, 8)),
            Step::Unassign(pages(4, 6)),
            Step::Free(pages(2, 6)),
        ]
    );
}

#[test]
fn no_step_is_about_pages_past_the_end_of_the_object() {
    let count = PageCount::from(10);
    let mut engine = Engine::new(Config { pages: count, ..*snp().config() });
    engine.bind(VmId(0), Slot(0), 0u32.into(), pages(0, 10)).unwrap();
    let mut steps =
        |range, to| convert(&mut engine, &request(range, to, Contents::Unspecified), None).unwrap();
    assert_eq!(
        steps(pages(8, 9), Visibility::Shared)[1..],
        [Step::Smash(pages(8, 10)), Step::Unassign(pages(8, 9))]
    );
    steps(pages(8, 9), Visibility::Private);
    // What the object has of its last 2M page is no large entry: it would be of other frames, too.
    let whole = steps(pages(8, 10), Visibility::Shared);
    assert!(whole.iter().all(|step| step.range().end() <= 10), "{whole:?}");
    let GuestAnswer::Now(answer) = engine.size_fault(VmId(0), 9u32.into()) else { panic!() };
    assert_eq!(answer.range(), pages(8, 10));
}

#[test]
fn a_fault_for_its_size_is_about_the_2m_page_and_waits_for_operations_there() {
    let (mut engine, vm) = (snp(), VmId(0));
    engine.bind(vm, Slot(0), 0u32.into(), pages(0, 64)).unwrap();
    let GuestAnswer::Now(answer) = engine.size_fault(vm, 5u32.into()) else { panic!() };
    assert_eq!(answer.range(), pages(4, 8));
    engine.answered(answer, None);
    let draining = engine.discard(pages(7, 8)).unwrap();
    assert!(matches!(engine.size_fault(vm, 5u32.into()), GuestAnswer::Wait));
    assert!(matches!(engine.size_fault(vm, 9u32.into()), GuestAnswer::Now(_)));
    assert!(matches!(engine.size_fault(vm, 64u32.into()), GuestAnswer::Exit(_)));
    drop(draining);
    assert!(matches!(engine.size_fault(vm, 5u32.into()), GuestAnswer::Undo(_)));
}

#[test]
fn a_merge_is_of_2m_pages_that_are_private_as_a_whole() {
    let mut engine = snp();
    let share = request(pages(5, 6), Visibility::Shared, Contents::Unspecified);
    convert(&mut engine, &share, None).unwrap();
    let merge = engine.merge(pages(1, 16)).unwrap();
    let mut taken = Vec::new();
    let merged = stage(&mut engine, merge, &mut taken, &mut None).unwrap();
    engine.finish_merge(merged);
    assert_eq!(taken, [Step::Merge(pages(8, 12)), Step::Merge(pages(12, 16))]);
}

#[test]
fn a_merge_is_in_the_way_of_what_it_merges_alone_and_leaves_out_what_is_in_quarantine() {
    let mut engine = snp();
    let share = request(pages(5, 6), Visibility::Shared, Contents::Unspecified);
    convert(&mut engine, &share, None).unwrap();
    let zeros = request(pages(1, 2), Visibility::Shared, Contents::Zero);
    // Unmap, smash, unassign, free: that has no way back.
    convert(&mut engine, &zeros, Some(3)).unwrap_err();
    assert!(engine.quarantine().contains(page(1)));
    let merge = engine.merge(pages(0, 16)).unwrap();
    let touch = now(engine.touch(View::Host, page(5)));
    engine.answered(touch, Some(Response::Map));
    let mut taken = Vec::new();
    let merged = stage(&mut engine, merge, &mut taken, &mut None).unwrap();
    engine.finish_merge(merged);
    assert_eq!(taken, [Step::Merge(pages(8, 12)), Step::Merge(pages(12, 16))]);
}

#[test]
fn a_merge_that_fails_takes_back_what_the_firmware_has_and_smashes_nothing() {
    let mut engine = snp();
    let merge = engine.merge(pages(0, 12)).unwrap();
    let undone = stage(&mut engine, merge, &mut Vec::new(), &mut Some(1)).unwrap_err();
    assert_eq!(undone, [Step::Thaw(pages(4, 8)), Step::Thaw(pages(0, 4))]);
}

#[test]
fn a_2m_page_that_is_shared_in_two_parts_is_smashed_once() {
    let mut engine = snp();
    let middle = request(pages(1, 2), Visibility::Shared, Contents::Unspecified);
    convert(&mut engine, &middle, None).unwrap();
    let all = request(pages(0, 7), Visibility::Shared, Contents::Unspecified);
    assert_eq!(
        convert(&mut engine, &all, None).unwrap()[2..],
        [
            Step::Smash(pages(0, 4)),
            Step::Unassign(pages(0, 1)),
            Step::Unassign(pages(2, 4)),
            Step::Smash(pages(4, 8)),
            Step::Unassign(pages(4, 7)),
        ]
    );
}

#[test]
fn a_page_in_quarantine_is_not_given_back_to_its_guest() {
    let mut engine = snp();
    let zeros = request(pages(2, 7), Visibility::Shared, Contents::Zero);
    // Unmap, twice smash and unassign, free: that has no way back.
    let undone = convert(&mut engine, &zeros, Some(5)).unwrap_err();
    assert_eq!(undone, [Step::Quarantine(pages(2, 7))]);
    let rest = Step::Reassign(pages(0, 8)).without(pages(3, 5));
    assert_eq!(rest, [Step::Reassign(pages(0, 3)), Step::Reassign(pages(5, 8))]);
    assert_eq!(Step::Unassign(pages(0, 4)).without(pages(4, 5)), [Step::Unassign(pages(0, 4))]);
}

#[test]
fn what_is_owed_or_failed_is_the_guests_once_it_is_private() {
    let initial = PageFacts { visibility: Visibility::Shared, population: Population::Owed };
    let mut engine = Engine::new(Config { initial, ..*snp().config() });
    engine.fail(pages(2, 4)).unwrap();
    let to_private = request(pages(0, 4), Visibility::Private, Contents::Unspecified);
    convert(&mut engine, &to_private, Some(1)).unwrap_err();
    assert_eq!(engine.pages().get(page(0)).population, Population::Owed, "nothing has changed");
    assert!(engine.failed().contains(page(2)));
    convert(&mut engine, &to_private, None).unwrap();
    assert!(engine.failed().is_empty());
    assert_eq!(engine.pages().get(page(3)).population, Population::Whole);
    assert_eq!(engine.pages().get(page(4)).population, Population::Owed);
    let refused = engine.populate(pages(3, 5));
    assert!(matches!(refused, Err(Blocked::Refused(Refusal::GuestFills { .. }))), "{refused:?}");
}

#[test]
#[should_panic(expected = "never owed")]
fn an_engine_does_not_begin_with_what_nobody_can_bring() {
    engine(Platform::Snp, Population::Owed);
}
