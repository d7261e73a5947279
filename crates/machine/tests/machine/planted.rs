//! Each planted bug, and what it looks like from outside. Each check passes without it.

use polder_machine::{Discrepancy, Exit, GupFast, GupStep, PinKind, Plant, Side, View};
use polder_units::{Gfn, Level};

use crate::{OWNER, Rig, gfns, gpa, page, pages, vpn, vpns};

/// Runs `check` without and with `plant`: it must be true, then false.
fn caught(plant: Plant, check: impl Fn(&mut Rig) -> bool) {
    for planted in [false, true] {
        let mut rig = Rig::new(View::HOST);
        rig.machine.allocate(rig.object, page(0), Level::Size4K).unwrap();
        rig.machine.host_map(rig.process, vpn(0), Level::Size4K).unwrap();
        rig.machine.host_unmap(rig.process, vpns(0, 1)).unwrap();
        rig.machine.plant(plant, planted);
        assert_eq!(check(&mut rig), !planted, "{plant:?} {planted}");
    }
}

#[test]
fn a_skipped_flush_lets_a_process_touch_what_was_taken_away() {
    caught(Plant::SkipFlush, |rig| {
        rig.machine.host_map(rig.process, vpn(0), Level::Size4K).unwrap();
        rig.machine.host_read(rig.thread, vpn(0).hva(), &mut [0]).unwrap();
        rig.machine.zap_object(rig.object, pages(0, 1)).unwrap();
        rig.machine.flush_object(rig.object, pages(0, 1)).unwrap();
        let stale = matches!(rig.machine.audit(), Err(Discrepancy::HostTlb { .. }));
        let touched = rig.machine.host_read(rig.thread, vpn(0).hva(), &mut [0]).is_ok();
        assert_eq!(stale, touched);
        !touched
    });
}

#[test]
fn a_skipped_flush_lets_a_guest_see_the_next_owners_bytes() {
    caught(Plant::SkipFlush, |rig| {
        let resolved = rig.machine.tdp_resolve(rig.vm, Gfn::from(0)).unwrap();
        rig.machine.tdp_map(&resolved, Level::Size4K, true).unwrap();
        let read =
            |rig: &mut Rig| rig.machine.vcpu(rig.vcpus[0]).unwrap().read_u64(gpa(0), Side::Private);
        read(rig).unwrap();
        rig.machine.tdp_zap(rig.vm, gfns(0, 1)).unwrap();
        rig.machine.punch(rig.object, pages(0, 1), None).unwrap();
        rig.machine.allocate(rig.object, page(9), Level::Size4K).unwrap();
        rig.machine.object_write(rig.object, 9 << 12, b"another's").unwrap();
        matches!(read(rig), Err(Exit::Fault(_)))
    });
}

#[test]
fn a_stale_gup_pins_a_page_that_is_no_longer_there() {
    caught(Plant::StaleGup, |rig| {
        rig.machine.host_map(rig.process, vpn(0), Level::Size4K).unwrap();
        let mut gup = GupFast::new(rig.process, vpn(0), true, PinKind::LongTerm);
        for _ in 0..2 {
            let GupStep::Again(next) = gup.step(&mut rig.machine).unwrap() else { return false };
            gup = next;
        }
        rig.machine.zap_object(rig.object, pages(0, 1)).unwrap();
        gup.step(&mut rig.machine) == Ok(GupStep::Fallback)
    });
}

#[test]
fn a_stale_sequence_maps_freed_memory_into_a_guest() {
    caught(Plant::StaleSequence, |rig| {
        let resolved = rig.machine.tdp_resolve(rig.vm, Gfn::from(0)).unwrap();
        rig.machine.tdp_zap(rig.vm, gfns(0, 1)).unwrap();
        rig.machine.punch(rig.object, pages(0, 1), None).unwrap();
        let mapped = rig.machine.tdp_map(&resolved, Level::Size4K, true).is_ok();
        let wrong = matches!(rig.machine.audit(), Err(Discrepancy::Spte { .. }));
        assert_eq!(wrong, mapped);
        !mapped
    });
}

#[test]
fn a_lost_map_count_hides_a_mapping_from_who_counts() {
    caught(Plant::LostMapcount, |rig| {
        rig.machine.host_map(rig.process, vpn(0), Level::Size4K).unwrap();
        let pfn = rig.machine.backing(rig.object, page(0)).unwrap().unwrap().pfn;
        rig.machine.lock_folio(pfn, OWNER).unwrap();
        let seen = rig.machine.locked_counts(pfn, OWNER).unwrap().mapcount == 1;
        let is = matches!(rig.machine.audit(), Err(Discrepancy::Count { count: "map count", .. }));
        assert_eq!(seen, !is);
        rig.machine.host_unmap(rig.process, vpns(0, 1)).unwrap();
        seen
    });
}

#[test]
fn a_lost_pin_lets_a_device_write_into_another_page() {
    caught(Plant::LostPin, |rig| {
        rig.machine.host_map(rig.process, vpn(0), Level::Size4K).unwrap();
        let pin = rig.machine.pin_user_pages(rig.process, vpns(0, 1), true, PinKind::LongTerm);
        rig.machine.zap_object(rig.object, pages(0, 1)).unwrap();
        rig.machine.punch(rig.object, pages(0, 1), None).unwrap();
        rig.machine.allocate(rig.object, page(9), Level::Size4K).unwrap();
        rig.machine.dma_write(pin.unwrap(), 0, b"stray dma").unwrap();
        let mut bytes = [0; 8];
        rig.machine.object_read(rig.object, 9 << 12, &mut bytes).unwrap();
        rig.machine.unpin(pin.unwrap()).unwrap();
        bytes == [0; 8]
    });
}
