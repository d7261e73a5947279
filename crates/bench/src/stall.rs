//! `polder bench stall`: the longest time a vCPU stands still because of an operation of the host's,
//! next to the bare system calls in it.
//!
//! A guest of KVM reads the first words of the pages concerned over and over, in ring 3, and keeps
//! the longest time from one read to the next, by its TSC. The host does an operation, waits until
//! the guest has read all pages again, and looks. What the scheduler of a busy machine takes from
//! the vCPU is in there, too: the median says what the operation does, the maximum what happened.

use polder::units::{PageCount, PageRange};
use polder::{Contents, Memory, OnBusy, Visibility};

use crate::bare::Bare;
use crate::guest::{BARE, Guest, POLDER};
use crate::turns::{median_of, quantiles};
use crate::{Bench, BenchError, Costs, Measured, Progress, Row};

pub(crate) const BENCH: Bench = Bench {
    name: "stall",
    about: "the longest time a vCPU stands still in each operation, next to the bare calls",
    run: |progress| run(100, progress),
};

/// What the host does.
#[derive(Clone, Copy)]
enum Operation {
    ToPrivate,
    ToShared,
    Discard,
}

const CASES: [(&str, Operation, u32); 6] = [
    ("to private, 1 page", Operation::ToPrivate, 1),
    ("to private, 512 pages", Operation::ToPrivate, 512),
    ("to shared, 1 page", Operation::ToShared, 1),
    ("to shared, 512 pages", Operation::ToShared, 512),
    ("discard, 1 page", Operation::Discard, 1),
    ("discard, 512 pages", Operation::Discard, 512),
];

/// The pages of the memories.
const PAGES: u32 = 1024;

/// With each operation done `times` times on either side.
fn run(times: u32, progress: &mut dyn FnMut(Progress)) -> Measured {
    let guest = Guest::new()?;
    let memory = Memory::builder(PageCount::from(PAGES)).shared().build()?;
    guest.bind(&memory)?;
    let bare = Bare::new(PAGES, false)?;
    let all = PageRange::between(0, PAGES.into()).expect("memory has pages");
    let _slot = guest.bind_bare(&bare, all)?;

    let mut rows = Vec::new();
    for (done, (case, operation, pages)) in CASES.into_iter().enumerate() {
        progress(Progress { done, of: CASES.len(), doing: case.to_owned() });
        let range = PageRange::between(0, pages.into()).expect("some pages");
        let (mut of_bare, mut of_polder) = (Vec::new(), Vec::new());
        // A few at a time of each, in turns.
        for part in [times - times / 2, times / 2] {
            let touch = || Ok(bare.host_view().read(0, &mut [0]).map_err(polder::Error::from)?);
            let alone = || without_polder(&bare, operation, range);
            of_bare.extend(guest.stand_still((BARE, pages), part, touch, alone)?);
            let prepare = || prepare(&memory, operation, range);
            let with = || with_polder(&memory, operation, range);
            of_polder.extend(guest.stand_still((POLDER, pages), part, prepare, with)?);
        }
        let costs = Costs { baseline: median_of(&of_bare), polder: median_of(&of_polder) };
        let baseline = match operation {
            Operation::ToPrivate => "madvise",
            Operation::ToShared => "nothing",
            Operation::Discard => "fallocate, 2 madvise",
        };
        let mut row = Row::of_costs(case.to_owned(), baseline, "us", costs);
        row.note = format!("{}; its {}", quantiles(of_polder), quantiles(of_bare));
        rows.push(row);
    }
    Ok(rows)
}

/// Has the pages as they are before the operation, the first one mapped in the host view.
fn prepare(memory: &Memory, operation: Operation, range: PageRange) -> Result<(), BenchError> {
    let before = match operation {
        Operation::ToPrivate | Operation::Discard => Visibility::Shared,
        Operation::ToShared => Visibility::Private,
    };
    memory.convert(range, before, Contents::Preserve, OnBusy::Wait)?;
    if before == Visibility::Shared {
        memory.host_view().touch_read(range.start().offset(), &mut [0])?;
    }
    Ok(())
}

fn with_polder(memory: &Memory, operation: Operation, range: PageRange) -> Result<(), BenchError> {
    let convert = |to| memory.convert(range, to, Contents::Preserve, OnBusy::Wait).map(drop);
    match operation {
        Operation::ToPrivate => convert(Visibility::Private)?,
        Operation::ToShared => convert(Visibility::Shared)?,
        Operation::Discard => memory.discard(range, OnBusy::Wait)?,
    }
    Ok(())
}

fn without_polder(bare: &Bare, operation: Operation, range: PageRange) -> Result<(), BenchError> {
    match operation {
        Operation::ToPrivate => bare.host_view().zap(range)?,
        Operation::ToShared => {}
        Operation::Discard => bare.free(range)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Facility, found};

    #[test]
    fn a_vcpu_stands_still_for_some_time_around_each_operation() {
        let Some(rows) = found(Facility::Kvm, run(3, &mut |_| ())) else { return };
        assert_eq!(rows.len(), CASES.len());
        assert!(rows.iter().all(|row| row.polder_value > 0.0 && row.note.contains("max")));
    }
}
