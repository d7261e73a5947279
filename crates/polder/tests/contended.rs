//! A vCPU of an SNP guest whose RMP entry somebody else has in use: it waits, and can be kicked.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::atomic::Ordering;

use polder::machine::{LockOwner, RmpSize};
use polder::units::{Gfn, Level, PageCount, PageRange, Pfn};
use polder::{GuestExit, HostKind, MachineVcpu, Memory, Platform, Slot, Visibility};

const OTHER: LockOwner = LockOwner(7);
const PAGES: u32 = 512;

/// Memory of one 2M folio that a guest has, and has validated, by a large entry; now in 4K folios.
fn split_folio() -> (Memory, MachineVcpu, Pfn) {
    let pages = PageCount::from(PAGES);
    let builder = Memory::builder(pages).host(HostKind::Machine).platform(Platform::Snp);
    let memory = builder.build().unwrap();
    let vm = memory.attach(polder::Vm::Machine).unwrap();
    let all = PageRange::between(0, pages.get()).unwrap();
    memory.bind(vm, Slot(0), Gfn::from(0), all).unwrap();
    let vcpu = memory.machine_vcpu(vm).unwrap();
    let head = memory.simulated(|machine, object, _| {
        machine.allocate(object, 0u32.into(), Level::Size2M).unwrap()
    });
    let head = head.unwrap();
    assert_eq!(vcpu.pvalidate(Gfn::from(0), Level::Size2M, true), Ok(Ok(true)));
    let split = memory.simulated(|machine, object, _| {
        machine.lock_folio(head, OTHER)?;
        let gfns: Vec<_> = machine.gfns_of(object, all).collect();
        gfns.into_iter().try_for_each(|(vm, gfns)| machine.tdp_zap(vm, gfns).map(drop))?;
        machine.split_folio(object, 0u32.into(), OTHER)?;
        machine.unlock_folio(head, OTHER)
    });
    split.unwrap().unwrap();
    (memory, vcpu, head)
}

/// A vCPU's read of page 0, while the entry of the `at`th page is in use until it is kicked.
fn kicked_while_in_use(at: u64) {
    let (memory, vcpu, head) = split_folio();
    let pfn = Pfn::new(head.get() + at).unwrap();
    memory
        .simulated(|machine, _, _| machine.rmp_hold(pfn, RmpSize::Size4K, OTHER))
        .unwrap()
        .unwrap();
    let read = || vcpu.read(Gfn::from(0).gpa(), Visibility::Private, &mut [0; 8]);
    std::thread::scope(|scope| {
        let reader = scope.spawn(read);
        // As many turns as would do for anything that is soon over.
        for _ in 0..5000 {
            memory.simulated(|_, _, _| ()).unwrap();
            std::thread::yield_now();
        }
        assert!(!reader.is_finished(), "an entry in use is no reason to give up");
        vcpu.kicker().store(true, Ordering::Release);
        assert_eq!(reader.join().unwrap(), Err(GuestExit::Kicked));
    });
    vcpu.kicker().store(false, Ordering::Release);
    memory.simulated(|machine, _, _| machine.rmp_release(pfn, OTHER)).unwrap().unwrap();
    assert_eq!(read(), Ok(()));
}

#[test]
fn a_vcpu_that_can_not_smash_because_of_another_waits_until_it_is_kicked() {
    kicked_while_in_use(5);
}

#[test]
fn a_vcpu_whose_entry_another_has_in_use_waits_until_it_is_kicked() {
    kicked_while_in_use(0);
}
