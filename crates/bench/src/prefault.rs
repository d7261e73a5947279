//! `polder bench prefault`: a guest's first touches of memory that was mapped ahead, next to those
//! of memory that was not.
//!
//! The guest is one of KVM's, in ring 3; it reads a word of each page and notes by its TSC how long
//! each read took. What is told is a page's share of the time by which the first reads of all pages
//! take longer than the same reads once all is mapped: clock and loop drop out.
//!
//! A page size for which this machine has no pages is left out; a note on the first row says so,
//! and what would bring them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use polder::units::{AddressSpace, Gfn, GfnRange, Gpa, PAGE_SIZE, PageCount, PageRange};
use polder::{HostKind, Memory, OnBusy, PageSize, Slot, Visibility, VmId};
use polder_linux::{Memfd, Userfault, View};
use polder_vmm::{GuestRoot, IdleVcpu, Vm};

use crate::guest::{Guest, POLDER};
use crate::turns::{alternate, median_of};
use crate::{Bench, BenchError, Costs, Measured, Progress, Row};

pub(crate) const BENCH: Bench = Bench {
    name: "prefault",
    about: "a guest's first touches of memory mapped ahead; and mapping it, by each root",
    run: |progress| run(Size::FULL, progress),
};

/// How much is measured.
#[derive(Clone, Copy)]
struct Size {
    /// Pages that the guest touches; whole huge pages.
    pages: u32,
    /// Pages that it touches where each is a userfault.
    unmapped: u32,
    /// Pages of the simulated machine.
    simulated: u64,
    /// Turns of which the median is told; odd.
    turns: usize,
}

impl Size {
    /// 256M.
    const FULL: Self = Self { pages: 1 << 16, unmapped: 1 << 12, simulated: 1 << 15, turns: 5 };
}

/// What a first touch is compared with: memory that is watched, and each page answered by a fault
/// thread.
const USERFAULT: &str = "userfault at 4K";
/// What mapping ahead is compared with: one ioctl for all of it.
const CONTINUE: &str = "bare UFFDIO_CONTINUE";
/// What mapping ahead on the machine is compared with.
const TOUCH: &str = "first touches";

/// What the memory that the guest touches is made of.
const SIZES: [PageSize; 3] = [PageSize::Small, PageSize::Thp, PageSize::Huge2M];

fn run(size: Size, progress: &mut dyn FnMut(Progress)) -> Measured {
    let of = 2 + GuestRoot::ALL.len();
    let mut rows = Vec::new();
    progress(Progress { done: 0, of, doing: "first touches".to_owned() });
    rows.extend(touches(size)?);
    progress(Progress { done: 1, of, doing: "bulk".to_owned() });
    rows.push(bulk(size)?);
    for (done, root) in (2..).zip(GuestRoot::ALL) {
        progress(Progress { done, of, doing: format!("machine, {}", space(root)) });
        rows.push(simulated(size, root)?);
    }
    Ok(rows)
}

/// A guest, and memory of Polder's that it sees, of which nothing is mapped at first. Memory that
/// can be watched is: what follows on the pages to touch stays owed.
struct Ahead {
    guest: Guest,
    memory: Memory,
    id: VmId,
    vcpu: IdleVcpu,
    size: PageSize,
    /// Those to touch.
    pages: PageRange,
}

impl Ahead {
    fn new(size: PageSize, pages: u32) -> Result<Self, BenchError> {
        let owed = match size {
            PageSize::Small => 1,
            // A fault thread's answer maps 4K of these.
            PageSize::Thp => 0,
            PageSize::Huge2M | PageSize::Huge1G => 512,
        };
        let builder = Memory::builder(PageCount::from(pages + owed)).page_size(size).shared();
        let memory = if owed > 0 { builder.owed() } else { builder }.build()?;
        if memory.page_size() != size {
            return Err(BenchError::Memory(polder::Error::NotOffered {
                what: "this machine gives shared memory no transparent huge pages",
                way_out: "echo advise > \
                          /sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled",
            }));
        }
        let guest = Guest::new()?;
        let id = guest.bind(&memory)?;
        let vcpu = guest.idle_vcpu(&memory, id)?;
        Ok(Self { guest, memory, id, vcpu, size, pages: range(0, pages.into()) })
    }

