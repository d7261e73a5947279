//! pKVM: the guest decides, and the host takes nothing out of its stage 2.

use super::*;

fn pkvm() -> Engine {
    engine(Platform::Pkvm, Population::Whole)
}

fn asked(range: PageRange, to: Visibility) -> ConversionRequest {
    ConversionRequest { by_guest: true, ..request(range, to, Contents::Preserve) }
}

#[test]
fn what_only_the_vmm_wishes_is_refused_and_what_the_guest_asks_is_done() {
    let mut engine = pkvm();
    let by_vmm = request(pages(3, 5), Visibility::Shared, Contents::Preserve);
    let refusal = Refusal::GuestDecides { page: page(3), platform: Platform::Pkvm };
    assert_eq!(claim(&mut engine, &by_vmm).unwrap_err(), refusal);
    assert_eq!(refusal.errno(), Errno::EPERM);
    let steps = convert(&mut engine, &asked(pages(3, 5), Visibility::Shared), None).unwrap();
    assert_eq!(steps, [Step::Protect(pages(3, 5), Visibility::Shared)]);
    // What is so already is no question of who decides.
    assert!(matches!(claim(&mut engine, &by_vmm), Ok(Start::AlreadySo)));
    let steps = convert(&mut engine, &asked(pages(3, 5), Visibility::Private), None).unwrap();
    assert_eq!(
        steps,
        [
            Step::UnmapHost(pages(3, 5)),
            Step::CheckReferences(pages(3, 5)),
            Step::Protect(pages(3, 5), Visibility::Private),
        ],
        "the guest's own mapping stays"
    );
}

#[test]
fn a_wish_is_noted_and_changes_nothing() {
    let mut engine = pkvm();
    let vm = VmId(0);
    engine.bind(vm, Slot(0), polder_units::Gfn::from(0), pages(0, 64)).unwrap();
    let gfns = polder_units::GfnRange::between(3, 5).unwrap();
    engine.want(vm, gfns, Visibility::Shared).unwrap();
    assert_eq!(engine.unmet().count(), 1);
    assert_eq!(engine.pages().get(page(3)).visibility, Visibility::Private);
    let granted = ConversionRequest { by: Some(vm), ..asked(pages(3, 5), Visibility::Shared) };
    convert(&mut engine, &granted, None).unwrap();
    assert_eq!(engine.unmet().count(), 0);
}

#[test]
fn contents_are_the_guests_and_stay() {
    let mut engine = pkvm();
    let zero =
        ConversionRequest { contents: Contents::Zero, ..asked(pages(0, 1), Visibility::Shared) };
    assert!(matches!(claim(&mut engine, &zero), Err(Refusal::Contents { .. })));
}

#[test]
fn the_host_discards_nothing_of_the_guests_unasked() {
    let mut engine = pkvm();
    assert!(matches!(
        engine.discard(pages(0, 1)),
        Err(Blocked::Refused(Refusal::GuestDecides { .. }))
    ));
    let discard = engine.discard_for_guest(pages(0, 1)).unwrap();
    let mut steps = Vec::new();
    let cleared = stage(&mut engine, discard, &mut steps, &mut None).unwrap();
    engine.finish_discard(cleared);
    assert_eq!(steps, [Step::UnmapHost(pages(0, 1)), Step::Free(pages(0, 1))]);
}

/// The steps of a move.
fn moves(engine: &mut Engine, range: PageRange) -> Result<Vec<Step>, Refusal> {
    let moving = match engine.move_pages(range) {
        Ok(moving) => moving,
        Err(Blocked::Refused(refusal) | Blocked::Busy(refusal)) => return Err(refusal),
        Err(Blocked::Abandoned(operation)) => panic!("{operation:?}"),
    };
    let mut steps = Vec::new();
    let unmapped = stage(engine, moving, &mut steps, &mut None).unwrap();
    let unpinned = stage(engine, unmapped, &mut steps, &mut None).unwrap();
    let moved = stage(engine, unpinned, &mut steps, &mut None).unwrap();
    engine.finish_move(moved);
    Ok(steps)
}

