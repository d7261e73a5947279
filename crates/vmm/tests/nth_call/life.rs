//! The life of a memory: what is done to it, and what has to be true after each act.

use std::collections::BTreeSet;
use std::time::Duration;

use polder::units::{Gpa, PAGE_SIZE, PageCount, PageRange};
use polder::{Contents, Error, HostKind, Memory, OnBusy, Population, Refusal, Slot, VmId};
use polder_linux::Errno;
use polder_require::patience;
use polder_vmm::scenario::{Op, Pattern, Visibility};
use polder_vmm::{End, Failure, Progress, Supervision, Vm};

const PAGES: u64 = 12;

/// The two slots: their pages, and how many frames after [`Vm::RAM`] they begin.
const SLOTS: [((u64, u64), u64); 2] = [((0, 8), 0), ((8, PAGES), 0x100)];

/// One thing that is done to a memory.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Act {
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
    StartLog,
    /// It has every page that was filled since it was started or taken.
    TakeLog,
    StopLog,
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

pub(crate) fn life(host: HostKind) -> Vec<Act> {
    use Act::{
        Attach, Bind, Build, Convert, Count, Discard, Drop, Fill, Look, Populate, Settle, StartLog,
        StopLog, TakeLog, Touch, Unbind, Write,
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
    ]);
    let again = [Unbind(1), Bind(1)];
    if host.is_in_place() {
        acts.extend([StartLog, Fill(0, 2), Fill(10, 12), TakeLog, Touch(7, 8)]);
        acts.extend(again);
        acts.extend([Fill(9, 10), TakeLog, TakeLog, StopLog]);
    } else {
        acts.extend(again);
    }
    acts.extend([Unbind(0), Count, Drop]);
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
pub(crate) struct Life<'a> {
    vm: &'a Vm,
    host: HostKind,
    memory: Option<(Memory, Option<VmId>)>,
    bound: [bool; 2],
    pages: Vec<Page>,
    /// Grows with each filling, so that nothing old passes for new.
    seed: u64,
    /// What was filled since the log was started or taken.
    filled: BTreeSet<u64>,
}

impl<'a> Life<'a> {
    pub(crate) fn new(vm: &'a Vm, host: HostKind) -> Self {
        let (memory, pages, filled) = (None, Vec::new(), BTreeSet::new());
        Self { vm, host, memory, bound: [false; 2], pages, seed: 1, filled }
    }

    fn memory(&self) -> &Memory {
        &self.memory.as_ref().expect("it was built").0
    }

    fn id(&self) -> VmId {
        self.memory.as_ref().and_then(|(_, id)| *id).expect("it was attached")
    }

    /// Does something. What it should come to is noted if it succeeds.
    pub(crate) fn act(&mut self, act: Act) -> Result<(), Error> {
        let pattern = Pattern::Seeded { seed: self.seed };
        match act {
            Act::Build => self.build()?,
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
            Act::StartLog => {
                self.memory().start_dirty_log()?;
                self.filled.clear();
            }
            Act::TakeLog => {
                let dirty = self.memory().take_dirty_log()?;
                let logged: BTreeSet<u64> =
                    dirty.runs().flat_map(|run| run.start().get()..run.end()).collect();
                assert!(logged.is_superset(&self.filled), "{logged:?} of {:?}", self.filled);
                self.filled.clear();
            }
            Act::StopLog => self.memory().stop_dirty_log()?,
            Act::Count => self.count()?,
            Act::Look => self.look(),
            Act::Drop => drop(self.memory.take()),
        }
        Ok(())
    }

    fn build(&mut self) -> Result<(), Error> {
        let builder = Memory::builder(PageCount::new(PAGES).expect("some")).host(self.host);
        let owed = self.host.is_in_place();
        let memory = if owed { builder.owed() } else { builder }.build()?;
        self.memory = Some((memory, None));
        let visibility = Visibility::Private;
        let page = Page { visibility, pattern: Pattern::Zero, owed, quarantined: false };
        self.pages = (0..PAGES).map(|_| page).collect();
        Ok(())
    }

    fn count(&self) -> Result<(), Error> {
        let existing = self.memory().existing()?;
        let count: u64 = existing.iter().map(|run| run.count().get()).sum();
        assert!(count <= PAGES);
        match self.memory().resident() {
            // This kernel can't count.
            Err(Error::Host(error)) if error.errno == Errno::NOSYS => {}
            counted => assert!(counted?.get() <= PAGES),
        }
        Ok(())
    }

    /// Notes it of some pages.
    fn each(&mut self, start: u64, end: u64, note: impl Fn(&mut Page)) {
        let at = |page: u64| usize::try_from(page).expect("few pages");
        self.pages[at(start)..at(end)].iter_mut().for_each(note);
    }

    pub(crate) fn quarantined(&mut self, run: PageRange) {
        self.each(run.start().get(), run.end(), |page| page.quarantined = true);
    }

    pub(crate) fn end(&mut self) {
        self.memory = None;
    }

    fn filled(&mut self, start: u64, end: u64) {
        let pattern = Pattern::Seeded { seed: self.seed };
        self.each(start, end, |page| (page.pattern, page.owed) = (pattern, false));
        self.filled.extend(start..end);
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
    pub(crate) fn agree(&self) {
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
    pub(crate) fn others_work(&mut self) {
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
