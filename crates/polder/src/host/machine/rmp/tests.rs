//! The host's part of what `docs/snp.md` says.

use polder_engine::{GuestAccess, Platform, Refusal, Slot, Step, Visibility};
use polder_machine::{HostPte, LockOwner, PinKind, Thread, View, VpnRange};
use polder_units::Gfn;

use super::*;
use crate::host::{Host, Smashed, Vm};

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

/// The 2M page that most is about.
fn whole() -> PageRange {
    PageRange::between(0, 512).unwrap()
}

fn map(host: &MachineHost, gfn: u32, level: Level) {
    let access = GuestAccess { gfn: gfn.into(), visibility: Visibility::Private };
    let range = PageRange::enclosing(gfn.into(), level, Geometry::X86_64);
    host.map_guest(VM, access, None, range).unwrap();
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
    assert_eq!(host.smash(VM, 7u32.into(), whole()), Ok(Smashed::Done));
    assert_eq!(level(&host, 7), None, "it is to be mapped anew, with all of its 2M");
    assert_eq!(host.smash(VM, 300u32.into(), whole()), Ok(Smashed::Spurious));
    map(&host, 7, Level::Size2M);
    assert_eq!(level(&host, 7), Some(Level::Size4K), "no larger than the entry (INV-5)");
}

#[test]
fn who_is_overtaken_between_look_and_psmash_has_raced() {
    let host = host();
    let found = entry(&host, 7);
    assert_eq!(host.smash(VM, 300u32.into(), whole()), Ok(Smashed::Done));
    assert_eq!(host.smash_found(7u32.into(), Some(found)), Ok(Smashed::Raced));
}

