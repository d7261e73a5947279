//! `polder bench map`: the page map next to other ways to know the facts of every page.
//!
//! The object has 1T. Each look-up is a call of its own, on either side: nothing is carried from
//! one to the next, and none is done together with its neighbours.
//!
//! # Holes
//! - Where half the pages are shared, a terabyte is 200 million runs. `rangemap` and `BTreeMap` are
//!   measured with 16G of them, which fit caches that those of 1T would not; the note says so.

mod pattern;
mod subjects;

use std::hint::black_box;
use std::time::Duration;

use polder_engine::{PageFacts, PageMap, Visibility};
use polder_units::{ByteSize, Level, PAGE_SIZE};

use crate::here::resident_bytes;
use crate::turns::compare;
use crate::{Bench, Costs, Progress, Row};
use pattern::{Pattern, Random};
use subjects::{Bitmaps, Ranges, Starts, Subject};

pub(crate) const BENCH: Bench = Bench {
    name: "map",
    about: "the page map's look-ups, conversions and memory, with 1T of pages",
    run: |progress| Ok(run(&Scale::FULL, progress)),
};

/// How much of everything.
struct Scale {
    pages: u32,
    /// The pages that maps of runs get where half of them are shared.
    pages_of_runs: u32,
    turn: Duration,
}

impl Scale {
    const FULL: Self =
        Self { pages: 1 << 28, pages_of_runs: 1 << 22, turn: Duration::from_millis(20) };
}

/// The pages that are asked about, or converted, between two looks at the count.
const BATCH: u32 = 1024;
const PAGES_1G: u32 = 1 << 18;

/// What is done to a map.
#[derive(Clone, Copy)]
enum Operation {
    LookUpAtRandom,
    LookUpInOrder,
    AskForLevels,
    ConvertPages,
    Convert1G,
}

/// All that is timed.
const CASES: &[(&str, Operation, Pattern)] = {
    use Operation::{AskForLevels, Convert1G, ConvertPages, LookUpAtRandom, LookUpInOrder};
    &[
        ("lookup random uniform", LookUpAtRandom, Pattern::Uniform),
        ("lookup random 1%", LookUpAtRandom, Pattern::ONE_PERCENT),
        ("lookup random 50%", LookUpAtRandom, Pattern::HALF),
        ("lookup sequential 1%", LookUpInOrder, Pattern::ONE_PERCENT),
        ("lookup sequential 50%", LookUpInOrder, Pattern::HALF),
        ("level query 1%", AskForLevels, Pattern::ONE_PERCENT),
        ("level query 50%", AskForLevels, Pattern::HALF),
        ("convert 1 page", ConvertPages, Pattern::ONE_PERCENT),
        ("convert 1g uniform", Convert1G, Pattern::Uniform),
    ]
};

fn run(scale: &Scale, progress: &mut dyn FnMut(Progress)) -> Vec<Row> {
    let patterns = Pattern::ALL.len();
    let mut parts = Parts { done: 0, of: 4 * patterns + 3 * CASES.len(), tell: progress };
    // All are built before any is dropped: memory that had been given back and is taken again
    // would not be seen to grow.
    let mut polder: Maps<PageMap> = Maps::new(scale, &mut parts);
    let mut ranges: Maps<Ranges> = Maps::new(scale, &mut parts);
    let mut starts: Maps<Starts> = Maps::new(scale, &mut parts);
    let mut bitmaps: Maps<Bitmaps> = Maps::new(scale, &mut parts);
    let mut rows = Vec::new();
    for &(case, operation, pattern) in CASES {
        let polder = polder.of(pattern);
        rows.push(time(scale, case, operation, ranges.of(pattern), polder, &mut parts));
        rows.push(time(scale, case, operation, starts.of(pattern), polder, &mut parts));
        rows.push(time(scale, case, operation, bitmaps.of(pattern), polder, &mut parts));
    }
    for pattern in Pattern::ALL {
        let polder = polder.of(pattern);
        rows.extend(weigh(pattern, ranges.of(pattern), polder));
        rows.extend(weigh(pattern, starts.of(pattern), polder));
        rows.extend(weigh(pattern, bitmaps.of(pattern), polder));
    }
    rows
}

