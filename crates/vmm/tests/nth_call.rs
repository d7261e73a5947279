//! One life of a memory, in which each call into the kernel fails once: the n-th, for all n. After
//! each failure engine and kernel agree on every page, for the host and for a real guest.
//!
//! How often a thread is woken differs from run to run, so calls are counted by name.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use polder::units::{Gpa, PAGE_SIZE, PageCount, PageRange};
use polder::{Contents, Error, HostKind, Memory, OnBusy, Population, Refusal, Slot, VmId};
use polder_linux::inject::{self, Plan, When};
use polder_linux::{Errno, inject::Outcome};
use polder_require::{Facility, patience, require};
use polder_vmm::scenario::{Op, Pattern, Visibility};
use polder_vmm::{End, Failure, Progress, Supervision, Vm};

const PAGES: u64 = 12;

/// The two slots: their pages, and how many frames after [`Vm::RAM`] they begin.
const SLOTS: [((u64, u64), u64); 2] = [((0, 8), 0), ((8, PAGES), 0x100)];

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
const RANGED: [&str; 9] = [
    "KVM_SET_USER_MEMORY_REGION",
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

/// One thing that is done to a memory.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Act {
    Build,
    Attach,
    Bind(usize),
    Unbind(usize),
    Convert(u64, u64, Visibility, Contents),
    /// Through the pointer that device models have.
    Touch(u64, u64),
    /// By the API.
    Write(u64, u64),
    /// By the guest.
    Fill(u64, u64),
    Populate(u64, u64),
    Discard(u64, u64),
    Settle,
    Count,
    /// Every page is tried, by every way that the host has.
    Look,
    Drop,
}

/// What a page is to be.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Page {
    visibility: Visibility,
    pattern: Pattern,
    owed: bool,
    quarantined: bool,
}

fn life(host: HostKind) -> Vec<Act> {
    use Act::{
        Attach, Bind, Build, Convert, Count, Discard, Drop, Fill, Look, Populate, Settle, Touch,
        Unbind, Write,
    };
    use Visibility::{Private, Shared};
    let keep = if host.is_in_place() { Contents::Preserve } else { Contents::Zero };
    let mut acts = vec![Build, Attach, Bind(0), Bind(1), Convert(0, 6, Shared, keep)];
    if host.is_in_place() {
        acts.extend([Populate(0, 3), Populate(8, 10), Settle]);
    }
    acts.extend([
        Touch(2, 5),
        Write(5, 6),
        Fill(6, 8),
        Fill(10, 12),
        Look,
        Convert(2, 4, Private, keep),
        Look,
        Convert(5, 7, Shared, Contents::Zero),
        Convert(2, 4, Shared, keep),
        Touch(3, 4),
        Discard(0, 2),
        Discard(11, 12),
        Count,
        Convert(0, PAGES, Private, Contents::Zero),
        Fill(0, PAGES),
        // Over both slots.
        Convert(6, 10, Shared, keep),
        Look,
        Unbind(1),
        Bind(1),
        Unbind(0),
        Count,
        Drop,
    ]);
    acts
}

fn range(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in the test")
}

fn gpa(page: u64) -> Gpa {
    let ((first, _), frames) = SLOTS[usize::from(page >= SLOTS[1].0.0)];
    Gpa::new(Vm::RAM.get() + (frames + page - first) * PAGE_SIZE)
}

/// The bytes of a page that holds `pattern`.
fn bytes(page: u64, pattern: Pattern) -> Vec<u8> {
    let words = (0..PAGE_SIZE / 8).map(|word| Gpa::new(gpa(page).get() + 8 * word));
    words.flat_map(|gpa| pattern.word(gpa).to_le_bytes()).collect()
}

/// A memory, and what should be true of it.
struct Life<'a> {
    vm: &'a Vm,
    host: HostKind,
    memory: Option<(Memory, Option<VmId>)>,
    bound: [bool; 2],
    pages: Vec<Page>,
    /// Grows with each filling, so that nothing old passes for new.
    seed: u64,
}

impl<'a> Life<'a> {
    fn new(vm: &'a Vm, host: HostKind) -> Self {
        Self { vm, host, memory: None, bound: [false; 2], pages: Vec::new(), seed: 1 }
    }

    fn memory(&self) -> &Memory {
        &self.memory.as_ref().expect("it was built").0
    }

