//! The host's part of what `docs/snp.md` says.

use polder_engine::{GuestAccess, Platform, Slot, Visibility};
use polder_machine::LockOwner;

use super::*;
use crate::host::{Host, Vm};

const PAGES: u32 = 1024;
const VM: VmId = VmId(0);

/// Two 2M folios, the first of which a guest has by a large entry, mapped at 2M.
fn host() -> MachineHost {
    let host = MachineHost::new(PageCount::from(PAGES), Platform::Snp).unwrap();
    let all = PageRange::new(0u32.into(), PageCount::from(PAGES)).unwrap();
    host.attach(VM, Vm::Machine).unwrap();
    host.bind(VM, Slot(0), Gfn::from(0), all).unwrap();
    for page in [0u32, 512] {
        let object = host.object;
        host.lock().allocate(object, page.into(), Level::Size2M).unwrap();
    }
    map(&host, 7, Level::Size2M);
    assert!(entry(&host, 7).is_large());
    host
}

fn map(host: &MachineHost, gfn: u32, level: Level) {
    let access = GuestAccess { gfn: gfn.into(), visibility: Visibility::Private };
    let range = PageRange::enclosing(gfn.into(), level, Geometry::X86_64);
    host.map_guest(VM, access, level, range).unwrap();
}

fn entry(host: &MachineHost, page: u32) -> Found {
    Found::at(&host.lock(), host, page.into()).unwrap().unwrap()
}

fn level(host: &MachineHost, gfn: u32) -> Option<Level> {
    let vm = host.vm(VM).unwrap();
    host.lock().spte(vm, gfn.into()).unwrap().map(|spte| spte.level)
}

#[test]
fn a_fault_for_its_size_smashes_once_and_is_spurious_for_who_comes_later() {
    let host = host();
    assert_eq!(level(&host, 7), Some(Level::Size2M));
    assert_eq!(host.smash(VM, 7u32.into()), Ok(Smashed::Done));
    assert_eq!(level(&host, 7), None, "it is to be mapped anew, with all of its 2M");
    assert_eq!(host.smash(VM, 300u32.into()), Ok(Smashed::Spurious));
    map(&host, 7, Level::Size2M);
    assert_eq!(level(&host, 7), Some(Level::Size4K), "no larger than the entry (INV-5)");
}

#[test]
fn who_is_overtaken_between_look_and_psmash_has_raced() {
    let host = host();
    let found = entry(&host, 7);
    assert_eq!(host.smash(VM, 300u32.into()), Ok(Smashed::Done));
    assert_eq!(host.smash_found(7u32.into(), Some(found)), Ok(Smashed::Raced));
}

#[test]
fn an_entry_in_use_lets_the_guest_try_again_and_a_conversion_fail_after_tries() {
    let host = host();
    let (head, other) = (entry(&host, 0).pfn, LockOwner(7));
    host.lock().rmp_hold(head, RmpSize::Size2M, other).unwrap();
    assert_eq!(host.smash(VM, 7u32.into()), Ok(Smashed::Busy));
    let page = PageIndex::from(0);
    let in_use = Err(Error::Rmp { page, fail: RmpFail::InUse });
    let whole = PageRange::enclosing(page, Level::Size2M, Geometry::X86_64);
    assert_eq!(host.unassign(whole), in_use);
    host.lock().rmp_release(head, other).unwrap();
    assert_eq!(host.unassign(whole), Ok(()));
    // The same for a page that is to be assigned: it is left unmapped.
    host.unmap_guest(whole).unwrap();
    host.lock().rmp_hold(head, RmpSize::Size4K, other).unwrap();
    map(&host, 0, Level::Size4K);
    assert_eq!(level(&host, 0), None);
    host.lock().rmp_release(head, other).unwrap();
    map(&host, 0, Level::Size4K);
    assert_eq!(level(&host, 0), Some(Level::Size4K));
}

#[test]
fn taking_away_by_a_wrong_size_fails_and_does_not_hang() {
    let host = host();
    let (page, part) = (PageIndex::from(3), PageRange::between(3, 5).unwrap());
    let overlap = Err(Error::Rmp { page, fail: RmpFail::Overlap });
    assert_eq!(host.unassign(part), overlap, "nobody has smashed it");
    host.smash_all(PageRange::between(0, 512).unwrap()).unwrap();
    assert_eq!(host.unassign(part), Ok(()));
    assert_eq!([2, 3, 4, 5].map(|page| entry(&host, page).entry.assigned), {
        [true, false, false, true]
    });
}

#[test]
fn a_page_that_shows_at_another_guest_frame_is_assigned_anew() {
    let host = host();
    host.unbind(VM, Slot(0)).expect("it is bound");
    let all = PageRange::new(0u32.into(), PageCount::from(PAGES)).unwrap();
    host.bind(VM, Slot(0), Gfn::from(0x801), all).unwrap();
    let access = GuestAccess { gfn: 0x808u32.into(), visibility: Visibility::Private };
    host.map_guest(VM, access, Level::Size4K, PageRange::one(7u32.into())).unwrap();
    let now = entry(&host, 7);
    assert_eq!((now.entry.gfn.get(), now.entry.size), (0x808, RmpSize::Size4K));
    assert_eq!(entry(&host, 8).entry.gfn.get(), 8, "nobody has asked for it there");
}
