//! What the host gives away, and what it can't reach then.

use polder_machine::{AccessCheck, AccessFault, Component, Error, HostExit, PkvmFail};

use crate::{PAGES, Rig, gfn, gfns, page, pfn, refusal};
use polder_machine::PageState::{NoPage, Owned, SharedBorrowed, SharedOwned};

#[test]
fn a_new_machine_is_the_hosts() {
    let rig = Rig::new();
    for at in 0..PAGES {
        assert_eq!(rig.tables(at), (Owned, NoPage, NoPage, true));
        assert_eq!(rig.machine.owner_of(pfn(at)), Ok(Component::Host));
    }
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn a_donation_changes_host_iommu_and_guest_together_and_keeps_the_contents() {
    let mut rig = Rig::new();
    rig.host_write(2, 7).unwrap();
    rig.donate(2).unwrap();
    assert_eq!(rig.tables(2), (NoPage, NoPage, Owned, false));
    assert_eq!(rig.machine.owner_of(pfn(2)), Ok(Component::Guest(rig.vm)));
    assert_eq!(rig.guest_read(2), Ok(7));
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn the_host_has_lost_what_it_donated_also_where_its_tlb_knew_it() {
    let mut rig = Rig::new();
    rig.host_write(2, 7).unwrap();
    rig.donate(2).unwrap();
    // The page table still maps it: stage 2 is what stops the access.
    let exit = rig.host_write(2, 8).unwrap_err();
    assert_eq!(refusal(&exit), Some(AccessCheck::HostStage2));
    let HostExit::Refused(refused) = exit else { unreachable!() };
    assert_eq!(refused.fault(), AccessFault::HostAbort);
    let trusted = rig.machine.object_write(rig.object, page(2).offset(), &[1]);
    assert!(matches!(trusted, Err(Error::Refused(_))));
    assert_eq!(rig.guest_read(2), Ok(7));
}

#[test]
fn what_is_not_the_hosts_alone_is_not_donated() {
    let mut rig = Rig::new();
    rig.donate(2).unwrap();
    assert_eq!(rig.donate(2), Err(PkvmFail::Permission), "donated already");
    let vm = rig.vm;
    assert_eq!(
        rig.machine.host_donate_guest(vm, gfn(2), pfn(3)),
        Err(PkvmFail::Permission),
        "the guest has a page there"
    );
    rig.share(2).unwrap();
    assert_eq!(rig.donate(2), Err(PkvmFail::Permission), "only borrowed");
    rig.machine.host_share_hyp(pfn(4)).unwrap();
    assert_eq!(rig.donate(4), Err(PkvmFail::Permission), "shared with the hypervisor");
    let plain = rig.plain;
    assert_eq!(
        rig.machine.host_donate_guest(plain, gfn(0), pfn(5)),
        Err(PkvmFail::Undefined),
        "no protected VM"
    );
    let beyond = rig.machine.host_donate_guest(vm, gfn(5), pfn(crate::FRAMES));
    assert_eq!(beyond, Err(PkvmFail::Input));
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn a_donation_that_fails_on_the_way_has_changed_nothing() {
    for nth in 0..3 {
        let mut rig = Rig::new();
        rig.host_write(2, 7).unwrap();
        rig.machine.fail_hypervisor(Some(nth));
        assert_eq!(rig.donate(2), Err(PkvmFail::NoMemory));
        assert_eq!(rig.tables(2), (Owned, NoPage, NoPage, true));
        assert_eq!(rig.host_read(2), Ok(7));
        assert!(rig.guest_read(2).is_err());
        assert_eq!(rig.machine.audit(), Ok(()));
        rig.donate(2).unwrap();
    }
}

#[test]
fn the_hypervisor_is_shared_with_and_given_pages_and_gives_them_back_scrubbed() {
    let mut rig = Rig::new();
    rig.host_write(1, 9).unwrap();
    rig.machine.host_share_hyp(pfn(1)).unwrap();
    assert_eq!(rig.tables(1), (SharedOwned, SharedBorrowed, NoPage, true));
    assert_eq!(rig.machine.host_share_hyp(pfn(1)), Err(PkvmFail::Permission));
    assert_eq!(rig.machine.host_donate_hyp(pfn(1)), Err(PkvmFail::Permission));
    rig.machine.host_unshare_hyp(pfn(1)).unwrap();
    assert_eq!(rig.machine.host_unshare_hyp(pfn(1)), Err(PkvmFail::Permission));
    rig.machine.host_donate_hyp(pfn(1)).unwrap();
    assert_eq!(rig.tables(1), (NoPage, Owned, NoPage, false));
    assert!(rig.host_read(1).is_err());
    rig.machine.hyp_donate_host(pfn(1)).unwrap();
    assert_eq!(rig.machine.hyp_donate_host(pfn(1)), Err(PkvmFail::Permission));
    assert_eq!(rig.host_read(1), Ok(0));
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn a_guest_that_is_not_protected_borrows_also_at_two_places() {
    let mut rig = Rig::new();
    let plain = rig.plain;
    for at in [3, 4] {
        rig.machine.host_share_guest(plain, gfn(at), pfn(3)).unwrap();
    }
    assert_eq!(rig.tables(3).0, SharedOwned);
    let again = rig.machine.host_share_guest(plain, gfn(3), pfn(3));
    assert_eq!(again, Err(PkvmFail::Permission));
    rig.machine.host_unshare_guest(plain, gfn(3)).unwrap();
    assert_eq!(rig.tables(3).0, SharedOwned);
    rig.machine.host_unshare_guest(plain, gfn(4)).unwrap();
    assert_eq!(rig.tables(3), (Owned, NoPage, NoPage, true));
    assert_eq!(rig.machine.host_unshare_guest(plain, gfn(4)), Err(PkvmFail::NotFound));
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn the_hosts_kernel_changes_no_stage_2_itself() {
    let mut rig = Rig::new();
    let vm = rig.vm;
    rig.donate(0).unwrap();
    assert_eq!(rig.machine.tdp_zap(vm, gfns(0, 8)), Err(Error::Protected { vm }));
    assert_eq!(rig.machine.tdp_unmap(vm, gfns(0, 8)), Err(Error::Protected { vm }));
    let resolved = rig.machine.tdp_resolve(vm, gfn(1)).unwrap();
    let mapped = rig.machine.tdp_map(&resolved, polder_units::Level::Size4K, true);
    assert_eq!(mapped, Err(Error::Protected { vm }));
    assert_eq!(rig.guest_read(0), Ok(0));
}

#[test]
fn a_vm_that_goes_leaves_its_pages_to_the_host_and_its_secrets_to_nobody() {
    let mut rig = Rig::new();
    for at in [0, 1] {
        rig.donate(at).unwrap();
        rig.guest_write(at, 7).unwrap();
    }
    rig.share(1).unwrap();
    rig.machine.destroy_vm(rig.vm).unwrap();
    assert_eq!(rig.machine.audit(), Ok(()));
    assert_eq!(rig.host_read(0), Ok(0), "scrubbed");
    assert_eq!(rig.host_read(1), Ok(7), "the host could read it before");
}

#[test]
fn a_frame_that_is_freed_while_a_guest_has_it_can_be_given_to_nobody() {
    let mut rig = Rig::new();
    rig.donate(0).unwrap();
    rig.machine.punch(rig.object, crate::pages(0, 1), None).unwrap();
    assert_eq!(rig.machine.audit(), Err(polder_machine::Discrepancy::FreeAssigned { pfn: pfn(0) }));
    let again = rig.machine.allocate(rig.object, page(0), polder_units::Level::Size4K);
    assert!(matches!(again, Err(Error::Refused(_))), "{again:?}");
}
