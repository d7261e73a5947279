//! RMPUPDATE, PSMASH, PVALIDATE, the firmware's commands, and their results.

use polder_machine::{
    AccessCheck, AccessFault, Asid, Config, Error, Exit, FirmwareFail, Machine, Op, Ran, RmpEntry,
    RmpFail, RmpOwner, RmpSize, RmpUpdate, Side,
};
use polder_units::{Gfn, Level, PageCount};

use crate::{FRAMES, LARGE, OWNER, Rig, SMALL, asid, gfn, large, pfn, refused, small};

#[test]
fn without_snp_every_instruction_is_undefined_and_no_snp_guest_is_made() {
    let mut machine = Machine::new(Config::x86_64(PageCount::from(512))).unwrap();
    assert_eq!(machine.rmpupdate(pfn(0), small(0)), Err(RmpFail::Undefined));
    assert_eq!(machine.psmash(pfn(0)), Err(RmpFail::Undefined));
    assert_eq!(machine.page_unsmash(pfn(0)), Err(FirmwareFail::Platform));
    assert_eq!(machine.create_snp_vm(asid(1)), Err(Error::NoSnp));
    assert_eq!(machine.rmp_entry(pfn(0)), None);
}

#[test]
fn results_have_the_codes_of_the_manual() {
    let codes = [
        (RmpFail::Undefined, None),
        (RmpFail::Input, Some(1)),
        (RmpFail::Permission, Some(2)),
        (RmpFail::InUse, Some(3)),
        (RmpFail::Overlap, Some(4)),
        (RmpFail::SizeMismatch, Some(6)),
        (RmpFail::BadAddress, Some(7)),
    ];
    assert!(codes.into_iter().all(|(fail, code)| fail.code() == code));
    assert_eq!([0, 0x3ff].map(Asid::new), [None; 2]);
    assert_eq!(RmpSize::of(Level::Size1G), None);
}

#[test]
fn rmpupdate_takes_only_what_can_be() {
    let mut rig = Rig::new();
    let last = Gfn::new((1 << 52) - 1).unwrap();
    let shared = RmpUpdate::shared(SMALL);
    for (what, at, update) in [
        ("2M of an unaligned frame", 1, large(0)),
        ("past the last frame", FRAMES, small(0)),
        ("shared with an ASID", 0, RmpUpdate { asid: Some(asid(1)), ..shared }),
        ("shared and immutable", 0, RmpUpdate { immutable: true, ..shared }),
        ("past the last guest frame", 0, RmpUpdate { gfn: last, ..large(0) }),
    ] {
        assert_eq!(rig.machine.rmpupdate(pfn(at), update), Err(RmpFail::Input), "{what}");
    }
    assert_eq!(rig.machine.rmp_entry(pfn(0)), Some(RmpEntry::HYPERVISOR));
    assert_eq!(rig.machine.rmp_entry(pfn(FRAMES)), None);
}

#[test]
fn an_aligned_frames_entry_is_that_of_its_whole_2m_page() {
    let mut rig = Rig::new();
    rig.machine.rmpupdate(pfn(4), large(8)).unwrap();
    let third = rig.machine.rmp_entry(pfn(6)).unwrap();
    assert_eq!((third.assigned, third.size, third.gfn), (true, LARGE, gfn(10)));
    assert_eq!(third.owner(), RmpOwner::Guest(asid(1)));
    let firmware = RmpUpdate { asid: None, immutable: true, ..small(0) };
    rig.machine.rmpupdate(pfn(0), firmware).unwrap();
    assert_eq!(rig.machine.rmp_entry(pfn(0)).unwrap().owner(), RmpOwner::Firmware);
    assert_eq!(rig.machine.rmp_entry(pfn(1)).unwrap().owner(), RmpOwner::Hypervisor);
}

#[test]
fn an_immutable_entry_is_changed_by_the_firmware_only() {
    let mut rig = Rig::new();
    let immutable = RmpUpdate { immutable: true, ..large(0) };
    rig.machine.rmpupdate(pfn(0), immutable).unwrap();
    for update in [RmpUpdate::shared(LARGE), RmpUpdate::shared(SMALL), large(4)] {
        assert_eq!(rig.machine.rmpupdate(pfn(0), update), Err(RmpFail::Permission));
    }
    assert_eq!(rig.machine.psmash(pfn(0)), Err(RmpFail::BadAddress));
    assert_eq!(rig.machine.page_reclaim(pfn(0), SMALL), Err(FirmwareFail::PageSize));
    rig.machine.page_reclaim(pfn(0), LARGE).unwrap();
    assert_eq!(rig.machine.rmpupdate(pfn(0), RmpUpdate::shared(LARGE)), Ok(()));
    assert_eq!(rig.machine.page_reclaim(pfn(0), LARGE), Err(FirmwareFail::PageState));
}

