//! Conversions of an SNP guest's memory that go wrong: the RMP is as it was.

use super::*;

/// Memory of an SNP guest whose pages 0, 2, .. 14 are shared, and the others assigned to it.
pub(super) fn snp(trouble: Trouble) -> Set {
    let set = Set::of((HostKind::Machine, Platform::Snp), trouble, Duration::from_millis(1));
    let (set, vm, first) = (set.expect("the machine needs nothing"), VmId(0), Gfn::from(0));
    let all = pages(0, PAGES);
    set.driver.host.attach(vm, Vm::Machine).unwrap();
    set.driver.engine().bind(vm, Slot(0), first, all).unwrap();
    set.driver.host.bind(vm, Slot(0), first, all).unwrap();
    for page in all.frames() {
        let gfn = Gfn::new(page.get()).unwrap();
        let access = GuestAccess { gfn, visibility: Visibility::Private };
        assert_eq!(
            set.driver.guest_fault(vm, access, None, || true).map(GuestFault::exit),
            Ok(None)
        );
        if page.get() % 2 == 0 {
            set.convert(PageRange::one(page), Visibility::Shared, Contents::Unspecified).unwrap();
        }
    }
    set
}

/// Which pages are assigned in the RMP.
fn assigned(set: &Set) -> Vec<bool> {
    let (object, _) = set.driver.host.machine().unwrap().parts();
    let machine = set.driver.host.machine().unwrap().lock();
    let is_assigned = |page| {
        let backing = machine.backing(object, page).unwrap().expect("a page with memory");
        machine.rmp_entry(backing.pfn).unwrap().assigned
    };
    pages(0, PAGES).frames().map(is_assigned).collect()
}

/// INV-4 and INV-9: the RMP is what it was, and agrees with what is granted.
#[test]
fn a_conversion_of_an_snp_guest_whose_nth_step_goes_wrong_leaves_the_rmp_as_it_was() {
    for trouble in [Trouble::Fail, Trouble::Panic] {
        for to in [Visibility::Private, Visibility::Shared] {
            let wrong = (0..).take_while(|&n| goes_wrong_on_snp(trouble, to, n)).count();
            assert!(wrong > 10, "{wrong} steps in all");
        }
    }
}

/// Whether there was an nth step.
fn goes_wrong_on_snp(trouble: Trouble, to: Visibility, n: usize) -> bool {
    let set = snp(trouble);
    let before = assigned(&set);
    assert_eq!(before, (0..PAGES).map(|page| page % 2 == 1).collect::<Vec<_>>());
    *set.plan.lock() = (n, 1);
    let convert = || set.convert(pages(0, PAGES), to, Contents::Unspecified);
    let result = catch_unwind(AssertUnwindSafe(convert));
    let wrong = set.plan.lock().1 == 0;
    *set.plan.lock() = (usize::MAX, 0);
    assert_eq!(matches!(result, Ok(Ok(()))), !wrong);
    if wrong {
        // Who comes next undoes what was abandoned.
        set.driver.populate(pages(0, 1), &[]).unwrap_err();
        assert_eq!(assigned(&set), before, "step {n} of a conversion to {to}");
        assert!(set.becomes_idle() && set.driver.engine().quarantine().is_empty());
        set.convert(pages(0, PAGES), to, Contents::Unspecified).unwrap();
    }
    let private = to == Visibility::Private;
    assert!(assigned(&set).iter().all(|assigned| *assigned == private));
    wrong
}

/// Memory of an SNP guest that has page 1, and was refused page 0, which somebody else refers to.
fn snp_refused_a_page(trouble: Trouble) -> Set {
    use polder_machine::{Hva, PinKind, Thread, View, VpnRange};
    let set = Set::of((HostKind::Machine, Platform::Snp), trouble, Duration::from_millis(1));
    let (set, vm, first) = (set.expect("the machine needs nothing"), VmId(0), Gfn::from(0));
    set.driver.host.attach(vm, Vm::Machine).unwrap();
    set.driver.engine().bind(vm, Slot(0), first, pages(0, PAGES)).unwrap();
    set.driver.host.bind(vm, Slot(0), first, pages(0, PAGES)).unwrap();
    {
        let host = set.driver.host.machine().unwrap();
        let (object, _) = host.parts();
        let mut machine = host.lock();
        let process = machine.create_process().unwrap();
        let vpns = VpnRange::between(0x1000, 0x1001).unwrap();
        machine.mmap(process, vpns, object, 0u32.into(), View::PLAIN).unwrap();
        let thread = Thread { process, index: 0 };
        machine.host_write(thread, Hva::new(0x1000 << 12), &[1]).unwrap();
        machine.pin_user_pages(process, vpns, true, PinKind::LongTerm).unwrap();
    }
    let fault = |gfn: u32| {
        let access = GuestAccess { gfn: gfn.into(), visibility: Visibility::Private };
        set.driver.guest_fault(vm, access, None, || true).map(GuestFault::exit)
    };
    let refused = fault(0);
    assert!(matches!(refused, Err(Error::Refused(Refusal::Referenced { .. }))), "{refused:?}");
    assert_eq!(fault(1), Ok(None));
    set
}

/// Which of the first two pages are assigned.
fn assigned_of_two(set: &Set) -> [bool; 2] {
    let (object, _) = set.driver.host.machine().unwrap().parts();
    let machine = set.driver.host.machine().unwrap().lock();
    [0u32, 1].map(|page| {
        let backing = machine.backing(object, page.into()).unwrap();
        backing.is_some_and(|backing| machine.rmp_entry(backing.pfn).unwrap().assigned)
    })
}

#[test]
fn a_way_back_assigns_no_page_that_was_not_assigned() {
    for trouble in [Trouble::Fail, Trouble::Panic] {
        for discards in [false, true] {
            let failed = (0..).take_while(|&n| fails_over_a_refused_page(trouble, discards, n));
            // Unmap, smash, unassign; a discard unmaps from two, and its last step has no way back.
            assert_eq!(failed.count(), if discards { 4 } else { 3 }, "{discards}");
        }
    }
}

/// Whether the nth step failed and had a way back.
fn fails_over_a_refused_page(trouble: Trouble, discards: bool, n: usize) -> bool {
    let set = snp_refused_a_page(trouble);
    let both = pages(0, 2);
    assert_eq!(assigned_of_two(&set), [false, true]);
    *set.plan.lock() = (n, 1);
    let result = catch_unwind(AssertUnwindSafe(|| match discards {
        true => set.driver.discard(both, false, OnBusy::Wait),
        false => set.convert(both, Visibility::Shared, Contents::Unspecified),
    }));
    *set.plan.lock() = (usize::MAX, 0);
    // Who comes next undoes what was abandoned.
    set.driver.populate(both, &[]).unwrap_err();
    if matches!(result, Ok(Ok(()))) || !set.driver.engine().quarantine().is_empty() {
        return false;
    }
    assert_eq!(assigned_of_two(&set), [false, true], "step {n}, discards: {discards}");
    true
}
