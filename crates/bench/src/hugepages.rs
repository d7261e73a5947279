//! `polder bench hugepages`: what huge pages are worth to a guest, and what it costs to share single
//! pages of them.
//!
//! The guest's accesses are of ring 3, natively. A size for which this machine has no pages is left
//! out, with a row's note on another saying so. What is of the simulated machine says so, too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use polder::units::{Gfn, Gpa, Level, PAGE_SIZE, PageCount, PageRange};
use polder::{Contents, HostKind, Memory, OnBusy, PageSize, Slot, Visibility, VmId};
use polder_machine::{Config, LockOwner, Machine};
use polder_vmm::scenario::{Op, Pattern};
use polder_vmm::{Supervision, Vm};

use crate::{Bench, BenchError, Costs, Progress, Row};

pub(crate) const BENCH: Bench = Bench {
    name: "hugepages",
    about: "a guest's accesses to huge pages, and sharing single 4K pages of them",
    run,
};

/// The guest's memory; a power of two.
const PAGES: u32 = 256 << 8;
const BYTES: u64 = PAGES as u64 * PAGE_SIZE;
/// Rounds, in turns; odd. The median is told.
const ROUNDS: usize = 5;
/// Random accesses of a round.
const ACCESSES: u64 = 2_000_000;

const SMALL: &str = "4k pages";
const NONE_SHARED: &str = "none shared";
const TO_4K: &str = "split to 4k";
const NESTED: &str = "shadow-paged KVM below a hypervisor, where faults are dearer than on metal";

fn run(progress: &mut dyn FnMut(Progress)) -> Result<Vec<Row>, BenchError> {
    let mut rows = Vec::new();
    let mut left_out = Vec::new();
    let of = 9;
    let mut done = 0;
    let mut next = |doing: &str| {
        progress(Progress { done, of, doing: doing.to_owned() });
        done += 1;
    };
    for size in [PageSize::Thp, PageSize::Huge2M] {
        next(&format!("first touch {size}"));
        match Guests::of(size) {
            Ok(mut guests) => {
                rows.push(guests.first_touch()?);
                next(&format!("random access {size}"));
                rows.push(guests.random_access()?);
            }
            Err(BenchError::Memory(error)) if error.way_out().is_some() => {
                left_out.push(format!("{size} left out: {error}"));
            }
            Err(other) => return Err(other),
        }
    }
    next("random access thp 1% shared");
    match shared_part() {
        Ok(row) => rows.push(row),
        Err(BenchError::Memory(error)) if error.way_out().is_some() => {}
        Err(other) => return Err(other),
    }
    next("userfaults per gib 2m");
    match userfaults() {
        Ok(row) => rows.push(row),
        Err(BenchError::Memory(error)) if error.way_out().is_some() => {}
        Err(other) => return Err(other),
    }
    next("minimal split 1g");
    rows.extend(minimal_split()?);
    for size in [PageSize::Huge2M, PageSize::Huge1G] {
        next(&format!("stall share 4k in {size}"));
        rows.push(stall(size)?);
    }
    if let Some(row) = rows.first_mut() {
        for note in left_out {
            row.note = format!("{}; {note}", row.note);
        }
    }
    Ok(rows)
}

