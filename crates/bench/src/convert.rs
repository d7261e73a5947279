//! `polder bench convert`: what a conversion costs, next to the bare system call in it.
//!
//! To cut the host off from pages takes one `madvise(MADV_DONTNEED)` of the host view, and the way
//! back none at all: all else is bookkeeping. So the baseline is that call alone, on a view of the
//! same kind (a memfd's, watched by a userfaultfd) with as many pages mapped, in a process that has
//! the same VM. A conversion of all of it to private is timed; the way back is told in the note.

use std::sync::Arc;
use std::time::Duration;

use polder::{Contents, HostKind, Memory, OnBusy, Slot, Visibility};
use polder_linux::{Memfd, Userfault, View};
use polder_units::{PageCount, PageIndex, PageRange};
use polder_vmm::Vm;

use crate::turns::{alternate, time};
use crate::{Bench, BenchError, Measured, Progress, Row};

pub(crate) const BENCH: Bench = Bench {
    name: "convert",
    about: "conversions of host memfd, next to the bare madvise",
    run: |progress| run(&CASES, progress),
};

const BARE: &str = "bare madvise";

/// What is converted, and in what.
struct Case {
    name: &'static str,
    /// The pages of a conversion.
    pages: u32,
    /// How many such conversions, one after the other, are timed at once.
    times: u32,
    /// Every how many pages one is mapped in the host view before.
    every: usize,
    /// The pages of the object; what is converted lies in its middle.
    object: u32,
}

const CASES: [Case; 4] = [
    Case { name: "1 page", pages: 1, times: 512, every: 1, object: 1 << 14 },
    Case { name: "512 pages", pages: 512, times: 8, every: 1, object: 1 << 14 },
    Case { name: "1g", pages: 1 << 18, times: 1, every: 512, object: 1 << 18 },
    Case { name: "1g in 1t", pages: 1 << 18, times: 1, every: 512, object: 1 << 28 },
];

impl Case {
    /// All that is converted.
    fn all(&self) -> PageRange {
        let count = self.pages * self.times;
        let start = (self.object - count) / 2;
        PageRange::between(start.into(), (start + count).into()).expect("a part of the object")
    }

    fn ranges(&self) -> impl Iterator<Item = PageRange> {
        let starts = (self.all().start().get()..).step_by(self.pages as usize);
        let pages = u64::from(self.pages);
        let ranges = starts.take(self.times as usize);
        ranges.filter_map(move |start| PageRange::between(start, start + pages))
    }

    /// The pages that are mapped before.
    fn mapped(&self) -> impl Iterator<Item = PageIndex> {
        let all = self.all();
        (all.start().get()..all.end()).step_by(self.every).filter_map(PageIndex::new)
    }
}

fn run(cases: &[Case], progress: &mut dyn FnMut(Progress)) -> Measured {
    let vm = Vm::new(HostKind::Memfd)?;
    let tell = |(done, case): (usize, &Case)| {
        progress(Progress { done, of: cases.len(), doing: case.name.to_owned() });
        measure(&vm, case)
    };
    cases.iter().enumerate().map(tell).collect()
}

fn measure(vm: &Vm, case: &Case) -> Result<Row, BenchError> {
    let bare = Bare::new(case)?;
    let polder = Converted::new(vm, case)?;
    let mut back = Vec::new();
    let costs = alternate(
        || bare.cut_off(case),
        || {
            let (to_private, to_shared) = polder.to_and_fro(case)?;
            back.push(to_shared);
            Ok(to_private)
        },
    )?;
    let mut row = Row::of_costs(case.name.to_owned(), BARE, "ns", costs);
    back.sort_by(f64::total_cmp);
    row.note = format!("back to shared: {:.0} ns, without a system call", back[back.len() / 2]);
    Ok(row)
}

/// The time for each conversion of a case, in nanoseconds.
fn each(case: &Case, all: Duration) -> f64 {
    all.as_secs_f64() * 1e9 / f64::from(case.times)
}

/// A memfd, its trusted view and a watched one, without Polder.
struct Bare {
    trusted: View,
    host: Userfault,
}

impl Bare {
    fn new(case: &Case) -> Result<Self, BenchError> {
        let memfd = Arc::new(Memfd::new("bench", PageCount::from(case.object))?);
        let trusted = View::new(&memfd)?;
        let host = Userfault::new(Arc::new(View::new(&memfd)?))?;
        host.watch(PageRange::between(0, case.object.into()).expect("an object has pages"))?;
        Ok(Self { trusted, host })
    }

    fn cut_off(&self, case: &Case) -> Result<f64, BenchError> {
        for page in case.mapped() {
            self.trusted.populate(PageRange::one(page))?;
            self.host.resume(PageRange::one(page))?;
        }
        let mut all = Ok(());
        let took = time(|| all = case.ranges().try_for_each(|range| self.host.view().zap(range)));
        all?;
        Ok(each(case, took))
    }
}

/// The same with Polder.
struct Converted {
    memory: Memory,
}

impl Converted {
    fn new(vm: &Vm, case: &Case) -> Result<Self, BenchError> {
        let memory = Memory::builder(PageCount::from(case.object)).shared().build()?;
        let id = vm.attach(&memory)?;
        // A slot of a terabyte costs a KVM without TDP gigabytes; what is converted is enough.
        memory.bind(id, Slot(0), Vm::RAM.gfn(), case.all())?;
        Ok(Self { memory })
    }

    fn to_and_fro(&self, case: &Case) -> Result<(f64, f64), BenchError> {
        for page in case.mapped() {
            self.memory.host_view().touch_read(page.offset(), &mut [0])?;
        }
        let convert = |to| {
            let mut all = Ok(());
            let each_range = |range| {
                let converted = self.memory.convert(range, to, Contents::Preserve, OnBusy::Refuse);
                converted.map(drop)
            };
            let took = time(|| all = case.ranges().try_for_each(each_range));
            all.map(|()| each(case, took))
        };
        Ok((convert(Visibility::Private)?, convert(Visibility::Shared)?))
    }
}
