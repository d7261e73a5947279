//! Stories of whole operations, and random ones against a naive oracle.

use std::collections::BTreeMap;
use std::string::ToString;
use std::vec;
use std::vec::Vec;

use polder_units::{Geometry, GfnRange, Level, PageCount, PageIndex, PageRange};
use proptest::prelude::*;

use super::*;

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

fn page(index: u32) -> PageIndex {
    PageIndex::from(index)
}

fn engine(platform: Platform, population: Population) -> Engine {
    Engine::new(Config {
        pages: PageCount::from(64),
        geometry: Geometry::new(4, 4).unwrap(),
        platform,
        in_place: true,
        host_view_level: Level::Size4K,
        initial: PageFacts { visibility: Visibility::Private, population },
    })
}

fn plain() -> Engine {
    engine(Platform::Plain, Population::Whole)
}

fn request(range: PageRange, to: Visibility, contents: Contents) -> ConversionRequest {
    ConversionRequest { ranges: vec![range], to, contents, by: None }
}

fn claim(engine: &mut Engine, request: &ConversionRequest) -> Result<Start, Refusal> {
    match engine.convert(request) {
        Ok(start) => Ok(start),
        Err(Blocked::Refused(refusal) | Blocked::Busy(refusal)) => Err(refusal),
        Err(Blocked::Abandoned(operation)) => panic!("{operation:?} was abandoned"),
    }
}

/// Takes the steps of a stage, failing the one where `fail` comes down to 0.
fn stage<S: Stage>(
    engine: &mut Engine,
    operation: Operation<S>,
    taken: &mut Vec<Step>,
    fail: &mut Option<usize>,
) -> Result<Operation<S::Next>, Vec<Step>> {
    let mut step = engine.next_step(&operation);
    while let Some(now) = step {
        taken.push(now);
        if *fail == Some(0) {
            let operation = engine.undo(operation);
            return Err(undo(engine, operation, true));
        }
        *fail = fail.map(|left| left - 1);
        step = engine.step_taken(&operation);
    }
    Ok(engine.advance(operation))
}

/// Takes the steps back; they succeed or fail.
fn undo(engine: &mut Engine, operation: Operation<Undoing>, succeed: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    while let Some(step) = engine.next_undo(&operation) {
        steps.push(step);
        engine.undo_taken(&operation, succeed);
    }
    engine.finish_undo(operation);
    steps
}

/// Converts with the `fail`th step failing. The steps taken, or those that undid them.
fn convert(
    engine: &mut Engine,
    request: &ConversionRequest,
    mut fail: Option<usize>,
) -> Result<Vec<Step>, Vec<Step>> {
    let mut taken = Vec::new();
    let Ok(Start::Claimed(draining)) = claim(engine, request) else { return Ok(taken) };
    let unmapped = stage(engine, draining, &mut taken, &mut fail)?;
    let unpinned = stage(engine, unmapped, &mut taken, &mut fail)?;
    let reshaped = stage(engine, unpinned, &mut taken, &mut fail)?;
    let protected = stage(engine, reshaped, &mut taken, &mut fail)?;
    let settled = stage(engine, protected, &mut taken, &mut fail)?;
    engine.finish_conversion(settled);
    Ok(taken)
}

fn share(engine: &mut Engine, range: PageRange) {
    convert(engine, &request(range, Visibility::Shared, Contents::Preserve), None).unwrap();
}

fn now(answer: TouchAnswer) -> Answer {
    match answer {
        TouchAnswer::Now(answer) => answer,
        other => panic!("{other:?}"),
    }
}

