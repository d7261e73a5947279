//! Prefault on the simulated machine: what the behaviour table can't bring about on every host.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use polder::machine::RmpSize;
use polder::units::{Gfn, GfnRange, Level, PageCount, PageRange};
use polder::{
    Contents, Error, HostKind, MachineVcpu, Memory, Moment, OnBusy, Platform, Prefaulted, Reached,
    Slot, Visibility, Vm, VmId, Watch,
};

const PAGES: u32 = 16;

fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange::between(start, end).expect("some frames")
}

fn memory() -> (Memory, VmId, MachineVcpu) {
    let memory = Memory::builder(PageCount::from(PAGES))
        .host(HostKind::Machine)
        .build()
        .expect("a small memory");
    let vm = memory.attach(Vm::Machine).expect("a machine's VM");
    let all = PageRange::between(0, PAGES.into()).expect("some pages");
    memory.bind(vm, Slot(0), Gfn::from(0), all).expect("a free slot");
    let vcpu = memory.machine_vcpu(vm).expect("a VM of it");
    (memory, vm, vcpu)
}

#[test]
fn a_vcpu_that_was_kicked_is_interrupted_before_a_page_is_done() {
    let (memory, vm, vcpu) = memory();
    vcpu.kicker().store(true, Ordering::Release);
    let interrupted = memory.prefault(vm, &vcpu, gfns(0, 4));
    assert_eq!(interrupted, Err(Error::Interrupted));
    assert_eq!(interrupted.unwrap_err().errno() as i32, 4, "EINTR");
    assert_eq!(memory.existing(), Ok(vec![]));
    vcpu.kicker().store(false, Ordering::Release);
    let done = gfns(0, 4);
    assert_eq!(
        memory.prefault(vm, &vcpu, done),
        Ok(Prefaulted { done, skipped: PageCount::ZERO, left: None })
    );
}

/// Holds an operation where it is claimed, until told to go on.
struct Hold(mpsc::Sender<()>, Mutex<mpsc::Receiver<()>>);

impl Watch for Hold {
    fn at(&self, moment: Moment) {
        if matches!(moment, Moment::Reached(Reached::Claimed)) {
            self.0.send(()).unwrap();
            self.1.lock().unwrap().recv().unwrap();
        }
    }
}

#[test]
fn a_vcpu_that_is_kicked_waits_no_longer_for_an_operation() {
    let (memory, vm, vcpu) = memory();
    let ((tell, claimed), (go_on, told)) = (mpsc::channel(), mpsc::channel());
    memory.watch(Arc::new(Hold(tell, Mutex::new(told))));
    let kicker = vcpu.kicker();
    std::thread::scope(|scope| {
        let (memory, vcpu) = (&memory, &vcpu);
        let third = PageRange::between(2, 3).unwrap();
        scope.spawn(move || memory.discard(third, OnBusy::Wait).unwrap());
        claimed.recv().unwrap();
        let (tell, came) = mpsc::channel();
        scope.spawn(move || {
            // A page that was done is told, and what stands before the next, afterwards.
            tell.send(memory.prefault(vm, vcpu, gfns(1, 4))).unwrap();
            tell.send(memory.prefault(vm, vcpu, gfns(2, 4))).unwrap();
        });
        std::thread::sleep(Duration::from_millis(50));
        kicker.store(true, Ordering::Release);
        let done =
            Prefaulted { done: gfns(1, 2), skipped: PageCount::ZERO, left: Some(gfns(2, 4)) };
        let limit = Duration::from_secs(10);
        let came = [came.recv_timeout(limit), came.recv_timeout(limit)];
        go_on.send(()).unwrap();
        assert_eq!(came, [Ok(Ok(done)), Ok(Err(Error::Interrupted))]);
    });
}

#[test]
fn a_vcpu_of_another_vm_or_memory_is_refused() {
    let (memory, vm, vcpu) = memory();
    let other_vm = memory.attach(Vm::Machine).unwrap();
    let (_other_memory, its_vm, its_vcpu) = self::memory();
    assert_eq!(memory.prefault(other_vm, &vcpu, gfns(0, 4)), Err(Error::WrongVcpu));
    assert_eq!(vm, its_vm, "the same number");
    assert_eq!(memory.prefault(vm, &its_vcpu, gfns(0, 4)), Err(Error::WrongVcpu));
    assert_eq!(memory.existing(), Ok(vec![]));
}

