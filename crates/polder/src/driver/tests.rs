//! The driver over each host, with steps and answers that fail or panic.

mod huge_pages;

use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use polder_engine::{
    Contents, GuestAccess, PageFacts, Platform, Population, Slot, Step, View, Visibility, VmId,
};
use polder_require::{Facility, require};
use polder_units::{Geometry, Gfn, GfnRange, Level, PageCount, PageIndex};

use super::*;
use crate::faults::FaultThreads;
use crate::host::machine::MachineHost;
use crate::host::memfd::MemfdHost;
use crate::host::{Faulted, Shown, Vm};
use crate::{HostKind, Vcpu};

/// What a step that is chosen to does instead of succeeding.
#[derive(Clone, Copy, PartialEq)]
enum Trouble {
    /// It is done, and reports a failure that may pass.
    Fail,
    /// It is done, and reports a failure that will not.
    Refuse,
    /// It is done, and panics: the operation is abandoned.
    Panic,
}

/// A host, in trouble from some step on.
struct Troubled {
    host: Box<dyn Host>,
    trouble: Trouble,
    /// How many steps go well first, and how many go wrong then.
    plan: Arc<Mutex<(usize, usize)>>,
    /// How many answers go wrong.
    answers: Arc<AtomicUsize>,
    unbinding: Arc<Unbinding>,
}

/// What happens while a slot is taken away.
#[derive(Default)]
struct Unbinding {
    /// Whether it can't be.
    slot_stays: AtomicBool,
    /// Called once, when the slot has gone from the host, or just before that fails.
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Troubled {
    fn go_wrong(&self) -> Result<(), Error> {
        let errno = match self.trouble {
            Trouble::Fail => polder_linux::Errno::NOMEM,
            Trouble::Refuse => polder_linux::Errno::INVAL,
            Trouble::Panic => panic!("as was planned"),
        };
        Err(polder_linux::Error { call: "planned", range: None, errno }.into())
    }
}

impl Host for Troubled {
    fn take(&self, step: Step) -> Result<(), Error> {
        self.host.take(step)?;
        let mut plan = self.plan.lock();
        if plan.0 > 0 {
            plan.0 -= 1;
        } else if plan.1 > 0 {
            plan.1 -= 1;
            drop(plan);
            return self.go_wrong();
        }
        Ok(())
    }

    fn views(&self) -> &dyn Views {
        self
    }

    fn attach(&self, id: VmId, vm: Vm) -> Result<(), Error> {
        self.host.attach(id, vm)
    }

    fn bind(&self, vm: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error> {
        self.host.bind(vm, slot, gfn, pages)
    }

    fn unbind(&self, vm: VmId, slot: Slot) -> Result<(), Error> {
        let stays = self.unbinding.slot_stays.load(Ordering::SeqCst);
        if !stays {
            self.host.unbind(vm, slot)?;
        }
        if let Some(meanwhile) = self.unbinding.meanwhile.lock().take() {
            meanwhile();
        }
        if stays { self.go_wrong() } else { Ok(()) }
    }

    fn map_guest(
        &self,
        vm: VmId,
        access: GuestAccess,
        faulted: Option<Faulted>,
        range: PageRange,
    ) -> Result<bool, Error> {
        self.host.map_guest(vm, access, faulted, range)
    }

    fn smash(&self, vm: VmId, gfn: Gfn, within: PageRange) -> Result<crate::host::Smashed, Error> {
        self.host.smash(vm, gfn, within)
    }

    fn machine(&self) -> Option<&MachineHost> {
        self.host.machine()
    }

    fn show(
        &self,
        vm: VmId,
        vcpu: Vcpu<'_>,
        shown: Shown,
        range: PageRange,
    ) -> Result<(u64, u64), Error> {
        self.host.show(vm, vcpu, shown, range)
    }

    fn settle(&self, failed: &[PageRange]) -> Result<(), Error> {
        self.host.settle(failed)
    }

    fn pool(&self) -> Option<polder_engine::pool::PoolCounts> {
        self.host.pool()
    }

    fn existing(&self) -> Result<Vec<PageRange>, Error> {
        self.host.existing()
    }
}

impl Views for Troubled {
    fn answer(&self, view: View, response: Response, range: PageRange) -> Result<(), Error> {
        let left = self.answers.load(Ordering::SeqCst);
        if left > 0 {
            self.answers.store(left - 1, Ordering::SeqCst);
            self.go_wrong()?;
        }
        self.host.views().answer(view, response, range)
    }

