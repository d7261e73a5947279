//! `polder bench prefault`: a guest's first touches of memory that was mapped ahead, next to those of
//! memory that was not.
//!
//! The guest is one of KVM's, in ring 3, and reads a word of each page. What is told is a page's
//! share of the time by which its first run takes longer than the same run once all is mapped: the
//! VM, its vCPU and the program itself drop out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use polder::units::{AddressSpace, Gfn, GfnRange, Gpa, PAGE_SIZE, PageCount, PageRange};
use polder::{HostKind, Memory, OnBusy, Slot, Visibility, VmId};
use polder_linux::{Memfd, Userfault, View};
use polder_vmm::scenario::Op;
use polder_vmm::{End, GuestRoot, IdleVcpu, RunError, Supervision, Vm};

use crate::{Bench, BenchError, Costs, Measured, Progress, Row};

pub(crate) const BENCH: Bench = Bench {
    name: "prefault",
    about: "a guest's first touches of memory mapped ahead; and mapping it, by each root",
    run: |progress| run(Size::FULL, progress),
};

/// How much is measured.
#[derive(Clone, Copy)]
struct Size {
    /// Pages that the guest touches.
    pages: u64,
    /// Pages that it touches where each is a userfault.
    unmapped: u64,
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

/// The most touches that a guest's image has room for.
const AT_ONCE: u64 = 1 << 14;

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

/// Memory of KVM's of which all but the last page is whole and nowhere, and that last page owed, so
/// that the guest's view is watched.
struct Watched {
    memory: Memory,
    vm: Vm,
    id: VmId,
    vcpu: IdleVcpu,
    /// All but the last page.
    pages: PageRange,
}

impl Watched {
    fn new(pages: u64) -> Result<Self, BenchError> {
        let vm = Vm::new(HostKind::Memfd)?;
        let builder = Memory::builder(count(pages + 1)).owed().shared();
        let memory = builder.build()?;
        let id = vm.attach(&memory)?;
        memory.bind(id, Slot(0), Vm::RAM.gfn(), range(0, pages + 1))?;
        let vcpu = vm.idle_vcpu(&memory, id)?;
        Ok(Self { memory, vm, id, vcpu, pages: range(0, pages) })
    }

    /// Has nothing mapped, and no memory behind it.
    fn forget(&self) -> Result<(), BenchError> {
        Ok(self.memory.discard(self.pages, OnBusy::Wait)?)
    }

    /// The guest frames of pages.
    fn gfns(&self, pages: PageRange) -> GfnRange {
        let first = Vm::RAM.gfn().get();
        GfnRange::between(first + pages.start().get(), first + pages.end()).expect("RAM of a VM")
    }

    /// Maps all that can be ahead.
    fn prefault(&self) -> Result<(), BenchError> {
        let all = self.gfns(self.pages);
        let came = self.memory.prefault(self.id, &self.vcpu, all)?;
        assert_eq!(came.done, all, "all of it is whole");
        Ok(())
    }

    /// Has the guest read a word of each page; how long that took.
    fn touch(&self, pages: PageRange) -> Result<Duration, BenchError> {
        let mut took = Duration::ZERO;
        let mut next = pages.start().get();
        while let Some(now) = PageRange::between(next, pages.end().min(next + AT_ONCE)) {
            next = now.end();
            let loads = self.gfns(now).frames().map(|gfn| Op::Load { gpa: gfn.gpa(), expect: 0 });
            let program = loads.chain([Op::Done]).collect();
            let begun = clock();
            let ended = self.vm.run((&self.memory, self.id), &[program], |_| Supervision::GoOn)?;
            took += begun.elapsed();
            if ended.end != End::Ok {
                return Err(RunError::Panicked.into());
            }
        }
        Ok(took)
    }

    /// A page's share of what the first touches take longer than the same touches take then, in
    /// microseconds.
    fn first_touches(&self, pages: PageRange) -> Result<f64, BenchError> {
        let first = self.touch(pages)?;
        let again = self.touch(pages)?.min(self.touch(pages)?);
        Ok(micros(first.saturating_sub(again), pages.count().get()))
    }
}

fn touches(size: Size) -> Result<[Row; 2], BenchError> {
    let watched = Watched::new(size.pages)?;
    let few = range(0, size.unmapped);
    let (mut unmapped, mut mapped, mut all_in) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..size.turns {
        watched.forget()?;
        unmapped.push(watched.first_touches(few)?);
        watched.forget()?;
        let begun = clock();
        watched.prefault()?;
        let ahead = micros(begun.elapsed(), size.pages);
        let touch = watched.first_touches(watched.pages)?;
        mapped.push(touch);
        all_in.push(ahead + touch);
    }
    let baseline = median(unmapped);
    let row = |case: &str, polder, note: String| {
        let costs = Costs { baseline, polder };
        let mut row = Row::of_costs(case.to_owned(), USERFAULT, "us a page", costs);
        row.note = note;
        row
    };
    let size_of = |pages: u64| format!("{}M", (pages * PAGE_SIZE) >> 20);
    let note = format!("its baseline touched {}", size_of(size.unmapped));
    let case = format!("4k: first touch of {}, prefaulted", size_of(size.pages));
    Ok([
        row(&case, median(mapped), note.clone()),
        row("4k: the prefault and the touch", median(all_in), note),
    ])
}

/// Mapping pages that exist into the guest's view.
fn bulk(size: Size) -> Result<Row, BenchError> {
    let watched = Watched::new(size.pages)?;
    let memfd = Arc::new(Memfd::new("bench", count(size.pages))?);
    View::new(&memfd)?.populate(watched.pages)?;
    let bare = Userfault::new(Arc::new(View::new(&memfd)?))?;
    bare.watch(watched.pages)?;
    let (mut baseline, mut polder) = (Vec::new(), Vec::new());
    for _ in 0..size.turns {
        bare.view().zap(watched.pages)?;
        let begun = clock();
        bare.resume(watched.pages)?;
        baseline.push(micros(begun.elapsed(), size.pages));

        watched.forget()?;
        for gfn in watched.gfns(watched.pages).frames() {
            watched.memory.write(watched.id, gfn.gpa(), &[0])?;
        }
        let begun = clock();
        watched.prefault()?;
        polder.push(micros(begun.elapsed(), size.pages));
    }
    let costs = Costs { baseline: median(baseline), polder: median(polder) };
    let mut row = Row::of_costs("bulk".to_owned(), CONTINUE, "us a page", costs);
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
    let costs = Costs { baseline: median(touched), polder: median(ahead) };
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[expect(clippy::disallowed_methods, reason = "a bench is about time")]
fn clock() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_mapped_ahead_costs_less_at_its_first_touch_and_every_root_has_a_row() {
        let size = Size { pages: 1024, unmapped: 256, simulated: 512, turns: 1 };
        let rows = match run(size, &mut |_| ()) {
            Ok(rows) => rows,
            Err(error) => {
                eprintln!("SKIPPED: {error}");
                return;
            }
        };
        assert_eq!(rows.len(), 6);
        assert!(rows[0].ratio > 1.0, "{:?}", rows[0]);
        assert!(rows.iter().all(|row| row.polder_value > 0.0 && row.ratio.is_finite()));
        assert!(rows[3..].iter().all(|row| row.note.contains("simulated")));
    }
}
