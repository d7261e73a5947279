//! `polder bench pins`: what a pin costs, next to a lock over a tree of pins; and what it costs
//! those who convert.
//!
//! # Cases
//! - *pin unpin*: a holder pins a page for a transfer and lets it go again, as a device model does
//!   for each buffer of a queue: [`QUEUE`] buffers, spread evenly over 4G of memory, in an order
//!   that no prefetcher knows. Meanwhile others hold so many pins for long.
//! - *any page*: the same of any page of those 4G, where what is looked up is seldom in a cache.
//! - *conversion with a pinner*: a page is converted to private and back, while another thread pins
//!   and unpins other pages as fast as it can; the baseline is a thread that only spins.
//! - *pinned io_uring read*: see `pins/ring.rs`.

mod registry;
mod ring;

use std::hint::black_box;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use polder::{Contents, Holder, HostKind, Memory, OnBusy, Pin, PinKind, Pinner, Visibility};
use polder_units::{PageCount, PageIndex, PageRange};

use crate::apart::Apart;
use crate::turns::compare;
use crate::{Bench, BenchError, Costs, Measured, Progress, Row};
use registry::{Registered, Registry};

pub(crate) const BENCH: Bench = Bench {
    name: "pins",
    about: "pins of guest memory, next to a lock over a tree of them",
    run: |progress| run(&Scale::FULL, progress),
};

/// How much of everything.
struct Scale {
    pages: u32,
    held: &'static [u32],
    turn: Duration,
}

impl Scale {
    const FULL: Self = Self {
        pages: 1 << 20,
        held: &[1, 1_000, 100_000, 1_000_000],
        turn: Duration::from_millis(20),
    };
}

/// The buffers of a queue.
const QUEUE: u32 = 256;

/// One page of so many is private: one of each 2M page.
const APART: u32 = 512;

/// Who pins for a while.
const HOLDER: &str = "virtio-blk";

const TREE: &str = "Mutex<BTreeMap>";

/// The nanoseconds that a pin was to cost at most.
const GOAL: f64 = 100.0;