#[test]
fn an_entry_in_use_lets_the_guest_try_again_and_a_conversion_fail_after_tries() {
    let host = host();
    let (head, other) = (entry(&host, 0).pfn, LockOwner(7));
    host.lock().rmp_hold(head, RmpSize::Size2M, other).unwrap();
    assert_eq!(host.smash(VM, 7u32.into(), whole()), Ok(Smashed::Busy));
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
fn what_was_taken_is_given_back_at_its_level_and_guest_frames_and_nothing_else_is() {
    let host = host();
    let at = |page| {
        let Found { entry, .. } = entry(&host, page);
        entry.assigned.then_some((entry.gfn.get(), entry.size))
    };
    let (small, large) = (RmpSize::Size4K, RmpSize::Size2M);
    for part in [whole(), PageRange::between(0, 1024).unwrap()] {
        host.unassign(part).unwrap();
        assert_eq!(at(7), None);
        host.reassign(whole()).unwrap();
        assert_eq!([at(7), at(600)], [Some((7, large)), None]);
    }
    // No VM sees it any more: it goes back to where it was seen.
    host.unbind(VM, Slot(0)).unwrap();
    host.unassign(whole()).unwrap();
    host.reassign(whole()).unwrap();
    assert_eq!(at(7), Some((7, large)));
    // A part of it is in quarantine.
    host.unassign(whole()).unwrap();
    host.reassign(PageRange::between(5, 512).unwrap()).unwrap();
    assert_eq!([at(4), at(5), at(511)], [None, Some((5, small)), Some((511, small))]);
}

#[test]
fn what_was_taken_before_a_conversion_or_a_free_is_not_given_back() {
    let part = PageRange::between(3, 5).unwrap();
    let host = host();
    let assigned = |page| entry(&host, page).entry.assigned;
    host.smash_all(whole()).unwrap();
    // A step that was handed out and never taken has taken nothing.
    host.unassign(whole()).unwrap();
    host.take(Step::Free(part)).unwrap();
    host.reassign(part).unwrap();
    assert!(!assigned(3));
    host.reassign(whole()).unwrap();
    assert_eq!([assigned(2), assigned(3), assigned(4), assigned(5)], [true, false, false, true]);
    host.unassign(whole()).unwrap();
    host.unassign(PageRange::between(0, 8).unwrap()).unwrap();
    host.reassign(whole()).unwrap();
    assert_eq!([assigned(2), assigned(7), assigned(8)], [false, false, true]);
}

#[test]
fn a_page_that_shows_at_another_guest_frame_is_assigned_anew() {
    let host = host();
    host.unbind(VM, Slot(0)).expect("it is bound");
    let all = PageRange::new(0u32.into(), PageCount::from(PAGES)).unwrap();
    host.bind(VM, Slot(0), Gfn::from(0x801), all).unwrap();
    let access = GuestAccess { gfn: 0x808u32.into(), visibility: Visibility::Private };
    host.map_guest(VM, access, None, PageRange::one(7u32.into())).unwrap();
    let now = entry(&host, 7);
    assert_eq!((now.entry.gfn.get(), now.entry.size), (0x808, RmpSize::Size4K));
    assert_eq!(entry(&host, 8).entry.gfn.get(), 8, "nobody has asked for it there");
}

/// What the host's mapping of a private page comes to.
fn mapped(host: &MachineHost, gfn: u32) -> Result<(), Error> {
    let access = GuestAccess { gfn: gfn.into(), visibility: Visibility::Private };
    let range = PageRange::enclosing(gfn.into(), Level::Size2M, Geometry::X86_64);
    host.map_guest(VM, access, None, range).map(drop)
}

#[test]
fn an_overlap_with_who_is_at_work_is_in_use_and_one_with_an_entry_is_told_at_once() {
    let host = host();
    let (first, second, other) = (entry(&host, 0).pfn, entry(&host, 512).pfn, LockOwner(7));
    // Somebody has a part of what gets a large entry; and all of what gets a 4K one.
    host.lock().rmp_hold(Pfn::new(second.get() + 9).unwrap(), RmpSize::Size4K, other).unwrap();
    assert_eq!(mapped(&host, 600), Ok(()), "the guest is to try again");
    assert_eq!(level(&host, 600), None);
    let page = PageIndex::from(512);
    let whole = PageRange::between(512, 1024).unwrap();
    let in_use = Error::Rmp { page, fail: RmpFail::InUse };
    assert_eq!(in_use.errno(), polder_engine::Errno::EAGAIN);
    assert_eq!(host.assign(whole), Err(in_use));
    host.lock().rmp_release(Pfn::new(second.get() + 9).unwrap(), other).unwrap();
    host.lock().rmp_hold(second, RmpSize::Size2M, other).unwrap();
    map(&host, 600, Level::Size4K);
    assert_eq!(level(&host, 600), None);
    host.lock().rmp_release(second, other).unwrap();
    assert_eq!(mapped(&host, 600), Ok(()));
    assert_eq!(level(&host, 600), Some(Level::Size2M));
    let overlap = Error::Rmp { page: 3u32.into(), fail: RmpFail::Overlap };
    assert_eq!(overlap.errno(), polder_engine::Errno::EIO, "no retry cures it");
    assert_eq!(host.unassign(PageRange::between(3, 5).unwrap()), Err(overlap));
    assert!(entry(&host, 0).is_large() && entry(&host, 0).pfn == first);
}

#[test]
fn who_has_a_private_page_from_before_its_first_use_is_cut_off_and_who_pins_it_is_in_the_way() {
    let host = host();
    let (process, thread, vpns) = {
        let mut machine = host.lock();
        let process = machine.create_process().unwrap();
        let vpns = VpnRange::between(0x1000, 0x1000 + 512).unwrap();
        let page = PageIndex::from(512);
        machine.mmap(process, vpns, host.object, page, View::PLAIN).unwrap();
        (process, Thread { process, index: 0 }, vpns)
    };
    let hva = polder_machine::Hva::new((0x1000 + 5) << 12);
    host.lock().host_write(thread, hva, &[1]).unwrap();
    let pin = host.lock().pin_user_pages(process, vpns, true, PinKind::LongTerm).unwrap();
    let refused = mapped(&host, 600).unwrap_err();
    let named = matches!(refused, Error::Refused(Refusal::Referenced { references: 1.., .. }));
    assert!(named, "{refused:?}");
    assert!(!entry(&host, 600).entry.assigned && level(&host, 600).is_none());
    host.lock().unpin(pin).unwrap();
    host.lock().host_write(thread, hva, &[1]).unwrap();
    assert_eq!(mapped(&host, 600), Ok(()));
    let vpn = polder_machine::Vpn::new(0x1005).unwrap();
    assert_eq!(host.lock().host_pte(process, vpn), Ok(HostPte::None), "it is unmapped");
    assert_eq!(level(&host, 600), Some(Level::Size2M));
    host.lock().audit().unwrap();
}

#[test]
fn who_pins_a_page_of_a_large_folio_is_named_with_it() {
    let host = host();
    let pin = {
        let mut machine = host.lock();
        let process = machine.create_process().unwrap();
        let vpns = VpnRange::between(0x1000, 0x1000 + 512).unwrap();
        machine.mmap(process, vpns, host.object, 512u32.into(), View::PLAIN).unwrap();
        let pinned = VpnRange::between(0x1000 + 300, 0x1000 + 302).unwrap();
        machine.pin_user_pages(process, pinned, true, PinKind::LongTerm).unwrap()
    };
    host.unmap_processes(PageRange::between(512, 1024).unwrap()).unwrap();
    for (start, end, named) in
        [(0, 1024, 812), (512, 1024, 812), (812, 813, 812), (813, 900, 813), (519, 520, 519)]
    {
        let range = PageRange::between(start, end).unwrap();
        let refused = host.check_references(range).unwrap_err();
        let Error::Refused(Refusal::Referenced { page, holder, .. }) = &refused else {
            panic!("{refused:?}")
        };
        assert_eq!(page.get(), named, "{range}: {refused}");
        let (holder, pin) = (holder.to_string(), pin.to_string());
        assert!(holder.starts_with(&pin), "{range}: {holder}");
        // The counts are the folio's: who pins one page keeps the others, too.
        assert_eq!(holder.contains("page 0x32c of the same folio"), named == 519, "{holder}");
    }
    host.lock().unpin(pin).unwrap();
    assert_eq!(host.check_references(whole()), Ok(()));
}

#[test]
fn while_somebody_has_the_folio_locked_the_guest_tries_again() {
    let host = host();
    let (pfn, other) = (entry(&host, 512).pfn, LockOwner(7));
    host.lock().lock_folio(pfn, other).unwrap();
    assert_eq!(mapped(&host, 600), Ok(()));
    assert_eq!(level(&host, 600), None);
    host.lock().unlock_folio(pfn, other).unwrap();
    assert_eq!(mapped(&host, 600), Ok(()));
    assert_eq!(level(&host, 600), Some(Level::Size2M));
}

#[test]
fn a_1g_page_is_mapped_as_one_while_all_of_its_entries_are_large() {
    let pages = PageCount::from(1u32 << 18);
    let host = MachineHost::new(pages, Platform::Snp).unwrap();
    let all = PageRange::new(0u32.into(), pages).unwrap();
    host.attach(VM, Vm::Machine).unwrap();
    host.bind(VM, Slot(0), Gfn::from(0), all).unwrap();
    let object = host.object;
    host.lock().allocate(object, 0u32.into(), Level::Size1G).unwrap();
    map(&host, 7, Level::Size1G);
    assert_eq!(level(&host, 7), Some(Level::Size2M), "no other part of it is assigned");
    host.assign(all).unwrap();
    map(&host, 7, Level::Size1G);
    assert_eq!(level(&host, 7), Some(Level::Size1G));
    host.unmap_guest(all).unwrap();
    let second = PageRange::between(512, 1024).unwrap();
    host.smash_all(second).unwrap();
    map(&host, 7, Level::Size1G);
    assert_eq!(level(&host, 7), Some(Level::Size2M), "the entry of another part is smaller");
    map(&host, 600, Level::Size1G);
    assert_eq!(level(&host, 600), Some(Level::Size4K));
    host.lock().audit().unwrap();
}

#[test]
fn a_frame_that_shows_another_page_by_now_is_not_smashed() {
    let host = host();
    let elsewhere = PageRange::between(512, 1024).unwrap();
    assert_eq!(host.smash(VM, 7u32.into(), elsewhere), Ok(Smashed::Spurious));
    assert!(entry(&host, 7).is_large() && level(&host, 7) == Some(Level::Size2M));
}

#[test]
fn a_folio_that_is_locked_for_a_moment_is_freed_all_the_same() {
    let host = host();
    let (pfn, other) = (entry(&host, 512).pfn, LockOwner(7));
    host.lock().lock_folio(pfn, other).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(3));
            host.lock().unlock_folio(pfn, other).unwrap();
        });
        assert_eq!(host.take(Step::Free(PageRange::between(512, 1024).unwrap())), Ok(()));
    });
    assert_eq!(host.lock().backing(host.object, 512u32.into()), Ok(None));
}

