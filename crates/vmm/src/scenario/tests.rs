//! Scenarios against a naive machine, which runs them one vCPU after the other.

use std::collections::{BTreeMap, BTreeSet};

use polder_units::{GfnRange, Gpa, PAGE_SIZE};
use proptest::prelude::*;

use super::*;

fn scenario(memory: u64, vcpus: u8, seed: u64) -> Scenario {
    Scenario::generate(&Config {
        memory,
        vcpus,
        seed,
        conversions: Conversions::KeepContents,
        virtqueue: true,
    })
    .unwrap()
}

/// Words by address. Of the pages of an area only one word is kept, each page's another.
#[derive(Default)]
struct Machine {
    words: BTreeMap<u64, u64>,
    shared: BTreeSet<u64>,
    ram: Vec<GfnRange>,
    checks: u64,
    bug: Option<Bug>,
}

/// Bugs to be caught.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Bug {
    /// A page that becomes private loses what it held.
    Forgets,
    /// The page after those shared is shared too.
    SharesTheNext,
    /// A range to be shared that reaches out of memory is shared as far as it goes.
    SharesInPart,
    /// The device answers where it may not.
    AnswersPrivate,
}

impl Machine {
    fn new(scenario: &Scenario) -> Self {
        let ram = ram(scenario.config().memory).into_iter().flatten().collect();
        Self { ram, ..Self::default() }
    }