    fn id(&self) -> VmId {
        self.memory.as_ref().and_then(|(_, id)| *id).expect("it was attached")
    }

    /// Does something. What it should come to is noted if it succeeds.
    fn act(&mut self, act: Act) -> Result<(), Error> {
        let pattern = Pattern::Seeded { seed: self.seed };
        match act {
            Act::Build => {
                let builder = Memory::builder(PageCount::new(PAGES).expect("some")).host(self.host);
                let owed = self.host.is_in_place();
                let memory = if owed { builder.owed() } else { builder }.build()?;
                self.memory = Some((memory, None));
                let visibility = Visibility::Private;
                let page = Page { visibility, pattern: Pattern::Zero, owed, quarantined: false };
                self.pages = (0..PAGES).map(|_| page).collect();
            }
            Act::Attach => {
                let id = self.vm.attach(self.memory())?;
                self.memory.as_mut().expect("it was built").1 = Some(id);
            }
            Act::Bind(slot) => {
                let ((start, end), _) = SLOTS[slot];
                let name = Slot(u32::try_from(slot).expect("two slots"));
                self.memory().bind(self.id(), name, gpa(start).gfn(), range(start, end))?;
                self.bound[slot] = true;
            }
            Act::Unbind(slot) => {
                self.memory().unbind(self.id(), Slot(u32::try_from(slot).expect("two slots")))?;
                self.bound[slot] = false;
            }
            Act::Convert(start, end, to, contents) => {
                self.memory().convert(range(start, end), to, contents, OnBusy::Wait)?;
                self.each(start, end, |page| {
                    if page.visibility != to && contents == Contents::Zero {
                        (page.pattern, page.owed) = (Pattern::Zero, false);
                    }
                    page.visibility = to;
                });
            }
            Act::Touch(start, end) => {
                for page in start..end {
                    let bytes = bytes(page, pattern);
                    self.memory().host_view().touch_write(page * PAGE_SIZE, &bytes)?;
                }
                self.filled(start, end);
            }
            Act::Write(start, end) => {
                for page in start..end {
                    self.memory().write(self.id(), gpa(page), &bytes(page, pattern))?;
                }
                self.filled(start, end);
            }
            Act::Fill(start, end) => {
                let op = |page| Op::Fill { gpa: gpa(page), len: PAGE_SIZE, pattern };
                assert_eq!(self.guest((start..end).map(op).collect()), End::Ok, "{act:?}");
                self.filled(start, end);
            }
            Act::Populate(start, end) => {
                let bytes: Vec<u8> = (start..end).flat_map(|page| bytes(page, pattern)).collect();
                self.memory().populate(range(start, end), &bytes)?;
                self.filled(start, end);
            }
            Act::Discard(start, end) => {
                self.memory().discard(range(start, end), OnBusy::Wait)?;
                self.each(start, end, |page| (page.pattern, page.owed) = (Pattern::Zero, false));
            }
            Act::Settle => {
                // Whether or not the host goes on watching, nothing is owed from here on.
                let settled = self.memory().settle();
                self.each(0, PAGES, |page| page.owed = false);
                settled?;
            }
            Act::Count => {
                let existing = self.memory().existing()?;
                let count: u64 = existing.iter().map(|run| run.count().get()).sum();
                assert!(count <= PAGES);
                match self.memory().resident() {
                    // This kernel can't count.
                    Err(Error::Host(error)) if error.errno == Errno::NOSYS => {}
                    counted => assert!(counted?.get() <= PAGES),
                }
            }
            Act::Look => self.look(),
            Act::Drop => drop(self.memory.take()),
        }
        Ok(())
    }

    fn each(&mut self, start: u64, end: u64, note: impl Fn(&mut Page)) {
        let at = |page: u64| usize::try_from(page).expect("few pages");
        self.pages[at(start)..at(end)].iter_mut().for_each(note);
    }

    fn filled(&mut self, start: u64, end: u64) {
        let pattern = Pattern::Seeded { seed: self.seed };
        self.each(start, end, |page| (page.pattern, page.owed) = (pattern, false));
        self.seed += 1;
    }

