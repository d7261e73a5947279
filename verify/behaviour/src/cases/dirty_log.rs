//! The dirty log: what is written is in it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use polder::units::{PAGE_BYTES, PAGE_SIZE, PageCount, PageRange};
use polder::{
    Contents, Dma, Error, Holder, HostKind, Memory, OnBusy, Platform, Refusal, Slot, Visibility,
};
use polder_vmm::scenario::Op;

use crate::Section::DirtyLog;
use crate::world::{
    BASE, Bound, PASSED, Stop, World, all, convert, fill, gfn, gfns, meanwhile, page, pages, put,
    share_all, to,
};
use crate::{Case, Ran};

pub(crate) const STARTED: &str =
    "it is started once and taken while it is on, or is refused by name";

pub(super) const CASES: &[Case] = &[
    Case::new(DirtyLog, STARTED, started),
    Case::new(
        DirtyLog,
        "what a guest writes is in it, again after it was taken, and what nobody touched is not",
        written,
    ),
    Case::new(DirtyLog, "what calls and touches write is in it", calls),
    Case::new(DirtyLog, "discarded and converted pages are in it", operations),
    Case::new(DirtyLog, "contents that come are in it", contents),
    Case::new(DirtyLog, "what a device has mapped is in it each time, and once after", device),
    Case::new(
        DirtyLog,
        "a slot that is bound later logs, and all of one that goes is in it",
        slots,
    ),
    Case::new(
        DirtyLog,
        "a copy made by it, while guest and host write and convert, is the same in the end",
        migration,
    ),
];

fn taken(memory: &Memory) -> BTreeSet<u64> {
    let dirty = memory.take_dirty_log().expect("it is on");
    dirty.runs().flat_map(|run| run.start().get()..run.end()).collect()
}

/// Takes what is in it, which is just these pages.
fn take(memory: &Memory, expected: impl IntoIterator<Item = u64>, why: &str) {
    assert_eq!(taken(memory), expected.into_iter().collect(), "{why}");
}

fn started(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    let beyond = Refusal::Beyond { range: page(memory.pages().get()), pages: memory.pages() };
    assert_eq!(memory.mark_dirty(page(memory.pages().get())), Err(beyond.into()));
    assert_eq!(memory.take_dirty_log().err(), Some(Error::DirtyLog { on: false }));
    assert_eq!(memory.stop_dirty_log(), Ok(()), "as it was");
    let confidential = matches!(memory.platform(), Platform::Snp | Platform::Pkvm);
    if w.kind() == HostKind::GuestMemfd || confidential {
        let refused = memory.start_dirty_log().expect_err("it can't be had");
        assert!(matches!(refused, Error::NotOffered { .. }) && refused.way_out().is_some());
        assert_eq!(memory.take_dirty_log().err(), Some(Error::DirtyLog { on: false }));
        return PASSED;
    }
    for _ in 0..2 {
        assert_eq!(memory.start_dirty_log(), Ok(()));
        assert_eq!(memory.start_dirty_log(), Err(Error::DirtyLog { on: true }));
        memory.mark_dirty(pages(2, 5)).expect("pages of the object");
        take(memory, 2..5, "they were marked");
        // What is not taken is forgotten.
        memory.mark_dirty(page(7)).expect("a page of the object");
        assert_eq!(memory.stop_dirty_log(), Ok(()));
        memory.mark_dirty(page(6)).expect("a page of the object");
    }
    PASSED
}

fn written(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let memory = &bound.memory;
    // Mapped for writing before, as large as may be.
    bound.passes([fill(gfns(pages(0, 12)), 1)]);
    memory.start_dirty_log().expect("it is off");
    for seed in 2..5 {
        bound.passes([fill(gfns(pages(2, 4)), seed), fill(gfns(page(9)), seed)]);
        let dirty = taken(memory);
        assert!([2, 3, 9].iter().all(|page| dirty.contains(page)), "{dirty:?}");
        // A page that is read is among them where KVM maps it for writing at once.
        assert!(dirty.iter().all(|page| *page < 12), "{dirty:?}");
    }
    take(memory, [], "nobody has written since");
    // After it was on and off, too.
    memory.stop_dirty_log().expect("it is on");
    bound.passes([fill(gfns(pages(0, 12)), 7)]);
    memory.start_dirty_log().expect("it is off");
    take(memory, [], "that was before");
    bound.passes([fill(gfns(page(11)), 8)]);
    assert!(taken(memory).contains(&11));
    PASSED
}

