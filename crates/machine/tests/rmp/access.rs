//! Who is let through: AMD APM volume 2, table 15-39.

use polder_machine::{
    AccessCheck, AccessFault, Discrepancy, Error, Exit, HostExit, Path, PinKind, Refused,
    RmpUpdate, Side,
};
use polder_units::Level;

use crate::{LARGE, OWNER, Rig, SMALL, asid, gfn, large, page, pages, pfn, refused, small, vpns};

#[test]
fn a_guests_private_access_needs_every_field_to_agree() {
    for (update, check) in [
        (None, AccessCheck::GuestOwned),
        (Some(RmpUpdate { asid: Some(asid(2)), ..small(1) }), AccessCheck::GuestOwned),
        (Some(RmpUpdate { asid: None, immutable: true, ..small(1) }), AccessCheck::GuestOwned),
        (Some(small(2)), AccessCheck::ReverseMap),
        (Some(RmpUpdate { immutable: true, ..small(1) }), AccessCheck::Mutable),
        (Some(small(1)), AccessCheck::Validated),
    ] {
        let mut rig = Rig::new();
        if let Some(update) = update {
            rig.machine.rmpupdate(pfn(1), update).unwrap();
        }
        rig.map(1, Level::Size4K);
        let reading = refused(rig.read(1, Side::Private));
        let writing = refused(rig.write(1, Side::Private, 7));
        assert_eq!((reading.check, reading.write), (check, false));
        assert_eq!((writing.check, writing.write), (check, true));
        let fault = match check {
            AccessCheck::Validated => AccessFault::NotValidated,
            _ => AccessFault::Npf { enc: true, sizem: false },
        };
        assert_eq!(reading.fault(), fault);
    }
}

#[test]
fn page_size_comes_before_validated() {
    for (entry, mapped) in [(LARGE, Level::Size4K), (SMALL, Level::Size2M)] {
        let mut rig = Rig::new();
        rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
        if entry == SMALL {
            rig.machine.psmash(pfn(0)).unwrap();
        }
        rig.map(0, mapped);
        let refused = refused(rig.read(0, Side::Private));
        assert_eq!(refused.check, AccessCheck::PageSize);
        let fault = AccessFault::Npf { enc: true, sizem: false };
        assert_eq!(refused.fault(), fault, "SIZEM is for instructions only");
    }
}

#[test]
fn a_1g_mapping_needs_2m_entries() {
    let mut rig = Rig::new();
    rig.machine.tdp_zap(rig.vm, crate::gfns(0, 8)).unwrap();
    rig.machine.merge_folios(rig.object, page(0), Level::Size1G, OWNER).unwrap();
    for at in [0, 4] {
        rig.machine.rmpupdate(pfn(at), large(at)).unwrap();
    }
    rig.map(0, Level::Size1G);
    for at in [0, 4] {
        assert_eq!(rig.pvalidate(at, LARGE), Ok(Ok(true)));
        assert_eq!(rig.write(at + 1, Side::Private, 7), Ok(()));
    }
    rig.machine.audit().unwrap();
}

#[test]
fn a_guests_shared_write_needs_the_whole_of_its_mapping_to_be_the_hypervisors() {
    let mut rig = Rig::new();
    rig.machine.rmpupdate(pfn(1), small(1)).unwrap();
    rig.map(0, Level::Size2M);
    let refused = refused(rig.write(0, Side::Shared, 7));
    assert_eq!(refused.check, AccessCheck::HypervisorOwned);
    assert_eq!(refused.fault(), AccessFault::Npf { enc: false, sizem: false });
    assert!(rig.read(1, Side::Shared).is_ok(), "a shared read is not checked");
    rig.machine.tdp_zap(rig.vm, crate::gfns(0, 4)).unwrap();
    rig.map(0, Level::Size4K);
    assert_eq!(rig.write(0, Side::Shared, 7), Ok(()));
}

#[test]
fn what_a_read_was_let_into_is_checked_again_for_a_write() {
    let mut rig = Rig::validated();
    assert!(rig.read(1, Side::Shared).is_ok());
    assert_eq!(refused(rig.write(1, Side::Shared, 7)).check, AccessCheck::HypervisorOwned);
    let hva = polder_machine::Vpn::from(1).hva();
    rig.machine.host_read(rig.thread, hva, &mut [0; 8]).unwrap();
    assert_eq!(rig.host_write(1), Some(AccessCheck::HypervisorOwned));
}

#[test]
fn the_host_reads_what_is_assigned_and_writes_none_of_it() {
    let mut rig = Rig::validated();
    rig.host_word(0);
    let trusted = rig.machine.object_write(rig.object, 1 << 12, &[7]);
    let check = AccessCheck::HypervisorOwned;
    let refused = Refused { path: Path::Host, pfn: pfn(1), write: true, check };
    assert_eq!(trusted, Err(Error::Refused(refused)));
    assert_eq!(refused.fault(), AccessFault::PageFault);
    assert_eq!(rig.machine.zero(rig.object, pages(1, 6)), Err(Error::Refused(refused)));
    assert_eq!(rig.host_write(2), Some(check));
    assert_eq!(rig.host_write(4), None, "the next 2M are shared");
}