#[test]
fn a_move_cuts_everybody_off_first_and_under_pkvm_leaves_the_guest_to_the_hypervisor() {
    let range = pages(2, 4);
    let [host, guest] = [Step::UnmapHost(range), Step::UnmapGuest(range)];
    let [check, moved] = [Step::CheckReferences(range), Step::Move(range)];
    assert_eq!(moves(&mut plain(), range), Ok(vec![host, guest, check, moved]));
    assert_eq!(moves(&mut pkvm(), range), Ok(vec![host, check, moved]));
}

#[test]
fn what_is_pinned_or_an_snp_guests_own_does_not_move_and_is_named() {
    let mut engine = plain();
    share(&mut engine, pages(2, 4));
    let pin = engine.pin(pages(3, 4), PinKind::Short, Holder::new("disk")).unwrap();
    assert!(matches!(moves(&mut engine, pages(0, 8)), Err(Refusal::Pinned { page: at, .. })
        if at == page(3)));
    engine.unpin(pin);
    moves(&mut engine, pages(0, 8)).unwrap();
    let mut snp = super::engine(Platform::Snp, Population::Whole);
    let unmovable = Refusal::Unmovable { page: page(0), platform: Platform::Snp };
    assert_eq!(moves(&mut snp, pages(0, 8)), Err(unmovable));
}

#[test]
fn a_move_that_fails_has_nothing_to_undo_and_lets_go() {
    let mut engine = plain();
    let moving = engine.move_pages(pages(0, 4)).unwrap();
    assert!(waits(&mut engine, page(1)));
    let undone = stage(&mut engine, moving, &mut Vec::new(), &mut Some(1)).unwrap_err();
    assert_eq!(undone, []);
    assert!(engine.is_idle());
}

#[test]
fn bytes_are_preloaded_until_the_guest_begins() {
    let mut engine = pkvm();
    share(&mut super::plain(), pages(0, 1));
    let preparing = engine.preload(pages(0, 2)).unwrap();
    assert!(waits(&mut engine, page(1)));
    let mut steps = Vec::new();
    let filling = stage(&mut engine, preparing, &mut steps, &mut None).unwrap();
    let preloaded = stage(&mut engine, filling, &mut steps, &mut None).unwrap();
    engine.finish_preload(preloaded);
    assert_eq!(steps, [Step::Publish(pages(0, 2))]);
    engine.launch();
    let late = engine.preload(pages(0, 2)).unwrap_err();
    assert!(matches!(late, Blocked::Refused(Refusal::Launched { page: at }) if at == page(0)));
}

#[test]
fn an_snp_guests_pages_are_launched_as_they_are_written_and_a_failure_leaves_zeros() {
    let mut engine = engine(Platform::Snp, Population::Whole);
    let range = pages(0, 2);
    let preparing = engine.preload(range).unwrap();
    let filling = stage(&mut engine, preparing, &mut Vec::new(), &mut None).unwrap();
    let undone = stage(&mut engine, filling, &mut Vec::new(), &mut Some(0)).unwrap_err();
    assert_eq!(undone, [Step::Unassign(range), Step::Free(range)]);
    // Its thread dies while it writes: whoever comes next undoes it.
    let preparing = engine.preload(range).unwrap();
    drop(stage(&mut engine, preparing, &mut Vec::new(), &mut None).unwrap());
    let Err(Blocked::Abandoned(operation)) = engine.preload(range) else { panic!() };
    assert_eq!(undo(&mut engine, operation, true), [Step::Free(range)]);
}

#[test]
fn what_is_shared_or_owed_is_not_preloaded() {
    let mut engine = plain();
    share(&mut engine, pages(1, 2));
    assert!(matches!(
        engine.preload(pages(0, 2)),
        Err(Blocked::Refused(Refusal::NotPrivate { page: at })) if at == page(1)
    ));
    let mut owed = super::engine(Platform::Plain, Population::Owed);
    assert!(matches!(owed.preload(pages(0, 2)), Err(Blocked::Refused(Refusal::Owed { .. }))));
}
