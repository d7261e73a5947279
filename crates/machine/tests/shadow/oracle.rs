//! Random accesses, table edits, flushes, zaps, discards, prefaults and switches of roots, each
//! compared with the naive walk: a page is where the tables have it, or, until it is flushed, where
//! they had it. What a guest has changed, itself or by the hypervisor's hand, is in the dirty log.

use polder_machine::{Error, Plant, Pte, Touch};
use polder_units::{GfnRange, PageRange};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::naive::{Naive, SPACE, Where};
use crate::rig::{Came, Kind, PAGES, Rig, gfn};

/// Guest frames that are likely to be tables.
const TABLES: u64 = 10;
const TOPS: [u64; 2] = [0, 1];
const USED: u64 = Pte::ACCESSED | Pte::DIRTY;

#[derive(Clone, Copy, Debug)]
enum Action {
    Read(usize, u64),
    Write(usize, u64),
    /// Through the root in use, to a word of the page.
    Edit(usize, u64, u64, u64),
    /// By guest frame.
    EditDirect(usize, u64, u64, u64),
    Invlpg(usize, u64),
    Load(usize, usize),
    Prefault(usize, u64),
    Zap(u64, u64),
    Discard(u64),
    Age,
    TakeDirty,
}

/// An entry that makes sense more often than not.
fn entry() -> impl Strategy<Value = u64> {
    let bits = prop_oneof![
        6 => Just(Pte::ALL),
        2 => Just(Pte::ALL & !Pte::DIRTY),
        2 => Just(Pte::ALL & !USED),
        1 => Just(Pte::ALL & !Pte::WRITABLE),
        1 => Just(Pte::ALL & !Pte::USER),
        1 => Just(Pte::ALL | Pte::LARGE),
        1 => Just(0),
    ];
    let to = prop_oneof![5 => 0..TABLES, 5 => 0..PAGES, 1 => Just(PAGES + 3), 2 => Just(32u64)];
    (bits, to).prop_map(|(bits, to)| Pte::new(gfn(to), bits).0)
}

fn action() -> impl Strategy<Value = Action> {
    let (vcpu, page) = (0..2usize, 0..SPACE);
    let (table, word) = (0..TABLES, 0..4u64);
    prop_oneof![
        4 => (vcpu.clone(), page.clone()).prop_map(|(v, p)| Action::Read(v, p)),
        4 => (vcpu.clone(), page.clone()).prop_map(|(v, p)| Action::Write(v, p)),
        4 => (vcpu.clone(), page.clone(), word.clone(), entry())
            .prop_map(|(v, p, w, e)| Action::Edit(v, p, w, e)),
        4 => (vcpu.clone(), table.clone(), word, entry())
            .prop_map(|(v, t, w, e)| Action::EditDirect(v, t, w, e)),
        2 => (vcpu.clone(), page.clone()).prop_map(|(v, p)| Action::Invlpg(v, p)),
        2 => (vcpu.clone(), 0..2usize).prop_map(|(v, top)| Action::Load(v, top)),
        3 => (vcpu, page).prop_map(|(v, p)| Action::Prefault(v, p)),
        1 => (0..PAGES, 1..8u64).prop_map(|(start, len)| Action::Zap(start, len)),
        1 => prop_oneof![0..TABLES, 0..PAGES].prop_map(Action::Discard),
        1 => Just(Action::Age),
        2 => Just(Action::TakeDirty),
    ]
}

struct Run {
    rig: Rig,
    naive: Naive,
    /// The top table that each vCPU is at.
    at: [u64; 2],
    next: u64,
    /// What memory was when the dirty log was taken last.
    copy: Vec<Vec<u8>>,
}

impl Run {
    /// Two address spaces that share tables, one with large pages; the tables are mapped in them.
    fn new(kind: Kind, plant: Option<Plant>) -> Self {
        let mut rig = Rig::new(kind);
        if let Some(plant) = plant {
            rig.machine.plant(plant, true);
        }
        let mut naive = Naive::default();
        let mut put = |table: u64, index: u64, to: u64, bits: u64| {
            rig.pte(table, u16::try_from(index).unwrap(), to, bits);
            naive.words.insert((table, index), Pte::new(gfn(to), bits).0);
        };
        // 0, 1: tops; 2: of 1G; 3, 4: of 2M; 5, 6, 7: of 4K pages.
        for (table, index, to) in [(0, 0, 2), (1, 0, 2), (2, 0, 3), (2, 1, 4), (3, 0, 5), (3, 1, 6)]
        {
            put(table, index, to, Pte::ALL);
        }
        put(3, 2, 20, Pte::ALL | Pte::LARGE);
        put(4, 0, 7, Pte::ALL);
        put(4, 1, 6, Pte::ALL & !Pte::WRITABLE);
        put(4, 2, 24, Pte::ALL | Pte::LARGE);
        for index in 0..4 {
            put(5, index, index, Pte::ALL);
            put(6, index, 4 + index, Pte::ALL);
            put(7, index, 40 + index, Pte::ALL & !USED);
        }
        rig.machine.log_dirty(rig.vm, gfn(0), true).unwrap();
        let copy = (0..PAGES).map(|number| rig.bytes(number)).collect();
        let mut run = Self { rig, naive, at: TOPS, next: 1 << 40, copy };
        for (vcpu, top) in TOPS.into_iter().enumerate() {
            run.load(vcpu, top);
        }
        run
    }

