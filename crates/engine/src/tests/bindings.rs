//! Bindings: what they wish, and what a guest sees through them.

use polder_units::GfnRange;

use super::*;

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
    let by_one = ConversionRequest {
        ranges,
        to: Shared,
        contents: Contents::Zero,
        by: Some(one),
        by_guest: false,
    };
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
    let unbound = engine.want(other, gfns(16, 17), Shared);
    assert!(matches!(unbound, Err(Blocked::Refused(Refusal::Unbound { .. }))), "{unbound:?}");
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
    let now = |answer| match answer {
        GuestAnswer::Now(answer) => answer,
        other => panic!("{other:?}"),
    };
    let whole = now(fault(&mut engine, 5, Visibility::Private));
    assert_eq!(whole.range(), pages(0, 16));
    engine.answered(whole, Some(Response::Map));

    share(&mut engine, pages(1, 2));
    let part = now(fault(&mut engine, 5, Visibility::Private));
    assert_eq!(part.range(), pages(4, 8));
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
    let page = now(fault(&mut engine, 5, Visibility::Private));
    assert_eq!(page.range(), pages(5, 6), "what is claimed is not mapped");
    engine.answered(page, Some(Response::Map));
    assert!(matches!(fault(&mut engine, 6, Visibility::Private), GuestAnswer::Wait));
    drop(discard);
    assert!(matches!(fault(&mut engine, 6, Visibility::Private), GuestAnswer::Undo(_)));
}

#[test]
fn a_binding_that_is_taken_away_takes_its_wishes_with_it_and_no_others() {
    let (mut engine, vm, other) = (plain(), VmId(0), VmId(1));
    for vm in [vm, other] {
        engine.bind(vm, Slot(0), 16u32.into(), pages(0, 32)).unwrap();
        engine.want(vm, GfnRange::between(20, 24).unwrap(), Visibility::Shared).unwrap();
    }
    let binding = engine.binding(vm, Slot(0)).unwrap();
    assert_eq!(engine.unbind(vm, Slot(0)), Ok(()));
    let gone = Refusal::NoSuchSlot { slot: Slot(0) };
    assert_eq!(engine.binding(vm, Slot(0)), Err(gone.clone()));
    assert_eq!(engine.unbind(vm, Slot(0)), Err(gone));
    let of: Vec<VmId> = engine.unmet().map(|(vm, ..)| vm).collect();
    assert_eq!(of, [other]);
    assert_eq!(engine.bind(vm, Slot(0), 16u32.into(), pages(0, 32)), Ok(binding));
    assert_eq!(engine.unmet().count(), 1, "a new binding wishes for what is granted");
}

#[test]
fn a_wish_waits_for_operations_on_its_pages() {
    let (mut engine, vm) = (plain(), VmId(0));
    engine.bind(vm, Slot(0), 0u32.into(), pages(0, 32)).unwrap();
    let gfns = |start, end| GfnRange::between(start, end).unwrap();
    let by_it = ConversionRequest {
        by: Some(vm),
        ..request(pages(0, 4), Visibility::Shared, Contents::Preserve)
    };
    let Start::Claimed(draining) = claim(&mut engine, &by_it).unwrap() else { panic!() };
    for frames in [gfns(3, 8), gfns(0, 1)] {
        let busy = engine.want(vm, frames, Visibility::Private);
        assert!(matches!(busy, Err(Blocked::Busy(Refusal::Busy { .. }))), "{busy:?}");
    }
    engine.want(vm, gfns(4, 8), Visibility::Shared).unwrap();
    drop(draining);
    let abandoned = engine.want(vm, gfns(3, 8), Visibility::Private);
    assert!(matches!(abandoned, Err(Blocked::Abandoned(_))), "{abandoned:?}");
}
