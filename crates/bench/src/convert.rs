//! `polder bench convert`: what a conversion costs, next to the bare system call in it.
//!
//! To cut the host off from pages takes one `madvise(MADV_DONTNEED)` of the host view, and the way
//! back none at all: all else is bookkeeping. So the baseline is that call alone, on a view of the
//! same kind (a memfd's, watched by a userfaultfd) with as many pages mapped, in a process that has
//! the same VM. A conversion of all of it to private is timed; the way back is told in the note.

use std::time::Duration;

use polder::{Contents, HostKind, Memory, OnBusy, Slot, Visibility};
use polder_units::{PageCount, PageIndex, PageRange};
use polder_vmm::Vm;

use crate::bare::Bare;
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
    let bare = Bare::new(case.object, false)?;
    let polder = Converted::new(vm, case)?;
    let mut back = Vec::new();
    let costs = alternate(
        || cut_off(&bare, case),
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

/// Cuts the host view off from all pages of a case, by the bare system call.
fn cut_off(bare: &Bare, case: &Case) -> Result<f64, BenchError> {
    for page in case.mapped() {
        bare.host_view().read(page.offset(), &mut [0]).map_err(polder::Error::from)?;
    }
    let mut all = Ok(());
    let took = time(|| all = case.ranges().try_for_each(|range| bare.host_view().zap(range)));
    all?;
    Ok(each(case, took))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Facility, found};

    #[test]
    fn what_is_converted_lies_in_the_object_and_is_measured() {
        for case in CASES {
            assert_eq!(case.ranges().count(), case.times as usize, "{}", case.name);
            let pages: u64 = case.ranges().map(|range| range.count().get()).sum();
            assert_eq!(pages, case.all().count().get(), "{}", case.name);
        }
        let small = [
            Case { name: "1 page", pages: 1, times: 4, every: 1, object: 64 },
            Case { name: "16 pages", pages: 16, times: 2, every: 4, object: 64 },
        ];
        let Some(rows) = found(Facility::Kvm, run(&small, &mut |_| ())) else { return };
        assert_eq!(rows.len(), 2);
        assert!(rows.iter().all(|row| row.polder_value > 0.0 && row.note.contains("back")));
    }
}
