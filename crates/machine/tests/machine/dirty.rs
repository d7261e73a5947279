//! The dirty log of a slot.

use polder_machine::{Error, Plant, Side, View};
use polder_units::{Gfn, Level};

use crate::{Rig, gpa, pages};

/// A VM whose slot logs, its 2M folio mapped by 4K as far as it is asked for.
fn logging() -> Rig {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    rig.machine.log_dirty(rig.vm, Gfn::from(0), true).unwrap();
    rig
}

fn map(rig: &mut Rig, gfn: u32) -> Level {
    let resolved = rig.machine.tdp_resolve(rig.vm, Gfn::from(gfn)).unwrap();
    rig.machine.tdp_map(&resolved, resolved.largest(), true).unwrap()
}

fn write(rig: &mut Rig, vcpu: usize, gfn: u32) {
    rig.machine.vcpu(rig.vcpus[vcpu]).unwrap().write_u64(gpa(gfn), Side::Private, 7).unwrap();
}

fn read(rig: &mut Rig, vcpu: usize, gfn: u32) {
    rig.machine.vcpu(rig.vcpus[vcpu]).unwrap().read_u64(gpa(gfn), Side::Private).unwrap();
}

fn taken(rig: &mut Rig) -> Vec<u64> {
    let taken = rig.machine.take_dirty(rig.vm, Gfn::from(0)).unwrap();
    taken.into_iter().map(Gfn::get).collect()
}

#[test]
fn what_is_written_is_in_the_log_once_and_again_after_it_was_taken() {
    let mut rig = logging();
    (0..3).for_each(|gfn| assert_eq!(map(&mut rig, gfn), Level::Size4K, "by 4K, each noted"));
    read(&mut rig, 0, 0);
    write(&mut rig, 0, 1);
    write(&mut rig, 0, 1);
    // Read first, and written by what the TLB has of it.
    read(&mut rig, 1, 2);
    write(&mut rig, 1, 2);
    assert_eq!(taken(&mut rig), [1, 2]);
    assert_eq!(taken(&mut rig), []);
    write(&mut rig, 0, 1);
    assert_eq!(taken(&mut rig), [1], "the TLB let it through before");
}

#[test]
fn an_access_across_pages_is_noted_of_each() {
    let mut rig = logging();
    (0..2).for_each(|gfn| _ = map(&mut rig, gfn));
    let mut vcpu = rig.machine.vcpu(rig.vcpus[0]).unwrap();
    vcpu.write(gpa(0), Side::Private, &[1; 0x1001]).unwrap();
    assert_eq!(taken(&mut rig), [0, 1]);
}

#[test]
fn large_pages_go_with_the_log_and_come_back_without_it() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    assert_eq!(map(&mut rig, 0), Level::Size2M);
    write(&mut rig, 0, 1);
    let before = rig.machine.tdp_resolve(rig.vm, Gfn::from(0)).unwrap();
    rig.machine.log_dirty(rig.vm, Gfn::from(0), true).unwrap();
    let stale = rig.machine.tdp_map(&before, Level::Size2M, true);
    assert!(matches!(stale, Err(Error::Stale { .. })), "{stale:?}");
    assert_eq!(taken(&mut rig), [], "what was written before is not its business");
    assert_eq!(map(&mut rig, 1), Level::Size4K);
    write(&mut rig, 0, 1);
    assert_eq!(taken(&mut rig), [1], "the TLB of the large page went, too");
    rig.machine.log_dirty(rig.vm, Gfn::from(0), false).unwrap();
    assert_eq!(map(&mut rig, 0), Level::Size2M);
    write(&mut rig, 0, 1);
    assert_eq!(taken(&mut rig), []);
}

#[test]
fn each_slot_has_a_log_of_its_own() {
    let mut rig = logging();
    rig.machine.bind(rig.vm, Gfn::from(32), rig.object, pages(4, 8)).unwrap();
    rig.machine.allocate(rig.object, crate::page(4), Level::Size4K).unwrap();
    map(&mut rig, 32);
    write(&mut rig, 0, 32);
    assert_eq!(rig.machine.take_dirty(rig.vm, Gfn::from(33)), Ok(vec![]), "it has none");
    assert_eq!(taken(&mut rig), []);
    rig.machine.log_dirty(rig.vm, Gfn::from(35), true).unwrap();
    map(&mut rig, 32);
    write(&mut rig, 0, 32);
    assert_eq!(taken(&mut rig), []);
    assert_eq!(rig.machine.take_dirty(rig.vm, Gfn::from(33)), Ok(vec![Gfn::from(32)]));
    let none = rig.machine.log_dirty(rig.vm, Gfn::from(63), true);
    assert_eq!(none, Err(Error::NoSlot { gfn: Gfn::from(63) }));
}

#[test]
fn a_flush_that_is_skipped_loses_a_write() {
    let mut rig = logging();
    rig.machine.plant(Plant::SkipFlush, true);
    map(&mut rig, 1);
    write(&mut rig, 0, 1);
    assert_eq!(taken(&mut rig), [1]);
    write(&mut rig, 0, 1);
    assert_eq!(taken(&mut rig), [], "the bug that the other tests have to notice");
}
