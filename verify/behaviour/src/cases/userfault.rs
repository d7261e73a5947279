//! Contents that a source brings when they are touched.

mod huge;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use polder::source::{Delivery, Fault, FaultySource, SourceError};
use polder::units::{PAGE_BYTES, PageCount, PageIndex, PageRange};
use polder::{
    Error, HostKind, Memory, MemoryFault, OnBusy, ReadAhead, Refusal, Source, Visibility,
};
use polder_require::patience;
use polder_vmm::scenario::Op;
use polder_vmm::{End, Failure};

use super::population::{A_WHILE, waits};
use crate::Section::Userfault;
use crate::world::{
    BASE, PASSED, World, all, byte, check, count, gfn, gfns, holds, meanwhile, page, pages, seeded,
    to, zero,
};
use crate::{Case, Ran, Skipped};

pub(super) const FILES: [&[Case]; 2] = [CASES, huge::CASES];

const CASES: &[Case] = &[
    Case::new(Userfault, "a touch by any view brings its page, whole", touch),
    Case::new(Userfault, "guest and host that touch one page have it read once", once),
    Case::new(Userfault, "an access of the API waits for the source", api),
    Case::new(Userfault, "with read-ahead off, what nobody touches is not read", alone),
    Case::new(Userfault, "a page that a source can't read is denied to all, and no other", fails),
    Case::new(Userfault, "a source that panics, ends or lies fails in the same way", lies),
    Case::new(Userfault, "who waits for a source longer than the deadline is denied", late),
    Case::new(Userfault, "while a source does not answer, other faults are", others),
    Case::new(Userfault, "pages that are being read can be converted", converted),
    Case::new(Userfault, "pages that are being read can be discarded, and are zeros", discarded),
    Case::new(Userfault, "pages that are discarded are not read any more", forgotten),
    Case::new(Userfault, "pages that are being read can be populated by others", populated),
    Case::new(
        Userfault,
        "all is brought by and by, if asked for, and nothing is owed then",
        filled,
    ),
    Case::new(Userfault, "nobody sees a torn page while a source fills it", torn),
    Case::new(
        Userfault,
        "touches come as events to fault threads, or as exits of their vCPU",
        delivery,
    ),
];

const SEED: u64 = 21;

/// A source of what a guest bound from [`BASE`] on would have written. It counts, and can be held.
#[derive(Default)]
struct Written {
    reads: AtomicU64,
    forgotten: AtomicU64,
    held: AtomicBool,
}

impl Source for Written {
    fn name(&self) -> String {
        "what the guest wrote".into()
    }

    fn read(&self, range: PageRange, into: &mut [u8]) -> Result<usize, SourceError> {
        self.reads.fetch_add(range.count().get(), Ordering::Relaxed);
        while self.held.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        for (page, into) in range.frames().zip(into.chunks_exact_mut(PAGE_BYTES)) {
            into.copy_from_slice(&seeded(gfn(BASE + page.get()), SEED));
        }
        Ok(into.len())
    }

    fn forget(&self, range: PageRange) {
        self.forgotten.fetch_add(range.count().get(), Ordering::Relaxed);
    }
}

/// Shared memory of `pages` pages that `source` fills.
fn memory(
    w: &World<'_>,
    pages: u64,
    source: Arc<dyn Source>,
    deadline: Duration,
) -> Result<Memory, Skipped> {
    let builder = w.builder(pages).shared().source(source);
    let builder = builder.read_ahead(ReadAhead::Off).fault_deadline(patience(deadline));
    Ok(w.try_build(builder)?.expect("memory of a sensible size"))
}

const LONG: Duration = Duration::from_secs(60);

fn touch(w: &World<'_>) -> Ran {
    let bound = w.bound(memory(w, 16, Arc::new(Written::default()), LONG)?)?;
    let memory = &bound.memory;
    assert!(holds(memory, page(3), SEED));
    bound.passes([check(gfns(pages(5, 9)), SEED), check(gfns(page(3)), SEED)]);
    assert!(holds(memory, pages(5, 9), SEED));
    assert_eq!(memory.owed(), count(11));
    PASSED
}