#[test]
fn a_vm_whose_bind_failed_does_not_have_the_memory() {
    let host = MachineHost::new(PageCount::from(PAGES), Platform::Snp).unwrap();
    let all = PageRange::new(0u32.into(), PageCount::from(PAGES)).unwrap();
    let beyond = PageRange::between(1, u64::from(PAGES) + 1).unwrap();
    let other = VmId(1);
    for vm in [VM, other] {
        host.attach(vm, Vm::Machine).unwrap();
    }
    host.bind(VM, Slot(0), Gfn::from(0), beyond).unwrap_err();
    host.bind(other, Slot(0), Gfn::from(0), all).unwrap();
    let refused = host.bind(VM, Slot(0), Gfn::from(0), all);
    assert_eq!(refused, Err(Error::OneVm { owner: other, vm: VM }));
}

#[test]
fn a_shared_page_whose_entry_is_in_use_for_a_moment_is_written_all_the_same() {
    let host = host();
    let (pfn, other) = (entry(&host, 512).pfn, LockOwner(7));
    let offset = 512 * polder_units::PAGE_SIZE;
    host.take(Step::UnmapHost(whole())).unwrap();
    let page = PageRange::one(512u32.into());
    host.views().answer(polder_engine::View::Host, polder_engine::Response::Map, page).unwrap();
    let touch = |at: u64| host.views().touch_write(offset + at, b"touched");
    let write = |at: u64| host.views().write(offset + at, b"written");
    let ways: [&(dyn Fn(u64) -> Result<(), Error> + Sync); 2] = [&touch, &write];
    for (way, at) in ways.into_iter().zip([0, 8]) {
        host.lock().rmp_hold(pfn, RmpSize::Size4K, other).unwrap();
        std::thread::scope(|scope| {
            let writes = scope.spawn(move || way(at));
            std::thread::sleep(std::time::Duration::from_millis(3));
            host.lock().rmp_release(pfn, other).unwrap();
            assert_eq!(writes.join().unwrap(), Ok(()));
        });
        // What stays in use for long is told as before.
        host.lock().rmp_hold(pfn, RmpSize::Size4K, other).unwrap();
        host.lock().flush_object(host.object, page).unwrap();
        assert!(way(at).is_err());
        host.lock().rmp_release(pfn, other).unwrap();
    }
}