    /// Has nothing mapped, and no memory behind it.
    fn forget(&self) -> Result<(), BenchError> {
        Ok(self.memory.discard(self.pages, OnBusy::Wait)?)
    }

    fn gfns(&self) -> GfnRange {
        let first = POLDER.gfn().get();
        GfnRange::between(first, first + self.pages.count().get()).expect("memory of a VM")
    }

    /// Maps all that can be ahead; what that takes a page, in microseconds.
    fn prefault(&self) -> Result<f64, BenchError> {
        let all = self.gfns();
        let begun = clock();
        let came = self.memory.prefault(self.id, &self.vcpu, all)?;
        let took = begun.elapsed();
        assert_eq!(came.done, all, "all of it is whole");
        Ok(micros(took, all.count().get()))
    }

    /// By how much the first reads of `pages` pages take longer than the same reads then, in
    /// microseconds a page.
    fn first_touches(&self, pages: u32) -> Result<f64, BenchError> {
        let read = || Ok::<f64, BenchError>(self.guest.time(POLDER, pages, 1)?.iter().sum());
        let first = read()?;
        let again = read()?.min(read()?);
        // What can't be told from nothing is not said to be infinitely better.
        Ok((first - again).max(1.0) / f64::from(pages))
    }
}

fn touches(size: Size) -> Result<Vec<Row>, BenchError> {
    let watched = Ahead::new(PageSize::Small, size.unmapped)?;
    let (mut cases, mut left_out) = (Vec::new(), Vec::new());
    for of in SIZES {
        match Ahead::new(of, size.pages) {
            Ok(ahead) => cases.push((ahead, Vec::new(), Vec::new())),
            Err(BenchError::Memory(error)) if error.way_out().is_some() => {
                let way_out = error.way_out().unwrap_or_default();
                left_out.push(format!("{of} left out: {error} ({way_out})"));
            }
            Err(other) => return Err(other),
        }
    }
    let mut unmapped = Vec::new();
    for _ in 0..size.turns {
        watched.forget()?;
        unmapped.push(watched.first_touches(size.unmapped)?);
        for (ahead, touch, with_prefault) in &mut cases {
            ahead.forget()?;
            let prefault = ahead.prefault()?;
            touch.push(ahead.first_touches(size.pages)?);
            with_prefault.push(prefault + touch.last().copied().unwrap_or_default());
        }
    }
    let baseline = median_of(&unmapped);
    let megabytes = |pages: u32| format!("{}M", (u64::from(pages) * PAGE_SIZE) >> 20);
    let mut rows = Vec::new();
    for (ahead, touch, with_prefault) in cases {
        let first = format!("first touch of {}, prefaulted", megabytes(size.pages));
        for (what, values) in [(first.as_str(), touch), ("prefault and touch", with_prefault)] {
            let costs = Costs { baseline, polder: median_of(&values) };
            let case = format!("{}: {what}", ahead.size);
            let mut row = Row::of_costs(case, USERFAULT, "us per 4K", costs);
            row.note = format!("its baseline touched {}", megabytes(size.unmapped));
            rows.push(row);
        }
    }
    if let Some(row) = rows.first_mut() {
        left_out.into_iter().for_each(|note| row.note += &format!("; {note}"));
    }
    Ok(rows)
}

/// Mapping pages that exist into the guest's view. For both they are written anew each turn, and
/// mapped in another view already.
fn bulk(size: Size) -> Result<Row, BenchError> {
    let ahead = Ahead::new(PageSize::Small, size.pages)?;
    let memfd = Arc::new(Memfd::new("bench", size.pages.into())?);
    let trusted = View::new(&memfd)?;
    let bare = Userfault::new(Arc::new(View::new(&memfd)?))?;
    bare.watch(ahead.pages)?;
    let costs = alternate(
        || {
            memfd.punch_hole(ahead.pages)?;
            for page in ahead.pages.frames() {
                trusted.write(page.offset(), &[0]).expect("memory of a memfd");
            }
            let begun = clock();
            bare.resume(ahead.pages)?;
            Ok::<f64, BenchError>(micros(begun.elapsed(), size.pages.into()))
        },
        || {
            ahead.forget()?;
            for gfn in ahead.gfns().frames() {
                ahead.memory.write(ahead.id, gfn.gpa(), &[0])?;
            }
            ahead.prefault()
        },
    )?;
    let mut row = Row::of_costs("bulk".to_owned(), CONTINUE, "us per 4K", costs);
    row.note = "2M at a time, each checked and claimed; its baseline is one call".to_owned();
    Ok(row)
}