#[test]
fn where_memory_runs_out_the_pages_before_are_done_and_no_others() {
    let (memory, vm, vcpu) = memory();
    // Somebody else has all frames but three.
    let hog = |machine: &mut polder::machine::Machine, free: usize| {
        let pages = PageCount::from(2 * PAGES);
        let object = machine.create_object(pages).unwrap();
        let all = PageRange::between(0, pages.get()).unwrap();
        let taken = all.frames().map_while(|page| {
            machine.allocate(object, page, Level::Size4K).is_ok().then_some(page)
        });
        let taken: Vec<_> = taken.collect();
        for page in &taken[taken.len() - free..] {
            machine.punch(object, PageRange::one(*page), None).unwrap();
        }
    };
    memory.simulated(|machine, _, _| hog(machine, 3)).unwrap();
    let came = memory.prefault(vm, &vcpu, gfns(2, 16));
    assert_eq!(
        came,
        Ok(Prefaulted { done: gfns(2, 5), skipped: PageCount::ZERO, left: Some(gfns(5, 16)) })
    );
    assert_eq!(memory.existing(), Ok(vec![PageRange::between(2, 5).unwrap()]));
    let none = memory.prefault(vm, &vcpu, gfns(5, 16)).unwrap_err();
    assert_eq!(none.errno() as i32, 12, "ENOMEM");
}

#[test]
fn what_is_said_to_be_done_is_mapped_though_other_pages_are_zapped_meanwhile() {
    let (memory, vm, vcpu) = memory();
    let (ours, theirs) = (gfns(0, 12), gfns(12, 16));
    let all = PageRange::between(0, PAGES.into()).unwrap();
    let zap = |gfns| {
        let zapped = memory.simulated(|machine, object, _| {
            let (vm, _) = machine.gfns_of(object, all).next().unwrap();
            machine.tdp_zap(vm, gfns).unwrap();
        });
        zapped.unwrap();
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                zap(theirs);
            }
        });
        let mut missing = 0;
        for _ in 0..5000 {
            zap(ours);
            let done = memory.prefault(vm, &vcpu, ours);
            assert_eq!(done, Ok(Prefaulted { done: ours, skipped: PageCount::ZERO, left: None }));
            let mapped = memory.simulated(|machine, object, _| {
                let (vm, _) = machine.gfns_of(object, all).next().unwrap();
                ours.frames().filter(|&gfn| machine.spte(vm, gfn).unwrap().is_some()).count()
            });
            missing += 12 - mapped.unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(missing, 0);
    });
}

/// Memory of an SNP guest or of another, of two 2M folios.
fn huge(platform: Platform) -> (Memory, VmId, MachineVcpu) {
    let pages = PageCount::from(1024);
    let builder = Memory::builder(pages).host(HostKind::Machine).platform(platform);
    let memory = builder.build().expect("a small memory");
    let vm = memory.attach(Vm::Machine).expect("a machine's VM");
    let all = PageRange::between(0, 1024).expect("some pages");
    memory.bind(vm, Slot(0), Gfn::from(0), all).expect("a free slot");
    let allocate = |machine: &mut polder::machine::Machine, object| {
        [0u32, 512].map(|page| machine.allocate(object, page.into(), Level::Size2M).unwrap())
    };
    memory.simulated(|machine, object, _| allocate(machine, object)).unwrap();
    let vcpu = memory.machine_vcpu(vm).expect("a VM of it");
    (memory, vm, vcpu)
}

/// The level at which stage 2 has a frame.
fn level(memory: &Memory, gfn: u32) -> Option<Level> {
    let level = memory.simulated(|machine, object, _| {
        let page = PageRange::one(gfn.into());
        let (vm, _) = machine.gfns_of(object, page).next().unwrap();
        machine.spte(vm, gfn.into()).unwrap().map(|spte| spte.level)
    });
    level.unwrap()
}