    fn load(&mut self, vcpu: usize, top: u64) {
        self.rig.load(vcpu, top);
        self.at[vcpu] = top;
        self.naive.tops[vcpu].insert(top);
        self.naive.flush(vcpu, top);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Read(vcpu, page) => self.read(vcpu, page),
            Action::Write(vcpu, page) => {
                self.next += 8;
                self.write(vcpu, page, 100, self.next);
            }
            Action::Edit(vcpu, page, word, entry) => self.write(vcpu, page, word, entry),
            Action::EditDirect(vcpu, table, word, entry) => {
                let top = self.at[vcpu];
                self.rig.direct(vcpu);
                self.naive.remember();
                let came = self.rig.access(vcpu, table, word, Some(entry));
                assert_eq!(came, Came::Done(entry));
                self.naive.words.insert((table, word), entry);
                self.load(vcpu, top);
            }
            Action::Invlpg(vcpu, page) => {
                self.rig.machine.invlpg(self.rig.vcpus[vcpu], page).unwrap();
                self.naive.stale.remove(&(vcpu, self.at[vcpu], page));
            }
            Action::Load(vcpu, top) => self.load(vcpu, TOPS[top]),
            Action::Prefault(vcpu, page) => self.prefault(vcpu, page),
            Action::Zap(start, len) => {
                let gfns = GfnRange::between(start, (start + len).min(PAGES)).unwrap();
                self.rig.machine.tdp_zap(self.rig.vm, gfns).unwrap();
            }
            Action::Discard(number) => {
                self.naive.remember();
                let page = PageRange::between(number, number + 1).unwrap();
                let gfns = GfnRange::one(gfn(number));
                self.rig.machine.tdp_zap(self.rig.vm, gfns).unwrap();
                self.rig.machine.punch(self.rig.object, page, None).unwrap();
                self.naive.words.retain(|(at, _), _| *at != number);
                // The host's doing.
                self.copy[usize::try_from(number).unwrap()] = self.rig.bytes(number);
            }
            Action::Age => {
                let all = GfnRange::between(0, PAGES).unwrap();
                self.rig.machine.age(self.rig.vm, all).unwrap();
            }
            Action::TakeDirty => self.take_dirty(),
        }
        self.rig.machine.audit().unwrap();
    }

    /// What has changed since the log was taken is in it.
    fn take_dirty(&mut self) {
        let dirty = self.rig.machine.take_dirty(self.rig.vm, gfn(0)).unwrap();
        for (number, copy) in (0..).zip(&mut self.copy) {
            let now = self.rig.bytes(number);
            assert!(*copy == now || dirty.contains(&gfn(number)), "gfn {number:#x} has changed");
            *copy = now;
        }
    }

    /// Where a page may be, for a vCPU.
    fn may(&self, vcpu: usize, page: u64) -> (Where, Vec<Where>) {
        let top = self.at[vcpu];
        let (_, now) = self.naive.walk(top, page);
        let stale = self.naive.stale.get(&(vcpu, top, page));
        (now, stale.into_iter().flatten().copied().collect())
    }

    fn read(&mut self, vcpu: usize, page: u64) {
        let (now, stale) = self.may(vcpu, page);
        let word = 100;
        match self.rig.access(vcpu, page, word, None) {
            Came::Done(value) => {
                let holds = |place: &Where| matches!(place, Where::At { gfn, .. } if self.naive.word(*gfn, word) == value);
                assert!(holds(&now) || stale.iter().any(holds), "{value:#x} at {now:?} {stale:?}");
            }
            Came::PageFault => assert_eq!(now, Where::Nowhere),
            Came::NoSlot => assert!(matches!(now, Where::NoSlot { .. }), "{now:?}"),
        }
        self.check_used(vcpu, page, false, stale.is_empty());
    }

    fn write(&mut self, vcpu: usize, page: u64, word: u64, value: u64) {
        let (now, stale) = self.may(vcpu, page);
        let (path, _) = self.naive.walk(self.at[vcpu], page);
        let mut over_itself = false;
        self.naive.remember();
        match self.rig.access(vcpu, page, word, Some(value)) {
            Came::Done(_) => {
                let is = |place: &Where| match place {
                    Where::At { gfn, writable: true } => {
                        (self.rig.word(*gfn, word) == value).then_some(*gfn)
                    }
                    _ => None,
                };
                let went = is(&now).or_else(|| stale.iter().find_map(is));
                let went = went.unwrap_or_else(|| panic!("{value:#x} at {now:?} {stale:?}"));
                self.naive.words.insert((went, word), value);
                // What the walk had marked, the write wrote over.
                over_itself = path.contains(&(went, word));
            }
            Came::PageFault => {
                let refused = match now {
                    Where::Nowhere => true,
                    Where::At { writable, .. } | Where::NoSlot { writable } => !writable,
                };
                assert!(refused, "{now:?}");
            }
            Came::NoSlot => assert!(matches!(now, Where::NoSlot { .. }), "{now:?}"),
        }
        self.check_words();
        let fresh =
            !over_itself && stale.is_empty() && self.naive.walk(self.at[vcpu], page).1 == now;
        self.check_used(vcpu, page, true, fresh);
    }

    /// Every word is what was written there last; of tables, but for what walks mark.
    fn check_words(&self) {
        for (&(gfn, word), &value) in &self.naive.words {
            let is = self.rig.word(gfn, word);
            assert_eq!(is & !USED, value & !USED, "word {word} of gfn {gfn:#x}");
        }
    }

    /// What was accessed is marked so in the guest's tables, unless an old translation was used.
    fn check_used(&self, vcpu: usize, page: u64, write: bool, fresh: bool) {
        let (path, now) = self.naive.walk(self.at[vcpu], page);
        let Where::At { writable, .. } = now else { return };
        if !fresh || (write && !writable) {
            return;
        }
        let bits = |&(table, index): &(u64, u64)| Pte(self.rig.word(table, index));
        assert!(path.iter().all(|at| bits(at).has(Pte::ACCESSED)), "page {page:#x}: {path:?}");
        let last = path.last().map(bits).unwrap();
        assert!(!write || last.has(Pte::DIRTY), "page {page:#x} was written to");
    }

    fn prefault(&mut self, vcpu: usize, page: u64) {
        let before: Vec<u64> = self.naive.words.keys().map(|&(g, w)| self.rig.word(g, w)).collect();
        let (now, _) = self.may(vcpu, page);
        match self.rig.prefault(vcpu, page) {
            Ok(_) => {
                assert!(matches!(now, Where::At { .. }), "{now:?}");
                // Where nothing else has the page mapped, nothing calls it accessed.
                let mut alone = self.rig.machine.clone();
                let all = GfnRange::between(0, PAGES).unwrap();
                alone.tdp_zap(self.rig.vm, all).unwrap();
                let vcpu = self.rig.vcpus[vcpu];
                let resolved = alone.resolve(vcpu, page, Touch::Prefault).unwrap();
                alone.map(&resolved, resolved.largest(), true).unwrap();
                let is = alone.mapped(vcpu, page).unwrap().unwrap();
                assert!(!is.accessed && !is.dirty, "{is:?}");
            }
            Err(Error::Untranslated { .. }) => assert_eq!(now, Where::Nowhere),
            Err(Error::NotAccessed { .. }) => {
                let (path, _) = self.naive.walk(self.at[vcpu], page);
                let used = |&(g, w): &(u64, u64)| Pte(self.rig.word(g, w)).has(Pte::ACCESSED);
                assert!(!path.iter().all(used));
            }
            Err(Error::NoSlot { .. }) => assert!(matches!(now, Where::NoSlot { .. })),
            Err(Error::Table { gfn }) if gfn.get() >= PAGES => {
                assert!(matches!(now, Where::NoSlot { .. }));
            }
            // Nobody has made it.
            Err(Error::Hole { .. } | Error::Table { .. }) => {}
            Err(other) => panic!("{other}"),
        }
        let after: Vec<u64> = self.naive.words.keys().map(|&(g, w)| self.rig.word(g, w)).collect();
        assert_eq!(before, after, "a prefault writes nowhere");
        let _ = self.rig.resolve(vcpu, page, Touch::Read);
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Shadow), Just(Kind::Nested)]
}

proptest! {
    #[test]
    fn a_page_is_where_the_guests_tables_have_it(
        kind in kinds(),
        actions in prop::collection::vec(action(), 1..120),
    ) {
        let mut run = Run::new(kind, None);
        for action in actions {
            run.act(action);
        }
        run.take_dirty();
    }
}

#[test]
fn the_oracle_catches_what_is_planted() {
    for plant in [Plant::SkipFlush, Plant::StaleShadow, Plant::AccessedSet, Plant::TableUnlogged] {
        let config = Config { max_shrink_iters: 0, failure_persistence: None, ..Config::default() };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let mut runner = TestRunner::new_with_rng(config, rng);
        let actions = (kinds(), prop::collection::vec(action(), 1..120));
        let outcome = runner.run(&actions, |(kind, actions)| {
            let mut run = Run::new(kind, Some(plant));
            for action in actions {
                run.act(action);
            }
            run.take_dirty();
            Ok(())
        });
        assert!(outcome.is_err(), "{plant:?} was not noticed");
    }
}
