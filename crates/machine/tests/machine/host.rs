//! Processes, their page tables and their TLBs.

use polder_machine::{Error, HostExit, HostFault, HostPte, Sigbus, Thread, View};
use polder_units::Level;

use crate::{OWNER, Rig, page, pages, vpn, vpns};

fn read(rig: &mut Rig, at: u32) -> Result<u64, HostExit> {
    let mut word = [0; 8];
    rig.machine.host_read(rig.thread, vpn(at).hva(), &mut word)?;
    Ok(u64::from_le_bytes(word))
}

#[test]
fn a_touch_of_a_watched_view_is_the_drivers_to_answer() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    let fault = |at, minor| {
        let (process, object) = (rig.process, rig.object);
        let (vpn, page) = (vpn(at), page(at));
        HostFault { process, vpn, object, page, write: false, minor }
    };
    let (minor, missing) = (fault(1, true), fault(9, false));
    assert_eq!(read(&mut rig, 1), Err(HostExit::Fault(minor)));
    assert_eq!(read(&mut rig, 9), Err(HostExit::Fault(missing)));
    rig.machine.host_map(rig.process, vpn(1), Level::Size4K).unwrap();
    assert_eq!(read(&mut rig, 1), Ok(0));
    assert!(matches!(rig.machine.host_pte(rig.process, vpn(1)), Ok(HostPte::Mapped { .. })));
    let again = rig.machine.host_map(rig.process, vpn(1), Level::Size4K);
    assert_eq!(again, Err(Error::Exists { number: 1 }));
}

#[test]
fn a_touch_of_nothing_or_past_the_end_is_a_signal() {
    let mut rig = Rig::new(View { writable: false, ..View::PLAIN });
    let beyond = HostExit::Sigbus { vpn: vpn(16), why: Sigbus::Beyond };
    assert_eq!(read(&mut rig, 16), Err(beyond));
    assert_eq!(read(&mut rig, 20), Err(HostExit::Segv { vpn: vpn(20) }));
    let write = rig.machine.host_write(rig.thread, vpn(0).hva(), &[1]);
    assert_eq!(write, Err(HostExit::Segv { vpn: vpn(0) }));
    rig.machine.fail_allocation(Some(0));
    let no_memory = HostExit::Sigbus { vpn: vpn(0), why: Sigbus::NoMemory };
    assert_eq!(read(&mut rig, 0), Err(no_memory));
    assert_eq!(read(&mut rig, 0), Ok(0));
}

#[test]
fn an_access_across_pages_is_made_whole_or_not_at_all() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    rig.machine.host_map(rig.process, vpn(0), Level::Size4K).unwrap();
    let across = vpn(0).hva().checked_add(4092).unwrap();
    let denied = rig.machine.host_write(rig.thread, across, &[9; 8]);
    assert!(matches!(denied, Err(HostExit::Fault(HostFault { write: true, .. }))));
    assert_eq!(read(&mut rig, 0), Ok(0));
    rig.machine.host_map(rig.process, vpn(1), Level::Size4K).unwrap();
    rig.machine.host_write(rig.thread, across, &[9; 8]).unwrap();
    assert_eq!(read(&mut rig, 1), Ok(0x0909_0909));
}

#[test]
fn a_poisoned_page_denies_without_asking_until_the_marker_is_lifted() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    rig.machine.host_poison(rig.process, vpns(0, 16)).unwrap();
    let denied = |at| Err(HostExit::Sigbus { vpn: vpn(at), why: Sigbus::Poisoned });
    assert_eq!(read(&mut rig, 2), denied(2));
    rig.machine.zap_object(rig.object, pages(0, 16)).unwrap();
    assert_eq!(read(&mut rig, 2), denied(2), "a zap of the object leaves markers");
    rig.machine.host_unmap(rig.process, vpns(2, 3)).unwrap();
    assert!(matches!(read(&mut rig, 2), Err(HostExit::Fault(_))));
    assert_eq!(read(&mut rig, 1), denied(1));
    rig.machine.host_map(rig.process, vpn(3), Level::Size4K).unwrap();
    assert_eq!(read(&mut rig, 3), Ok(0), "mapping lifts it too");
    let mapped = rig.machine.host_poison(rig.process, vpns(0, 16));
    assert_eq!(mapped, Err(Error::Exists { number: 3 }));
}