fn waits(engine: &mut Engine, page: PageIndex) -> bool {
    matches!(engine.touch(View::Host, page), TouchAnswer::Wait)
}

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
    engine.unpin(net).unwrap();
    engine.unpin(blk).unwrap();
    assert_eq!(engine.unpin(blk), Err(Refusal::NoSuchPin));
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
    assert_eq!(undone.unwrap_err(), [Step::Assign(pages(0, 2))], "4K entries are left 4K");
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
fn a_fault_for_its_size_is_about_the_2m_page_and_waits_for_operations_there() {
    let (mut engine, vm) = (snp(), VmId(0));
    engine.bind(vm, Slot(0), 0u32.into(), pages(0, 64)).unwrap();
    let GuestAnswer::Now { answer, level } = engine.size_fault(vm, 5u32.into()) else { panic!() };
    assert_eq!((answer.range(), level), (pages(4, 8), Level::Size2M));
    engine.answered(answer, None);
    let draining = engine.discard(pages(7, 8)).unwrap();
    assert!(matches!(engine.size_fault(vm, 5u32.into()), GuestAnswer::Wait));
    assert!(matches!(engine.size_fault(vm, 9u32.into()), GuestAnswer::Now { .. }));
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
    let rest = Step::Assign(pages(0, 8)).without(pages(3, 5));
    assert_eq!(rest, [Step::Assign(pages(0, 3)), Step::Assign(pages(5, 8))]);
    assert_eq!(Step::Unassign(pages(0, 4)).without(pages(4, 5)), [Step::Unassign(pages(0, 4))]);
}

