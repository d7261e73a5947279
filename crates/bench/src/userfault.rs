//! `polder bench userfault`: guest memory that is filled from a file when it is touched.
//!
//! The guest runs in ring 3 and reads every word of the pages that it touches, each of which has to
//! be as in the file. The baseline is the shape of Firecracker's example handler: one thread that
//! copies a page (`UFFDIO_COPY`) for each fault, from a copy of the file in its own memory. Its
//! memory is a memfd, not anonymous: that is some half a microsecond for each fault of a hundred.

mod file;
mod model;
mod peer;

use std::sync::Arc;

use polder::source::FileSource;
use polder::units::{PAGE_SIZE, PageCount, PageRange};
use polder::{Memory, PageSize, ReadAhead, Slot};
use polder_vmm::scenario::Op;
use polder_vmm::{End, Supervision, Vm};

use self::file::Image;
use crate::turns::{median_of, now};
use crate::{Bench, BenchError, Costs, Measured, Progress, Row};

pub(crate) const BENCH: Bench = Bench {
    name: "userfault",
    about: "guest memory filled from a file when touched, next to a handler that copies each page",
    run,
};

/// What the baseline is called.
const PEER: &str = "one thread, UFFDIO_COPY for each fault";

const UNIT: &str = "us a page";

/// How a guest goes through its memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Sequential,
    /// Clusters of 1 to 64 pages at random places.
    WorkingSet,
    /// Single pages at random places.
    Random,
    /// A word of each page, one after the other.
    EachPage,
}

struct Case {
    name: &'static str,
    page_size: PageSize,
    order: Order,
    vcpus: u64,
    read_ahead: ReadAhead,
    /// Odd.
    turns: usize,
}

const CASES: [Case; 5] = [
    Case::new("4k sequential", Order::Sequential, 1, ReadAhead::Adaptive, 3),
    Case::new("4k working set", Order::WorkingSet, 1, ReadAhead::Adaptive, 5),
    Case::new("4k random, read-ahead off", Order::Random, 1, ReadAhead::Off, 7),
    Case::new("2 vcpus 4k working set", Order::WorkingSet, 2, ReadAhead::Adaptive, 5),
    // Next to 4K pages: what huge ones save.
    Case::new("2m", Order::EachPage, 1, ReadAhead::Adaptive, 3).of(PageSize::Huge2M),
];

impl Case {
    const fn new(
        name: &'static str,
        order: Order,
        vcpus: u64,
        read_ahead: ReadAhead,
        turns: usize,
    ) -> Self {
        Self { name, order, vcpus, read_ahead, turns, page_size: PageSize::Small }
    }

    const fn of(self, page_size: PageSize) -> Self {
        Self { page_size, ..self }
    }
}

fn run(progress: &mut dyn FnMut(Progress)) -> Measured {
    let mut tell = |done, doing: &str| {
        progress(Progress { done, of: CASES.len() + 1, doing: doing.to_owned() });
    };
    tell(0, "a file of 256M");
    let image = Image::new()?;
    let mut rows = Vec::new();
    for (done, case) in CASES.iter().enumerate() {
        tell(done + 1, case.name);
        rows.push(measure(&image, case)?);
    }
    rows.extend(model::rows());
    Ok(rows)
}

/// A case by both, in turns; left out where there are no pages of the case's size.
fn measure(image: &Image, case: &Case) -> Result<Row, BenchError> {
    match Memory::builder(image.pages()).page_size(case.page_size).build() {
        Err(error @ polder::Error::HugePages { .. }) => {
            let (case, way_out) = (case.name.to_owned(), error.way_out().unwrap_or_default());
            return Ok(Row::left_out(case, PEER, UNIT, &format!("{error}; {way_out}")));
        }
        built => drop(built?),
    }
    let (programs, touched) = image.programs(case.order, case.vcpus);
    let (mut peer, mut polder, mut wasted, mut faults) = (Vec::new(), Vec::new(), 0, 0);
    for _ in 0..case.turns {
        peer.push(peer::turn(image, &programs)? / touched as f64);
        let turn = polder_turn(image, &programs, case)?;
        polder.push(turn.seconds / touched as f64);
        wasted = turn.brought.saturating_sub(touched);
        faults = turn.faults;
    }
    let values = Costs { baseline: 1e6 * median_of(&peer), polder: 1e6 * median_of(&polder) };
    let mut row = Row::of_costs(case.name.to_owned(), PEER, UNIT, values);
    row.note = format!(
        "{touched} pages touched in {faults} faults; {} of {} KiB brought wasted",
        (wasted * PAGE_SIZE) >> 10,
        ((wasted + touched) * PAGE_SIZE) >> 10,
    );
    Ok(row)
}

struct Turn {
    seconds: f64,
    brought: u64,
    faults: u64,
}

fn polder_turn(image: &Image, programs: &[Vec<Op>], case: &Case) -> Result<Turn, BenchError> {
    let vm = Vm::new(polder::HostKind::Memfd)?;
    let source =
        FileSource::open(image.path()).map_err(|error| BenchError::Guest(error.to_string()))?;
    let builder = Memory::builder(image.pages()).source(Arc::new(source));
    let memory = builder.read_ahead(case.read_ahead).page_size(case.page_size).build()?;
    let id = vm.attach(&memory)?;
    memory.bind(id, Slot(0), Vm::RAM.gfn(), all(image.pages()))?;
    let seconds = timed(&vm, (&memory, id), programs)?;
    let source = memory.source_statistics();
    let faults = memory.statistics().guest_faults;
    Ok(Turn { seconds, brought: source.demanded + source.ahead + source.zeros, faults })
}

/// How long a guest takes for its programs, in seconds.
fn timed(
    vm: &Vm,
    memory: (&Memory, polder::VmId),
    programs: &[Vec<Op>],
) -> Result<f64, BenchError> {
    let start = now();
    let ended = vm.run(memory, programs, |_| Supervision::GoOn)?;
    let seconds = start.elapsed().as_secs_f64();
    match ended.end {
        End::Ok => Ok(seconds),
        End::Failed(failure) => Err(BenchError::Guest(failure.to_string())),
        End::TimedOut | End::Interrupted => Err(BenchError::Guest("it was stopped".into())),
    }
}

fn all(pages: PageCount) -> PageRange {
    PageRange::between(0, pages.get()).expect("a file has pages")
}
