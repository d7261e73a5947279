//! The driver over each host, with steps and answers that fail or panic.

mod huge_pages;
mod slots;
mod snp;
mod troubled;

use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use polder_engine::{
    Contents, GuestAccess, PageFacts, Platform, Population, Slot, Step, View, Visibility, VmId,
};
use polder_require::{Facility, require};
use polder_units::{Geometry, Gfn, GfnRange, Level, PageCount, PageIndex};

use self::troubled::{Trouble, Troubled, Unbinding};
use super::*;
use crate::faults::FaultThreads;
use crate::host::machine::MachineHost;
use crate::host::memfd::MemfdHost;
use crate::host::{Faulted, Shown, Vm};
use crate::{HostKind, Vcpu};

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