/// The row of a case and a baseline.
fn time<S: Subject>(
    scale: &Scale,
    case: &str,
    operation: Operation,
    baseline: &mut Built<S>,
    polder: &mut Built<PageMap>,
    parts: &mut Parts,
) -> Row {
    parts.next(format!("{case}, {}", S::NAME));
    let note = note(baseline, polder);
    let mut costs =
        compare(scale.turn, &mut *baseline.work(operation), &mut *polder.work(operation));
    if !matches!(operation, Operation::Convert1G) {
        costs.baseline /= f64::from(BATCH);
        costs.polder /= f64::from(BATCH);
    }
    Row { note, ..Row::of_costs(case.into(), S::NAME, "ns", costs) }
}

/// The row of the memory in a pattern, if the kernel tells.
fn weigh<S: Subject>(
    pattern: Pattern,
    baseline: &Built<S>,
    polder: &Built<PageMap>,
) -> Option<Row> {
    let (bytes, ours) = (baseline.bytes_per_page?, polder.bytes_per_page?);
    let costs = Costs { baseline: bytes, polder: ours };
    let case = format!("bytes per page {}", pattern.name());
    Some(Row { note: note(baseline, polder), ..Row::of_costs(case, S::NAME, "bytes", costs) })
}

/// Says so where the baseline is smaller.
fn note<S: Subject>(baseline: &Built<S>, polder: &Built<PageMap>) -> String {
    if baseline.pages == polder.pages {
        return String::new();
    }
    let size = ByteSize::new(u64::from(baseline.pages) * PAGE_SIZE);
    format!("{} with {size}", S::NAME)
}

/// Tells of one part after the other.
struct Parts<'a> {
    done: usize,
    of: usize,
    tell: &'a mut dyn FnMut(Progress),
}

impl Parts<'_> {
    fn next(&mut self, doing: String) {
        (self.tell)(Progress { done: self.done, of: self.of, doing });
        self.done += 1;
    }
}

/// A map in each pattern.
struct Maps<S> {
    each: [Built<S>; Pattern::ALL.len()],
}

impl<S: Subject> Maps<S> {
    fn new(scale: &Scale, parts: &mut Parts) -> Self {
        let each = Pattern::ALL.map(|pattern| {
            parts.next(format!("making {} {}", S::NAME, pattern.name()));
            let few = S::OF_RUNS && pattern == Pattern::HALF;
            Built::new(pattern, if few { scale.pages_of_runs } else { scale.pages })
        });
        Self { each }
    }

    fn of(&mut self, pattern: Pattern) -> &mut Built<S> {
        let index = Pattern::ALL.iter().position(|&other| other == pattern);
        &mut self.each[index.expect("every pattern is among them")]
    }
}

/// One look-up, kept a call of its own.
#[inline(never)]
fn look_up<S: Subject>(map: &S, page: u32) -> PageFacts {
    map.get(page)
}

/// As [`look_up`].
#[inline(never)]
fn ask_for_level<S: Subject>(map: &S, page: u32) -> Level {
    map.level(page)
}

/// A map in some pattern, and what it took.
struct Built<S> {
    map: S,
    pages: u32,
    bytes_per_page: Option<f64>,
    /// The pages that random look-ups ask about.
    asked: Vec<u32>,
}

