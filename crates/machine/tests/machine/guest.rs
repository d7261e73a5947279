//! Guests, stage 2 and the sequence.

use std::hash::{DefaultHasher, Hash, Hasher};

use polder_machine::{Error, Exit, GuestFault, Machine, Op, Ran, Request, Side, View};
use polder_units::{Gfn, Gpa, Level};

use crate::{Rig, gfns, gpa, page, pages};

fn fault(gfn: u32, write: bool) -> Exit {
    let page = gfn.into();
    Exit::Fault(GuestFault { gfn: Gfn::from(gfn), page, write, side: Side::Shared })
}

fn read(rig: &mut Rig, vcpu: usize, gfn: u32) -> Result<u64, Exit> {
    rig.machine.vcpu(rig.vcpus[vcpu]).unwrap().read_u64(gpa(gfn), Side::Shared)
}

fn write(rig: &mut Rig, gfn: u32, value: u64) -> Result<(), Exit> {
    rig.machine.vcpu(rig.vcpus[0]).unwrap().write_u64(gpa(gfn), Side::Shared, value)
}

fn map(rig: &mut Rig, gfn: u32, level: Level) {
    let resolved = rig.machine.tdp_resolve(rig.vm, Gfn::from(gfn)).unwrap();
    rig.machine.tdp_map(&resolved, level, true).unwrap();
}

fn digest(machine: &Machine) -> u64 {
    let mut hasher = DefaultHasher::new();
    machine.hash(&mut hasher);
    hasher.finish()
}

#[test]
fn a_guest_is_a_program_that_is_stepped_through_faults_and_requests() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    let vcpu = rig.vcpus[0];
    let request = Request::MapGpaRange { range: gfns(0, 1), side: Side::Private };
    let program = [
        Op::Write { gpa: gpa(1), side: Side::Shared, value: 7 },
        Op::Request(request),
        Op::Read { gpa: gpa(1), side: Side::Shared },
    ];
    rig.machine.load(vcpu, program.into()).unwrap();
    let step = |rig: &mut Rig| rig.machine.vcpu(vcpu).unwrap().step();
    assert_eq!(step(&mut rig), Err(fault(1, true)));
    assert_eq!(step(&mut rig), Err(fault(1, true)), "nobody has answered");
    map(&mut rig, 1, Level::Size4K);
    assert_eq!(step(&mut rig), Ok(Ran::Wrote));
    assert_eq!(step(&mut rig), Err(Exit::Request(request)));
    assert_eq!(step(&mut rig), Ok(Ran::Read(7)));
    assert_eq!(step(&mut rig), Err(Exit::Halted));
}

#[test]
fn a_guest_may_name_any_address() {
    let mut rig = Rig::new(View::HOST);
    for address in [0x20 << 12, (1 << 52) - 1, u64::MAX - 3, u64::MAX] {
        let mut vcpu = rig.machine.vcpu(rig.vcpus[0]).unwrap();
        let exit = vcpu.read_u64(Gpa::new(address), Side::Private);
        assert!(matches!(exit, Err(Exit::Fault(_))), "{address:#x}");
        assert!(vcpu.write(Gpa::new(address), Side::Shared, &[0; 5000]).is_err());
        assert_eq!(vcpu.read(Gpa::new(address), Side::Shared, &mut []), Ok(()));
    }
}

#[test]
fn a_write_through_a_read_only_entry_is_a_fault_of_its_own() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    let resolved = rig.machine.tdp_resolve(rig.vm, Gfn::from(2)).unwrap();
    rig.machine.tdp_map(&resolved, Level::Size2M, false).unwrap();
    assert_eq!(read(&mut rig, 0, 3), Ok(0));
    assert_eq!(write(&mut rig, 3, 1), Err(fault(3, true)));
    rig.machine.tdp_map(&resolved, Level::Size4K, true).unwrap();
    assert_eq!(write(&mut rig, 3, 1), Ok(()));
    let spte = rig.machine.spte(rig.vm, Gfn::from(3)).unwrap().unwrap();
    assert_eq!((spte.level, spte.writable), (Level::Size2M, true), "the larger entry is kept");
}

#[test]
fn unmapping_is_noticed_only_after_the_flush() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    map(&mut rig, 0, Level::Size4K);
    write(&mut rig, 0, 3).unwrap();
    assert_eq!(read(&mut rig, 1, 0), Ok(3));
    assert_eq!(rig.machine.tdp_unmap(rig.vm, gfns(0, 1)), Ok(true));
    assert_eq!((read(&mut rig, 0, 0), read(&mut rig, 1, 0)), (Ok(3), Ok(3)));
    rig.machine.flush_vcpu(rig.vcpus[0], gfns(0, 1)).unwrap();
    assert_eq!((read(&mut rig, 0, 0), read(&mut rig, 1, 0)), (Err(fault(0, false)), Ok(3)));
    rig.machine.flush_vm(rig.vm, gfns(0, 1)).unwrap();
    assert_eq!(read(&mut rig, 1, 0), Err(fault(0, false)));
}

#[test]
fn what_was_resolved_before_an_invalidation_is_not_mapped_after_it() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    let resolve = |rig: &Rig| rig.machine.tdp_resolve(rig.vm, Gfn::from(0)).unwrap();
    let stale = Err(Error::Stale { gfn: Gfn::from(0) });
    let before = resolve(&rig);
    rig.machine.invalidate_begin(rig.vm, gfns(0, 4)).unwrap();
    let during = resolve(&rig);
    assert_eq!(rig.machine.tdp_map(&before, Level::Size4K, true), stale);
    assert_eq!(rig.machine.tdp_map(&during, Level::Size4K, true), stale);
    rig.machine.invalidate_end(rig.vm).unwrap();
    assert_eq!(rig.machine.tdp_map(&during, Level::Size4K, true), stale);
    assert!(!during.is_current(&rig.machine));
    let after = resolve(&rig);
    assert!(after.is_current(&rig.machine));
    assert_eq!(rig.machine.tdp_map(&after, Level::Size4K, true), Ok(Level::Size4K));
    assert_eq!(rig.machine.invalidate_end(rig.vm), Err(Error::NotInvalidating));
}