#[test]
fn a_translation_works_until_it_is_flushed_in_each_thread() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    let other = rig.machine.add_thread(rig.process).unwrap();
    rig.machine.host_map(rig.process, vpn(0), Level::Size4K).unwrap();
    rig.machine.host_write(rig.thread, vpn(0).hva(), &5u64.to_le_bytes()).unwrap();
    rig.machine.host_read(other, vpn(0).hva(), &mut [0]).unwrap();
    rig.machine.host_unmap(rig.process, vpns(0, 1)).unwrap();
    assert_eq!(read(&mut rig, 0), Ok(5), "unmapped, and still there");
    rig.machine.flush_thread(rig.thread, vpns(0, 1)).unwrap();
    assert!(matches!(read(&mut rig, 0), Err(HostExit::Fault(_))));
    assert_eq!(rig.machine.host_read(other, vpn(0).hva(), &mut [0]), Ok(()));
    rig.machine.flush_process(rig.process, vpns(0, 1)).unwrap();
    let denied = rig.machine.host_read(other, vpn(0).hva(), &mut [0]);
    assert!(matches!(denied, Err(HostExit::Fault(_))));
}

#[test]
fn a_mapping_is_as_large_as_folio_view_and_alignment_allow() {
    let (mut rig, _) = Rig::with_folio(View { largest: Level::Size2M, ..View::HOST });
    rig.machine.allocate(rig.object, page(8), Level::Size1G).unwrap();
    let largest = |rig: &Rig, at| rig.machine.largest_host_level(rig.process, vpn(at));
    assert_eq!(largest(&rig, 1), Ok(Level::Size2M));
    assert_eq!(largest(&rig, 9), Ok(Level::Size2M), "the view's own largest");
    let askew = rig.machine.create_process().unwrap();
    let view = View { largest: Level::Size1G, ..View::HOST };
    rig.machine.mmap(askew, vpns(4, 20), rig.object, page(0), view).unwrap();
    assert_eq!(rig.machine.largest_host_level(askew, vpn(4)), Ok(Level::Size2M));
    assert_eq!(rig.machine.largest_host_level(askew, vpn(12)), Ok(Level::Size2M));
    let too_large = rig.machine.host_map(rig.process, vpn(0), Level::Size1G);
    let expected = Error::TooLarge { level: Level::Size1G, largest: Level::Size2M };
    assert_eq!(too_large, Err(expected));
    rig.machine.host_map(rig.process, vpn(2), Level::Size2M).unwrap();
    assert_eq!(read(&mut rig, 0), Ok(0));
    rig.machine.host_unmap(rig.process, vpns(1, 2)).unwrap();
    assert_eq!(rig.machine.host_pte(rig.process, vpn(3)), Ok(HostPte::None), "it goes whole");
    rig.machine.flush_process(rig.process, vpns(1, 2)).unwrap();
    rig.machine.audit().unwrap();
}

