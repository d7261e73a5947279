//! Exclusive pins against plain ones, in both directions and by every way to a pin.

use polder_machine::{GupFast, GupStep, HostExit, PinKind, Plant, View};

use crate::{Rig, page, vpn, vpns};

fn run(rig: &mut Rig, mut gup: GupFast) -> GupStep {
    loop {
        match gup.step(&mut rig.machine).unwrap() {
            GupStep::Again(next) => gup = next,
            last => return last,
        }
    }
}

#[test]
fn an_exclusive_pin_is_refused_while_any_other_is_held_and_names_it() {
    for kind in [PinKind::Short, PinKind::LongTerm, PinKind::Exclusive] {
        let mut rig = Rig::new();
        let other = rig.pin(1, kind).unwrap();
        let Err(HostExit::Pinned { vpn: at, by }) = rig.pin(1, PinKind::Exclusive) else {
            panic!("it was granted beside {kind:?}");
        };
        assert_eq!((at, by.pin, by.kind), (vpn(1), other, kind));
        rig.pin(2, PinKind::Exclusive).unwrap();
        rig.machine.unpin(other).unwrap();
        rig.pin(1, PinKind::Exclusive).unwrap();
        assert_eq!(rig.machine.audit(), Ok(()));
    }
}

#[test]
fn every_other_pin_is_refused_while_an_exclusive_one_is_held() {
    let mut rig = Rig::new();
    rig.host_write(1, 1).unwrap();
    let exclusive = rig.pin(1, PinKind::Exclusive).unwrap();
    for kind in [PinKind::Short, PinKind::LongTerm] {
        let pinned = rig.pin(1, kind);
        assert!(matches!(pinned, Err(HostExit::Pinned { by, .. }) if by.pin == exclusive));
        let gup = GupFast::new(rig.process, vpn(1), true, kind);
        assert_eq!(run(&mut rig, gup), GupStep::Fallback, "by GUP-fast neither");
    }
    assert_eq!(rig.host_read(1), Ok(1), "a mapping is no pin");
    rig.machine.unpin(exclusive).unwrap();
    rig.pin(1, PinKind::Short).unwrap();
}

#[test]
fn another_processs_mapping_is_no_way_round_it() {
    let mut rig = Rig::new();
    rig.pin(1, PinKind::Exclusive).unwrap();
    let other = rig.machine.create_process().unwrap();
    let (object, at) = (rig.object, vpns(32, 40));
    rig.machine.mmap(other, at, object, page(0), View::PLAIN).unwrap();
    let pinned = rig.machine.pin_user_pages(other, vpns(33, 34), true, PinKind::Short);
    assert!(matches!(pinned, Err(HostExit::Pinned { .. })), "{pinned:?}");
}

#[test]
fn gup_fast_that_began_before_it_gives_up_and_one_amid_its_steps_is_soon_gone() {
    let mut rig = Rig::new();
    rig.host_write(1, 1).unwrap();
    let begun = GupFast::new(rig.process, vpn(1), true, PinKind::Short);
    let GupStep::Again(read) = begun.step(&mut rig.machine).unwrap() else { panic!() };
    // It has read the entry: the exclusive pin is granted, and GUP-fast sees it.
    let exclusive = rig.pin(1, PinKind::Exclusive).unwrap();
    assert_eq!(run(&mut rig, read), GupStep::Fallback);
    rig.machine.unpin(exclusive).unwrap();
    // It has taken its reference: the exclusive pin is refused by what is soon gone, and says so.
    let GupStep::Again(read) = begun.step(&mut rig.machine).unwrap() else { panic!() };
    let GupStep::Again(grabbed) = read.step(&mut rig.machine).unwrap() else { panic!() };
    let refused = rig.pin(1, PinKind::Exclusive);
    assert!(matches!(refused, Err(HostExit::Pinned { by, .. }) if by.speculative));
    let GupStep::Pinned(pin) = run(&mut rig, grabbed) else { panic!() };
    rig.machine.unpin(pin).unwrap();
    rig.pin(1, PinKind::Exclusive).unwrap();
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn a_gup_fast_that_does_not_look_is_found() {
    let mut rig = Rig::new();
    rig.machine.plant(Plant::GupFastIgnoresExclusive, true);
    rig.pin(1, PinKind::Exclusive).unwrap();
    let gup = GupFast::new(rig.process, vpn(1), true, PinKind::Short);
    assert!(matches!(run(&mut rig, gup), GupStep::Pinned(_)));
    let wrong = rig.machine.audit().unwrap_err();
    assert_eq!(wrong, polder_machine::Discrepancy::NotExclusive { pfn: crate::pfn(1) });
}