impl<S: Subject> Built<S> {
    /// Shares the pages of `pattern` one by one, in order.
    fn new(pattern: Pattern, pages: u32) -> Self {
        let mut random = Random::new(2);
        let asked: Vec<u32> = (0..1 << 20).map(|_| random.below(pages)).collect();
        // Where a map is too small for the kernel to count, many are counted.
        let copies = if pattern == Pattern::Uniform { S::COPIES } else { 1 };
        let before = resident_bytes();
        let mut maps: Vec<S> = (0..copies).map(|_| S::new(pages)).collect();
        for map in &mut maps {
            for page in pattern.shared(pages) {
                map.convert(page..page + 1, Visibility::Shared);
            }
        }
        let after = resident_bytes();
        let bytes_per_page = before.zip(after).map(|(before, after)| {
            let grown = u32::try_from(after.saturating_sub(before) / 1024).unwrap_or(u32::MAX);
            f64::from(grown) * 1024.0 / f64::from(copies) / f64::from(pages)
        });
        let map = maps.pop().expect("there is at least one copy");
        Self { map, pages, bytes_per_page, asked }
    }

    fn work(&mut self, operation: Operation) -> Box<dyn FnMut(u32) + '_> {
        match operation {
            Operation::LookUpAtRandom => Box::new(self.look_up_at_random()),
            Operation::LookUpInOrder => Box::new(self.look_up_in_order()),
            Operation::AskForLevels => Box::new(self.ask_for_levels()),
            Operation::ConvertPages => Box::new(self.convert_pages()),
            Operation::Convert1G => Box::new(self.convert_1g_pages()),
        }
    }

    fn look_up_at_random(&self) -> impl FnMut(u32) {
        let mut batches = self.asked.chunks_exact(BATCH as usize).cycle();
        move |count| {
            for batch in batches.by_ref().take(count as usize) {
                for &page in batch {
                    black_box(look_up(&self.map, page));
                }
            }
        }
    }

    fn look_up_in_order(&self) -> impl FnMut(u32) {
        let mut at = 0;
        move |count| {
            for _ in 0..count {
                for page in at..at + BATCH {
                    black_box(look_up(&self.map, page));
                }
                at = (at + BATCH) % self.pages;
            }
        }
    }

    fn ask_for_levels(&self) -> impl FnMut(u32) {
        let mut batches = self.asked.chunks_exact(BATCH as usize).cycle();
        move |count| {
            for batch in batches.by_ref().take(count as usize) {
                for &page in batch {
                    black_box(ask_for_level(&self.map, page));
                }
            }
        }
    }

    /// Each page to the other visibility and back: two conversions, and the map is as before.
    fn convert_pages(&mut self) -> impl FnMut(u32) {
        let Self { map, asked, .. } = self;
        let known: Vec<_> = asked.iter().map(|&page| (page, map.get(page).visibility)).collect();
        let mut at = 0;
        move |count| {
            for _ in 0..count {
                for &(page, visibility) in &known[at..at + BATCH as usize / 2] {
                    map.convert(black_box(page..page + 1), visibility.other());
                    map.convert(black_box(page..page + 1), visibility);
                }
                at = (at + BATCH as usize / 2) % known.len();
            }
        }
    }

    /// One 1G page after the other, and round again.
    fn convert_1g_pages(&mut self) -> impl FnMut(u32) {
        let (mut at, mut to) = (0, Visibility::Shared);
        move |count| {
            for _ in 0..count {
                self.map.convert(black_box(at..at + PAGES_1G), to);
                at += PAGES_1G;
                if at == self.pages {
                    (at, to) = (0, to.other());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_row_for_every_baseline() {
        let scale =
            Scale { pages: 1 << 20, pages_of_runs: 1 << 14, turn: Duration::from_micros(100) };
        let mut parts = Vec::new();
        let rows = run(&scale, &mut |progress| parts.push((progress.done, progress.of)));
        assert_eq!(rows.len(), 3 * (CASES.len() + Pattern::ALL.len()));
        assert!(parts.iter().enumerate().all(|(index, &(done, of))| index == done && done < of));
        for row in &rows {
            let small = row.baseline != "flat bitmaps" && row.case.ends_with("50%");
            assert_eq!(row.note.is_empty(), !small, "{row:?}");
        }
    }
}
