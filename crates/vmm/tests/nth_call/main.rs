//! One life of a memory, in which each call into the kernel fails once: the n-th, for all n. After
//! each failure engine and kernel agree on every page, for the host and for a real guest.
//!
//! How often a thread is woken differs from run to run, so calls are counted by name.

mod held;
mod life;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use polder::{Error, HostKind};
use polder_linux::inject::{self, Plan, When};
use polder_linux::{Errno, inject::Outcome};
use polder_require::{Facility, patience, require};
use polder_vmm::Vm;

use held::Held;
use life::{Act, Life};

/// Calls whose failure the caller need not hear of, and why.
const SURVIVED: [(&str, &str); 9] = [
    ("open of /dev/userfaultfd", "there is the system call"),
    ("USERFAULTFD_IOC_NEW", "there is the system call"),
    ("munmap", "addresses are lost that nobody uses"),
    ("poll", "a fault thread polls again"),
    ("read of userfaultfd", "a fault thread reads again"),
    ("UFFDIO_CONTINUE", "a fault thread answers again"),
    ("UFFDIO_POISON", "a fault thread answers again"),
    ("UFFDIO_WAKE", "a fault thread answers again"),
    ("madvise(MADV_POPULATE_WRITE)", "a fault thread answers again"),
];

/// The deletion of a slot, which only the memory's end survives.
const DELETION: &str = "KVM_SET_USER_MEMORY_REGION (deletion)";

/// What a fault thread does whenever it is woken, most often for nothing: one round is like the
/// other, so only some of them are had fail.
const ROUND: [&str; 2] = ["poll", "read of userfaultfd"];
const ROUND_STRIDE: usize = 9;

/// Calls that are for certain bytes of the object.
const RANGED: [&str; 11] = [
    "KVM_SET_USER_MEMORY_REGION",
    "KVM_GET_DIRTY_LOG",
    "KVM_CLEAR_DIRTY_LOG",
    "KVM_SET_USER_MEMORY_REGION2",
    DELETION,
    "KVM_SET_MEMORY_ATTRIBUTES",
    "UFFDIO_REGISTER",
    "UFFDIO_UNREGISTER",
    "fallocate",
    "madvise(MADV_DONTNEED)",
    "cachestat",
];

/// Calls that may have had their effect, in part or in whole, when they fail.
const MAY_BE_DONE: [&str; 6] = [
    "fallocate",
    "madvise(MADV_DONTNEED)",
    "madvise(MADV_POPULATE_WRITE)",
    "KVM_SET_MEMORY_ATTRIBUTES",
    "UFFDIO_CONTINUE",
    "UFFDIO_UNREGISTER",
];

/// Calls that an operation's steps and their undoing consist of.
const STEPS: [&str; 5] = [
    "fallocate",
    "madvise(MADV_DONTNEED)",
    "KVM_SET_MEMORY_ATTRIBUTES",
    "UFFDIO_POISON",
    "UFFDIO_REGISTER",
];

/// The failed call and range that an error names.
fn named(error: &Error) -> polder_linux::Error {
    match error {
        Error::Host(error) => *error,
        Error::Missing { source, .. } => *source,
        Error::Quarantined { source, .. } => named(source),
        other => panic!("an error that names no call: {other}"),
    }
}

/// Held by each test: the calls and descriptors of another would be counted too.
static ALONE: Mutex<()> = Mutex::new(());

/// What is being tried, for who finds the test hanging, and for how many seconds.
static NOW: Mutex<Option<(String, u64)>> = Mutex::new(None);

fn watch_over() {
    std::thread::spawn(|| {
        let limit = patience(Duration::from_secs(60)).as_secs();
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let mut now = NOW.lock().expect("nobody panics with it");
            let Some((what, seconds)) = now.as_mut() else { continue };
            *seconds += 1;
            if *seconds > limit {
                eprintln!("{what} hangs");
                std::process::abort();
            }
        }
    });
}

/// Whether a call's failure is one that the caller of `act` need not hear of.
fn is_survived(name: &str, act: Act, plan: Plan) -> bool {
    // An unbind that can't be undone either goes on to its end.
    let went_on =
        plan.times > 1 && matches!(act, Act::Unbind(_)) && name == "KVM_SET_MEMORY_ATTRIBUTES";
    went_on
        || SURVIVED.iter().any(|(survived, _)| *survived == name)
        || (act == Act::Drop && [DELETION, "KVM_SET_MEMORY_ATTRIBUTES"].contains(&name))
        || plan.errno == Errno::INTR
        || (plan.errno == Errno::AGAIN && name.starts_with("UFFDIO_"))
}

