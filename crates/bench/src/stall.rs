//! `polder bench stall`: the longest time a vCPU stands still because of an operation of the
//! host's, next to the bare system calls in it.
//!
//! A guest of KVM reads the first words of the pages concerned over and over, in ring 3, and keeps
//! the longest time from one read to the next, by its TSC. The host does an operation, waits until
//! the guest has read all pages again, and looks. For what the guest asks for itself it takes the
//! time from before its request to after the answer. What the scheduler of a busy machine takes
//! from the vCPU is in there, too: the median says what the operation does, the maximum what
//! happened.

use std::cell::{Cell, RefCell};

use polder::units::{PAGE_BYTES, PageCount, PageRange};
use polder::{Contents, Memory, OnBusy, Slot, Visibility, VmId};
use polder_linux::KvmSlot;

use crate::bare::Bare;
use crate::guest::{BARE, BESIDE, Guest, POLDER};
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
    /// Of pages that nobody waits for.
    Populate,
    /// Of a slot beside the one that the guest reads.
    Bind,
    Unbind,
}

const CASES: [(&str, Operation, u32); 10] = [
    ("to private, 1 page", Operation::ToPrivate, 1),
    ("to private, 512 pages", Operation::ToPrivate, 512),
    ("to shared, 1 page", Operation::ToShared, 1),
    ("to shared, 512 pages", Operation::ToShared, 512),
    ("discard, 1 page", Operation::Discard, 1),
    ("discard, 512 pages", Operation::Discard, 512),
    ("populate, 1 page", Operation::Populate, 1),
    ("populate, 512 pages", Operation::Populate, 512),
    ("bind, 1024 pages", Operation::Bind, 1024),
    ("unbind, 1024 pages", Operation::Unbind, 1024),
];

/// The pages of the memories.
const PAGES: u32 = 1024;

/// The slot of what is bound and unbound.
const SLOT: Slot = Slot(3);

/// What a guest asks for itself.
const OWN: [&str; 2] = ["own request, to private", "own request, to shared"];

/// The operations, with Polder or without.
trait Side {
    /// Has the pages as they are before the operation, the first one mapped in the host view.
    fn prepare(&self, operation: Operation, range: PageRange) -> Result<(), BenchError>;

    fn operate(&self, operation: Operation, range: PageRange) -> Result<(), BenchError>;
}

struct WithPolder {
    memory: Memory,
    /// Memory that the guest does not read, all of it owed at first.
    beside: Memory,
    vm: VmId,
    brought: Cell<u64>,
    bound: Cell<bool>,
}

struct Without<'a> {
    guest: &'a Guest,
    bare: Bare,
    beside: Bare,
    brought: Cell<u64>,
    bound: RefCell<Option<KvmSlot>>,
}

/// With each operation done `times` times on either side.
fn run(times: u32, progress: &mut dyn FnMut(Progress)) -> Measured {
    let guest = Guest::new()?;
    let memory = Memory::builder(PageCount::from(PAGES)).shared().build()?;
    guest.bind(&memory)?;
    let bare = Bare::new(PAGES, false)?;
    let all = PageRange::between(0, PAGES.into()).expect("memory has pages");
    let _slot = guest.bind_bare(&bare, all)?;
    let populations = CASES.iter().filter(|(_, it, _)| matches!(it, Operation::Populate));
    let owed = PAGES.max(populations.map(|(.., pages)| pages * times).sum());
    let beside = Memory::builder(PageCount::from(owed)).shared().owed().build()?;
    let vm = guest.attach(&beside)?;
    let with = WithPolder { memory, beside, vm, brought: Cell::default(), bound: Cell::default() };
    let (beside, bound) = (Bare::new(owed, true)?, RefCell::default());
    let without = Without { guest: &guest, bare, beside, brought: Cell::default(), bound };

    let of = CASES.len() + 1;
    let mut rows = Vec::new();
    for (done, case) in CASES.into_iter().enumerate() {
        progress(Progress { done, of, doing: case.0.to_owned() });
        rows.push(measure(&guest, (&with, &without), times, case)?);
    }
    progress(Progress { done: CASES.len(), of, doing: OWN[0].to_owned() });
    rows.extend(own_requests(&guest, times)?);
    Ok(rows)
}