/// Mapping pages that exist by a root of the simulated machine.
fn simulated(size: Size, root: GuestRoot) -> Result<Row, BenchError> {
    let builder = Memory::builder(count(size.simulated)).host(HostKind::Machine);
    let memory = builder.build()?;
    let vm = Vm::on(root);
    let id = vm.attach(&memory)?;
    let all = range(0, size.simulated);
    memory.bind(id, Slot(0), Gfn::from(0), all)?;
    let vcpu = vm.idle_vcpu(&memory, id)?;
    let IdleVcpu::Machine(guest) = &vcpu else { unreachable!("a VM of the machine") };
    let gfns = GfnRange::between(0, size.simulated).expect("some frames");
    let machine_vm = memory.simulated_vm(id)?;
    let zap = || {
        let zapped = memory.simulated(|machine, _, _| machine.tdp_zap(machine_vm, gfns));
        zapped?.map_err(polder::Error::Machine)
    };
    root.prefault((&memory, id), &vcpu, gfns)?;
    let (mut touched, mut ahead) = (Vec::new(), Vec::new());
    for _ in 0..size.turns {
        zap()?;
        let begun = clock();
        for gfn in gfns.frames() {
            let mut word = [0; 8];
            let read = guest.read(Gpa::new(gfn.gpa().get()), Visibility::Private, &mut word);
            assert!(read.is_ok(), "{read:?}");
        }
        touched.push(micros(begun.elapsed(), size.simulated) * 1000.0);
        zap()?;
        let begun = clock();
        let came = root.prefault((&memory, id), &vcpu, gfns)?;
        ahead.push(micros(begun.elapsed(), size.simulated) * 1000.0);
        assert_eq!((came.done, came.skipped), (gfns, PageCount::ZERO), "all of it is mapped");
    }
    let costs = Costs { baseline: median_of(&touched), polder: median_of(&ahead) };
    let case = format!("machine: {} addresses", space(root));
    let mut row = Row::of_costs(case, TOUCH, "ns a page", costs);
    row.note = format!("simulated; {:.0} thousand pages a second", 1e6 / costs.polder);
    Ok(row)
}

const fn space(root: GuestRoot) -> &'static str {
    match root.space() {
        AddressSpace::Gpa => "guest-physical",
        AddressSpace::Linear => "linear",
        AddressSpace::L2Gpa => "L2 guest-physical",
    }
}

fn count(pages: u64) -> PageCount {
    PageCount::new(pages).expect("memory of a VM")
}

fn range(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("some pages")
}

/// Microseconds a page.
fn micros(took: Duration, pages: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 pages")]
    let pages = pages as f64;
    took.as_secs_f64() * 1e6 / pages
}

#[expect(clippy::disallowed_methods, reason = "a bench is about time")]
fn clock() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Facility, found};

    #[test]
    fn a_page_mapped_ahead_costs_less_at_its_first_touch_and_every_root_has_a_row() {
        let size = Size { pages: 1024, unmapped: 256, simulated: 512, turns: 1 };
        let Some(rows) = found(Facility::Kvm, run(size, &mut |_| ())) else { return };
        let case = |name: &str| rows.iter().filter(|row| row.case.starts_with(name)).count();
        assert_eq!([case("4k"), case("bulk"), case("machine")], [2, 1, 3]);
        for (size, rest) in [("thp", case("thp")), ("2m", case("2m"))] {
            // What there are no pages for is said, and the way to them.
            let said = rows[0].note.contains(&format!("{size} left out")) && rest == 0;
            assert!(rest == 2 || said && rows[0].note.contains("echo "), "{:?}", rows[0]);
        }
        assert!(rows[0].ratio > 1.0, "{:?}", rows[0]);
        assert!(rows.iter().all(|row| row.polder_value > 0.0 && row.ratio.is_finite()));
        let simulated = rows.iter().filter(|row| row.note.contains("simulated"));
        assert_eq!(simulated.count(), 3);
    }
}