fn run(scale: &Scale, progress: &mut dyn FnMut(Progress)) -> Measured {
    let of = scale.held.len() + 2 + ring::SIZES.len();
    let mut done = 0;
    let mut tell = |doing: String| {
        progress(Progress { done, of, doing });
        done += 1;
    };
    let memory = memory(scale, HostKind::Machine)?;
    let tree = Registry::new(scale.pages, private(scale));
    let vfio = memory.pinner(PinKind::LongTerm, Holder::new("vfio"))?;
    let of_vfio = tree.add_holder(Holder::new("vfio"));
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut rows = Vec::new();
    let mut first = None;
    for &held in scale.held {
        tell(format!("pin unpin, {held} held"));
        hold(scale, held, &vfio, &mut ours)?;
        hold_in_tree(scale, held, (&tree, of_vfio), &mut theirs);
        let costs = pin_unpin(scale, (&memory, &tree), QUEUE)?;
        let flat = costs.polder / *first.get_or_insert(costs.polder);
        let note = format!("Polder's is {flat:.2} times that with {} held", scale.held[0]);
        let case = format!("pin unpin, {held} held");
        rows.push(Row { note, ..Row::of_costs(case.clone(), TREE, "ns", costs) });
        let goal = Costs { baseline: GOAL, ..costs };
        rows.push(Row::of_costs(case, "goal", "ns", goal));
    }
    let held = ours.len();
    tell(format!("pin unpin of any page, {held} held"));
    let costs = pin_unpin(scale, (&memory, &tree), scale.pages)?;
    let case = format!("pin unpin of any page, {held} held");
    rows.push(Row::of_costs(case, TREE, "ns", costs));
    drop((ours, theirs));
    tell("conversion with a pinner".into());
    rows.push(conversion(scale)?);
    for size in ring::SIZES {
        tell(format!("pinned io_uring read, {}", size.name));
        match ring::row(scale, size) {
            Ok(row) => rows.push(row),
            Err(missing) if missing.is_missing() => {
                let row = rows.last_mut().expect("the rows before");
                row.note = format!("{}; reads by io_uring were not measured: {missing}", row.note);
                break;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(rows)
}

/// Memory of which every [`APART`]th page is private: no large page is of one kind, and whoever
/// asks about a page has to look at that page.
fn memory(scale: &Scale, host: HostKind) -> Result<Memory, BenchError> {
    let memory = Memory::builder(PageCount::from(scale.pages)).host(host).shared().build()?;
    for page in private(scale) {
        let page = PageRange::one(page.into());
        memory.convert(page, Visibility::Private, Contents::Preserve, OnBusy::Wait)?;
    }
    Ok(memory)
}

fn private(scale: &Scale) -> impl Iterator<Item = u32> {
    (APART - 1..scale.pages).step_by(APART as usize)
}

fn one(page: u32) -> PageRange {
    PageRange::one(shared(page))
}

/// A page, or the one before it if it is private.
fn shared(page: u32) -> PageIndex {
    PageIndex::from(if page % APART == APART - 1 { page - 1 } else { page })
}

/// The pages that so many are held of, evenly spread.
fn spread(scale: &Scale, held: u32) -> impl Iterator<Item = u32> {
    let pages = u64::from(scale.pages);
    (0..held).filter_map(move |nth| u32::try_from(u64::from(nth) * pages / u64::from(held)).ok())
}

fn hold<'a>(
    scale: &Scale,
    held: u32,
    by: &'a Pinner<'_>,
    pins: &mut Vec<Pin<'a>>,
) -> Result<(), BenchError> {
    pins.clear();
    for page in spread(scale, held) {
        pins.push(by.pin(one(page), OnBusy::Refuse)?);
    }
    Ok(())
}

fn hold_in_tree<'a>(
    scale: &Scale,
    held: u32,
    (tree, holder): (&'a Registry, usize),
    pins: &mut Vec<Registered<'a>>,
) {
    pins.clear();
    pins.extend(spread(scale, held).map(|page| {
        tree.pin(holder, PinKind::LongTerm, shared(page)).expect("the page is shared")
    }));
}

/// Pins and unpins one of so many pages, one after the other.
fn pin_unpin(
    scale: &Scale,
    (memory, tree): (&Memory, &Registry),
    places: u32,
) -> Result<Costs, BenchError> {
    let disk = memory.pinner(PinKind::Short, Holder::new(HOLDER))?;
    let of_disk = tree.add_holder(Holder::new(HOLDER));
    let apart = scale.pages / places;
    let mut in_tree = |count| {
        each_place(count, places, |place| {
            let pin = tree.pin(of_disk, PinKind::Short, shared(place * apart));
            black_box(&pin.expect("nothing is in the way"));
        });
    };
    let mut in_polder = |count| {
        each_place(count, places, |place| {
            let pin = disk.pin(one(place * apart), OnBusy::Refuse);
            black_box(&pin.expect("nothing is in the way"));
        });
    };
    Ok(compare(scale.turn, &mut in_tree, &mut in_polder))
}

/// Does something at places, a power of two of them, in an order that no prefetcher knows.
fn each_place(count: u32, places: u32, mut each: impl FnMut(u32)) {
    let mut at = 0_u32;
    for _ in 0..count {
        at = at.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // The low bits of such a sequence come in order.
        each(black_box(at >> (32 - places.trailing_zeros())));
    }
}

const SPINS: u8 = 0;
const PINS: u8 = 1;
const STOPS: u8 = 2;

/// Conversions of a page, to private and back, next to a thread that pins others or spins.
fn conversion(scale: &Scale) -> Result<Row, BenchError> {
    let memory = memory(scale, HostKind::Memfd)?;
    let disk = memory.pinner(PinKind::Short, Holder::new(HOLDER))?;
    let does = AtomicU8::new(SPINS);
    let converted = |to| {
        let converted = memory.convert(one(scale.pages / 2), to, Contents::Preserve, OnBusy::Wait);
        converted.expect("nobody has that page pinned");
    };
    let convert_while = |what, count| {
        does.store(what, Ordering::Relaxed);
        for _ in 0..count {
            converted(Visibility::Private);
            converted(Visibility::Shared);
        }
    };
    let apart = Apart::new();
    let costs = std::thread::scope(|scope| {
        scope.spawn(|| {
            apart.iter().for_each(Apart::elsewhere);
            loop {
                match does.load(Ordering::Relaxed) {
                    STOPS => break,
                    SPINS => std::hint::spin_loop(),
                    _ => each_place(64, QUEUE, |place| {
                        drop(black_box(disk.pin(one(place), OnBusy::Wait)));
                    }),
                }
            }
        });
        let mut spins = |count| convert_while(SPINS, count);
        let mut pins = |count| convert_while(PINS, count);
        let costs = compare(scale.turn, &mut spins, &mut pins);
        does.store(STOPS, Ordering::Relaxed);
        costs
    });
    let note = "of one page, to private and back".to_owned();
    let case = "conversion with a pinner".to_owned();
    Ok(Row { note, ..Row::of_costs(case, "a spinning thread", "ns", costs) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Facility, found};

    #[test]
    fn every_case_is_measured() {
        let scale = Scale { pages: 1 << 12, held: &[1, 4_000], turn: Duration::from_millis(1) };
        let measured = run(&scale, &mut |_| {});
        let Some(rows) = found(Facility::Userfault, measured) else { return };
        let cases: Vec<&str> = rows.iter().map(|row| row.case.as_str()).collect();
        let expected = [
            "pin unpin, 1 held",
            "pin unpin, 1 held",
            "pin unpin, 4000 held",
            "pin unpin, 4000 held",
            "pin unpin of any page, 4000 held",
            "conversion with a pinner",
            "pinned io_uring read, 4K",
            "pinned io_uring read, 64K",
            "pinned io_uring read, 1M",
        ];
        // The last where there is io_uring.
        assert!(cases.len() >= 6 && expected.starts_with(&cases), "{cases:?}");
        assert!(rows.iter().all(|row| row.polder_value > 0.0 && row.ratio > 0.0));
    }
}
