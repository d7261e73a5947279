//! Each planted bug of the RMP, and what it looks like from outside. Each check passes without it.

use polder_machine::{Discrepancy, Plant, RmpFail, RmpUpdate, Side};
use polder_units::Level;

use crate::{LARGE, Rig, SMALL, asid, gfn, gfns, large, page, pages, pfn, small};

/// Runs `check` without and with `plant`: it must be true, then false.
fn caught(plant: Plant, check: impl Fn(&mut Rig) -> bool) {
    for planted in [false, true] {
        let mut rig = Rig::new();
        rig.machine.plant(plant, planted);
        assert_eq!(check(&mut rig), !planted, "{plant:?} {planted}");
    }
}

#[test]
fn a_psmash_that_loses_a_validated_bit_is_met_by_the_guest() {
    caught(Plant::SmashUnvalidates, |rig| {
        rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
        rig.map(0, Level::Size2M);
        rig.pvalidate(0, LARGE).unwrap().unwrap();
        rig.machine.psmash(pfn(0)).unwrap();
        rig.machine.tdp_zap(rig.vm, gfns(0, 4)).unwrap();
        (0..4).for_each(|at| rig.map(at, Level::Size4K));
        (0..4).all(|at| rig.read(at, Side::Private).is_ok())
    });
}

#[test]
fn a_2m_entry_over_an_assigned_4k_page_takes_it_from_its_guest() {
    caught(Plant::LargeOverAssigned, |rig| {
        rig.machine.rmpupdate(pfn(1), small(1)).unwrap();
        rig.map(1, Level::Size4K);
        rig.pvalidate(1, SMALL).unwrap().unwrap();
        rig.write(1, Side::Private, 7).unwrap();
        let stolen = rig.machine.rmpupdate(pfn(0), RmpUpdate::private(asid(2), gfn(0), LARGE));
        let seen = matches!(rig.machine.audit(), Err(Discrepancy::RmpOwner { gfn: 1, .. }));
        assert_eq!(stolen.is_ok(), seen);
        stolen == Err(RmpFail::Overlap)
    });
}

#[test]
fn a_validated_bit_that_survives_a_remap_lets_the_host_swap_a_guests_pages() {
    caught(Plant::KeptValidated, |rig| {
        for at in [1, 2] {
            rig.machine.rmpupdate(pfn(at), small(at)).unwrap();
            rig.map(at, Level::Size4K);
            rig.pvalidate(at, SMALL).unwrap().unwrap();
        }
        // gfn 1 is moved to the frame of gfn 2.
        rig.machine.tdp_zap(rig.vm, gfns(0, 8)).unwrap();
        rig.machine.rmpupdate(pfn(2), small(1)).unwrap();
        rig.machine.unbind(rig.vm, gfn(0)).unwrap();
        rig.machine.bind(rig.vm, gfn(1), rig.object, pages(2, 3)).unwrap();
        rig.map(1, Level::Size4K);
        rig.read(1, Side::Private).is_err()
    });
}

#[test]
fn a_missing_size_check_lets_a_2m_mapping_through_over_4k_entries() {
    caught(Plant::NoSizeCheck, |rig| {
        rig.machine.rmpupdate(pfn(0), small(0)).unwrap();
        rig.map(0, Level::Size4K);
        rig.pvalidate(0, SMALL).unwrap().unwrap();
        rig.machine.tdp_zap(rig.vm, gfns(0, 4)).unwrap();
        rig.map(0, Level::Size2M);
        let level = Discrepancy::RmpLevel { vm: rig.vm, gfn: 0 };
        assert_eq!(rig.machine.audit(), Err(level), "the audit sees the cause either way");
        let let_through = rig.read(0, Side::Private).is_ok();
        let page_size = rig.machine.backing(rig.object, page(0)).unwrap().unwrap().level;
        assert_eq!(page_size, Level::Size2M);
        !let_through
    });
}