#[test]
fn one_bindings_wish_overrides_no_others_and_both_are_reported() {
    use Visibility::{Private, Shared};
    let (mut engine, one, other) = (plain(), VmId(0), VmId(1));
    engine.bind(one, Slot(0), 0u32.into(), pages(0, 32)).unwrap();
    engine.bind(other, Slot(3), 16u32.into(), pages(0, 32)).unwrap();
    let gfns = |start, end| GfnRange::between(start, end).unwrap();
    let wish = |pages, granted, wanted| Wish { pages, granted, wanted };
    assert_eq!(engine.unmet().count(), 0, "a new binding wishes for what is granted");

    engine.want(one, gfns(4, 8), Shared).unwrap();
    assert_eq!(
        engine.wanted(one, gfns(2, 10)).unwrap(),
        [
            wish(pages(2, 4), Private, Private),
            wish(pages(4, 8), Private, Shared),
            wish(pages(8, 10), Private, Private)
        ]
    );
    let others = engine.wanted(other, gfns(16, 48)).unwrap();
    assert_eq!(others, [wish(pages(0, 32), Private, Private)]);
    assert_eq!(engine.pages().get(page(4)).visibility, Private, "a wish alone changes nothing");

    // Granted for the one, it is unmet for the other.
    let ranges = vec![pages(4, 8)];
    let by_one = ConversionRequest { ranges, to: Shared, contents: Contents::Zero, by: Some(one) };
    convert(&mut engine, &by_one, Some(1)).unwrap_err();
    let unmet = |engine: &Engine| engine.unmet().collect::<Vec<_>>();
    let of_one = (one, Slot(0), wish(pages(4, 8), Private, Shared));
    assert_eq!(unmet(&engine), [of_one], "what failed has granted nothing");
    convert(&mut engine, &by_one, None).unwrap();
    assert_eq!(unmet(&engine), [(other, Slot(3), wish(pages(4, 8), Shared, Private))]);

    // The other wishes the same of a part; the VMM decides for all of the rest.
    engine.want(other, gfns(20, 22), Shared).unwrap();
    assert_eq!(unmet(&engine), [(other, Slot(3), wish(pages(6, 8), Shared, Private))]);
    let for_all = request(pages(0, 32), Shared, Contents::Zero);
    convert(&mut engine, &for_all, None).unwrap();
    assert_eq!(unmet(&engine), []);

    // Both wish it private again; what one is granted is what both wished.
    engine.want(one, gfns(0, 2), Private).unwrap();
    engine.want(other, gfns(17, 18), Private).unwrap();
    let back = ConversionRequest { ranges: vec![pages(0, 2)], to: Private, ..by_one };
    convert(&mut engine, &back, None).unwrap();
    assert_eq!(unmet(&engine), [(other, Slot(3), wish(pages(0, 1), Private, Shared))]);
    engine.unbind(other, Slot(3)).unwrap();
    assert_eq!(unmet(&engine), []);
    assert!(matches!(engine.want(other, gfns(16, 17), Shared), Err(Refusal::Unbound { .. })));
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
fn a_population_is_seen_whole_or_not_at_all() {
    let mut engine = engine(Platform::Plain, Population::Owed);
    share(&mut engine, pages(0, 8));
    assert!(waits(&mut engine, page(0)), "it is owed");
    let writing = engine.populate(pages(0, 4)).unwrap();
    assert!(matches!(engine.populate(pages(3, 5)), Err(Blocked::Busy(_))));
    let published = stage(&mut engine, writing, &mut Vec::new(), &mut None).unwrap();
    assert!(waits(&mut engine, page(0)), "it is published, not shown");
    let shown = engine.finish_population(published);
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
fn bindings_keep_apart_and_know_their_levels() {
    let (mut engine, vm) = (plain(), VmId(0));
    let gfn = |number: u32| polder_units::Gfn::from(number);
    engine.bind(vm, Slot(0), gfn(16), pages(0, 32)).unwrap();
    let refused = |engine: &mut Engine, slot, at, range| {
        engine.bind(vm, Slot(slot), gfn(at), range).unwrap_err()
    };
    assert_eq!(refused(&mut engine, 0, 99, pages(40, 41)), Refusal::SlotTaken { slot: Slot(0) });
    assert!(matches!(refused(&mut engine, 1, 47, pages(40, 41)), Refusal::GfnsTaken { .. }));
    assert!(matches!(refused(&mut engine, 1, 99, pages(31, 33)), Refusal::PagesTaken { .. }));
    assert!(matches!(refused(&mut engine, 1, 99, pages(60, 65)), Refusal::Beyond { .. }));
    // A second VM has gfns, slots and pages of its own.
    let other = engine.bind(VmId(1), Slot(0), gfn(17), pages(0, 32)).unwrap();
    let geometry = engine.config().geometry;
    assert_eq!(other.level(page(8), geometry), Level::Size4K, "not congruent");
    let (_, _, binding) = engine.bindings().next().unwrap();
    assert_eq!(binding.level(page(8), geometry), Level::Size1G);
    engine.bind(vm, Slot(1), gfn(48), pages(34, 50)).unwrap();
    let (_, _, binding) = engine.bindings().find(|(_, slot, _)| slot.0 == 1).unwrap();
    assert_eq!(binding.level(page(36), geometry), Level::Size4K, "congruent modulo 2 pages only");

    let gfns = |start, end| GfnRange::between(start, end).unwrap();
    assert_eq!(engine.pages_of(vm, gfns(46, 50)), Ok(vec![pages(30, 32), pages(34, 36)]));
    assert!(matches!(engine.pages_of(vm, gfns(15, 17)), Err(Refusal::Unbound { .. })));
    engine.unbind(vm, Slot(0)).unwrap();
    assert_eq!(engine.unbind(vm, Slot(0)), Err(Refusal::NoSuchSlot { slot: Slot(0) }));
    engine.bind(vm, Slot(0), gfn(16), pages(0, 32)).unwrap();
}

#[test]
fn a_guest_fault_maps_as_much_as_is_uniform_and_free() {
    let (mut engine, vm) = (engine(Platform::SwProtected, Population::Whole), VmId(0));
    engine.bind(vm, Slot(0), 0u32.into(), pages(0, 64)).unwrap();
    let fault = |engine: &mut Engine, gfn: u32, visibility| {
        engine.guest_fault(vm, GuestAccess { gfn: gfn.into(), visibility })
    };
    let level = |answer| match answer {
        GuestAnswer::Now { answer, level } => (answer, level),
        other => panic!("{other:?}"),
    };
    let (whole, size) = level(fault(&mut engine, 5, Visibility::Private));
    assert_eq!((whole.range(), size), (pages(0, 16), Level::Size1G));
    engine.answered(whole, Some(Response::Map));

    share(&mut engine, pages(1, 2));
    let (part, size) = level(fault(&mut engine, 5, Visibility::Private));
    assert_eq!((part.range(), size), (pages(4, 8), Level::Size2M));
    engine.answered(part, Some(Response::Map));
    assert!(matches!(
        fault(&mut engine, 1, Visibility::Private),
        GuestAnswer::Exit(MemoryFault::Mismatch { wanted: Visibility::Private, .. })
    ));
    assert!(matches!(
        fault(&mut engine, 64, Visibility::Private),
        GuestAnswer::Exit(MemoryFault::Unbound(_))
    ));
    let discard = engine.discard(pages(6, 7)).unwrap();
    let (page, size) = level(fault(&mut engine, 5, Visibility::Private));
    assert_eq!((page.range(), size), (pages(5, 6), Level::Size4K), "what is claimed is not mapped");
    engine.answered(page, Some(Response::Map));
    assert!(matches!(fault(&mut engine, 6, Visibility::Private), GuestAnswer::Wait));
    drop(discard);
    assert!(matches!(fault(&mut engine, 6, Visibility::Private), GuestAnswer::Undo(_)));
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

/// One thing to do to an engine and to its oracle.
#[derive(Clone, Copy, Debug)]
enum Act {
    Convert { range: PageRange, private: bool, fail: Option<usize> },
    Pin { range: PageRange },
    Unpin,
    Touch { page: PageIndex },
    Discard { range: PageRange },
}

fn act() -> impl Strategy<Value = Act> {
    let range =
        (0u64..64, 1u64..20).prop_map(|(start, count)| pages(start, (start + count).min(64)));
    prop_oneof![
        4 => (range.clone(), any::<bool>(), prop::option::of(0usize..12))
            .prop_map(|(range, private, fail)| Act::Convert { range, private, fail }),
        2 => range.clone().prop_map(|range| Act::Pin { range }),
        1 => Just(Act::Unpin),
        2 => (0u32..64).prop_map(|index| Act::Touch { page: index.into() }),
        1 => range.prop_map(|range| Act::Discard { range }),
    ]
}

/// A page, naively.
#[derive(Clone, Copy, Default)]
struct Naive {
    shared: bool,
    pins: u32,
}

/// Does one act to both; they have to agree.
fn both(
    engine: &mut Engine,
    naive: &mut BTreeMap<u64, Naive>,
    pins: &mut Vec<(PinId, PageRange)>,
    act: Act,
) {
    let all = |naive: &BTreeMap<u64, Naive>, range: PageRange, is: &dyn Fn(Naive) -> bool| {
        range.frames().all(|page| is(naive[&page.get()]))
    };
    match act {
        Act::Convert { range, private, fail } => {
            let to = if private { Visibility::Private } else { Visibility::Shared };
            let request = request(range, to, Contents::Preserve);
            let pinned = private && !all(naive, range, &|page| page.pins == 0 || !page.shared);
            if pinned {
                assert!(matches!(claim(engine, &request), Err(Refusal::Pinned { .. })));
            } else if convert(engine, &request, fail).is_ok() {
                for page in range.frames() {
                    naive.get_mut(&page.get()).unwrap().shared = !private;
                }
            }
        }
        Act::Pin { range } => {
            let pin = engine.pin(range, PinKind::Short, Holder::new("test"));
            assert_eq!(pin.is_ok(), all(naive, range, &|page| page.shared));
            let Ok(pin) = pin else { return };
            pins.push((pin, range));
            range.frames().for_each(|page| naive.get_mut(&page.get()).unwrap().pins += 1);
        }
        Act::Unpin => {
            let Some((pin, range)) = pins.pop() else { return };
            engine.unpin(pin).unwrap();
            range.frames().for_each(|page| naive.get_mut(&page.get()).unwrap().pins -= 1);
        }
        Act::Touch { page } => {
            let answer = now(engine.touch(View::Host, page));
            let response = answer.response();
            assert_eq!(response == Response::Map, naive[&page.get()].shared, "INV-1 at {page}");
            engine.answered(answer, Some(response));
        }
        Act::Discard { range } => {
            let discard = engine.discard(range);
            assert_eq!(discard.is_ok(), all(naive, range, &|page| page.pins == 0), "INV-7");
            let Ok(discard) = discard else { return };
            let cleared = stage(engine, discard, &mut Vec::new(), &mut None).unwrap();
            engine.finish_discard(cleared);
        }
    }
}

proptest! {
    /// INV-1, INV-4 and INV-7, as far as the engine decides them.
    #[test]
    fn random_operations_agree_with_a_page_by_page_oracle(
        acts in prop::collection::vec(act(), 0..60),
    ) {
        let mut engine = plain();
        let mut naive: BTreeMap<u64, Naive> =
            (0..64).map(|page| (page, Naive::default())).collect();
        let mut pins = Vec::new();
        for act in acts {
            both(&mut engine, &mut naive, &mut pins, act);
            prop_assert!(engine.is_idle());
            for (&index, page) in &naive {
                let facts = engine.pages().get(PageIndex::new(index).unwrap());
                prop_assert_eq!(facts.visibility == Visibility::Shared, page.shared);
            }
        }
    }
}
