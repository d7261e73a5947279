//! Random operations on an SNP guest's memory, with folios that split and collapse under them and
//! entries that others have in use: whatever came of each, RMP and page map agree (INV-9), nothing
//! is in quarantine, and the machine adds up (INV-5).

#![expect(clippy::unwrap_used, reason = "a test")]

use polder::machine::{Error as Refused, LockOwner, RmpSize};
use polder::units::{Gfn, Level, PageCount, PageIndex, PageRange, PfnRange};
use polder::{Contents, Error, HostKind, Memory, OnBusy, Platform, Slot, Visibility, VmId};

const HUGE: u64 = 512;
const PAGES: u64 = 3 * HUGE;
const OTHER: LockOwner = LockOwner(7);

/// An xorshift: anything, the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// A range that often begins or ends where a 2M page does.
    fn range(&mut self) -> PageRange {
        let mut end_of = |edges: u64| match self.below(3) {
            0 => self.below(edges + 1) * HUGE,
            _ => self.below(PAGES + 1),
        };
        let (one, other) = (end_of(3), end_of(3));
        let (start, end) = (one.min(other), one.max(other));
        PageRange::between(start, end).unwrap_or_else(|| {
            let start = start.min(PAGES - 1);
            PageRange::between(start, start + 1).unwrap()
        })
    }
}

fn memory() -> (Memory, VmId) {
    let pages = PageCount::new(PAGES).unwrap();
    let builder = Memory::builder(pages).host(HostKind::Machine).platform(Platform::Snp);
    let memory = builder.build().unwrap();
    let vm = memory.attach(polder::Vm::Machine).unwrap();
    let all = PageRange::between(0, PAGES).unwrap();
    memory.bind(vm, Slot(0), Gfn::from(0), all).unwrap();
    (memory, vm)
}

/// Does something; what may fail is an entry in use, and nothing else.
fn act(memory: &Memory, vm: VmId, random: &mut Random) {
    let range = random.range();
    let page = PageIndex::new(random.below(PAGES)).unwrap();
    let done = match random.below(8) {
        0 | 1 => memory.convert(range, Visibility::Private, Contents::Unspecified, OnBusy::Wait),
        2 => memory.convert(range, Visibility::Shared, Contents::Zero, OnBusy::Wait),
        3 => memory.convert(range, Visibility::Shared, Contents::Unspecified, OnBusy::Wait),
        4 if random.below(4) == 0 => memory.discard(range, OnBusy::Wait).map(|()| PageCount::ZERO),
        4 => memory.merge(range, OnBusy::Wait).map(|()| PageCount::ZERO),
        5 | 6 => {
            let granted = memory.facts(PageRange::one(page)).unwrap()[0].1.visibility;
            let gpa = Gfn::new(page.get()).unwrap().gpa();
            // An entry in use, by whatever size, has the guest try again.
            assert_eq!(memory.guest_fault(vm, gpa, granted), Ok(None));
            Ok(PageCount::ZERO)
        }
        _ => {
            reshape(memory, page, random.below(3));
            Ok(PageCount::ZERO)
        }
    };
    assert!(done.is_ok() || matches!(done, Err(Error::Rmp { .. })), "{done:?}");
}

/// Gives memory to a 2M page, or splits its folio, or collapses it, if it can be.
fn reshape(memory: &Memory, page: PageIndex, how: u64) {
    let reshaped = memory.simulated(|machine, object, _| -> Result<(), Refused> {
        let around = PageRange::enclosing(page, Level::Size2M, machine.geometry());
        if how == 0 {
            return machine.allocate(object, around.start(), Level::Size2M).map(drop);
        }
        let gfns: Vec<_> = machine.gfns_of(object, around).collect();
        gfns.into_iter().try_for_each(|(vm, gfns)| machine.tdp_zap(vm, gfns).map(drop))?;
        if how == 1 {
            return machine.merge_folios(object, around.start(), Level::Size2M, OTHER);
        }
        let Some(backing) = machine.backing(object, page)? else { return Ok(()) };
        machine.lock_folio(backing.pfn, OTHER)?;
        let split = machine.split_folio(object, page, OTHER).map(drop);
        machine.unlock_folio(backing.pfn, OTHER).and(split)
    });
    // What can't be reshaped as it is stays as it is.
    let _ = reshaped.unwrap();
}

fn check(memory: &Memory, act: u64) {
    assert_eq!(memory.quarantined(), [], "after act {act}");
    let facts = memory.facts(PageRange::between(0, PAGES).unwrap()).unwrap();
    let audit = memory.simulated(|machine, object, _| {
        for (run, facts) in facts {
            for page in run.frames() {
                let Some(backing) = machine.backing(object, page).unwrap() else { continue };
                let entry = machine.rmp_entry(backing.pfn).unwrap();
                let private = facts.visibility == Visibility::Private;
                assert!(private || !entry.assigned, "after act {act}: page {page} is shared");
                assert!(!entry.assigned || entry.gfn.get() == page.get(), "after act {act}");
                assert!(!entry.immutable, "after act {act}: page {page} is the firmware's");
            }
        }
        machine.audit()
    });
    audit.unwrap().unwrap();
}

#[test]
fn the_rmp_agrees_with_what_is_granted_whatever_happens() {
    let (mut failed, mut rmp) = (0, Vec::new());
    for seed in 1..=4u64 {
        let (memory, vm) = memory();
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ seed);
        for number in 0..600 {
            let page = PageIndex::new(random.below(PAGES)).unwrap();
            let (in_use, large_hold) = (random.below(2) == 0, random.below(4) == 0);
            let held = memory.simulated(|machine, object, _| {
                let backing = machine.backing(object, page).unwrap().filter(|_| in_use)?;
                let large = PfnRange::enclosing(backing.pfn, Level::Size2M, machine.geometry());
                let (pfn, size) = match large_hold {
                    true => (large.start(), RmpSize::Size2M),
                    false => (backing.pfn, RmpSize::Size4K),
                };
                machine.rmp_hold(pfn, size, OTHER).ok()?;
                Some(pfn)
            });
            let before = memory.statistics().refused;
            act(&memory, vm, &mut random);
            failed += memory.statistics().refused - before;
            if let Some(pfn) = held.unwrap() {
                memory.simulated(|machine, _, _| machine.rmp_release(pfn, OTHER)).unwrap().unwrap();
            }
            check(&memory, number);
        }
        rmp.push(memory.statistics().rmp);
    }
    // It was worth the while: conversions failed, large entries and merges happened.
    assert!(failed > 10, "{failed} conversions failed");
    let happened = |count: fn(&polder::RmpStatistics) -> u64| rmp.iter().map(count).sum::<u64>();
    assert!(happened(|rmp| rmp.large) > 10 && happened(|rmp| rmp.merged) > 0, "{rmp:?}");
}