    /// The words of `[gpa..gpa + len)` that are kept.
    fn kept(gpa: Gpa, len: u64) -> Box<dyn Iterator<Item = Gpa>> {
        let (start, end) = (gpa.get(), gpa.get() + len);
        if end <= 4 << 20 {
            return Box::new((start..end).step_by(8).map(Gpa::new));
        }
        assert!(start.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE));
        let word = |page| Gpa::new(page * PAGE_SIZE + page * 8 % PAGE_SIZE);
        Box::new((start / PAGE_SIZE..end / PAGE_SIZE).map(word))
    }

    fn word(&self, gpa: Gpa) -> u64 {
        self.words.get(&gpa.get()).copied().unwrap_or(0)
    }

    fn pages(gpa: Gpa, len: u64) -> impl Iterator<Item = u64> {
        gpa.get() / PAGE_SIZE..=(gpa.get() + len - 1) / PAGE_SIZE
    }

    fn host_reaches(&self, gpa: Gpa, len: u64) -> bool {
        Self::pages(gpa, len).all(|page| self.shared.contains(&page))
    }

    fn convert(&mut self, gpa: Gpa, pages: u64, to: Visibility) -> Outcome {
        let range = pages.checked_mul(PAGE_SIZE);
        let range = range.and_then(|size| GfnRange::from_bytes(gpa.get(), size).ok());
        let Some(range) = range.filter(|r| self.ram.iter().any(|ram| ram.contains_range(*r)))
        else {
            if self.bug == Some(Bug::SharesInPart) && to == Visibility::Shared {
                self.shared.insert(gpa.gfn().get());
            }
            return Outcome::Invalid;
        };
        if to == Visibility::Shared && self.bug == Some(Bug::SharesTheNext) {
            self.shared.insert(range.end());
        }
        for frame in range.frames() {
            if to == Visibility::Private && self.bug == Some(Bug::Forgets) {
                let page = frame.get() * PAGE_SIZE;
                self.words.retain(|gpa, _| !(page..page + PAGE_SIZE).contains(gpa));
            }
            match to {
                Visibility::Shared => self.shared.insert(frame.get()),
                Visibility::Private => self.shared.remove(&frame.get()),
            };
        }
        Outcome::Done
    }

    fn device(&mut self, request: Gpa, source: Gpa, len: u64, destination: Gpa) -> Outcome {
        let reaches = |(gpa, len)| self.host_reaches(gpa, len);
        let all = [(request, 40), (source, len), (destination, len)].into_iter().all(reaches);
        if !all && self.bug != Some(Bug::AnswersPrivate) {
            return Outcome::Fault;
        }
        for at in (0..len).step_by(8) {
            let word = self.word(source.checked_add(at).unwrap());
            self.words.insert(destination.get() + at, !word);
        }
        Outcome::Done
    }

    /// `bytes` bytes of a word, 8 at most.
    fn field(&self, at: u64, bytes: u64) -> u64 {
        let word = self.word(Gpa::new(at & !7)) >> (at % 8 * 8);
        if bytes == 8 { word } else { word & ((1 << (bytes * 8)) - 1) }
    }

    fn set_field(&mut self, at: u64, bytes: u64, value: u64) {
        let (shift, mask) = (at % 8 * 8, ((1 << (bytes * 8)) - 1));
        let word = self.words.entry(at & !7).or_default();
        *word = *word & !(mask << shift) | (value & mask) << shift;
    }

    /// A virtqueue's device, with no state but what lies in the ring.
    fn notify(&mut self, queue: Gpa, size: u64) -> Outcome {
        if !size.is_power_of_two() || !queue.get().is_multiple_of(16) {
            return Outcome::Invalid;
        }
        let (table, available, used) =
            (queue.get(), queue.get() + 16 * size, queue.get() + PAGE_SIZE);
        if !self.host_reaches(queue, PAGE_SIZE) || !self.host_reaches(Gpa::new(used), PAGE_SIZE) {
            return Outcome::Fault;
        }
        while self.field(used + 2, 2) != self.field(available + 2, 2) {
            let index = self.field(used + 2, 2);
            let head = self.field(available + 4 + 2 * (index % size), 2);
            let (mut reads, mut at, mut write) = (Vec::new(), table + 16 * head, None);
            while write.is_none() {
                let piece = (Gpa::new(self.field(at, 8)), self.field(at + 8, 4));
                match self.field(at + 12, 2) {
                    1 => reads.push(piece),
                    2 => write = Some(piece),
                    flags => panic!("a descriptor with flags {flags:#x}"),
                }
                at = table + 16 * self.field(at + 14, 2);
            }
            let write = write.unwrap();
            let all = reads.iter().chain([&write]).all(|&(gpa, len)| self.host_reaches(gpa, len));
            if all || self.bug == Some(Bug::AnswersPrivate) {
                let words = reads.iter().flat_map(|&(gpa, len)| Self::kept(gpa, len));
                let answer: Vec<u64> = words.map(|gpa| !self.word(gpa)).collect();
                for (at, word) in (write.0.get()..).step_by(8).zip(answer) {
                    self.words.insert(at, word);
                }
            }
            let place = used + 4 + 8 * (index % size);
            self.set_field(place, 4, head);
            self.set_field(place + 4, 4, if all { write.1 } else { 0 });
            self.set_field(used + 2, 2, index + 1);
        }
        Outcome::Done
    }

    fn check(&self, gpa: Gpa, len: u64, pattern: Pattern) {
        for gpa in Self::kept(gpa, len) {
            assert_eq!(self.word(gpa), pattern.word(gpa), "{gpa}");
        }
    }

    fn run(&mut self, program: &[Op]) {
        for op in program {
            self.checks += 1;
            match *op {
                Op::Check { gpa, len, pattern } => self.check(gpa, len, pattern),
                Op::Convert { gpa, pages, to, expect } => {
                    assert_eq!(self.convert(gpa, pages, to), expect, "{op:?}");
                }
                Op::Device { request, source, len, destination, expect, .. } => {
                    assert_eq!(self.device(request, source, len, destination), expect, "{op:?}");
                }
                Op::Probe { gpa, pages, expect } => {
                    let readable = expect == HostAccess::Readable;
                    let mut all = Self::pages(gpa, pages * PAGE_SIZE);
                    assert!(all.all(|page| self.shared.contains(&page) == readable), "{op:?}");
                }
                Op::Notify { queue, size, expect } => {
                    assert_eq!(self.notify(queue, size), expect, "{op:?}");
                }
                Op::Load { gpa, expect } if gpa.get() < 4 << 20 => {
                    assert_eq!(self.word(gpa), expect, "{op:?}");
                }
                Op::Load { gpa, expect } => {
                    assert!(self.ram.iter().all(|ram| !ram.contains(gpa.gfn())), "{op:?}");
                    assert_eq!(expect, u64::MAX);
                }
                Op::Churn { gpa, len, seed, until } => {
                    assert_eq!(self.word(until), 1);
                    self.run(&[Op::Fill { gpa, len, pattern: Pattern::Seeded { seed } }]);
                }
                _ => self.checks -= 1,
            }
            match *op {
                Op::Fill { gpa, len, pattern } => {
                    for gpa in Self::kept(gpa, len) {
                        self.words.insert(gpa.get(), pattern.word(gpa));
                    }
                }
                Op::Store { gpa, value } if gpa.get() < 4 << 20 => {
                    self.words.insert(gpa.get(), value);
                }
                Op::SetFlag { gpa } => drop(self.words.insert(gpa.get(), 1)),
                Op::WaitFlag { gpa } => assert_eq!(self.word(gpa), 1, "{op:?}"),
                _ => {}
            }
        }
    }
}

/// What a vCPU may fill, check and have converted.
fn own(layout: &Layout, vcpu: u8) -> Vec<GfnRange> {
    let Layout { request, payload, response, queue, .. } = *layout;
    match vcpu {
        0 => [request, payload, response, queue, layout.areas[0]]
            .into_iter()
            .chain(layout.high_area)
            .collect(),
        1 => vec![layout.churn],
        vcpu => vec![layout.areas[usize::from(vcpu) - 1]],
    }
}

fn pages(gpa: Gpa, len: u64) -> GfnRange {
    let end = (gpa.get() + len).div_ceil(PAGE_SIZE);
    GfnRange::between(gpa.gfn().get(), end).unwrap()
}