    /// How a guest with these ops ends.
    fn guest(&self, mut ops: Vec<Op>) -> End {
        ops.push(Op::Done);
        // The supervisor is asked some twenty times a second.
        let mut left = 20 * patience(Duration::from_secs(2)).as_secs();
        let supervise = |_: Progress<'_>| {
            left = left.saturating_sub(1);
            if left == 0 { Supervision::TimeOut } else { Supervision::GoOn }
        };
        let ran = self.vm.run((self.memory(), self.id()), &[ops], supervise);
        ran.expect("KVM runs the guest").end
    }

    /// Tries every page that nobody would wait for, by the raw pointer and by the API.
    fn look(&self) {
        let (memory, view) = (self.memory(), self.memory().host_view());
        for (page, facts) in (0..).zip(&self.pages) {
            if facts.owed && facts.visibility == Visibility::Shared && !facts.quarantined {
                continue;
            }
            let mut found = vec![0; usize::try_from(PAGE_SIZE).expect("4096")];
            let touched = view.touch_read(page * PAGE_SIZE, &mut found);
            let readable = facts.visibility == Visibility::Shared && !facts.quarantined;
            match touched {
                Ok(()) => {
                    assert!(readable, "page {page} was touched: {facts:?}");
                    assert_eq!(found, bytes(page, facts.pattern), "page {page}: {facts:?}");
                }
                Err(error) => assert!(
                    !readable && matches!(error, Error::Copy(_)),
                    "page {page} was denied: {facts:?}: {error}"
                ),
            }
            if !self.bound[usize::from(page >= SLOTS[1].0.0)] {
                continue;
            }
            found.fill(0);
            match memory.read(self.id(), gpa(page), &mut found) {
                Ok(()) => {
                    assert!(readable, "page {page} was read: {facts:?}");
                    assert_eq!(found, bytes(page, facts.pattern), "page {page}: {facts:?}");
                }
                Err(Error::Refused(Refusal::Quarantined { page: named })) => {
                    assert!(facts.quarantined && named.get() == page);
                }
                Err(Error::Refused(Refusal::Private { page: named })) => {
                    assert!(facts.visibility == Visibility::Private && named.get() == page);
                }
                Err(error) => panic!("page {page}: {facts:?}: {error}"),
            }
        }
    }

    /// Engine and kernel say the same of every page, and it is what should be.
    fn agree(&self) {
        let Some((memory, id)) = &self.memory else { return };
        for (page, expected) in (0..).zip(&self.pages) {
            let facts = memory.facts(range(page, page + 1)).expect("it is in the object")[0].1;
            assert_eq!(facts.visibility, expected.visibility, "page {page}");
            assert_eq!(facts.population == Population::Owed, expected.owed, "page {page}");
            let quarantined = memory.quarantined();
            let quarantined = quarantined.iter().any(|run| run.overlaps(range(page, page + 1)));
            assert_eq!(quarantined, expected.quarantined, "page {page}");
        }
        let Some(_) = id else { return };
        let bindings = memory.bindings();
        let slots: Vec<u32> = bindings.iter().map(|(_, slot, _)| slot.0).collect();
        let bound: Vec<u32> = (0..2u32).filter(|&slot| self.bound[slot as usize]).collect();
        assert_eq!(slots, bound, "the slots that are bound");
        self.look();
        let of = |slot: usize| if slot == 0 { 0..8 } else { 8..PAGES };
        let mut checks = Vec::new();
        for slot in 0..2 {
            for page in of(slot) {
                let expected = &self.pages[usize::try_from(page).expect("few pages")];
                let (gpa, pattern) = (gpa(page), expected.pattern);
                match self.bound[slot] {
                    // What is not bound is not there: loads give all ones.
                    false => checks.push(Op::Load { gpa, expect: u64::MAX }),
                    true if expected.quarantined => {
                        let end = self.guest(vec![Op::Load { gpa, expect: 0 }]);
                        let denied = matches!(
                            end,
                            End::Failed(
                                Failure::MemoryFailure { .. } | Failure::MemoryFault { .. }
                            )
                        );
                        assert!(denied, "the guest reached page {page} in quarantine: {end:?}");
                    }
                    true if expected.owed => {}
                    true => checks.push(Op::Check { gpa, len: PAGE_SIZE, pattern }),
                }
            }
        }
        assert_eq!(self.guest(checks), End::Ok, "what the guest finds");
    }

    /// Pages that are not in quarantine are as good as ever.
    fn others_work(&mut self) {
        for page in 0..PAGES {
            let facts = self.pages[usize::try_from(page).expect("few pages")];
            if facts.quarantined {
                let again = self.memory().discard(range(page, page + 1), OnBusy::Wait);
                assert!(matches!(again, Err(Error::Refused(Refusal::Quarantined { .. }))));
                continue;
            }
            for to in [facts.visibility.other(), facts.visibility] {
                let act = Act::Convert(page, page + 1, to, Contents::Zero);
                self.act(act).expect("nothing fails any more");
            }
        }
        if self.pages.iter().any(|page| page.owed) {
            self.act(Act::Settle).expect("nothing fails any more");
        }
        self.agree();
    }
}

