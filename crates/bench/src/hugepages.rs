//! `polder bench hugepages`: what huge pages are worth to a guest, and what it costs to share
//! single pages of them.
//!
//! The guest's accesses are of ring 3, natively. A size for which this machine has no pages has its
//! rows all the same, with no figures but why, and what to do about it. What is of the simulated
//! machine says so, too.

mod accesses;
mod split;
mod stall;

use polder::units::{PageCount, PageRange};
use polder::{HostKind, Memory, PageSize};

use crate::{Bench, BenchError, Measured, Progress, Row};

pub(crate) const BENCH: Bench = Bench {
    name: "hugepages",
    about: "a guest's accesses to huge pages, and sharing single 4K pages of them",
    run: |progress| run(&Extent::FULL, progress),
};

/// How much is measured.
struct Extent {
    /// The guest's memory; a power of two.
    pages: u32,
    /// Rounds, in turns; odd. The median is told.
    rounds: usize,
    /// Random accesses of a round.
    accesses: u64,
    /// Conversions around which a vCPU's longest stall is taken.
    stalls: u32,
}

impl Extent {
    const FULL: Self = Self { pages: 256 << 8, rounds: 5, accesses: 2_000_000, stalls: 100 };
}

/// What the guest's memory is compared with.
const SMALL: &str = "4k pages";
const SIMULATED: &str = "simulated machine";

/// What a row is of, where it is measured and where it can't be.
struct Case {
    name: String,
    baseline: &'static str,
    unit: &'static str,
}

impl Case {
    fn new(name: impl Into<String>, baseline: &'static str, unit: &'static str) -> Self {
        Self { name: name.into(), baseline, unit }
    }
}

type Measure<'a> = Box<dyn Fn(&Case) -> Result<Row, BenchError> + 'a>;

fn run(extent: &Extent, progress: &mut dyn FnMut(Progress)) -> Measured {
    let mut cases: Vec<(Case, Measure<'_>)> = Vec::new();
    for size in [PageSize::Thp, PageSize::Huge2M] {
        let touch = Case::new(format!("first touch {size}"), SMALL, "us/4k");
        cases.push((touch, Box::new(move |case| accesses::first_touch(case, size, extent))));
        let access = Case::new(format!("random access {size}"), SMALL, "ns");
        cases.push((access, Box::new(move |case| accesses::random(case, size, extent))));
    }
    let shared = Case::new("random access thp 1% shared", "none shared", "ns");
    cases.push((shared, Box::new(|case| accesses::random_beside_shared(case, extent))));
    let userfaults = Case::new("userfaults per gib 2m", SMALL, "userfaults");
    cases.push((userfaults, Box::new(|case| accesses::userfaults(case, extent))));
    let split = Case::new("minimal split 1g", split::TO_4K, "us");
    cases.push((split, Box::new(|case| split::time(case, extent))));
    let tables = Case::new("minimal split 1g: tables", split::TO_4K, "pages");
    cases.push((tables, Box::new(split::tables)));
    for size in [PageSize::Thp, PageSize::Huge2M, PageSize::Huge1G] {
        let share = Case::new(format!("stall share 4k in {size}"), SMALL, "us");
        cases.push((share, Box::new(move |case| stall::of_kvm(case, size, extent))));
    }
    for size in [PageSize::Huge2M, PageSize::Huge1G] {
        let share = Case::new(format!("stall share 4k in {size}, {SIMULATED}"), SMALL, "us");
        cases.push((share, Box::new(move |case| stall::simulated(case, size, extent))));
        let name = format!("stall share 4k in {size}, 50 times in a row, {SIMULATED}");
        let in_a_row = Case::new(name, "once", "us");
        cases.push((in_a_row, Box::new(move |case| stall::in_a_row(case, size, extent))));
    }
    let of = cases.len();
    let rows = cases.iter().enumerate().map(|(done, (case, measure))| {
        progress(Progress { done, of, doing: case.name.clone() });
        measured(case, measure)
    });
    rows.collect()
}

/// A row, also of what this machine has no pages for.
fn measured(case: &Case, measure: &Measure<'_>) -> Result<Row, BenchError> {
    match measure(case) {
        Err(BenchError::Memory(error)) if error.way_out().is_some() => {
            let way_out = error.way_out().unwrap_or_default();
            let why = format!("{error}; {way_out}");
            Ok(Row::left_out(case.name.clone(), case.baseline, case.unit, &why))
        }
        measured => measured,
    }
}

fn all(memory: &Memory) -> PageRange {
    PageRange::between(0, memory.pages().get()).expect("memory has pages")
}

/// Memory of a page size that there is in fact, made as `told`.
fn memory_of(
    (size, pages): (PageSize, u32),
    told: impl FnOnce(polder::Builder) -> polder::Builder,
) -> Result<Memory, BenchError> {
    let memory = told(Memory::builder(PageCount::from(pages)).page_size(size)).build()?;
    if memory.page_size() == size {
        return Ok(memory);
    }
    Err(BenchError::Memory(polder::Error::NotOffered {
        what: "this machine gives shared memory no transparent huge pages",
        way_out: "echo advise > \
                  /sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled",
    }))
}

/// Memory of one 1G page on the simulated machine.
fn simulated(size: PageSize) -> Result<Memory, BenchError> {
    memory_of((size, 512 * 512), |builder| builder.host(HostKind::Machine))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Facility, found};

    #[test]
    fn every_case_has_figures_or_says_why_not_and_what_to_do() {
        let few = Extent { pages: 1024, rounds: 1, accesses: 1000, stalls: 3 };
        let Some(rows) = found(Facility::Kvm, run(&few, &mut |_| ())) else { return };
        let case = |name: &str| rows.iter().find(|row| row.case == name).expect(name);
        for row in &rows {
            let is_left_out = row.note.starts_with("left out: ") && row.note.contains("; ");
            assert!(row.polder_value > 0.0 || is_left_out, "{row:?}");
        }
        let tables = case("minimal split 1g: tables");
        assert_eq!((tables.baseline_value, tables.polder_value), (4095.0, 518.0));
        for name in ["first touch thp", "random access 2m", "stall share 4k in 1g"] {
            case(name);
        }
    }
}
