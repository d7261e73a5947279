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
fn a_binding_that_is_put_back_wishes_what_it_did() {
    use Visibility::{Private, Shared};
    let (mut engine, vm, other) = (plain(), VmId(0), VmId(1));
    for vm in [vm, other] {
        engine.bind(vm, Slot(0), 16u32.into(), pages(0, 32)).unwrap();
    }
    engine.want(vm, GfnRange::between(20, 24).unwrap(), Shared).unwrap();
    let unmet = |engine: &Engine| engine.unmet().collect::<Vec<_>>();
    let before = unmet(&engine);
    let unbound = engine.unbind(vm, Slot(0)).unwrap();
    assert_eq!(unmet(&engine), []);
    engine.rebind(unbound);
    assert_eq!(unmet(&engine), before);

    // Another VM was granted something meanwhile: one wish is met by that, one no longer.
    let unbound = engine.unbind(vm, Slot(0)).unwrap();
    let ranges = vec![pages(2, 6)];
    let by = Some(other);
    convert(
        &mut engine,
        &ConversionRequest { ranges, to: Shared, contents: Contents::Zero, by },
        None,
    )
    .unwrap();
    engine.rebind(unbound);
    let wish = |pages, granted: Visibility| {
        (vm, Slot(0), Wish { pages, granted, wanted: granted.other() })
    };
    assert_eq!(unmet(&engine), [wish(pages(2, 4), Shared), wish(pages(6, 8), Private)]);
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