#[test]
fn a_4k_update_of_any_part_of_a_2m_entry_overlaps() {
    let mut rig = Rig::new();
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    for at in 0..4 {
        for update in [small(at), RmpUpdate::shared(SMALL)] {
            assert_eq!(rig.machine.rmpupdate(pfn(at), update), Err(RmpFail::Overlap), "{at}");
        }
    }
}

#[test]
fn a_2m_update_over_any_assigned_4k_entry_overlaps() {
    for at in 0..4 {
        let mut rig = Rig::new();
        rig.machine.rmpupdate(pfn(at), small(at)).unwrap();
        for update in [large(0), RmpUpdate::shared(LARGE)] {
            assert_eq!(rig.machine.rmpupdate(pfn(0), update), Err(RmpFail::Overlap), "{at}");
        }
        rig.machine.rmpupdate(pfn(at), RmpUpdate::shared(SMALL)).unwrap();
        assert_eq!(rig.machine.rmpupdate(pfn(0), large(0)), Ok(()));
    }
}

#[test]
fn every_change_of_owner_place_or_size_clears_validated() {
    for update in [
        RmpUpdate { asid: Some(asid(2)), ..large(0) },
        large(4),
        RmpUpdate { asid: None, ..large(0) },
    ] {
        let mut rig = Rig::validated();
        rig.machine.rmpupdate(pfn(0), update).unwrap();
        assert!(!rig.machine.rmp_entry(pfn(0)).unwrap().validated, "{update:?}");
    }
    let mut rig = Rig::validated();
    rig.machine.rmpupdate(pfn(0), RmpUpdate::shared(LARGE)).unwrap();
    assert_eq!(rig.machine.rmp_entry(pfn(0)), Some(RmpEntry::HYPERVISOR));
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    assert!(!rig.machine.rmp_entry(pfn(0)).unwrap().validated, "there and back");
}

#[test]
fn setting_the_immutable_bit_alone_keeps_validated() {
    let mut rig = Rig::validated();
    let immutable = RmpUpdate { immutable: true, ..large(0) };
    rig.machine.rmpupdate(pfn(0), immutable).unwrap();
    let entry = rig.machine.rmp_entry(pfn(0)).unwrap();
    assert!(entry.immutable && entry.validated);
}

#[test]
fn psmash_makes_4k_entries_of_a_2m_entry_and_keeps_all_else() {
    let mut rig = Rig::validated();
    let before = rig.machine.rmp_entry(pfn(3)).unwrap();
    assert_eq!(rig.machine.psmash(pfn(1)), Err(RmpFail::Input));
    assert_eq!(rig.machine.psmash(pfn(FRAMES)), Err(RmpFail::Input));
    assert_eq!(rig.machine.psmash(pfn(0)), Ok(()));
    assert!(before.validated);
    assert_eq!(rig.machine.rmp_entry(pfn(3)), Some(RmpEntry { size: SMALL, ..before }));
    assert_eq!(rig.machine.psmash(pfn(0)), Err(RmpFail::BadAddress), "it is of 4K now");
    assert_eq!(rig.machine.psmash(pfn(4)), Err(RmpFail::BadAddress), "nobody's");
}

#[test]
fn what_is_in_use_is_neither_updated_nor_smashed() {
    let mut rig = Rig::new();
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    rig.machine.rmp_hold(pfn(0), LARGE, OWNER).unwrap();
    assert_eq!(rig.machine.rmpupdate(pfn(0), large(0)), Err(RmpFail::InUse), "the same entry");
    assert_eq!(rig.machine.rmpupdate(pfn(2), small(2)), Err(RmpFail::Overlap), "a part of it");
    assert_eq!(rig.machine.psmash(pfn(0)), Err(RmpFail::InUse));
    assert_eq!(rig.machine.rmp_hold(pfn(0), SMALL, OWNER), Err(RmpFail::InUse));
    rig.machine.rmp_release(pfn(0), OWNER).unwrap();
    assert_eq!(rig.machine.rmp_release(pfn(0), OWNER), Err(RmpFail::Input));
    rig.machine.rmp_hold(pfn(1), SMALL, OWNER).unwrap();
    assert_eq!(rig.machine.rmpupdate(pfn(0), large(0)), Err(RmpFail::Overlap), "around it");
    assert_eq!(rig.machine.psmash(pfn(0)), Err(RmpFail::InUse));
    assert_eq!(rig.machine.rmpupdate(pfn(4), large(4)), Ok(()), "next to it");
    rig.machine.rmp_release(pfn(1), OWNER).unwrap();
    assert_eq!(rig.machine.psmash(pfn(0)), Ok(()));
}