fn calls(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let memory = &bound.memory;
    share_all(memory);
    memory.start_dirty_log().expect("it is off");
    let across = gfn(BASE + 3).gpa().checked_add(PAGE_SIZE - 2).expect("a small address");
    memory.write(bound.vm, across, b"four").expect("shared pages");
    memory.read(bound.vm, gfn(BASE + 7).gpa(), &mut [0; 8]).expect("a shared page");
    take(memory, 3..5, "what is read is not");
    memory.write(bound.vm, across, &[]).expect("nothing");
    put(memory, 6, 1);
    let file = std::fs::File::open("/dev/zero").expect("there is one");
    let read = memory.host_view().read_from(&file, 8 * PAGE_SIZE, 2 * PAGE_BYTES);
    assert_eq!(read, Ok(2 * PAGE_BYTES));
    take(memory, [6, 8, 9], "nothing was written at page 3");
    to(memory, w.granules().page(0), Visibility::Private).expect("nothing is in the way");
    taken(memory);
    let denied = memory.write(bound.vm, gfn(BASE).gpa(), b"denied");
    assert!(matches!(denied, Err(Error::Refused(Refusal::Private { .. }))));
    take(memory, [], "it was refused before it began");
    if w.granules().is_small() {
        to(memory, page(5), Visibility::Private).expect("nothing is in the way");
        taken(memory);
        let denied = memory.host_view().touch_write(5 * PAGE_SIZE - 2, b"half");
        assert!(denied.is_err(), "the second page is private");
        let half = taken(memory);
        assert!(half.contains(&4), "it was denied half-way: {half:?}");
    }
    PASSED
}

fn operations(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let memory = &bound.memory;
    let (shared, private) = (Visibility::Shared, Visibility::Private);
    memory.start_dirty_log().expect("it is off");
    let convert = |range, to, contents| memory.convert(range, to, contents, OnBusy::Wait);
    convert(pages(2, 4), shared, Contents::Preserve).expect("nothing is in the way");
    take(memory, 2..4, "it can be had now");
    convert(pages(2, 4), shared, Contents::Preserve).expect("it is so");
    take(memory, [], "it was so already");
    convert(pages(3, 4), private, Contents::Zero).expect("nothing is in the way");
    take(memory, 3..4, "it is zeros now");
    memory.discard(pages(5, 8), OnBusy::Wait).expect("nothing is in the way");
    take(memory, 5..8, "they are zeros now");
    PASSED
}

fn contents(w: &World<'_>) -> Ran {
    let memory = w.owed(16)?;
    let end = memory.pages().get();
    let granule = w.granules();
    memory.start_dirty_log().expect("it is off");
    let brought = granule.page(0);
    memory.populate(brought, b"what came").expect("it is owed");
    take(&memory, brought.start().get()..brought.end(), "it has come");
    memory.settle().expect("nobody is at work");
    take(&memory, brought.end()..end, "it is zeros now");
    PASSED
}

struct Anything;

impl Dma for Anything {
    fn map(&self, _: PageRange) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: PageRange) -> Result<(), Error> {
        Ok(())
    }
}

fn device(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    memory.start_dirty_log().expect("it is off");
    to(memory, pages(2, 4), Visibility::Shared).expect("nothing is in the way");
    taken(memory);
    let device = memory.attach_dma(Holder::new("nic"), PageCount::ONE, Arc::new(Anything));
    let device = device.expect("what is shared is of whole pieces");
    for _ in 0..3 {
        take(memory, 2..4, "it may write at any time");
    }
    device.detach().expect("it lets go");
    take(memory, 2..4, "it may have written to the last");
    take(memory, [], "it has nothing mapped");
    PASSED
}