#[test]
fn what_was_resolved_for_a_vm_that_is_gone_is_stale_for_the_next_of_its_number() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    let resolved = rig.machine.tdp_resolve(rig.vm, Gfn::from(0)).unwrap();
    rig.machine.destroy_vm(rig.vm).unwrap();
    assert_eq!(rig.machine.create_vm(), Ok(rig.vm));
    rig.machine.bind(rig.vm, Gfn::from(0), rig.object, pages(0, 16)).unwrap();
    assert!(!resolved.is_current(&rig.machine));
}

#[test]
fn a_level_needs_the_folio_the_slot_and_the_alignment_of_both() {
    let mut rig = Rig::new(View::HOST);
    rig.machine.allocate(rig.object, page(0), Level::Size1G).unwrap();
    let largest =
        |rig: &Rig, vm, gfn| rig.machine.tdp_resolve(vm, Gfn::from(gfn)).unwrap().largest();
    assert_eq!(largest(&rig, rig.vm, 5), Level::Size1G);
    let vm = rig.machine.create_vm().unwrap();
    rig.machine.bind(vm, Gfn::from(4), rig.object, pages(0, 6)).unwrap();
    rig.machine.bind(vm, Gfn::from(17), rig.object, pages(0, 8)).unwrap();
    assert_eq!(largest(&rig, vm, 4), Level::Size2M, "congruent modulo 2M only");
    assert_eq!(largest(&rig, vm, 9), Level::Size4K, "the slot ends within the 2M page");
    assert_eq!(largest(&rig, vm, 21), Level::Size4K, "congruent modulo 4K only");
    let resolved = rig.machine.tdp_resolve(vm, Gfn::from(9)).unwrap();
    let refused = rig.machine.tdp_map(&resolved, Level::Size2M, true);
    assert!(matches!(refused, Err(Error::TooLarge { largest: Level::Size4K, .. })));
    let seen: Vec<_> = rig.machine.gfns_of(rig.object, pages(4, 5)).collect();
    assert_eq!(seen, [(rig.vm, gfns(4, 5)), (vm, gfns(8, 9)), (vm, gfns(21, 22))]);
}

#[test]
fn a_large_entry_replaces_smaller_ones_and_flushes_them() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    map(&mut rig, 1, Level::Size4K);
    write(&mut rig, 1, 9).unwrap();
    map(&mut rig, 2, Level::Size2M);
    assert_eq!(read(&mut rig, 0, 1), Ok(9));
    assert_eq!(rig.machine.tdp_pages(rig.vm).unwrap().get(), 4);
    rig.machine.audit().unwrap();
}

#[test]
fn an_entry_that_replaces_a_forgotten_one_flushes_it() {
    let (mut rig, pfn) = Rig::with_folio(View::HOST);
    map(&mut rig, 0, Level::Size2M);
    write(&mut rig, 1, 9).unwrap();
    rig.machine.punch(rig.object, pages(0, 4), None).unwrap();
    rig.machine.allocate(rig.object, page(8), Level::Size2M).unwrap();
    assert_ne!(rig.machine.allocate(rig.object, page(1), Level::Size4K), Ok(pfn));
    assert_eq!(read(&mut rig, 0, 1), Ok(0), "page 9 by now");
    map(&mut rig, 1, Level::Size4K);
    rig.machine.object_write(rig.object, 1 << 12, &5u64.to_le_bytes()).unwrap();
    assert_eq!(read(&mut rig, 0, 1), Ok(5));
    assert_eq!(read(&mut rig, 0, 0), Err(fault(0, false)), "it went whole");
}

#[test]
fn slots_do_not_overlap_and_an_unbound_one_stales_what_was_resolved() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    let overlap = rig.machine.bind(rig.vm, Gfn::from(15), rig.object, pages(0, 2));
    assert_eq!(overlap, Err(Error::Exists { number: 15 }));
    let beyond = rig.machine.bind(rig.vm, Gfn::from(16), rig.object, pages(15, 17));
    assert!(matches!(beyond, Err(Error::Beyond { .. })));
    let resolved = rig.machine.tdp_resolve(rig.vm, Gfn::from(0)).unwrap();
    assert_eq!(rig.machine.unbind(rig.vm, Gfn::from(7)), Ok(gfns(0, 16)));
    assert!(rig.machine.tdp_map(&resolved, Level::Size4K, true).is_err());
    let gone = rig.machine.tdp_resolve(rig.vm, Gfn::from(0));
    assert_eq!(gone.err(), Some(Error::NoSlot { gfn: Gfn::from(0) }));
}

#[test]
fn machines_that_behave_alike_hash_alike() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    let before = digest(&rig.machine);
    let mut other = rig.machine.clone();
    map(&mut rig, 0, Level::Size4K);
    write(&mut rig, 0, 1).unwrap();
    assert_ne!(digest(&rig.machine), before);
    assert_eq!(digest(&other), before, "a clone is its own machine");
    write(&mut rig, 0, 0).unwrap();
    rig.machine.tdp_zap(rig.vm, gfns(0, 16)).unwrap();
    rig.machine.zero(rig.object, pages(0, 4)).unwrap();
    assert_eq!(digest(&rig.machine), before, "the way here does not show");
    other.destroy_vm(rig.vm).unwrap();
    assert_ne!(digest(&other), before);
}
