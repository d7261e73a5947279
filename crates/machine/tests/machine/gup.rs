//! Pins, and GUP-fast step by step.

use polder_machine::{Error, GupFast, GupStep, HostExit, Machine, PinKind, View};
use polder_units::{Level, Pfn, PfnRange};

use crate::{OWNER, Rig, page, pages, vpn, vpns};

fn again(step: GupStep) -> GupFast {
    match step {
        GupStep::Again(gup) => gup,
        other => panic!("not again: {other:?}"),
    }
}

fn mapped() -> (Rig, Pfn) {
    let mut rig = Rig::new(View::HOST);
    let pfn = rig.machine.allocate(rig.object, page(0), Level::Size4K).unwrap();
    rig.machine.host_map(rig.process, vpn(0), Level::Size4K).unwrap();
    (rig, pfn)
}

#[test]
fn gup_fast_shows_a_reference_before_it_looks_again() {
    let (mut rig, pfn) = mapped();
    let gup = GupFast::new(rig.process, vpn(0), true, PinKind::LongTerm);
    let gup = again(gup.step(&mut rig.machine).unwrap());
    let gup = again(gup.step(&mut rig.machine).unwrap());
    assert!(rig.machine.counts(pfn).unwrap().maybe_dma_pinned());
    assert!(rig.machine.holders_of(PfnRange::one(pfn)).all(|holder| holder.speculative));
    rig.machine.host_unmap(rig.process, vpns(0, 1)).unwrap();
    assert_eq!(gup.step(&mut rig.machine), Ok(GupStep::Fallback));
    assert_eq!(rig.machine.counts(pfn).unwrap().foreign(), 0);
}

#[test]
fn gup_fast_on_an_unchanged_entry_is_a_pin_with_a_holder() {
    let (mut rig, pfn) = mapped();
    let mut step = GupStep::Again(GupFast::new(rig.process, vpn(0), true, PinKind::Short));
    while let GupStep::Again(gup) = step {
        step = gup.step(&mut rig.machine).unwrap();
    }
    let GupStep::Pinned(pin) = step else { panic!("{step:?}") };
    let holder = rig.machine.holders_of(PfnRange::one(pfn)).next().unwrap();
    assert_eq!((holder.pin, holder.kind, holder.speculative), (pin, PinKind::Short, false));
    assert_eq!(rig.machine.pinned_frames(pin), Ok(&[pfn][..]));
    let past = rig.machine.dma_write(pin, 4090, &[0; 8]);
    assert_eq!(past, Err(Error::OutOfBounds { offset: 4090, len: 8 }));
}

#[test]
fn a_refusal_can_name_each_pinned_page_of_a_folio_and_its_holder() {
    let (mut rig, pfn) = Rig::with_folio(View::PLAIN);
    let mut pin = |start, end, kind| {
        rig.machine.pin_user_pages(rig.process, vpns(start, end), true, kind).unwrap()
    };
    let (disk, device) = (pin(1, 3, PinKind::Short), pin(2, 3, PinKind::LongTerm));
    let folio = PfnRange::enclosing(pfn, Level::Size2M, crate::geometry());
    let holders = rig.machine.holders_of(folio);
    let named: Vec<_> = holders.map(|it| (it.pfn.get() - pfn.get(), it.pin, it.kind)).collect();
    let (short, long) = (PinKind::Short, PinKind::LongTerm);
    assert_eq!(named, [(1, disk, short), (2, disk, short), (2, device, long)]);
    assert_eq!(rig.machine.counts(pfn).unwrap().pincount, 3);
}

#[test]
fn gup_fast_leaves_alone_what_is_freed_unmapped_poisoned_or_read_only() {
    let (mut rig, _) = mapped();
    let gup = GupFast::new(rig.process, vpn(0), true, PinKind::Short);
    let gup = again(gup.step(&mut rig.machine).unwrap());
    rig.machine.zap_object(rig.object, pages(0, 1)).unwrap();
    rig.machine.punch(rig.object, pages(0, 1), None).unwrap();
    assert_eq!(gup.step(&mut rig.machine), Ok(GupStep::Fallback), "its count is 0");
    rig.machine.host_poison(rig.process, vpns(1, 2)).unwrap();
    let mut first = |at, write| {
        GupFast::new(rig.process, vpn(at), write, PinKind::Short).step(&mut rig.machine)
    };
    assert_eq!(first(0, false), Ok(GupStep::Fallback));
    assert_eq!(first(1, false), Ok(GupStep::Fallback));
    assert_eq!(first(30, false), Ok(GupStep::Fallback));
}