/// Every conversion of a part of `area` is followed, before anything changes again, by checks
/// that cover all of it, and by a probe of the pages converted and of those beside them.
fn assert_verified(program: &[Op], area: GfnRange) {
    for (index, op) in program.iter().enumerate() {
        let Op::Convert { gpa, pages: count, expect: Outcome::Done, .. } = *op else { continue };
        let converted = pages(gpa, count * PAGE_SIZE);
        if !area.contains_range(converted) {
            continue;
        }
        let (mut checked, mut probed) = (area.start().get(), Vec::new());
        for op in &program[index + 1..] {
            match *op {
                Op::Check { gpa, len, .. } if gpa.gfn().get() == checked => {
                    checked += len / PAGE_SIZE;
                }
                Op::Probe { gpa, pages: count, .. } => {
                    probed.extend(pages(gpa, count * PAGE_SIZE).frames());
                }
                _ => break,
            }
        }
        assert_eq!(checked, area.end(), "{op:?}");
        let around = GfnRange::between(
            converted.start().get().saturating_sub(1).max(area.start().get()),
            (converted.end() + 1).min(area.end()),
        );
        assert_eq!(probed, around.unwrap().frames().collect::<Vec<_>>(), "{op:?}");
    }
}

#[test]
fn scenarios_pass_on_a_machine_that_does_what_it_should() {
    for (memory, vcpus, seed) in [(16 << 20, 1, 1), (64 << 20, 2, 7), (8 << 30, 4, 42)] {
        let scenario = scenario(memory, vcpus, seed);
        let mut machine = Machine::new(&scenario);
        for vcpu in [2, 3, 0, 1] {
            machine.run(scenario.program(vcpu));
        }
        assert_eq!(machine.checks, scenario.least_checks());
        let layout = scenario.layout();
        let bounce = [layout.request, layout.payload, layout.response];
        let left: Vec<u64> =
            bounce.into_iter().flat_map(|range| range.start().get()..range.end()).collect();
        let shared: Vec<u64> = machine.shared.iter().copied().collect();
        assert_eq!(shared, left, "the bounce buffer alone is shared in the end");
    }
}

#[test]
fn a_machine_with_a_bug_is_caught() {
    let scenario = scenario(16 << 20, 1, 5);
    for bug in [Bug::Forgets, Bug::SharesTheNext, Bug::SharesInPart, Bug::AnswersPrivate] {
        let run = || {
            let mut machine = Machine { bug: Some(bug), ..Machine::new(&scenario) };
            machine.run(scenario.program(0));
        };
        assert!(std::panic::catch_unwind(run).is_err(), "{bug:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |memory, vcpus| {
        Scenario::generate(&Config {
            memory,
            vcpus,
            seed: 0,
            conversions: Conversions::KeepContents,
            virtqueue: true,
        })
        .unwrap_err()
    };
    let memory = MEMORY_MIN - PAGE_SIZE;
    assert_eq!(refused(memory, 1), ScenarioError::Memory { memory });
    let memory = MEMORY_MAX + PAGE_SIZE;
    assert_eq!(refused(memory, 1), ScenarioError::Memory { memory });
    let memory = MEMORY_MIN + 8;
    assert_eq!(refused(memory, 1), ScenarioError::Unaligned { memory });
    for vcpus in [0, 5] {
        assert_eq!(refused(MEMORY_MIN, vcpus), ScenarioError::Vcpus { vcpus: vcpus.into() });
    }
}

#[test]
fn another_seed_makes_another_scenario() {
    assert_ne!(scenario(64 << 20, 1, 1).programs(), scenario(64 << 20, 1, 2).programs());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_scenario_is_decided_by_its_config_and_stays_where_it_belongs(
        memory in prop_oneof![
            (16u64 << 8)..(4 << 18),
            (3u64 << 18)..(4 << 18),
            (4u64 << 18)..=(1 << 28),
        ],
        vcpus in 1u8..=4,
        seed: u64,
    ) {
        let memory = memory * PAGE_SIZE;
        let scenario = scenario(memory, vcpus, seed);
        prop_assert_eq!(&scenario, &super::tests::scenario(memory, vcpus, seed));
        prop_assert!(scenario.least_checks() > 1000);
        prop_assert_eq!(scenario.programs().len(), usize::from(vcpus));
        for (vcpu, program) in (0..).zip(scenario.programs()) {
            let own = own(scenario.layout(), vcpu);
            let is_own = |range: GfnRange| own.iter().any(|own| own.contains_range(range));
            for op in program {
                let range = match *op {
                    Op::Fill { gpa, len, .. } | Op::Check { gpa, len, .. } => pages(gpa, len),
                    Op::Churn { gpa, len, .. } => pages(gpa, len),
                    Op::Convert { gpa, pages: count, expect: Outcome::Done, .. }
                    | Op::Probe { gpa, pages: count, .. } => pages(gpa, count * PAGE_SIZE),
                    _ => continue,
                };
                prop_assert!(is_own(range), "{:?}", op);
            }
            for area in scenario.layout().areas.into_iter().chain(scenario.layout().high_area) {
                assert_verified(program, area);
            }
            prop_assert_eq!(program.iter().position(|op| *op == Op::Done), Some(program.len() - 1));
        }
    }
}