#[test]
fn pvalidate_says_whether_it_changed_anything_and_can_be_taken_back() {
    let mut rig = Rig::validated();
    assert_eq!(rig.pvalidate(0, LARGE), Ok(Ok(false)), "it was validated");
    let mut vcpu = rig.machine.vcpu(rig.vcpus[1]).unwrap();
    assert_eq!(vcpu.pvalidate(gfn(0), LARGE, false), Ok(Ok(true)));
    assert_eq!(refused(rig.read(0, Side::Private)).check, AccessCheck::Validated);
    assert_eq!(rig.pvalidate(2, LARGE), Ok(Err(RmpFail::Input)));
}

#[test]
fn pvalidate_of_what_stage_2_does_not_map_is_a_stage_2_fault() {
    let mut rig = Rig::new();
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    assert!(matches!(rig.pvalidate(0, LARGE), Err(Exit::Fault(fault)) if fault.gfn == gfn(0)));
}

#[test]
fn pvalidate_passes_the_checks_of_an_access_but_validated() {
    let immutable = RmpUpdate { immutable: true, ..small(1) };
    for (update, check) in [
        (None, AccessCheck::GuestOwned),
        (Some(RmpUpdate { asid: Some(asid(2)), ..small(1) }), AccessCheck::GuestOwned),
        (Some(small(2)), AccessCheck::ReverseMap),
        (Some(immutable), AccessCheck::Mutable),
    ] {
        let mut rig = Rig::new();
        if let Some(update) = update {
            rig.machine.rmpupdate(pfn(1), update).unwrap();
        }
        rig.map(1, Level::Size4K);
        let refused = refused(rig.pvalidate(1, SMALL));
        assert_eq!(refused.check, check);
        assert_eq!(refused.fault(), AccessFault::Npf { enc: true, sizem: false });
    }
    let mut rig = Rig::validated();
    rig.machine.rmp_hold(pfn(0), LARGE, OWNER).unwrap();
    assert_eq!(refused(rig.pvalidate(0, LARGE)).check, AccessCheck::InUse);
}

/// AMD APM volume 2, table 15-40, and for what stage 2 adds section 15.36.6.
#[test]
fn a_size_that_does_not_match_is_the_hypervisors_or_the_guests_to_solve() {
    let npf = |sizem| Err(AccessFault::Npf { enc: true, sizem });
    let mismatch = Ok(Err(RmpFail::SizeMismatch));
    for (asked, entry, mapped, expected) in [
        (SMALL, SMALL, SMALL, Ok(Ok(true))),
        (LARGE, LARGE, LARGE, Ok(Ok(true))),
        (SMALL, LARGE, LARGE, npf(true)),
        (SMALL, LARGE, SMALL, npf(true)),
        (SMALL, SMALL, LARGE, npf(false)),
        (LARGE, SMALL, SMALL, mismatch),
        (LARGE, SMALL, LARGE, mismatch),
        (LARGE, LARGE, SMALL, mismatch),
    ] {
        let mut rig = Rig::new();
        rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
        if entry == SMALL {
            rig.machine.psmash(pfn(0)).unwrap();
        }
        rig.map(0, mapped.level());
        let outcome = rig.pvalidate(0, asked).map_err(|exit| match exit {
            Exit::Refused(refused) => refused.fault(),
            other => panic!("{other}"),
        });
        assert_eq!(outcome, expected, "{asked:?} of {entry:?} mapped {mapped:?}");
    }
}