#[expect(clippy::disallowed_methods, reason = "a bench is about time")]
fn now() -> Instant {
    Instant::now()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn all(memory: &Memory) -> PageRange {
    PageRange::between(0, memory.pages().get()).expect("memory has pages")
}

/// Memory of a page size that there is in fact.
fn memory_of(size: PageSize) -> Result<Memory, BenchError> {
    let memory = Memory::builder(PageCount::from(PAGES)).page_size(size).build()?;
    if memory.page_size() == size {
        return Ok(memory);
    }
    Err(BenchError::Memory(polder::Error::NotOffered {
        what: "this machine gives shared memory no transparent huge pages",
        way_out: "echo advise > \
                  /sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled",
    }))
}

/// A VM and its memory.
struct Guest {
    vm: Vm,
    memory: Memory,
    id: VmId,
}

impl Guest {
    fn new(size: PageSize) -> Result<Self, BenchError> {
        let memory = memory_of(size)?;
        let vm = Vm::new(HostKind::Memfd)?;
        let id = vm.attach(&memory)?;
        memory.bind(id, Slot(0), Vm::RAM.gfn(), all(&memory))?;
        Ok(Self { vm, memory, id })
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

    fn fill(&self) -> Result<f64, BenchError> {
        self.time(Op::Fill { gpa: Vm::RAM, len: BYTES, pattern: Pattern::Seeded { seed: 3 } })
    }

    fn roam(&self, seed: u64) -> Result<f64, BenchError> {
        let seconds =
            self.time(Op::Roam { gpa: Vm::RAM, len: BYTES, count: ACCESSES, seed: seed | 1 })?;
        Ok(seconds * 1e9 / ACCESSES as f64)
    }
}

/// A guest on 4K pages and one on others, in turns.
struct Guests {
    size: PageSize,
    small: Guest,
    huge: Guest,
}

impl Guests {
    fn of(size: PageSize) -> Result<Self, BenchError> {
        Ok(Self { size, small: Guest::new(PageSize::Small)?, huge: Guest::new(size)? })
    }

    /// Of fresh memory each round; what writing the words takes itself is not counted.
    fn first_touch(&mut self) -> Result<Row, BenchError> {
        let (mut small, mut huge) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            for (guest, into) in [(&self.small, &mut small), (&self.huge, &mut huge)] {
                guest.memory.discard(all(&guest.memory), OnBusy::Wait)?;
                let first = guest.fill()?;
                let again = guest.fill()?;
                into.push((first - again).max(1e-9) * 1e6 / f64::from(PAGES));
            }
        }
        let costs = Costs { baseline: median(small), polder: median(huge) };
        let mut row = Row::of_costs(format!("first touch {}", self.size), SMALL, "us/4k", costs);
        row.note = NESTED.to_owned();
        Ok(row)
    }

    fn random_access(&mut self) -> Result<Row, BenchError> {
        let (mut small, mut huge) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS as u64 {
            let values = (self.small.roam(round + 7)?, self.huge.roam(round + 7)?);
            // The first one brings what was not there.
            if round > 0 {
                small.push(values.0);
                huge.push(values.1);
            }
        }
        let costs = Costs { baseline: median(small), polder: median(huge) };
        Ok(Row::of_costs(format!("random access {}", self.size), SMALL, "ns", costs))
    }
}

/// Random accesses with every hundredth page shared, and touched by the host, next to none shared.
fn shared_part() -> Result<Row, BenchError> {
    let (none, part) = (Guest::new(PageSize::Thp)?, Guest::new(PageSize::Thp)?);
    for guest in [&none, &part] {
        guest.fill()?;
    }
    for page in (0..u64::from(PAGES)).step_by(100) {
        let one = PageRange::between(page, page + 1).expect("a page");
        part.memory.convert(one, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
        part.memory.host_view().touch_write(page * PAGE_SIZE, &[1])?;
    }
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS as u64 {
        without.push(none.roam(round + 11)?);
        with.push(part.roam(round + 11)?);
    }
    let costs = Costs { baseline: median(without), polder: median(with) };
    let mut row = Row::of_costs("random access thp 1% shared".into(), NONE_SHARED, "ns", costs);
    let huge = part.memory.levels().size_2m * 512;
    row.note = format!("{huge} of {PAGES} pages of the guest's view are mapped by 2M entries");
    Ok(row)
}

/// What the fault threads are told of while the host touches all of a plain VM's memory.
fn userfaults() -> Result<Row, BenchError> {
    let faults = |size| {
        let builder = Memory::builder(PageCount::from(PAGES)).page_size(size).shared();
        let memory = builder.build()?;
        for page in 0..u64::from(PAGES) {
            memory.host_view().touch_write(page * PAGE_SIZE, &[1])?;
        }
        let gibibytes = BYTES as f64 / f64::from(1 << 30);
        Ok::<f64, BenchError>(memory.statistics().host_faults as f64 / gibibytes)
    };
    let huge = faults(PageSize::Huge2M)?;
    let costs = Costs { baseline: faults(PageSize::Small)?, polder: huge };
    Ok(Row::of_costs("userfaults per gib 2m".into(), SMALL, "userfaults", costs))
}

/// Memory of one 1G page on the simulated machine.
fn simulated(size: PageSize) -> Result<Memory, BenchError> {
    let builder = Memory::builder(PageCount::from(512 * 512)).host(HostKind::Machine);
    Ok(builder.page_size(size).build()?)
}

/// Sharing a 4K page of a 1G folio as it is, next to splitting the folio to 4K alone.
fn minimal_split() -> Result<[Row; 2], BenchError> {
    const OWNER: LockOwner = LockOwner(9);
    let page = PageRange::one(1000u32.into());
    let (mut to_4k, mut minimal) = (Vec::new(), Vec::new());
    let mut tables = (0, 0);
    for _ in 0..ROUNDS {
        let frames = PageCount::from((512 * 512) * 2);
        let config = Config::x86_64(frames);
        let mut machine = Machine::new(config).expect("a machine of sensible size");
        let object = machine.create_object(PageCount::from(512 * 512)).expect("there is room");
        machine.fill_pool(Level::Size1G, 1);
        let free = machine.free_frames();
        let pfn = machine.allocate_from_pool(object, 0u32.into(), Level::Size1G);
        let pfn = pfn.expect("the pool has one");
        let start = now();
        machine.lock_folio(pfn, OWNER).expect("nobody else is there");
        let mut split = |at: u32| {
            let folio = machine.backing(object, at.into()).expect("it is there").expect("as is");
            // The first part is locked yet.
            let _ = machine.lock_folio(folio.pfn, OWNER);
            machine.split_folio(object, at.into(), OWNER).expect("there are frames for tables")
        };
        split(0);
        for number in 0..512 {
            split(number * 512);
        }
        to_4k.push(start.elapsed().as_secs_f64() * 1e6);
        tables.0 = free - machine.free_frames();

        let memory = simulated(PageSize::Huge1G)?;
        memory.convert(
            PageRange::one(5u32.into()),
            Visibility::Shared,
            Contents::Preserve,
            OnBusy::Wait,
        )?;
        memory.host_view().touch_write(5 * PAGE_SIZE, &[1])?;
        memory.convert(all(&memory), Visibility::Private, Contents::Preserve, OnBusy::Wait)?;
        let free = |memory: &Memory| memory.simulated(|machine, _, _| machine.free_frames());
        let before = free(&memory)?;
        let start = now();
        memory.convert(page, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
        minimal.push(start.elapsed().as_secs_f64() * 1e6);
        tables.1 = before - free(&memory)?;
    }
    let costs = Costs { baseline: median(to_4k), polder: median(minimal) };
    let mut time = Row::of_costs("minimal split 1g".into(), TO_4K, "us", costs);
    time.note =
        "simulated machine; Polder's is a whole conversion, the other the splits alone".into();
    let costs = Costs { baseline: tables.0 as f64, polder: tables.1 as f64 };
    let mut kept = Row::of_costs("minimal split 1g: tables".into(), TO_4K, "pages", costs);
    kept.note = "simulated machine".into();
    Ok([time, kept])
}

/// The longest that a vCPU waits for a page while another one of the same huge page is shared and
/// made private again, next to the same on 4K pages.
fn stall(size: PageSize) -> Result<Row, BenchError> {
    let worst = |size| {
        let memory = simulated(size)?;
        let id = memory.attach(polder::Vm::Machine)?;
        memory.bind(id, Slot(0), Gfn::from(0), all(&memory))?;
        let vcpu = memory.machine_vcpu(id)?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut longest = Vec::new();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let (mut each, mut word) = (Vec::new(), [0; 8]);
                while !stop.load(Ordering::Relaxed) {
                    let start = now();
                    let read = vcpu.read(Gpa::new(7 * PAGE_SIZE), Visibility::Private, &mut word);
                    assert!(read.is_ok(), "it is there: {read:?}");
                    each.push(start.elapsed().as_secs_f64() * 1e6);
                }
                each
            });
            let end = now() + Duration::from_millis(300);
            let mut converted = Ok(());
            while now() < end && converted.is_ok() {
                for to in [Visibility::Shared, Visibility::Private] {
                    let one = PageRange::one(1000u32.into());
                    let done = memory.convert(one, to, Contents::Preserve, OnBusy::Wait);
                    converted = converted.and(done.map(drop));
                }
            }
            stop.store(true, Ordering::Relaxed);
            longest = reader.join().expect("the reader does not panic");
            converted
        })?;
        longest.sort_by(f64::total_cmp);
        // The very longest are the scheduler's.
        let at = longest.len() - 1 - longest.len() / 10_000;
        Ok::<f64, BenchError>(longest[at])
    };
    let costs = Costs { baseline: worst(PageSize::Small)?, polder: worst(size)? };
    let mut row = Row::of_costs(format!("stall share 4k in {size}"), SMALL, "us", costs);
    row.note =
        "simulated machine; of 10,000 reads all but the longest. On a memfd the guest's view \
                stays mapped"
            .into();
    Ok(row)
}