#[test]
fn who_has_touched_a_page_again_is_cut_off_when_it_is_assigned() {
    let host = host();
    let object = host.object;
    let other = host.lock().create_process().unwrap();
    let vpns = VpnRange::between(1 << 20, (1 << 20) + u64::from(PAGES)).unwrap();
    host.lock().mmap(other, vpns, object, 0u32.into(), View::PLAIN).unwrap();
    let thread = Thread { process: other, index: 0 };
    let hva = |page: u64| polder_machine::Hva::new(((1 << 20) + page) * polder_units::PAGE_SIZE);
    let half = PageRange::between(512, 1024).unwrap();
    for step in [Step::UnmapHost(half), Step::CheckReferences(half)] {
        host.take(step).unwrap();
    }
    host.lock().host_write(thread, hva(700), b"before").unwrap();
    host.take(Step::Assign(half)).unwrap();
    assert!(entry(&host, 700).entry.assigned);
    assert!(host.lock().host_write(thread, hva(700), b"after").is_err());
    host.lock().host_unmap(other, vpns).unwrap();

    // Who has pinned it again has it stay what it was.
    host.take(Step::Unassign(half)).unwrap();
    let vpn = VpnRange::between((1 << 20) + 900, (1 << 20) + 901).unwrap();
    let pin = host.lock().pin_user_pages(other, vpn, true, PinKind::LongTerm).unwrap();
    let refused = host.take(Step::Assign(half)).unwrap_err();
    assert!(matches!(refused, Error::Refused(Refusal::Referenced { .. })), "{refused}");
    assert!(!entry(&host, 900).entry.assigned);
    host.lock().unpin(pin).unwrap();
    assert_eq!(host.take(Step::Assign(half)), Ok(()));
    host.lock().audit().unwrap();
}