#[test]
fn a_guests_program_validates_its_pages() {
    let mut rig = Rig::new();
    let program = [
        Op::Pvalidate { gfn: gfn(0), size: LARGE, validate: true },
        Op::Write { gpa: gfn(1).gpa(), side: Side::Private, value: 7 },
        Op::Read { gpa: gfn(1).gpa(), side: Side::Private },
        Op::Rmpadjust { gfn: gfn(0), size: SMALL, vmsa: true },
    ];
    rig.machine.load(rig.vcpus[0], program.into()).unwrap();
    let step = |rig: &mut Rig| rig.machine.vcpu(rig.vcpus[0]).unwrap().step();
    assert!(matches!(step(&mut rig), Err(Exit::Fault(_))));
    rig.map(0, Level::Size2M);
    assert_eq!(refused(step(&mut rig)).check, AccessCheck::GuestOwned);
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    assert_eq!(step(&mut rig), Ok(Ran::Pvalidated(Ok(true))));
    assert_eq!(step(&mut rig), Ok(Ran::Wrote));
    assert_eq!(step(&mut rig), Ok(Ran::Read(7)));
    assert_eq!(refused(step(&mut rig)).check, AccessCheck::InstructionSize);
    rig.machine.psmash(pfn(0)).unwrap();
    rig.machine.tdp_zap(rig.vm, crate::gfns(0, 4)).unwrap();
    rig.map(0, Level::Size4K);
    assert_eq!(step(&mut rig), Ok(Ran::Rmpadjusted(Ok(()))));
}

#[test]
fn a_plain_guest_has_no_pvalidate() {
    let mut rig = Rig::new();
    let plain = rig.machine.create_vm().unwrap();
    let vcpu = rig.machine.add_vcpu(plain).unwrap();
    let outcome = rig.machine.vcpu(vcpu).unwrap().pvalidate(gfn(0), SMALL, true);
    assert_eq!(outcome, Ok(Err(RmpFail::Undefined)));
}

#[test]
fn unsmash_merges_agreeing_immutable_entries_and_keeps_validated() {
    let mut rig = Rig::validated();
    rig.machine.psmash(pfn(0)).unwrap();
    let immutable = |at| RmpUpdate { immutable: true, ..small(at) };
    for at in 0..4 {
        assert_eq!(rig.machine.page_unsmash(pfn(0)), Err(FirmwareFail::PageState), "{at}");
        rig.machine.rmpupdate(pfn(at), immutable(at)).unwrap();
    }
    assert_eq!(rig.machine.page_unsmash(pfn(1)), Err(FirmwareFail::Param));
    assert_eq!(rig.machine.page_unsmash(pfn(FRAMES)), Err(FirmwareFail::Param));
    rig.machine.page_unsmash(pfn(0)).unwrap();
    assert_eq!(refused(rig.pvalidate(0, LARGE)).check, AccessCheck::Mutable);
    rig.machine.page_reclaim(pfn(0), LARGE).unwrap();
    let entry = rig.machine.rmp_entry(pfn(2)).unwrap();
    assert_eq!((entry.size, entry.gfn, entry.validated), (LARGE, gfn(2), true));
    assert_eq!(rig.pvalidate(0, LARGE), Ok(Ok(false)));
}

#[test]
fn unsmash_refuses_entries_that_disagree() {
    let immutable = |update| RmpUpdate { immutable: true, ..update };
    for (what, first, third) in [
        ("unaligned guest frames", 1, small(3)),
        ("a gap", 0, small(3)),
        ("another guest's", 0, RmpUpdate { asid: Some(asid(2)), ..small(2) }),
        ("the firmware's", 0, RmpUpdate { asid: None, ..small(2) }),
    ] {
        let mut rig = Rig::new();
        for at in 0..4 {
            let update = if at == 2 { third } else { small(first + at) };
            rig.machine.rmpupdate(pfn(at), immutable(update)).unwrap();
        }
        assert_eq!(rig.machine.page_unsmash(pfn(0)), Err(FirmwareFail::PageState), "{what}");
    }
    let mut rig = Rig::new();
    (0..4).for_each(|at| rig.machine.rmpupdate(pfn(at), small(at)).unwrap());
    rig.map(1, Level::Size4K);
    rig.pvalidate(1, SMALL).unwrap().unwrap();
    (0..4).for_each(|at| rig.machine.rmpupdate(pfn(at), immutable(small(at))).unwrap());
    assert_eq!(rig.machine.page_unsmash(pfn(0)), Err(FirmwareFail::PageState), "one validated");
}

#[test]
fn an_asid_is_one_vms_and_none_while_pages_are_assigned_to_it() {
    let mut rig = Rig::validated();
    assert_eq!(rig.machine.create_snp_vm(asid(1)), Err(Error::Exists { number: 1 }));
    rig.machine.destroy_vm(rig.vm).unwrap();
    assert_eq!(rig.machine.create_snp_vm(asid(1)), Err(Error::Exists { number: 1 }));
    rig.machine.rmpupdate(pfn(0), RmpUpdate::shared(LARGE)).unwrap();
    assert!(rig.machine.create_snp_vm(asid(1)).is_ok());
}
