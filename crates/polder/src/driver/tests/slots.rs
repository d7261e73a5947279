//! Slots that can't be taken away, and accesses meanwhile.

use super::snp::snp;
use super::*;

#[test]
fn a_slot_that_can_not_be_taken_away_wishes_what_it_did() {
    let (set, vm) = (snp(Trouble::Fail), VmId(0));
    let wished = GfnRange::between(2, 8).unwrap();
    set.driver.claim(OnBusy::Wait, |engine| engine.want(vm, wished, Visibility::Shared)).unwrap();
    let unmet = || set.driver.engine().unmet().collect::<Vec<_>>();
    let before = unmet();
    assert_eq!(before.len(), 3, "every other page is private");
    set.unbinding.slot_stays.store(true, Ordering::SeqCst);
    set.driver.unbind(vm, Slot(0)).unwrap_err();
    assert_eq!(unmet(), before);
    set.unbinding.slot_stays.store(false, Ordering::SeqCst);
    set.driver.unbind(vm, Slot(0)).unwrap();
    assert_eq!(unmet(), []);
}

#[test]
fn while_a_slot_can_not_be_taken_away_its_guest_goes_on_and_its_wishes_are_met() {
    let (set, vm) = (snp(Trouble::Fail), VmId(0));
    set.unbinding.slot_stays.store(true, Ordering::SeqCst);
    let driver = Arc::clone(&set.driver);
    let answered = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&answered);
    *set.unbinding.meanwhile.lock() = Some(Box::new(move || {
        let access = GuestAccess { gfn: 1u32.into(), visibility: Visibility::Private };
        assert_eq!(driver.guest_fault(vm, access, None, || true).map(GuestFault::exit), Ok(None));
        // The VMM decides for all of its guests.
        let (find, to) = (|_: &Engine| Ok(vec![pages(1, 2)]), Visibility::Shared);
        driver.convert(find, (to, Contents::Unspecified), (None, false), OnBusy::Wait).unwrap();
        done.store(true, Ordering::SeqCst);
    }));
    set.driver.unbind(vm, Slot(0)).unwrap_err();
    assert!(answered.load(Ordering::SeqCst));
    assert_eq!(set.driver.engine().unmet().collect::<Vec<_>>(), []);
}

#[test]
fn an_access_to_a_slot_that_has_just_gone_is_unbound_and_nothing_else() {
    let config = Config {
        pages: PageCount::new(PAGES).unwrap(),
        geometry: Geometry::X86_64,
        platform: Platform::Plain,
        in_place: true,
        host_view_level: Level::Size4K,
        backing: polder_engine::Backing::ANY,
        initial: PageFacts { visibility: Visibility::Private, population: Population::Whole },
    };
    let unbinding = Arc::new(Unbinding::default());
    let host = Troubled {
        host: Box::new(MachineHost::new(config.pages, config.platform).unwrap()),
        trouble: Trouble::Fail,
        plan: Arc::new(Mutex::new((usize::MAX, 0))),
        answers: Arc::default(),
        unbinding: Arc::clone(&unbinding),
    };
    let memory = Arc::new(crate::Memory::over(Driver::new(config, Box::new(host))).unwrap());
    let vm = memory.attach(Vm::Machine).unwrap();
    memory.bind(vm, Slot(0), Gfn::from(0), pages(0, PAGES)).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let at_once = Arc::clone(&memory);
    *unbinding.meanwhile.lock() = Some(Box::new(move || {
        let faults = std::thread::spawn(move || {
            at_once.guest_fault(vm, Gfn::from(1).gpa(), Visibility::Private)
        });
        std::thread::sleep(Duration::from_millis(20));
        tell.send(faults).unwrap();
    }));
    memory.unbind(vm, Slot(0)).unwrap();
    let unbound = polder_engine::MemoryFault::Unbound(GfnRange::one(1u32.into()));
    assert_eq!(told.recv().unwrap().join().unwrap(), Ok(Some(unbound)));
}