/// What is counted before a life and after it.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Held {
    descriptors: usize,
    mappings: usize,
    threads: usize,
}

impl Held {
    fn now() -> Self {
        let entries = |path| std::fs::read_dir(path).expect("procfs").flatten();
        // KVM has threads of its own in the process. One that has just ended has no name any more.
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
        let ours = |name: &String| name.trim() == "polder-faults";
        let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs");
        Self {
            descriptors: entries("/proc/self/fd").count(),
            mappings: maps.lines().filter(|line| line.contains("/memfd:polder")).count(),
            threads: entries("/proc/self/task").flat_map(name).filter(ours).count(),
        }
    }
}

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

/// Lives through a life in which calls fail as planned.
fn live(host: HostKind, plan: Plan) -> Outcome {
    let what = format!("{host}, {plan:?}");
    *NOW.lock().expect("nobody panics with it") = Some((what.clone(), 0));
    let vm = Vm::new(host).expect("it was there a moment ago");
    // The VM's own memory has a fault thread, which takes its name when it first runs.
    let before = (0..1000).map(|_| Held::now()).find(|held| {
        std::thread::sleep(Duration::from_millis(1));
        held.threads == 1
    });
    let before = before.expect("the VM's own memory has a fault thread");
    let mut life = Life::new(&vm, host);
    let armed = inject::arm(plan);
    let mut failures = 0;
    let mut seen = false;
    for act in self::life(host) {
        let result = life.act(act);
        let outcome = armed.outcome();
        match &result {
            Ok(()) if outcome.hit() && !seen => {
                let name = outcome.failed[0];
                // An unbind that can't be undone either goes on to its end.
                let went_on = plan.times > 1
                    && matches!(act, Act::Unbind(_))
                    && name == "KVM_SET_MEMORY_ATTRIBUTES";
                let survived = went_on
                    || SURVIVED.iter().any(|(survived, _)| *survived == name)
                    || (act == Act::Drop
                        && [DELETION, "KVM_SET_MEMORY_ATTRIBUTES"].contains(&name))
                    || plan.errno == Errno::INTR
                    || (plan.errno == Errno::AGAIN && name.starts_with("UFFDIO_"));
                assert!(survived, "{what}: {act:?} took no notice of {name}");
                life.agree();
            }
            Ok(()) => {}
            Err(error) => {
                failures += 1;
                assert!(failures <= plan.times, "{what}: {act:?} fails again: {error}");
                assert_ne!(plan.errno, Errno::INTR, "{what}: {act:?}: {error}");
                let error = named(error);
                assert!(outcome.failed.contains(&error.call), "{what}: {act:?}: {error}");
                assert_eq!(error.errno, plan.errno, "{what}: {act:?}");
                let ranged = RANGED.contains(&error.call);
                assert!(error.range.is_some() || !ranged, "{what}: no range in {error}");
            }
        }
        seen |= outcome.hit();
        if let Err(error) = result {
            if let Error::Quarantined { pages, .. } = &error {
                for run in pages {
                    life.each(run.start().get(), run.end(), |page| page.quarantined = true);
                }
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
    }
    life.memory = None;
    let outcome = armed.disarm();
    let lost = |name| outcome.failed.contains(&name) && plan.errno != Errno::INTR;
    // Nobody tries that again.
    let unmapped = usize::from(lost("munmap"));
    let expected = Held { mappings: before.mappings + unmapped, ..before };
    // A thread that was joined may still be listed for a moment.
    let gone = (0..1000).any(|_| {
        std::thread::sleep(Duration::from_millis(1));
        Held::now() == expected
    });
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
