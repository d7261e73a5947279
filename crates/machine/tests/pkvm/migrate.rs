//! Folios that move.

use polder_machine::PageState::{NoPage, Owned, SharedBorrowed, SharedOwned};
use polder_machine::{Error, PinKind, PkvmFail};

use crate::{OWNER, Rig, gfn, page, pfn, vpns};

impl Rig {
    /// Unmaps page `at` from the process and moves it.
    fn migrate(&mut self, at: u32) -> Result<u64, Error> {
        let range = vpns(at.into(), u64::from(at) + 1);
        self.machine.host_unmap(self.process, range)?;
        self.machine.flush_process(self.process, range)?;
        let from = self.machine.backing(self.object, page(at))?.unwrap().pfn;
        self.machine.lock_folio(from, OWNER)?;
        let moved = self.machine.migrate_folio(self.object, page(at), OWNER);
        self.machine.unlock_folio(moved.unwrap_or(from), OWNER)?;
        moved.map(polder_units::Pfn::get)
    }
}

#[test]
fn a_folio_moves_with_its_contents_and_the_old_frames_are_free() {
    let mut rig = Rig::new();
    rig.host_write(1, 3).unwrap();
    let free = rig.machine.free_frames();
    assert_eq!(rig.migrate(1), Ok(8));
    assert_eq!(rig.machine.free_frames(), free);
    assert_eq!(rig.host_read(1), Ok(3));
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn what_is_mapped_pinned_or_not_locked_does_not_move() {
    let mut rig = Rig::new();
    rig.host_write(1, 3).unwrap();
    let unlocked = rig.machine.migrate_folio(rig.object, page(1), OWNER);
    assert_eq!(unlocked, Err(Error::NotLocked { pfn: pfn(1) }));
    rig.machine.lock_folio(pfn(1), OWNER).unwrap();
    let mapped = rig.machine.migrate_folio(rig.object, page(1), OWNER);
    assert_eq!(mapped, Err(Error::Mapped { pfn: pfn(1), mapcount: 1 }));
    rig.machine.unlock_folio(pfn(1), OWNER).unwrap();
    let pin = rig.pin(1, PinKind::Short).unwrap();
    assert_eq!(rig.migrate(1), Err(Error::Referenced { pfn: pfn(1), foreign: 1024 }));
    rig.machine.unpin(pin).unwrap();
    assert_eq!(rig.migrate(1), Ok(8));
}

#[test]
fn memory_that_runs_out_leaves_it_where_it_was() {
    let mut rig = Rig::new();
    rig.host_write(1, 3).unwrap();
    rig.machine.fail_allocation(Some(0));
    assert!(matches!(rig.migrate(1), Err(Error::NoMemory { .. })));
    assert_eq!(rig.host_read(1), Ok(3));
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn a_guests_own_page_is_moved_by_the_hypervisor_and_its_source_is_scrubbed() {
    for shared in [false, true] {
        let mut rig = Rig::new();
        rig.donate(1).unwrap();
        rig.guest_write(1, 5).unwrap();
        if shared {
            rig.share(1).unwrap();
        }
        assert_eq!(rig.migrate(1), Ok(8));
        let guest = if shared { SharedOwned } else { Owned };
        let host = if shared { SharedBorrowed } else { NoPage };
        assert_eq!(rig.tables(8), (host, NoPage, guest, shared));
        assert_eq!(rig.tables(1), (Owned, NoPage, NoPage, true));
        assert_eq!(rig.guest_read(1), Ok(5), "by the new frame, for its TLB was flushed");
        assert_eq!(rig.machine.audit(), Ok(()));
    }
}

#[test]
fn the_source_of_a_move_goes_back_to_the_host_without_the_guests_bytes() {
    let mut rig = Rig::new();
    rig.donate(1).unwrap();
    rig.guest_write(1, 5).unwrap();
    // By the bare hypercall, so that the old frame stays in the page cache, to be looked at.
    let other = rig.machine.create_object(1u32.into()).unwrap();
    let to = rig.machine.allocate(other, page(0), polder_units::Level::Size4K).unwrap();
    let vm = rig.vm;
    rig.machine.host_move_guest(vm, gfn(1), to).unwrap();
    assert_eq!((rig.host_read(1), rig.guest_read(1)), (Ok(0), Ok(5)));
}

#[test]
fn a_move_that_fails_in_the_hypervisor_has_moved_nothing() {
    for nth in 0..5 {
        let mut rig = Rig::new();
        rig.donate(1).unwrap();
        rig.guest_write(1, 5).unwrap();
        let free = rig.machine.free_frames();
        rig.machine.fail_hypervisor(Some(nth));
        assert_eq!(rig.migrate(1), Err(Error::Pkvm(PkvmFail::NoMemory)));
        assert_eq!(rig.tables(1), (NoPage, NoPage, Owned, false));
        assert_eq!((rig.guest_read(1), rig.machine.free_frames()), (Ok(5), free));
        assert_eq!(rig.machine.audit(), Ok(()));
    }
}

#[test]
fn a_page_that_a_device_has_mapped_does_not_move() {
    let mut rig = Rig::new();
    rig.donate(1).unwrap();
    rig.share(1).unwrap();
    let pin = rig.pin(1, PinKind::LongTerm).unwrap();
    rig.machine.iommu_map(rig.domain, gfn(1), pin).unwrap();
    assert!(matches!(rig.migrate(1), Err(Error::Referenced { .. })));
    let (vm, to) = (rig.vm, pfn(9));
    assert_eq!(rig.machine.host_move_guest(vm, gfn(1), to), Err(PkvmFail::Busy));
}