fn once(w: &World<'_>) -> Ran {
    let source = Arc::new(Written::default());
    let bound = w.bound(memory(w, 4, Arc::clone(&source) as Arc<dyn Source>, LONG)?)?;
    source.held.store(true, Ordering::Release);
    let together = || {
        let guest = || bound.passes([check(gfns(page(1)), SEED)]);
        meanwhile(guest, || holds(&bound.memory, page(1), SEED)).1
    };
    assert!(waits(together, || source.held.store(false, Ordering::Release)));
    assert_eq!(source.reads.load(Ordering::Relaxed), 1);
    PASSED
}

fn api(w: &World<'_>) -> Ran {
    let source = Arc::new(Written::default());
    let bound = w.bound(memory(w, 4, Arc::clone(&source) as Arc<dyn Source>, LONG)?)?;
    source.held.store(true, Ordering::Release);
    let mut bytes = vec![0; 2 * PAGE_BYTES];
    let read = || bound.memory.read(bound.vm, gfn(BASE + 1).gpa(), &mut bytes);
    assert_eq!(waits(read, || source.held.store(false, Ordering::Release)), Ok(()));
    assert!(bytes[..PAGE_BYTES] == seeded(gfn(BASE + 1), SEED));
    assert!(bytes[PAGE_BYTES..] == seeded(gfn(BASE + 2), SEED));
    PASSED
}

fn alone(w: &World<'_>) -> Ran {
    let source = Arc::new(Written::default());
    let memory = memory(w, 64, Arc::clone(&source) as Arc<dyn Source>, LONG)?;
    assert!([3, 4, 50].into_iter().all(|at| holds(&memory, page(at), SEED)));
    assert_eq!(source.reads.load(Ordering::Relaxed), 3);
    assert_eq!(memory.owed(), count(61));
    PASSED
}

fn fails(w: &World<'_>) -> Ran {
    let source = FaultySource::new(Written::default(), Fault::Fails, PageIndex::from(2), 0);
    let bound = w.bound(memory(w, 8, Arc::new(source), LONG)?)?;
    let memory = &bound.memory;
    let ended = bound.run([check(gfns(pages(0, 2)), SEED), check(gfns(page(2)), SEED)]);
    let fault = MemoryFault::SourceFailed(gfns(page(2)));
    let failures = [
        Failure::MemoryFailure { vcpu: 0, page: Some(2u32.into()) },
        Failure::MemoryFault { vcpu: 0, fault },
    ];
    assert!(failures.map(End::Failed).contains(&ended.end), "{:?}", ended.end);
    assert_eq!(byte_of(memory, 2), None);
    let refused = Error::Refused(Refusal::SourceFailed { page: 2u32.into() });
    assert_eq!(memory.read(bound.vm, gfn(BASE + 2).gpa(), &mut [0]), Err(refused));
    assert!(holds(memory, pages(3, 8), SEED));
    bound.passes([check(gfns(pages(3, 8)), SEED)]);
    let failures = memory.source_failures();
    assert_eq!(failures.len(), 1);
    assert_eq!(
        (failures[0].pages, failures[0].source_name.as_str()),
        (page(2), "what the guest wrote")
    );
    memory.discard(page(2), OnBusy::Wait).expect("no pins");
    bound.passes([zero(gfns(page(2)))]);
    PASSED
}

/// Whether a touch of a page is let through; its first byte.
fn byte_of(memory: &Memory, at: u64) -> Option<u8> {
    crate::world::touch(memory, at).ok().map(|bytes| bytes[0])
}

fn lies(w: &World<'_>) -> Ran {
    for fault in [Fault::Panics, Fault::Ends, Fault::Ragged, Fault::TooLong] {
        let source = FaultySource::new(Written::default(), fault, PageIndex::from(1), 2);
        let memory = memory(w, 6, Arc::new(source), LONG)?;
        for at in 0..6 {
            let seen = holds(&memory, page(at), SEED);
            assert_eq!(seen, at % 2 == 0, "{fault:?}, page {at}");
        }
        assert_eq!(memory.source_statistics().failed, 3, "{fault:?}");
    }
    PASSED
}

