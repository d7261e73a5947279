//! The longest that a vCPU waits while a 4K page is shared and made private again that lies in the
//! same huge page as those it reads, next to the same on 4K pages.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use polder::units::{Gfn, Gpa, PAGE_SIZE, PageRange};
use polder::{Contents, Memory, OnBusy, PageSize, Slot, Visibility};

use super::{Case, Extent, all, memory_of, simulated as simulated_memory};
use crate::apart::Apart;
use crate::guest::{Guest, POLDER};
use crate::turns::{median_of, now, quantiles};
use crate::{BenchError, Costs, Row};

/// The pages that a guest of KVM reads in turn, and the one that is converted.
const READ: u32 = 64;
const CONVERTED: u32 = 100;

fn there_and_back(memory: &Memory) -> Result<(), BenchError> {
    for to in [Visibility::Shared, Visibility::Private] {
        let page = PageRange::one(CONVERTED.into());
        memory.convert(page, to, Contents::Preserve, OnBusy::Wait)?;
    }
    Ok(())
}

fn row(case: &Case, small: Vec<f64>, huge: Vec<f64>) -> Row {
    let costs = Costs { baseline: median_of(&small), polder: median_of(&huge) };
    let row = Row::of_costs(case.name.clone(), case.baseline, case.unit, costs);
    Row { note: format!("{}; its {}", quantiles(huge), quantiles(small)), ..row }
}

/// On a memfd, where the guest's view stays mapped.
pub(super) fn of_kvm(case: &Case, size: PageSize, extent: &Extent) -> Result<Row, BenchError> {
    let stalls = |size| {
        let pages = if size == PageSize::Huge1G { 512 * 512 } else { 1024 };
        let memory = memory_of((size, pages), |builder| builder)?;
        let guest = Guest::new()?;
        guest.bind(&memory)?;
        let convert = || there_and_back(&memory);
        guest.stand_still((POLDER, READ), extent.stalls, || Ok(()), convert)
    };
    let huge = stalls(size)?;
    Ok(row(case, stalls(PageSize::Small)?, huge))
}

/// On the simulated machine, which splits the folio and merges it again.
pub(super) fn simulated(case: &Case, size: PageSize, extent: &Extent) -> Result<Row, BenchError> {
    let huge = simulated_stalls(size, 1, extent)?;
    Ok(row(case, simulated_stalls(PageSize::Small, 1, extent)?, huge))
}

/// Conversions there and back that follow each other without a pause.
const IN_A_ROW: u32 = 50;

/// The same of conversions one right after the other, next to two of them.
pub(super) fn in_a_row(case: &Case, size: PageSize, extent: &Extent) -> Result<Row, BenchError> {
    let many = simulated_stalls(size, IN_A_ROW, extent)?;
    Ok(row(case, simulated_stalls(size, 1, extent)?, many))
}

/// Reads a page over and over, and keeps the longest time from one read to the next.
struct Reader {
    stop: AtomicBool,
    reads: AtomicU64,
    longest_ns: AtomicU64,
}

impl Reader {
    fn run(&self, mut read: impl FnMut()) {
        let mut last = now();
        while !self.stop.load(Ordering::Relaxed) {
            read();
            let this = now();
            let took = u64::try_from((this - last).as_nanos()).unwrap_or(u64::MAX);
            self.longest_ns.fetch_max(took, Ordering::Relaxed);
            self.reads.fetch_add(1, Ordering::Relaxed);
            last = this;
        }
    }

    /// Waits until it has read again.
    fn pass(&self) {
        let start = self.reads.load(Ordering::Relaxed);
        while self.reads.load(Ordering::Relaxed) < start + 2 {
            std::thread::sleep(Duration::from_micros(20));
        }
    }
}

fn simulated_stalls(
    size: PageSize,
    in_a_row: u32,
    extent: &Extent,
) -> Result<Vec<f64>, BenchError> {
    let memory = simulated_memory(size)?;
    let id = memory.attach(polder::Vm::Machine)?;
    memory.bind(id, Slot(0), Gfn::from(0), all(&memory))?;
    let vcpu = memory.machine_vcpu(id)?;
    let reader = Reader {
        stop: AtomicBool::new(false),
        reads: AtomicU64::new(0),
        longest_ns: AtomicU64::new(0),
    };
    let apart = Apart::new();
    std::thread::scope(|scope| {
        let vcpu = &vcpu;
        let read = move || {
            let read = vcpu.read(Gpa::new(7 * PAGE_SIZE), Visibility::Private, &mut [0; 8]);
            assert!(read.is_ok(), "it is there: {read:?}");
        };
        let (reader, apart) = (&reader, &apart);
        scope.spawn(move || {
            apart.iter().for_each(Apart::elsewhere);
            reader.run(read);
        });
        let sample = || {
            reader.pass();
            reader.longest_ns.store(0, Ordering::Relaxed);
            (0..in_a_row).try_for_each(|_| there_and_back(&memory))?;
            reader.pass();
            Ok(reader.longest_ns.load(Ordering::Relaxed) as f64 / 1e3)
        };
        let stalls = (0..extent.stalls).map(|_| sample()).collect();
        reader.stop.store(true, Ordering::Relaxed);
        stalls
    })
}