#[test]
fn a_range_is_mapped_in_the_largest_pieces_up_to_the_first_hole() {
    let (mut rig, _) = Rig::with_folio(View { largest: Level::Size1G, ..View::HOST });
    for at in [4, 5, 7] {
        rig.machine.allocate(rig.object, page(at), Level::Size4K).unwrap();
    }
    rig.machine.host_map(rig.process, vpn(5), Level::Size4K).unwrap();
    assert_eq!(rig.machine.host_map_range(rig.process, vpns(2, 4)).unwrap().get(), 2);
    rig.machine.host_unmap(rig.process, vpns(0, 4)).unwrap();
    assert_eq!(rig.machine.host_map_range(rig.process, vpns(0, 8)).unwrap().get(), 6);
    let level = |at| match rig.machine.host_pte(rig.process, vpn(at)) {
        Ok(HostPte::Mapped { level, .. }) => Some(level),
        _ => None,
    };
    let levels = [0, 3, 4, 6, 7].map(level);
    assert_eq!(levels, [Some(Level::Size2M), Some(Level::Size2M), Some(Level::Size4K), None, None]);
    let hole = rig.machine.host_map_range(rig.process, vpns(6, 8));
    assert_eq!(hole, Err(Error::Hole { object: rig.object, page: page(6) }));
}

#[test]
fn the_kernel_fills_a_plain_view_in_the_largest_pieces_and_takes_no_markers_on_it() {
    let (mut rig, pfn) = Rig::with_folio(View { largest: Level::Size2M, ..View::PLAIN });
    assert_eq!(read(&mut rig, 3), Ok(0));
    let mapped = HostPte::Mapped { pfn, level: Level::Size2M };
    assert_eq!(rig.machine.host_pte(rig.process, vpn(0)), Ok(mapped));
    let refused = rig.machine.host_poison(rig.process, vpns(4, 8));
    assert_eq!(refused, Err(Error::NotWatched { vpn: vpn(4) }));
}

#[test]
fn a_forked_child_has_a_hole_in_the_watch_unless_told_not_to() {
    let (mut rig, _) = Rig::with_folio(View { dont_fork: false, ..View::HOST });
    rig.machine.host_poison(rig.process, vpns(0, 4)).unwrap();
    let child = Thread { process: rig.machine.fork(rig.process).unwrap(), index: 0 };
    assert_eq!(rig.machine.host_read(child, vpn(1).hva(), &mut [0]), Ok(()), "nobody is asked");
    let mapped: Vec<_> = rig.machine.mappings_of(rig.object, page(1)).collect();
    assert_eq!(mapped, [(child.process, vpn(1))]);

    let mut rig = Rig::new(View::HOST);
    let child = Thread { process: rig.machine.fork(rig.process).unwrap(), index: 0 };
    let nothing = rig.machine.host_read(child, vpn(1).hva(), &mut [0]);
    assert_eq!(nothing, Err(HostExit::Segv { vpn: vpn(1) }));
}

#[test]
fn the_kernels_own_fault_waits_for_the_folio_lock() {
    let (mut rig, pfn) = Rig::with_folio(View::PLAIN);
    rig.machine.lock_folio(pfn, OWNER).unwrap();
    assert!(matches!(read(&mut rig, 1), Err(HostExit::Wait { .. })));
    rig.machine.unlock_folio(pfn, OWNER).unwrap();
    assert_eq!(read(&mut rig, 1), Ok(0));
}

#[test]
fn vmas_do_not_overlap_and_take_everything_along_when_they_go() {
    let (mut rig, pfn) = Rig::with_folio(View::PLAIN);
    read(&mut rig, 1).unwrap();
    let overlap = rig.machine.mmap(rig.process, vpns(19, 21), rig.object, page(0), View::PLAIN);
    assert_eq!(overlap, Err(Error::Exists { number: 19 }));
    let far = rig.machine.mmap(
        rig.process,
        vpns(1 << 51, (1 << 51) + 1),
        rig.object,
        page(0),
        View::PLAIN,
    );
    assert!(matches!(far, Err(Error::Space { .. })));
    rig.machine.munmap(rig.process, vpn(7)).unwrap();
    assert_eq!(read(&mut rig, 1), Err(HostExit::Segv { vpn: vpn(1) }));
    assert_eq!(rig.machine.counts(pfn).unwrap().mapcount, 0);
    rig.machine.exit_process(rig.process).unwrap();
    assert!(matches!(read(&mut rig, 1), Err(HostExit::Invalid(Error::Gone { .. }))));
}