#[test]
fn a_transient_reference_can_be_on_a_strangers_folio() {
    let (mut rig, pfn) = mapped();
    let gup = GupFast::new(rig.process, vpn(0), true, PinKind::Short);
    let gup = again(gup.step(&mut rig.machine).unwrap());
    rig.machine.zap_object(rig.object, pages(0, 1)).unwrap();
    rig.machine.punch(rig.object, pages(0, 1), None).unwrap();
    assert_eq!(rig.machine.allocate(rig.object, page(5), Level::Size4K), Ok(pfn));
    let gup = again(gup.step(&mut rig.machine).unwrap());
    assert!(rig.machine.counts(pfn).unwrap().foreign() > 0, "whoever checks page 5 now is misled");
    assert_eq!(gup.step(&mut rig.machine), Ok(GupStep::Fallback));
}

#[test]
fn the_slow_path_pins_all_of_a_range_or_nothing() {
    let (mut rig, pfn) = mapped();
    let refused = rig.machine.pin_user_pages(rig.process, vpns(0, 2), true, PinKind::Short);
    assert!(matches!(refused, Err(HostExit::Fault(fault)) if fault.page == page(1)));
    assert_eq!(rig.machine.counts(pfn).unwrap().foreign(), 0);
    assert_eq!(rig.machine.holders_of(PfnRange::one(pfn)).count(), 0);
}

/// To-private as it should be: cut off, flush, lock, count. `None` while it has steps to do.
fn convert(machine: &mut Machine, rig: &Rig, pfn: Pfn, stage: usize) -> Option<bool> {
    match stage {
        0 => {
            machine.zap_object(rig.object, pages(0, 1)).unwrap();
            None
        }
        1 => {
            machine.flush_object(rig.object, pages(0, 1)).unwrap();
            None
        }
        2 => {
            machine.lock_folio(pfn, OWNER).unwrap();
            None
        }
        _ => Some(machine.locked_counts(pfn, OWNER).unwrap().foreign() == 0),
    }
}

/// Runs every interleaving of GUP-fast with the conversion; counts those in which the conversion
/// found the folio free of references and GUP-fast has it pinned, at the end.
fn both(rig: &Rig, pfn: Pfn, machine: &Machine, gup: GupStep, stage: usize) -> usize {
    let mut found = 0;
    if let GupStep::Again(gup) = gup {
        let mut machine = machine.clone();
        let next = gup.step(&mut machine).unwrap();
        found += both(rig, pfn, &machine, next, stage);
    }
    if stage < 4 {
        let mut machine = machine.clone();
        match convert(&mut machine, rig, pfn, stage) {
            Some(false) => {}
            Some(true) => found += both_after(&machine, gup),
            None => found += both(rig, pfn, &machine, gup, stage + 1),
        }
    }
    found
}

/// 1 if GUP-fast ends with a pin though the conversion has succeeded.
fn both_after(machine: &Machine, mut gup: GupStep) -> usize {
    let mut machine = machine.clone();
    while let GupStep::Again(next) = gup {
        gup = next.step(&mut machine).unwrap();
    }
    usize::from(matches!(gup, GupStep::Pinned(_)))
}

#[test]
fn no_interleaving_of_gup_fast_pins_what_was_cut_off_before_the_check() {
    let (rig, pfn) = mapped();
    let gup = GupStep::Again(GupFast::new(rig.process, vpn(0), true, PinKind::LongTerm));
    assert_eq!(both(&rig, pfn, &rig.machine, gup, 0), 0);
}

#[test]
fn without_the_second_look_some_interleaving_does() {
    let (mut rig, pfn) = mapped();
    rig.machine.plant(polder_machine::Plant::StaleGup, true);
    let gup = GupStep::Again(GupFast::new(rig.process, vpn(0), true, PinKind::LongTerm));
    assert!(both(&rig, pfn, &rig.machine, gup, 0) > 0);
}
