//! A guest's accesses to memory of huge pages, next to the same accesses to 4K pages.

use polder::units::{PAGE_SIZE, PageRange};
use polder::{Contents, HostKind, Memory, OnBusy, PageSize, Slot, Visibility, VmId};
use polder_vmm::scenario::{Op, Pattern};
use polder_vmm::{Supervision, Vm};

use super::{Case, Extent, all, memory_of};
use crate::turns::{median_of, now};
use crate::{BenchError, Costs, Row};

const NESTED: &str = "shadow-paged KVM below a hypervisor, where faults are dearer than on metal";

/// A VM and its memory.
struct Guest {
    vm: Vm,
    memory: Memory,
    id: VmId,
    accesses: u64,
}

impl Guest {
    fn new(size: PageSize, extent: &Extent) -> Result<Self, BenchError> {
        let memory = memory_of((size, extent.pages), |builder| builder)?;
        let vm = Vm::new(HostKind::Memfd)?;
        let id = vm.attach(&memory)?;
        memory.bind(id, Slot(0), Vm::RAM.gfn(), all(&memory))?;
        Ok(Self { vm, memory, id, accesses: extent.accesses })
    }

    /// How long the guest takes for some work, beside what it takes for none, in seconds.
    fn time(&self, op: Op) -> Result<f64, BenchError> {
        let run = |program: Vec<Op>| {
            let start = now();
            let ended = self.vm.run((&self.memory, self.id), &[program], |_| Supervision::GoOn)?;
            assert_eq!(ended.end, polder_vmm::End::Ok, "the guest comes to its end");
            Ok::<f64, BenchError>(start.elapsed().as_secs_f64())
        };
        let none = run(vec![Op::Done])?;
        Ok((run(vec![op, Op::Done])? - none).max(1e-9))
    }

    fn bytes(&self) -> u64 {
        self.memory.pages().get() * PAGE_SIZE
    }

    fn fill(&self) -> Result<f64, BenchError> {
        let pattern = Pattern::Seeded { seed: 3 };
        self.time(Op::Fill { gpa: Vm::RAM, len: self.bytes(), pattern })
    }

    /// The nanoseconds of a random access.
    fn roam(&self, seed: u64) -> Result<f64, BenchError> {
        let (len, count) = (self.bytes(), self.accesses);
        let seconds = self.time(Op::Roam { gpa: Vm::RAM, len, count, seed: seed | 1 })?;
        Ok(seconds * 1e9 / count as f64)
    }

    /// The microseconds that each page's first touch takes, of memory that was freed: what writing
    /// the words takes itself is not counted.
    fn first_touch(&self) -> Result<f64, BenchError> {
        self.memory.discard(all(&self.memory), OnBusy::Wait)?;
        let first = self.fill()?;
        let again = self.fill()?;
        Ok((first - again).max(1e-9) * 1e6 / self.memory.pages().get() as f64)
    }
}

/// The row of two guests that do the same in turns, after a round that brings what is not there.
fn in_turns(
    case: &Case,
    rounds: usize,
    mut baseline: impl FnMut(u64) -> Result<f64, BenchError>,
    mut polder: impl FnMut(u64) -> Result<f64, BenchError>,
) -> Result<Row, BenchError> {
    let (mut of_baseline, mut of_polder) = (Vec::new(), Vec::new());
    for round in 0..=rounds as u64 {
        of_baseline.push(baseline(round)?);
        of_polder.push(polder(round)?);
    }
    let costs =
        Costs { baseline: median_of(&of_baseline[1..]), polder: median_of(&of_polder[1..]) };
    Ok(Row::of_costs(case.name.clone(), case.baseline, case.unit, costs))
}

pub(super) fn first_touch(case: &Case, size: PageSize, extent: &Extent) -> Result<Row, BenchError> {
    let huge = Guest::new(size, extent)?;
    let small = Guest::new(PageSize::Small, extent)?;
    let touched = in_turns(case, extent.rounds, |_| small.first_touch(), |_| huge.first_touch());
    Ok(Row { note: NESTED.to_owned(), ..touched? })
}

pub(super) fn random(case: &Case, size: PageSize, extent: &Extent) -> Result<Row, BenchError> {
    let huge = Guest::new(size, extent)?;
    let small = Guest::new(PageSize::Small, extent)?;
    for guest in [&small, &huge] {
        guest.fill()?;
    }
    in_turns(case, extent.rounds, |round| small.roam(round + 7), |round| huge.roam(round + 7))
}

/// With every hundredth page shared, and touched by the host.
pub(super) fn random_beside_shared(case: &Case, extent: &Extent) -> Result<Row, BenchError> {
    let (none, part) = (Guest::new(PageSize::Thp, extent)?, Guest::new(PageSize::Thp, extent)?);
    for guest in [&none, &part] {
        guest.fill()?;
    }
    let pages = part.memory.pages().get();
    for page in (0..pages).step_by(100) {
        let one = PageRange::between(page, page + 1).expect("a page");
        part.memory.convert(one, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
        part.memory.host_view().touch_write(page * PAGE_SIZE, &[1])?;
    }
    let roam = |guest: &Guest, round: u64| guest.roam(round + 11);
    let row = in_turns(case, extent.rounds, |at| roam(&none, at), |at| roam(&part, at))?;
    let huge = part.memory.levels().size_2m * 512;
    let note = format!("{huge} of {pages} pages of the guest's view are mapped by 2M entries");
    Ok(Row { note, ..row })
}

/// What the fault threads are told of while the host touches all of a plain VM's memory.
pub(super) fn userfaults(case: &Case, extent: &Extent) -> Result<Row, BenchError> {
    let faults = |size| {
        let memory = memory_of((size, extent.pages), polder::Builder::shared)?;
        for page in 0..memory.pages().get() {
            memory.host_view().touch_write(page * PAGE_SIZE, &[1])?;
        }
        let gibibytes = (memory.pages().get() * PAGE_SIZE) as f64 / f64::from(1 << 30);
        Ok::<f64, BenchError>(memory.statistics().host_faults as f64 / gibibytes)
    };
    let huge = faults(PageSize::Huge2M)?;
    let costs = Costs { baseline: faults(PageSize::Small)?, polder: huge };
    Ok(Row::of_costs(case.name.clone(), case.baseline, case.unit, costs))
}
