//! `polder bench convert`: what a conversion costs, next to the bare system call in it.
//!
//! To cut the host off from pages takes one `madvise(MADV_DONTNEED)` of the host view, and the way
//! back none at all: all else is bookkeeping. So the baseline is that call alone, on a view of the
//! same kind (a memfd's, watched by a userfaultfd) with as many pages mapped, in a process that has
//! the same VM. A conversion of all of it to private is timed; the way back is told in the note.

use std::time::Duration;

use polder::{Contents, HostKind, Memory, OnBusy, Slot, Visibility};
use polder_units::{PAGE_SIZE, PageCount, PageRange};
use polder_vmm::Vm;

use crate::bare::Bare;
use crate::turns::{TURNS, median_of, time};
use crate::{Bench, BenchError, Costs, Measured, Progress, Row};

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
    at_once: u32,
    /// How many times so many, in a turn.
    times: u32,
    /// Every how many pages one is mapped in the host view before.
    every: usize,
    /// The pages of the object; what is converted lies in its middle.
    object: u32,
}

const CASES: [Case; 4] = [
    Case { name: "1 page", pages: 1, at_once: 64, times: 8, every: 1, object: 1 << 14 },
    Case { name: "512 pages", pages: 512, at_once: 1, times: 8, every: 1, object: 1 << 14 },
    Case { name: "1g", pages: 1 << 18, at_once: 1, times: 1, every: 512, object: 1 << 18 },
    Case { name: "1g in 1t", pages: 1 << 18, at_once: 1, times: 1, every: 512, object: 1 << 28 },
];

impl Case {
    /// All that is converted.
    fn all(&self) -> PageRange {
        let count = self.pages * self.at_once * self.times;
        let start = (self.object - count) / 2;
        PageRange::between(start.into(), (start + count).into()).expect("a part of the object")
    }

    /// The pages of each conversion, by what is timed at once.
    fn ranges(&self) -> Vec<Vec<PageRange>> {
        let all = self.all();
        let pages = u64::from(self.pages);
        let starts = (all.start().get()..all.end()).step_by(self.pages as usize);
        let ranges = starts.filter_map(|start| PageRange::between(start, start + pages));
        let ranges: Vec<PageRange> = ranges.collect();
        ranges.chunks(self.at_once as usize).map(<[_]>::to_vec).collect()
    }

    /// Has the pages that are to be mapped in a host view touched there.
    fn touch<E>(&self, mut touch: impl FnMut(u64) -> Result<(), E>) -> Result<(), E> {
        let all = self.all();
        let mut pages = (all.start().get()..all.end()).step_by(self.every);
        pages.try_for_each(|page| touch(page * PAGE_SIZE))
    }

    /// Nanoseconds of each conversion, of a time for as many as are timed at once.
    fn each(&self, took: Duration) -> f64 {
        took.as_secs_f64() * 1e9 / f64::from(self.at_once)
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

/// Measures a case, range by range in turns: what else the machine does meets both alike.
fn measure(vm: &Vm, case: &Case) -> Result<Row, BenchError> {
    let bare = Bare::new(case.object, false)?;
    let memory = Memory::builder(PageCount::from(case.object)).shared().build()?;
    let id = vm.attach(&memory)?;
    // A slot of a terabyte costs a KVM without TDP gigabytes; what is converted is enough.
    memory.bind(id, Slot(0), Vm::RAM.gfn(), case.all())?;
    let convert = |ranges: &[PageRange], to| {
        timed(ranges, |range| {
            memory.convert(range, to, Contents::Preserve, OnBusy::Refuse).map(drop)
        })
    };

    let ranges = case.ranges();
    let [mut of_bare, mut to_private, mut to_shared] = [(); 3].map(|()| Vec::new());
    for turn in 0..=TURNS {
        case.touch(|offset| bare.host_view().read(offset, &mut [0]))
            .map_err(polder::Error::from)?;
        case.touch(|offset| memory.host_view().touch_read(offset, &mut [0]))?;
        for ranges in &ranges {
            let alone = || timed(ranges, |range| bare.host_view().zap(range));
            let (bare, polder);
            // Who comes first finds the caches cold.
            if turn % 2 == 0 {
                bare = alone()?;
                polder = convert(ranges, Visibility::Private)?;
            } else {
                polder = convert(ranges, Visibility::Private)?;
                bare = alone()?;
            }
            let back = convert(ranges, Visibility::Shared)?;
            // The first turn warms up.
            if turn > 0 {
                of_bare.push(case.each(bare));
                to_private.push(case.each(polder));
                to_shared.push(case.each(back));
            }
        }
    }
    let costs = Costs { baseline: median_of(&of_bare), polder: median_of(&to_private) };
    let mut row = Row::of_costs(case.name.to_owned(), BARE, "ns", costs);
    let back = median_of(&to_shared);
    row.note = format!("back to shared: {back:.0} ns, without a system call");
    Ok(row)
}

/// How long it takes to do something with each range.
fn timed<E>(
    ranges: &[PageRange],
    work: impl FnMut(PageRange) -> Result<(), E>,
) -> Result<Duration, E> {
    let mut done = Ok(());
    let took = time(|| done = ranges.iter().copied().try_for_each(work));
    done.map(|()| took)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Facility, found};

    #[test]
    fn what_is_converted_lies_in_the_object_and_is_measured() {
        for case in CASES {
            let ranges = case.ranges();
            assert_eq!(ranges.len(), case.times as usize, "{}", case.name);
            let pages: u64 = ranges.iter().flatten().map(|range| range.count().get()).sum();
            assert_eq!(pages, case.all().count().get(), "{}", case.name);
        }
        let small = [
            Case { name: "1 page", pages: 1, at_once: 2, times: 2, every: 1, object: 64 },
            Case { name: "16 pages", pages: 16, at_once: 1, times: 2, every: 4, object: 64 },
        ];
        let Some(rows) = found(Facility::Kvm, run(&small, &mut |_| ())) else { return };
        assert_eq!(rows.len(), 2);
        assert!(rows.iter().all(|row| row.polder_value > 0.0 && row.note.contains("back")));
    }
}