fn late(w: &World<'_>) -> Ran {
    let source = Arc::new(Written::default());
    let deadline = Duration::from_millis(100);
    let bound = w.bound(memory(w, 4, Arc::clone(&source) as Arc<dyn Source>, deadline)?)?;
    source.held.store(true, Ordering::Release);
    let guest = || bound.run([Op::Load { gpa: gfn(BASE + 1).gpa(), expect: 0 }]).end;
    let (end, host) = meanwhile(guest, || byte_of(&bound.memory, 2));
    assert!(matches!(end, End::Failed(_)), "{end:?}");
    assert_eq!(host, None);
    let failures = bound.memory.source_failures();
    assert!(failures.iter().all(|it| it.why == SourceError::Late(patience(deadline))));
    source.held.store(false, Ordering::Release);
    // What comes after all is not taken, and what was not asked for is there to be had.
    std::thread::sleep(patience(A_WHILE));
    assert_eq!(byte_of(&bound.memory, 1), None);
    assert!(holds(&bound.memory, page(3), SEED));
    PASSED
}

fn others(w: &World<'_>) -> Ran {
    let source = Arc::new(Written::default());
    let memory = memory(w, 64, Arc::clone(&source) as Arc<dyn Source>, LONG)?;
    assert!(holds(&memory, pages(0, 4), SEED));
    // Away from the host view, so that a touch is a question.
    to(&memory, pages(0, 4), Visibility::Private).expect("no pins");
    if memory.keeps_most(Visibility::Shared) != polder::Contents::Preserve {
        source.held.store(false, Ordering::Release);
        return PASSED;
    }
    to(&memory, pages(0, 4), Visibility::Shared).expect("no pins");
    source.held.store(true, Ordering::Release);
    std::thread::scope(|scope| {
        // More than there are threads.
        let waiting: Vec<_> = (0..6)
            .map(|n| {
                let memory = &memory;
                scope.spawn(move || holds(memory, page(10 + 8 * n), SEED))
            })
            .collect();
        std::thread::sleep(patience(A_WHILE));
        assert!(holds(&memory, pages(0, 4), SEED), "it is there");
        assert!(waiting.iter().all(|thread| !thread.is_finished()));
        source.held.store(false, Ordering::Release);
        assert!(waiting.into_iter().all(|thread| thread.join().expect("it does not panic")));
    });
    PASSED
}

/// Has page 1 read, and something else done while it is; then lets the read go on.
fn amid_read<T: Send>(
    w: &World<'_>,
    touch: impl FnOnce(&Memory) -> T + Send,
    then: impl FnOnce(&Memory),
) -> Result<(Memory, T), Skipped> {
    let source = Arc::new(Written::default());
    let memory = memory(w, 4, Arc::clone(&source) as Arc<dyn Source>, LONG)?;
    source.held.store(true, Ordering::Release);
    let (seen, ()) = meanwhile(
        || touch(&memory),
        || {
            while source.reads.load(Ordering::Relaxed) == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            then(&memory);
            source.held.store(false, Ordering::Release);
        },
    );
    Ok((memory, seen))
}

fn converted(w: &World<'_>) -> Ran {
    let convert = |memory: &Memory| {
        if !memory.platform().host_fills_private() {
            return;
        }
        let contents = memory.keeps_most(Visibility::Private);
        let converted = memory
            .convert(page(1), Visibility::Private, contents, OnBusy::Refuse)
            .map(|it| it.get());
        assert_eq!(converted, Ok(1), "a read holds nothing");
    };
    let (memory, seen) = amid_read(w, |memory| byte_of(memory, 1), convert)?;
    if memory.platform().host_fills_private() {
        assert_eq!(seen, None, "it is private now");
        to(&memory, page(1), Visibility::Shared).expect("no pins");
    }
    assert!(holds(&memory, page(1), SEED), "what was read is for either kind");
    PASSED
}

fn discarded(w: &World<'_>) -> Ran {
    let discard =
        |memory: &Memory| memory.discard(page(1), OnBusy::Refuse).expect("it holds nothing");
    let (memory, seen) = amid_read(w, |memory| byte(memory, 1), discard)?;
    assert_eq!((seen, byte(&memory, 1)), (Some(0), Some(0)));
    PASSED
}

fn forgotten(w: &World<'_>) -> Ran {
    let source = Arc::new(Written::default());
    let memory = memory(w, 8, Arc::clone(&source) as Arc<dyn Source>, LONG)?;
    memory.discard(pages(2, 6), OnBusy::Wait).expect("no pins");
    assert_eq!(source.forgotten.load(Ordering::Relaxed), 4);
    assert!((2..6).all(|at| byte(&memory, at) == Some(0)));
    assert_eq!(source.reads.load(Ordering::Relaxed), 0);
    assert!(holds(&memory, pages(0, 2), SEED) && holds(&memory, pages(6, 8), SEED));
    assert!(owed_in_time(&memory, count(0)));
    PASSED
}