    fn wake(&self, view: View, range: PageRange) {
        self.host.views().wake(view, range);
    }

    fn touches(
        &self,
        into: &mut Vec<(View, PageIndex)>,
        at_most: Option<Duration>,
    ) -> Result<bool, Error> {
        self.host.views().touches(into, at_most)
    }

    fn nudge(&self) {
        self.host.views().nudge();
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.host.views().read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.host.views().write(offset, from)
    }

    fn touch_read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.host.views().touch_read(offset, into)
    }

    fn touch_write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.host.views().touch_write(offset, from)
    }

    fn touch_from(&self, file: BorrowedFd<'_>, offset: u64, count: usize) -> Result<usize, Error> {
        self.host.views().touch_from(file, offset, count)
    }

    fn host_view(&self) -> Option<&std::sync::Arc<polder_linux::View>> {
        self.host.views().host_view()
    }

    fn guest_page(&self, address: usize) -> Option<PageIndex> {
        self.host.views().guest_page(address)
    }
}

const PAGES: u64 = 16;

/// Those that do all of their steps without a VM.
const HOSTS: [HostKind; 2] = [HostKind::Memfd, HostKind::Machine];

/// A driver and its threads, over a host whose plan is to be set.
struct Set {
    driver: Arc<Driver>,
    threads: FaultThreads,
    plan: Arc<Mutex<(usize, usize)>>,
    answers: Arc<AtomicUsize>,
    unbinding: Arc<Unbinding>,
    guest_view: Option<Arc<polder_linux::View>>,
}

impl Set {
    fn new(kind: HostKind, trouble: Trouble) -> Option<Self> {
        Self::asking(kind, trouble, Duration::from_secs(3600))
    }

    /// One whose waiters ask again after `ask_again`.
    fn asking(kind: HostKind, trouble: Trouble, ask_again: Duration) -> Option<Self> {
        Self::of((kind, Platform::Plain), trouble, ask_again)
    }

    fn of(
        (kind, platform): (HostKind, Platform),
        trouble: Trouble,
        ask_again: Duration,
    ) -> Option<Self> {
        let pages = PageCount::new(PAGES).unwrap();
        let (host, guest_view): (Box<dyn Host>, _) = match kind {
            HostKind::Memfd => {
                let host = require(
                    Facility::Userfault,
                    MemfdHost::new(pages, false, crate::PageSize::Small),
                )?;
                let guest_view = host.guest_view();
                (Box::new(host), Some(guest_view))
            }
            HostKind::GuestMemfd => unreachable!("not one of `HOSTS`"),
            HostKind::Machine => (Box::new(MachineHost::new(pages, platform).unwrap()), None),
        };
        let config = Config {
            pages,
            geometry: Geometry::X86_64,
            platform,
            in_place: true,
            host_view_level: Level::Size4K,
            backing: polder_engine::Backing::ANY,
            initial: PageFacts { visibility: Visibility::Private, population: Population::Whole },
        };
        Some(Self::over(host, guest_view, config, trouble, ask_again))
    }

    fn over(
        host: Box<dyn Host>,
        guest_view: Option<Arc<polder_linux::View>>,
        config: Config,
        trouble: Trouble,
        ask_again: Duration,
    ) -> Self {
        let plan = Arc::new(Mutex::new((usize::MAX, 0)));
        let answers = Arc::new(AtomicUsize::new(0));
        let unbinding = Arc::new(Unbinding::default());
        let host = Troubled {
            host,
            trouble,
            plan: Arc::clone(&plan),
            answers: Arc::clone(&answers),
            unbinding: Arc::clone(&unbinding),
        };
        let mut driver = Driver::new(config, Box::new(host));
        // Nobody is saved by asking again unprompted: a wake-up that is lost hangs the test.
        driver.ask_again = ask_again;
        let driver = Arc::new(driver);
        let threads = FaultThreads::start(&driver, 1).unwrap();
        Self { driver, threads, plan, answers, unbinding, guest_view }
    }