/// The error tells which call has failed, how, and where.
fn check_told(error: &Error, plan: Plan, outcome: &Outcome, what: &str) {
    assert_ne!(plan.errno, Errno::INTR, "{what}: {error}");
    let error = named(error);
    assert!(outcome.failed.contains(&error.call), "{what}: {error}");
    assert_eq!(error.errno, plan.errno, "{what}");
    let ranged = RANGED.contains(&error.call);
    assert!(error.range.is_some() || !ranged, "{what}: no range in {error}");
}

/// Lives through a life in which calls fail as planned.
fn live(host: HostKind, plan: Plan) -> Outcome {
    let what = format!("{host}, {plan:?}");
    *NOW.lock().expect("nobody panics with it") = Some((what.clone(), 0));
    let vm = Vm::new(host).expect("it was there a moment ago");
    let before = Held::before_a_life();
    let mut life = Life::new(&vm, host);
    let armed = inject::arm(plan);
    let mut failures = 0;
    let mut seen = false;
    for act in life::life(host) {
        let result = life.act(act);
        let outcome = armed.outcome();
        if result.is_ok() && outcome.hit() && !seen {
            let name = outcome.failed[0];
            assert!(is_survived(name, act, plan), "{what}: {act:?} took no notice of {name}");
            life.agree();
        }
        seen |= outcome.hit();
        let Err(error) = result else { continue };
        failures += 1;
        assert!(failures <= plan.times, "{what}: {act:?} fails again: {error}");
        check_told(&error, plan, &outcome, &format!("{what}: {act:?}"));
        if let Error::Quarantined { pages, .. } = &error {
            pages.iter().for_each(|&run| life.quarantined(run));
            life.agree();
            life.others_work();
            break;
        }
        life.agree();
        let again = (0..plan.times).map(|_| life.act(act)).find(|again| {
            !again.as_ref().is_err_and(|error| outcome.failed.contains(&named(error).call))
        });
        assert_eq!(again, Some(Ok(())), "{what}: {act:?} is tried again");
        life.agree();
    }
    life.end();
    let outcome = armed.disarm();
    let lost = |name| outcome.failed.contains(&name) && plan.errno != Errno::INTR;
    // Nobody tries that again.
    let unmapped = usize::from(lost("munmap"));
    let expected = Held { mappings: before.mappings + unmapped, ..before };
    let gone = Held::until(|held| *held == expected).is_some();
    assert!(gone, "{what}: {:?}, expected {expected:?}", Held::now());
    outcome
}

fn every_call_fails(host: HostKind) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let facility = match host {
        HostKind::GuestMemfd => Facility::PrivateMemory,
        _ => Facility::Kvm,
    };
    if require(facility, Vm::new(host)).is_none() {
        return;
    }
    watch_over();
    let calls = live(host, Plan::COUNT).calls;
    let mut names = BTreeMap::new();
    for call in &calls {
        *names.entry(*call).or_insert(0) += 1;
    }
    eprintln!("{host}: {} calls: {names:?}", calls.len());
    let mut runs = 0;
    let errnos = [Errno::NOMEM, Errno::INVAL, Errno::AGAIN, Errno::INTR];
    let plans = errnos.map(|errno| (errno, When::Instead)).into_iter();
    // Emulated it takes too long: one errno has to do.
    let emulated = patience(Duration::from_secs(1)) > Duration::from_secs(1);
    let (errnos, most) = if emulated { (1, 2) } else { (4, 4) };
    for (errno, when) in plans.take(errnos).chain([(Errno::NOMEM, When::After)]) {
        for &name in names.keys() {
            let calls = vec![name].leak();
            if when == When::After && !MAY_BE_DONE.contains(&name) {
                continue;
            }
            if emulated {
                eprintln!("{host}: {name}, {errno}, {when:?}");
            }
            let stride = if ROUND.contains(&name) { ROUND_STRIDE } else { 1 };
            for nth in (1..).step_by(stride) {
                let plan = Plan { nth, when, ..Plan::of(calls, errno) };
                if !live(host, plan).hit() {
                    break;
                }
                runs += 1;
            }
        }
    }
    // Undoing fails too, and then cutting off what could not be undone.
    // For lack of memory it is tried again, and then done.
    let lasting = (2..=most).map(|times| (times, Errno::INVAL));
    for (times, errno) in lasting.chain([(most, Errno::NOMEM)]) {
        for nth in 1.. {
            let plan = Plan { nth, times, ..Plan::of(&STEPS, errno) };
            if !live(host, plan).hit() {
                break;
            }
            runs += 1;
        }
    }
    *NOW.lock().expect("nobody panics with it") = None;
    eprintln!("{host}: {runs} failures");
    assert!(runs > names.len(), "{runs} failures");
}

#[test]
fn whichever_call_of_host_memfd_fails_engine_and_kernel_agree() {
    every_call_fails(HostKind::Memfd);
}

#[test]
fn whichever_call_of_host_guest_memfd_fails_engine_and_kernel_agree() {
    every_call_fails(HostKind::GuestMemfd);
}