#[test]
fn a_huge_folio_is_mapped_as_one_page_also_by_a_prefault_that_begins_before_it() {
    for platform in [Platform::Plain, Platform::SwProtected, Platform::Snp] {
        let (memory, vm, vcpu) = huge(platform);
        let done = gfns(510, 1024);
        assert_eq!(
            memory.prefault(vm, &vcpu, done),
            Ok(Prefaulted { done, skipped: PageCount::ZERO, left: None })
        );
        let levels = [509, 510, 511, 512, 700].map(|gfn| level(&memory, gfn));
        let (small, large) = (Some(Level::Size4K), Some(Level::Size2M));
        // With an RMP the rest of the first comes with it: its entry is large.
        let first = if platform.has_rmp() { [large; 3] } else { [None, small, small] };
        assert_eq!(levels[..3], first, "{platform}");
        assert_eq!(levels[3..], [large; 2], "{platform}");
    }
}

/// Has the RMP entry of a page in use, as another processor.
#[test]
fn pages_of_two_kinds_are_not_mapped_as_one_by_a_prefault() {
    for platform in [Platform::Plain, Platform::SwProtected] {
        let (memory, vm, vcpu) = huge(platform);
        let one = PageRange::between(9, 10).unwrap();
        memory.convert(one, Visibility::Shared, Contents::Zero, OnBusy::Wait).unwrap();
        let mut left = Some(gfns(0, 512));
        while let Some(now) = left {
            left = memory.prefault(vm, &vcpu, now).unwrap().left;
        }
        for gfn in [3, 9, 300] {
            assert_eq!(level(&memory, gfn), Some(Level::Size4K), "{platform:?}, gfn {gfn}");
        }
    }
}

fn in_use(memory: &Memory, page: u32, held: bool) {
    let other = polder::machine::LockOwner(7);
    let done = memory.simulated(|machine, object, _| {
        let pfn = machine.backing(object, page.into()).unwrap().unwrap().pfn;
        match held {
            true => machine.rmp_hold(pfn, RmpSize::Size4K, other),
            false => machine.rmp_release(pfn, other),
        }
    });
    done.unwrap().unwrap();
}

#[test]
fn an_entry_that_others_have_in_use_for_long_ends_it_with_what_was_done() {
    let (memory, vm, vcpu) = huge(Platform::Snp);
    in_use(&memory, 600, true);
    let came = memory.prefault(vm, &vcpu, gfns(0, 1024));
    assert_eq!(
        came,
        Ok(Prefaulted {
            done: gfns(0, 512),
            skipped: PageCount::ZERO,
            left: Some(gfns(512, 1024))
        })
    );
    let again = memory.prefault(vm, &vcpu, gfns(512, 1024)).unwrap_err();
    assert!(matches!(again, Error::Host(_)) && again.errno() as i32 == 11, "EAGAIN: {again:?}");
    vcpu.kicker().store(true, Ordering::Release);
    assert_eq!(memory.prefault(vm, &vcpu, gfns(512, 1024)), Err(Error::Interrupted));
    vcpu.kicker().store(false, Ordering::Release);
    in_use(&memory, 600, false);
    let done = gfns(512, 1024);
    assert_eq!(
        memory.prefault(vm, &vcpu, done),
        Ok(Prefaulted { done, skipped: PageCount::ZERO, left: None })
    );
    assert_eq!(level(&memory, 600), Some(Level::Size2M), "nothing small was left behind");
}

#[test]
fn a_prefault_of_a_part_of_a_large_entrys_page_leaves_nothing_to_smash() {
    let (memory, vm, vcpu) = huge(Platform::Snp);
    for done in [gfns(3, 5), gfns(510, 514), gfns(3, 5)] {
        assert_eq!(
            memory.prefault(vm, &vcpu, done),
            Ok(Prefaulted { done, skipped: PageCount::ZERO, left: None })
        );
        assert_eq!(level(&memory, 3), Some(Level::Size2M));
    }
    assert_eq!(level(&memory, 600), Some(Level::Size2M));
    // One shared page, and what is left of its 2M is mapped page by page.
    let page = PageRange::between(9, 10).unwrap();
    memory.convert(page, Visibility::Shared, Contents::Zero, OnBusy::Wait).unwrap();
    let done = gfns(3, 5);
    assert_eq!(
        memory.prefault(vm, &vcpu, done),
        Ok(Prefaulted { done, skipped: PageCount::ZERO, left: None })
    );
    let small = Some(Level::Size4K);
    assert_eq!([2, 3, 4, 5].map(|gfn| level(&memory, gfn)), [None, small, small, None]);
}