    fn convert(&self, range: PageRange, to: Visibility, contents: Contents) -> Result<(), Error> {
        self.driver
            .convert(|_| Ok(vec![range]), (to, contents), (None, false), OnBusy::Wait)
            .map(drop)
    }

    /// Whether nothing is in flight soon: who touches is let go before his answer is given back.
    fn becomes_idle(&self) -> bool {
        (0..1000).any(|_| {
            crate::sync::sleep(Duration::from_millis(1));
            self.driver.engine().is_idle()
        })
    }

    /// What a raw touch of each page finds.
    fn touch(&self) -> Vec<Option<u8>> {
        let byte = |page: u64| {
            let mut byte = [0];
            self.driver.host.views().touch_read(page * 4096, &mut byte).ok().map(|()| byte[0])
        };
        (0..PAGES).map(byte).collect()
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        self.threads.stop(&self.driver);
    }
}

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

/// Memory of an SNP guest whose pages 0, 2, .. 14 are shared, and the others assigned to it.
fn snp(trouble: Trouble) -> Set {
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

/// Pages 0, 2, .. 14 are shared and hold their number plus one.
fn striped(set: &Set) -> Vec<Option<u8>> {
    for page in (0..PAGES).step_by(2) {
        set.convert(pages(page, page + 1), Visibility::Shared, Contents::Preserve).unwrap();
        let byte = u8::try_from(page).unwrap() + 1;
        set.driver.host.views().touch_write(page * 4096, &[byte]).unwrap();
    }
    set.touch()
}

#[test]
fn a_conversion_whose_nth_step_fails_changed_nothing_for_every_n() {
    for kind in HOSTS {
        for to in [Visibility::Private, Visibility::Shared] {
            every_step_fails(kind, to);
        }
    }
}

fn every_step_fails(kind: HostKind, to: Visibility) {
    let mut failures = 0;
    {
        for n in 0.. {
            let Some(set) = Set::new(kind, Trouble::Fail) else { return };
            let before = striped(&set);
            *set.plan.lock() = (n, 1);
            let result = set.convert(pages(0, PAGES), to, Contents::Preserve);
            let failed = set.plan.lock().1 == 0;
            *set.plan.lock() = (usize::MAX, 0);
            assert_eq!(result.is_err(), failed);
            if !failed {
                break;
            }
            failures += 1;
            assert_eq!(set.touch(), before, "step {n} of a conversion to {to} failed (INV-4)");
            assert!(set.becomes_idle() && set.driver.engine().quarantine().is_empty());
            set.convert(pages(0, PAGES), to, Contents::Preserve).unwrap();
            assert!(set.touch().iter().all(|byte| byte.is_some() == (to == Visibility::Shared)));
        }
    }
    assert!(failures > 10, "{failures} steps in all");
}

#[test]
fn an_operation_abandoned_at_any_step_is_undone_by_who_comes_next() {
    HOSTS.into_iter().for_each(abandoned_at_any_step);
}

fn abandoned_at_any_step(kind: HostKind) {
    for n in 0.. {
        let Some(set) = Set::new(kind, Trouble::Panic) else { return };
        let before = striped(&set);
        *set.plan.lock() = (n, 1);
        let convert = || set.convert(pages(0, PAGES), Visibility::Private, Contents::Preserve);
        let panicked = catch_unwind(AssertUnwindSafe(convert)).is_err();
        *set.plan.lock() = (usize::MAX, 0);
        if !panicked {
            assert!(n > 10, "{n} steps in all");
            return;
        }
        assert!(!set.driver.engine().is_idle(), "nobody has undone it yet");
        // A touch is who comes next: its fault thread undoes the conversion (INV-8).
        assert_eq!(set.touch(), before, "step {n} panicked");
        assert!(set.becomes_idle());
        set.convert(pages(0, PAGES), Visibility::Private, Contents::Preserve).unwrap();
    }
}

#[test]
fn pages_that_can_not_be_put_right_are_out_of_use_in_every_view() {
    HOSTS.into_iter().for_each(out_of_use);
}

fn out_of_use(kind: HostKind) {
    let Some(set) = Set::new(kind, Trouble::Fail) else { return };
    striped(&set);
    // Unmap, check references, protect, free: the last step is the one with no way back.
    *set.plan.lock() = (3, 1);
    let result = set.convert(pages(2, 3), Visibility::Private, Contents::Zero);
    *set.plan.lock() = (usize::MAX, 0);
    assert!(matches!(&result, Err(Error::Quarantined { pages: out, .. }) if *out == [pages(2, 3)]));
    assert_eq!(set.touch()[2], None);
    if let Some(guest_view) = &set.guest_view {
        let denied = Err(polder_linux::Touched { offset: 2 * 4096 });
        assert_eq!(guest_view.read(2 * 4096, &mut [0]), denied);
        assert_eq!(guest_view.read(3 * 4096, &mut [0]), Ok(()));
        set.driver.settle().unwrap();
        assert_eq!(guest_view.read(2 * 4096, &mut [0]), denied, "for good");
    }
    let again = set.convert(pages(2, 3), Visibility::Shared, Contents::Preserve);
    assert!(matches!(again, Err(Error::Refused(Refusal::Quarantined { .. }))), "{again:?}");
    set.convert(pages(3, 4), Visibility::Shared, Contents::Preserve).unwrap();
    assert_eq!(set.touch()[3], Some(0), "its neighbour is as good as ever");
}

#[test]
fn a_step_of_a_way_back_is_tried_again_while_what_is_in_its_way_may_pass() {
    for trouble in [Trouble::Fail, Trouble::Refuse] {
        for kind in HOSTS {
            let Some(set) = Set::new(kind, trouble) else { return };
            let before = striped(&set);
            // Unmap, check references, protect, free: protecting fails, and its way back.
            *set.plan.lock() = (2, 51);
            let result = set.convert(pages(2, 3), Visibility::Private, Contents::Zero);
            let left = std::mem::replace(&mut *set.plan.lock(), (usize::MAX, 0)).1;
            if trouble == Trouble::Fail {
                assert!(matches!(result, Err(Error::Host(_))), "{kind}: {result:?}");
                assert_eq!(set.touch(), before);
            } else {
                assert!(matches!(result, Err(Error::Quarantined { .. })), "{kind}: {result:?}");
            }
            assert_eq!(left, 0, "it is tried until it is done, and so is cutting off");
        }
    }
}

#[test]
fn an_answer_that_fails_for_a_while_is_given_in_the_end() {
    for kind in HOSTS {
        let pause = Duration::from_millis(1);
        let Some(set) = Set::asking(kind, Trouble::Fail, pause) else { continue };
        set.convert(pages(0, 4), Visibility::Shared, Contents::Preserve).unwrap();
        set.answers.store(100, Ordering::SeqCst);
        assert_eq!(set.touch()[..5], [Some(0), Some(0), Some(0), Some(0), None], "{kind}");
        assert!(set.driver.engine().markers(View::Host).first_in(pages(0, 4)).is_none());
    }
}

#[test]
fn an_answer_that_panics_loses_no_touch_and_holds_up_no_conversion() {
    for kind in HOSTS {
        let pause = Duration::from_millis(1);
        let Some(set) = Set::asking(kind, Trouble::Panic, pause) else { continue };
        set.convert(pages(0, 4), Visibility::Shared, Contents::Preserve).unwrap();
        set.answers.store(2, Ordering::SeqCst);
        assert_eq!(set.touch()[..5], [Some(0), Some(0), Some(0), Some(0), None], "{kind}");
        set.convert(pages(0, 4), Visibility::Private, Contents::Preserve).unwrap();
        assert_eq!(set.touch()[0], None);
    }
}