fn populated(w: &World<'_>) -> Ran {
    let populate =
        |memory: &Memory| memory.populate(page(1), &[7; PAGE_BYTES]).expect("it is owed still");
    let (memory, seen) = amid_read(w, |memory| byte(memory, 1), populate)?;
    assert_eq!((seen, byte(&memory, 1)), (Some(7), Some(7)));
    PASSED
}

/// Whether so much is owed in the end: who waits for one page of a huge one may go on before its
/// last has come.
fn owed_in_time(memory: &Memory, owed: PageCount) -> bool {
    (0..patience(LONG).as_millis()).any(|_| {
        let so = memory.owed() == owed;
        if !so {
            std::thread::sleep(Duration::from_millis(1));
        }
        so
    })
}

fn filled(w: &World<'_>) -> Ran {
    let bound = w.bound(memory(w, 200, Arc::new(Written::default()), LONG)?)?;
    let memory = &bound.memory;
    memory.fill();
    memory.fetch(all(memory)).expect("it can all be had");
    assert!(memory.owed().is_zero());
    let before = memory.statistics().guest_faults;
    bound.passes([check(gfns(all(memory)), SEED)]);
    // On the machine Polder is the hypervisor, and told of each.
    let told = memory.statistics().guest_faults - before;
    assert!(told == 0 || memory.simulated(|_, _, _| ()).is_ok(), "{told}");
    PASSED
}

fn torn(w: &World<'_>) -> Ran {
    let builder = w.builder(256).shared().source(Arc::new(Written::default()));
    let memory = w.try_build(builder)?.expect("memory of a sensible size");
    let bound = w.bound(memory)?;
    let (memory, whole) = (&bound.memory, pages(0, 256));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| assert!(holds(memory, whole, SEED)));
        }
        bound.pass(vec![vec![check(gfns(whole), SEED)], vec![check(gfns(pages(128, 256)), SEED)]]);
    });
    PASSED
}

/// A source that notes by which threads it is read.
#[derive(Default)]
struct Noted {
    written: Written,
    readers: Mutex<Vec<String>>,
}

impl Source for Noted {
    fn name(&self) -> String {
        self.written.name()
    }

    fn read(&self, range: PageRange, into: &mut [u8]) -> Result<usize, SourceError> {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("no name").to_owned();
        self.readers.lock().expect("nobody panics with it").push(name);
        self.written.read(range, into)
    }
}

fn delivery(w: &World<'_>) -> Ran {
    const PAGES: u64 = 64;
    let build = |delivery| {
        let source = Arc::new(Noted::default());
        let builder = Memory::builder(count(PAGES)).shared().delivery(delivery);
        let builder = builder.source(Arc::clone(&source) as Arc<dyn Source>);
        let builder = builder.read_ahead(ReadAhead::Off).fault_deadline(patience(LONG));
        w.try_build(builder).map(|built| (source, built))
    };
    for delivery in [Delivery::Events, Delivery::Exits] {
        let (source, built) = build(delivery)?;
        let memory = match built {
            Err(Error::NotOffered { .. }) if delivery == Delivery::Exits => {
                let plain = w.memory(1)?.platform();
                let of_machine = w.kind() == HostKind::Machine;
                assert!(!of_machine || plain.has_rmp() || plain.hypervisor_keeps_stage2());
                continue;
            }
            built => built.expect("memory of a sensible size"),
        };
        let bound = w.bound(memory)?;
        let halves = [pages(0, PAGES / 2), pages(PAGES / 2, PAGES)];
        bound.pass(halves.map(|half| vec![check(gfns(half), SEED)]).to_vec());
        let readers = source.readers.lock().expect("nobody panics with it");
        assert_eq!(readers.len() as u64, PAGES, "{delivery:?}: each page once");
        let by_faults = readers.iter().filter(|name| *name == "polder-faults").count();
        match delivery {
            Delivery::Events => assert_eq!(by_faults, readers.len()),
            Delivery::Exits => assert_eq!(by_faults, 0, "each vCPU's own thread"),
        }
        drop(readers);
        assert!(holds(&bound.memory, all(&bound.memory), SEED));
        bound.memory.discard(page(3), OnBusy::Wait).expect("no pins");
        bound.passes([zero(gfns(page(3))), check(gfns(pages(4, PAGES)), SEED)]);
    }
    PASSED
}