fn measure(
    guest: &Guest,
    (with, without): (&WithPolder, &Without<'_>),
    times: u32,
    (case, operation, pages): (&str, Operation, u32),
) -> Result<Row, BenchError> {
    let range = PageRange::between(0, pages.into()).expect("some pages");
    let still = |gpa, times, side: &dyn Side| {
        let prepare = || side.prepare(operation, range);
        guest.stand_still((gpa, pages), times, prepare, || side.operate(operation, range))
    };
    let (mut of_bare, mut of_polder) = (Vec::new(), Vec::new());
    // A few at a time of each, in turns.
    for part in [times - times / 2, times / 2] {
        of_bare.extend(still(BARE, part, without)?);
        of_polder.extend(still(POLDER, part, with)?);
    }
    let baseline = match operation {
        Operation::ToPrivate => "madvise",
        Operation::ToShared => "nothing",
        Operation::Discard => "fallocate, 2 madvise",
        Operation::Populate => "pwrite, continue",
        Operation::Bind | Operation::Unbind => "the slot's ioctl",
    };
    Ok(row(case, baseline, of_bare, of_polder))
}

fn row(case: &str, baseline: &'static str, of_bare: Vec<f64>, of_polder: Vec<f64>) -> Row {
    let costs = Costs { baseline: median_of(&of_bare), polder: median_of(&of_polder) };
    let mut row = Row::of_costs(case.to_owned(), baseline, "us", costs);
    row.note = format!("{}; its {}", quantiles(of_polder), quantiles(of_bare));
    row
}

/// How long a vCPU stands still for a conversion that its own guest asks for, next to a request
/// that finds the page so already: the same way out of the guest and back.
fn own_requests(guest: &Guest, times: u32) -> Measured {
    let [to_private, to_shared, nothing] = guest.own_requests(times)?;
    let of = |case, took| row(case, "a request for nothing", nothing.clone(), took);
    Ok(vec![of(OWN[0], to_private), of(OWN[1], to_shared)])
}

/// What a range is filled with.
fn bytes(range: PageRange) -> &'static [u8] {
    static BYTES: [u8; 512 * PAGE_BYTES] = [1; 512 * PAGE_BYTES];
    &BYTES[..PAGE_BYTES * usize::try_from(range.count().get()).expect("512 pages at most")]
}

/// The next pages that were not brought, as many as `range` has.
fn next(brought: &Cell<u64>, range: PageRange) -> PageRange {
    let start = brought.get();
    brought.set(start + range.count().get());
    PageRange::between(start, brought.get()).expect("some pages")
}

impl Side for WithPolder {
    fn prepare(&self, operation: Operation, range: PageRange) -> Result<(), BenchError> {
        let before = match operation {
            Operation::ToPrivate | Operation::Discard => Visibility::Shared,
            Operation::ToShared => Visibility::Private,
            Operation::Populate => return Ok(()),
            Operation::Bind => return self.bind(range, false),
            Operation::Unbind => return self.bind(range, true),
        };
        self.memory.convert(range, before, Contents::Preserve, OnBusy::Wait)?;
        if before == Visibility::Shared {
            self.memory.host_view().touch_read(range.start().offset(), &mut [0])?;
        }
        Ok(())
    }

    fn operate(&self, operation: Operation, range: PageRange) -> Result<(), BenchError> {
        let convert = |to| self.memory.convert(range, to, Contents::Preserve, OnBusy::Wait);
        match operation {
            Operation::ToPrivate => drop(convert(Visibility::Private)?),
            Operation::ToShared => drop(convert(Visibility::Shared)?),
            Operation::Discard => self.memory.discard(range, OnBusy::Wait)?,
            Operation::Populate => {
                self.beside.populate(next(&self.brought, range), bytes(range))?;
            }
            Operation::Bind => self.bind(range, true)?,
            Operation::Unbind => self.bind(range, false)?,
        }
        Ok(())
    }
}

impl WithPolder {
    fn bind(&self, range: PageRange, bound: bool) -> Result<(), BenchError> {
        match (self.bound.replace(bound), bound) {
            (false, true) => self.beside.bind(self.vm, SLOT, BESIDE.gfn(), range)?,
            (true, false) => self.beside.unbind(self.vm, SLOT)?,
            _ => {}
        }
        Ok(())
    }
}

impl Side for Without<'_> {
    fn prepare(&self, operation: Operation, range: PageRange) -> Result<(), BenchError> {
        match operation {
            Operation::Populate => {}
            Operation::Bind => self.bind(range, false)?,
            Operation::Unbind => self.bind(range, true)?,
            Operation::ToPrivate | Operation::ToShared | Operation::Discard => {
                self.bare.host_view().read(0, &mut [0]).map_err(polder::Error::from)?;
            }
        }
        Ok(())
    }

    fn operate(&self, operation: Operation, range: PageRange) -> Result<(), BenchError> {
        match operation {
            Operation::ToPrivate => self.bare.host_view().zap(range)?,
            Operation::ToShared => {}
            Operation::Discard => self.bare.free(range)?,
            Operation::Populate => self.beside.bring(next(&self.brought, range), bytes(range))?,
            Operation::Bind => self.bind(range, true)?,
            Operation::Unbind => self.bind(range, false)?,
        }
        Ok(())
    }
}

impl Without<'_> {
    fn bind(&self, range: PageRange, bound: bool) -> Result<(), BenchError> {
        let mut slot = self.bound.borrow_mut();
        *slot = match (bound, slot.take()) {
            (true, None) => Some(self.guest.bind_bare_beside(&self.beside, range)?),
            (true, kept) => kept,
            (false, _) => None,
        };
        Ok(())
    }
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Facility, found};

    #[test]
    fn a_vcpu_stands_still_for_some_time_around_each_operation() {
        let Some(rows) = found(Facility::Kvm, run(3, &mut |_| ())) else { return };
        assert_eq!(rows.len(), CASES.len() + OWN.len());
        assert!(rows.iter().all(|row| row.polder_value > 0.0 && row.note.contains("max")));
    }
}