#[test]
fn a_2m_mapping_of_the_host_writes_nothing_next_to_an_assigned_page() {
    let mut rig = Rig::new();
    rig.machine.rmpupdate(pfn(5), small(5)).unwrap();
    rig.machine.host_map(rig.process, polder_machine::Vpn::from(4), Level::Size2M).unwrap();
    assert_eq!(rig.host_write(4), Some(AccessCheck::HypervisorOwned));
    rig.machine.host_unmap(rig.process, vpns(4, 8)).unwrap();
    rig.machine.flush_process(rig.process, vpns(4, 8)).unwrap();
    rig.machine.host_map(rig.process, polder_machine::Vpn::from(4), Level::Size4K).unwrap();
    assert_eq!(rig.host_write(4), None, "by 4K it does: why the kernel splits its direct map");
}

#[test]
fn a_device_reads_what_is_assigned_and_writes_none_of_it() {
    let mut rig = Rig::new();
    let pin = rig.machine.pin_user_pages(rig.process, vpns(0, 2), true, PinKind::LongTerm).unwrap();
    rig.machine.rmpupdate(pfn(1), small(1)).unwrap();
    assert_eq!(rig.machine.dma_write(pin, 0, &[7; 8]), Ok(()), "its own 4K are shared");
    let refused = rig.machine.dma_write(pin, 1 << 12, &[7; 8]);
    let Err(Error::Refused(refused)) = refused else { panic!("{refused:?}") };
    assert_eq!(
        (refused.check, refused.fault()),
        (AccessCheck::HypervisorOwned, AccessFault::Iommu)
    );
    assert_eq!(rig.machine.dma_read(pin, 1 << 12, &mut [0; 8]), Ok(()));
}

#[test]
fn a_plain_guest_is_as_the_host() {
    let mut rig = Rig::new();
    let plain = rig.machine.create_vm().unwrap();
    let vcpu = rig.machine.add_vcpu(plain).unwrap();
    rig.machine.bind(plain, gfn(0), rig.object, pages(0, 8)).unwrap();
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    for at in [0, 4] {
        let resolved = rig.machine.tdp_resolve(plain, gfn(at)).unwrap();
        rig.machine.tdp_map(&resolved, Level::Size2M, true).unwrap();
    }
    let mut vcpu = rig.machine.vcpu(vcpu).unwrap();
    for side in [Side::Private, Side::Shared] {
        assert!(vcpu.read_u64(gfn(0).gpa(), side).is_ok());
        let check = refused(vcpu.write_u64(gfn(0).gpa(), side, 7)).check;
        assert_eq!(check, AccessCheck::HypervisorOwned);
        assert_eq!(vcpu.write_u64(gfn(4).gpa(), side, 7), Ok(()));
    }
}

#[test]
fn an_entry_in_use_refuses_until_it_is_released() {
    let mut rig = Rig::validated();
    rig.machine.rmp_hold(pfn(0), LARGE, OWNER).unwrap();
    assert_eq!(refused(rig.read(1, Side::Private)).check, AccessCheck::InUse);
    assert_eq!(refused(rig.write(1, Side::Shared, 7)).check, AccessCheck::InUse);
    assert!(rig.read(1, Side::Shared).is_ok(), "what is not checked can't be refused");
    rig.machine.rmp_release(pfn(0), OWNER).unwrap();
    assert!(rig.read(1, Side::Private).is_ok());
}

#[test]
fn what_a_tlb_holds_is_not_checked_again_and_the_audit_sees_it() {
    let mut rig = Rig::new();
    assert_eq!(rig.host_write(1), None);
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    assert_eq!(rig.host_write(1), None, "stale");
    assert!(matches!(rig.machine.audit(), Err(Discrepancy::RmpTlb(it)) if it.pfn == pfn(1)));
    rig.machine.flush_process(rig.process, vpns(0, 4)).unwrap();
    rig.machine.audit().unwrap();
    assert_eq!(rig.host_write(1), Some(AccessCheck::HypervisorOwned));
}

#[test]
fn a_page_that_was_freed_while_assigned_can_be_given_to_nobody() {
    let mut rig = Rig::new();
    rig.machine.rmpupdate(pfn(4), large(4)).unwrap();
    rig.machine.punch(rig.object, pages(4, 8), None).unwrap();
    assert_eq!(rig.machine.audit(), Err(Discrepancy::FreeAssigned { pfn: pfn(4) }));
    let again = rig.machine.allocate(rig.object, page(4), Level::Size2M);
    assert!(matches!(again, Err(Error::Refused(refused)) if refused.pfn == pfn(4)));
    rig.machine.rmpupdate(pfn(4), RmpUpdate::shared(LARGE)).unwrap();
    assert_eq!(rig.machine.allocate(rig.object, page(4), Level::Size2M), Ok(pfn(4)));
}

#[test]
fn a_refusal_reaches_a_process_as_an_exit() {
    let mut rig = Rig::validated();
    let hva = polder_machine::Vpn::from(0).hva();
    let outcome = rig.machine.host_write(rig.thread, hva, &[1]);
    assert!(matches!(outcome, Err(HostExit::Refused(_))));
    assert!(matches!(rig.read(7, Side::Private), Err(Exit::Fault(_))), "stage 2 comes first");
}
