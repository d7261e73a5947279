//! Only the guest's own hypercall changes who may reach its page.

use polder_machine::PageState::{NoPage, Owned, SharedBorrowed, SharedOwned};
use polder_machine::{AccessCheck, Ask, Exit, PkvmFail};

use crate::{Rig, gfn, refusal};

#[test]
fn what_the_guest_shares_the_host_reaches_until_the_guest_takes_it_back() {
    let mut rig = Rig::new();
    rig.donate(1).unwrap();
    rig.guest_write(1, 5).unwrap();
    rig.share(1).unwrap();
    assert_eq!(rig.tables(1), (SharedBorrowed, NoPage, SharedOwned, true));
    assert_eq!(rig.host_read(1), Ok(5));
    rig.host_write(1, 6).unwrap();
    rig.unshare(1).unwrap();
    assert_eq!(rig.tables(1), (NoPage, NoPage, Owned, false));
    assert_eq!(refusal(&rig.host_read(1).unwrap_err()), Some(AccessCheck::HostStage2));
    assert_eq!(rig.guest_read(1), Ok(6));
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn a_host_that_was_not_asked_changes_nothing() {
    let mut rig = Rig::new();
    rig.donate(1).unwrap();
    let vm = rig.vm;
    assert_eq!(rig.machine.answer_guest(vm, gfn(1)), Err(PkvmFail::NotAsked));
    rig.machine.vcpu(rig.vcpu).unwrap().mem_share(gfn(1)).unwrap().unwrap();
    assert_eq!(rig.machine.asked_by_guest(vm, gfn(1)), Some((Ask::Share, false)));
    assert_eq!(rig.machine.resume_guest(vm, gfn(1)), Ok(false), "the host would not");
    assert_eq!(rig.machine.answer_guest(vm, gfn(1)), Err(PkvmFail::NotAsked), "it is over");
    assert_eq!(rig.tables(1), (NoPage, NoPage, Owned, false));
}

#[test]
fn an_answer_is_taken_back_until_the_guest_goes_on_and_not_after() {
    let mut rig = Rig::new();
    rig.donate(1).unwrap();
    let vm = rig.vm;
    rig.machine.vcpu(rig.vcpu).unwrap().mem_share(gfn(1)).unwrap().unwrap();
    rig.machine.answer_guest(vm, gfn(1)).unwrap();
    assert_eq!(rig.machine.answer_guest(vm, gfn(1)), Err(PkvmFail::NotAsked), "once");
    rig.machine.take_back_answer(vm, gfn(1)).unwrap();
    assert_eq!(rig.tables(1), (NoPage, NoPage, Owned, false));
    rig.machine.answer_guest(vm, gfn(1)).unwrap();
    assert_eq!(rig.machine.resume_guest(vm, gfn(1)), Ok(true));
    assert_eq!(rig.machine.take_back_answer(vm, gfn(1)), Err(PkvmFail::NotAsked));
}

#[test]
fn a_guest_asks_only_for_what_it_has() {
    let mut rig = Rig::new();
    let mut vcpu = rig.machine.vcpu(rig.vcpu).unwrap();
    assert!(matches!(vcpu.mem_share(gfn(1)), Err(Exit::Fault(fault)) if fault.gfn == gfn(1)));
    rig.donate(1).unwrap();
    let mut vcpu = rig.machine.vcpu(rig.vcpu).unwrap();
    assert_eq!(vcpu.mem_unshare(gfn(1)), Ok(Err(PkvmFail::Permission)));
    rig.share(1).unwrap();
    let mut vcpu = rig.machine.vcpu(rig.vcpu).unwrap();
    assert_eq!(vcpu.mem_share(gfn(1)), Ok(Err(PkvmFail::Permission)));
    assert_eq!(vcpu.mem_relinquish(gfn(1)), Ok(Err(PkvmFail::Permission)));
}

#[test]
fn what_a_guest_relinquishes_is_the_hosts_and_scrubbed() {
    let mut rig = Rig::new();
    rig.donate(1).unwrap();
    rig.guest_write(1, 5).unwrap();
    let vm = rig.vm;
    rig.machine.vcpu(rig.vcpu).unwrap().mem_relinquish(gfn(1)).unwrap().unwrap();
    rig.machine.answer_guest(vm, gfn(1)).unwrap();
    assert_eq!(rig.machine.take_back_answer(vm, gfn(1)), Err(PkvmFail::Permission), "for good");
    rig.machine.resume_guest(vm, gfn(1)).unwrap();
    assert_eq!(rig.host_read(1), Ok(0));
    assert!(matches!(rig.guest_read(1), Err(Exit::Fault(_))), "its TLB was flushed, too");
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn an_unshare_that_fails_on_the_way_leaves_the_page_shared() {
    for nth in 0..3 {
        let mut rig = Rig::new();
        rig.donate(1).unwrap();
        rig.share(1).unwrap();
        rig.machine.fail_hypervisor(Some(nth));
        assert_eq!(rig.unshare(1), Err(PkvmFail::NoMemory));
        assert_eq!(rig.tables(1), (SharedBorrowed, NoPage, SharedOwned, true));
        assert_eq!(rig.machine.audit(), Ok(()));
    }
}