fn slots(w: &World<'_>) -> Ran {
    let memory = w.memory(16)?;
    let guest = w.guest()?;
    let vm = guest.attach(&memory);
    memory.start_dirty_log().expect("it is off");
    memory.bind(vm, Slot(0), gfn(BASE), all(&memory)).expect("a VM's first slot");
    let bound = Bound { memory, vm, guest };
    let memory = &bound.memory;
    bound.passes([fill(gfns(pages(3, 5)), 1)]);
    let dirty = taken(memory);
    assert!(dirty.contains(&3) && dirty.contains(&4), "{dirty:?}");
    memory.unbind(vm, Slot(0)).expect("it is bound");
    take(memory, 0..memory.pages().get(), "nobody knows what it was at");
    PASSED
}

/// Has a copy of memory follow it by the log. A page that is private is left out: it is in the log
/// again when it becomes shared.
fn follow(copy: &mut [u8], Bound { memory, vm, .. }: &Bound) {
    let dirty = memory.take_dirty_log().expect("it is on");
    for page in dirty.runs().flat_map(PageRange::frames) {
        let place = &mut copy[usize::try_from(page.offset()).expect("small")..][..PAGE_BYTES];
        match memory.read(*vm, gfn(BASE + page.get()).gpa(), place) {
            Ok(()) | Err(Error::Refused(Refusal::Private { .. })) => {}
            Err(error) => panic!("page {page}: {error}"),
        }
    }
}

/// Pages that guests write to all the time, that they convert too, and that the host writes to.
const WRITTEN: [(u64, u64); 2] = [(0, 12), (12, 24)];
const CONVERTED: (u64, u64) = (24, 28);
const HOSTS: u64 = 28;
const OF_MIGRATION: u64 = 32;

fn migration(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(OF_MIGRATION)?)?;
    let memory = &bound.memory;
    share_all(memory);
    bound.passes([fill(gfns(pages(0, OF_MIGRATION)), 1)]);
    memory.start_dirty_log().expect("it is off");
    let size = usize::try_from(memory.pages().get()).expect("small") * PAGE_BYTES;
    let mut copy = vec![0; size];
    memory.mark_dirty(all(memory)).expect("all that there is");
    follow(&mut copy, &bound);
    let done = AtomicBool::new(false);
    let rounds = w.rounds(40);
    let guests = || {
        let _ends = Stop(&done);
        bound.pass(WRITTEN.map(|own| program(own, rounds)).into());
    };
    let host = || {
        let mut wrote = 0u64;
        while !done.load(Ordering::Relaxed) {
            wrote += 1;
            let at = gfn(BASE + HOSTS + wrote % 2).gpa();
            memory.write(bound.vm, at, &wrote.to_le_bytes()).expect("a shared page");
            std::thread::yield_now();
        }
    };
    let ((), ((), ())) = meanwhile(guests, || {
        meanwhile(host, || {
            while !done.load(Ordering::Relaxed) {
                follow(&mut copy, &bound);
            }
        })
    });
    // Everybody has stopped: what is private is made shared, and copied at last.
    share_all(memory);
    follow(&mut copy, &bound);
    let mut now = vec![0; PAGE_BYTES];
    for page in all(memory).frames() {
        memory.read(bound.vm, gfn(BASE + page.get()).gpa(), &mut now).expect("a shared page");
        let copied = &copy[usize::try_from(page.offset()).expect("small")..][..PAGE_BYTES];
        assert!(now == copied, "page {page} is not what was copied");
    }
    PASSED
}

/// Fills pages of its own over and over; the first vCPU's also converts some.
fn program(own: (u64, u64), rounds: u64) -> Vec<Op> {
    let mut ops = Vec::new();
    for seed in 2..rounds + 2 {
        ops.push(fill(gfns(pages(own.0, own.1)), seed));
        if own.0 == 0 {
            let range = gfns(pages(CONVERTED.0, CONVERTED.1));
            ops.push(convert(range, Visibility::Private));
            ops.push(fill(range, seed));
            ops.push(convert(range, Visibility::Shared));
        }
    }
    ops
}
