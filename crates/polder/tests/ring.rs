//! io_uring straight into shared guest memory: who has pages pinned meanwhile, who is refused
//! because of it, and that no byte goes astray.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use polder::units::{PAGE_SIZE, PageCount, PageRange};
use polder::{
    Completed, Contents, DeadPin, Error, Holder, HostKind, Memory, OnBusy, PinKind, Refusal, Ring,
    Visibility,
};
use polder_require::{Facility, require};

use PinKind::{Exclusive, LongTerm, Short};
use Visibility::{Private, Shared};

fn disk() -> Holder {
    Holder::new("virtio-blk")
}

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in the test")
}

/// Shared memory of so many pages, if this machine has io_uring.
fn memory(count: u32) -> Option<Memory> {
    let builder = Memory::builder(PageCount::from(count)).shared();
    let memory = require(Facility::Userfault, builder.build())?;
    require(Facility::IoUring, memory.ring(disk(), 1, OnBusy::Refuse))?;
    Some(memory)
}

/// A file that is gone when it is closed.
fn file(bytes: &[u8]) -> File {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("polder-ring-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let open = File::options().read(true).write(true).create_new(true).open(&path);
    let file = open.expect("a file in the temporary directory");
    std::fs::remove_file(&path).expect("it is ours");
    file.write_all_at(bytes, 0).expect("a few bytes");
    file
}

fn to(memory: &Memory, range: PageRange, to: Visibility) -> Result<(), Error> {
    memory.convert(range, to, Contents::Preserve, OnBusy::Refuse).map(drop)
}

fn pinned(page: u32, kind: PinKind) -> Error {
    Refusal::Pinned { page: page.into(), kind, holder: disk() }.into()
}

fn read(memory: &Memory, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    memory.host_view().touch_read(page * PAGE_SIZE, &mut bytes).expect("the page is shared");
    bytes
}

/// All that is in flight.
fn all(ring: &mut Ring<'_>) -> Vec<Completed> {
    ring.submit(u32::MAX).expect("it waits");
    std::iter::from_fn(|| ring.complete()).collect()
}

#[test]
fn a_file_is_read_into_shared_pages_and_written_from_them() {
    let Some(memory) = memory(8) else { return };
    let source = file(&[[1; 4096], [2; 4096], [3; 4096]].concat());
    let target = file(&[]);
    let mut ring = memory.ring(disk(), 4, OnBusy::Wait).unwrap();
    for fixed in [false, true] {
        if fixed {
            ring.register(&[pages(0, 1), pages(2, 6)]).unwrap();
        }
        ring.read(source.as_fd(), 0, 2 * PAGE_SIZE, 4096, 10).unwrap();
        // Not a whole page, and over a page's end.
        ring.read(source.as_fd(), 6144, 3 * PAGE_SIZE + 2048, 4096, 11).unwrap();
        ring.read(source.as_fd(), 8192, 5 * PAGE_SIZE, 9000, 12)
            .unwrap_or_else(|error| panic!("what is no part of a buffer is pinned: {error}"));
        let mut done = all(&mut ring);
        done.sort_by_key(|done| done.tag);
        let came = |tag, count| Completed { tag, result: Ok(count) };
        assert_eq!(done, [came(10, 4096), came(11, 4096), came(12, 4096)]);
        assert_eq!(read(&memory, 2), [1; 4096]);
        assert_eq!(read(&memory, 3)[2048..], [2; 2048]);
        assert_eq!(read(&memory, 4)[..2048], [3; 2048]);
        assert_eq!(read(&memory, 5), [3; 4096]);
        ring.write(target.as_fd(), 100, 3 * PAGE_SIZE + 2048, 4096, 13).unwrap();
        assert_eq!(all(&mut ring), [came(13, 4096)]);
        let mut bytes = [0; 4096];
        target.read_exact_at(&mut bytes, 100).unwrap();
        assert_eq!(bytes, [[2; 2048], [3; 2048]].concat()[..]);
        memory.host_view().touch_write(0, &[0; 8 * 4096]).unwrap();
    }
}

#[test]
fn pages_are_pinned_while_a_transfer_is_in_flight() {
    let Some(memory) = memory(4) else { return };
    let (reader, mut writer): (PipeReader, PipeWriter) = std::io::pipe().unwrap();
    let mut ring = memory.ring(disk(), 4, OnBusy::Refuse).unwrap();
    ring.read(reader.as_fd(), 0, PAGE_SIZE, 2 * 4096, 1).unwrap();
    // Queued is as good as begun: it can't be taken back.
    assert_eq!(to(&memory, pages(0, 4), Private), Err(pinned(1, Short)));
    ring.submit(0).unwrap();
    assert_eq!(ring.complete(), None, "nothing was written yet");
    assert_eq!(to(&memory, pages(2, 3), Private), Err(pinned(2, Short)));
    assert_eq!(memory.discard(pages(0, 4), OnBusy::Refuse), Err(pinned(1, Short)));
    let exclusive = memory.pin(pages(2, 3), Exclusive, Holder::new("a hypervisor"));
    assert_eq!(exclusive.unwrap_err(), pinned(2, Short));
    to(&memory, pages(0, 1), Private).unwrap();

    writer.write_all(&[7; 100]).unwrap();
    ring.submit(1).unwrap();
    assert_eq!(to(&memory, pages(1, 2), Private), Err(pinned(1, Short)), "not told of yet");
    assert_eq!(ring.complete(), Some(Completed { tag: 1, result: Ok(100) }));
    assert_eq!(read(&memory, 1)[..101], [&[7; 100][..], &[0]].concat());
    to(&memory, pages(1, 4), Private).unwrap();
}

#[test]
fn a_fixed_buffer_is_pinned_as_long_as_it_is_registered() {
    let Some(memory) = memory(8) else { return };
    let source = file(&[5; 4096]);
    let mut ring = memory.ring(disk(), 4, OnBusy::Refuse).unwrap();
    ring.register(&[pages(2, 4), pages(6, 7)]).unwrap();
    assert_eq!(to(&memory, pages(0, 8), Private), Err(pinned(2, LongTerm)));
    assert_eq!(memory.discard(pages(6, 8), OnBusy::Refuse), Err(pinned(6, LongTerm)));
    to(&memory, pages(4, 6), Private).unwrap();
    ring.read(source.as_fd(), 0, 3 * PAGE_SIZE, 4096, 1).unwrap();
    assert_eq!(all(&mut ring), [Completed { tag: 1, result: Ok(4096) }]);
    assert_eq!(to(&memory, pages(3, 4), Private), Err(pinned(3, LongTerm)), "not by the transfer");
    // Other buffers instead of those; one that can't be pinned, and there is none.
    ring.register(&[pages(0, 1)]).unwrap();
    to(&memory, pages(2, 4), Private).unwrap();
    let refused = ring.register(&[pages(1, 2), pages(2, 4)]).unwrap_err();
    assert_eq!(refused, Refusal::Private { page: 2_u32.into() }.into());
    to(&memory, pages(0, 2), Private).unwrap();
    to(&memory, pages(0, 8), Shared).unwrap();
    ring.register(&[pages(0, 8)]).unwrap();
    ring.unregister().unwrap();
    to(&memory, pages(0, 8), Private).unwrap();
    ring.unregister().unwrap();
    assert_eq!(read_all_refused(&mut ring, &source), 8);
}

/// How many pages are refused because they are private.
fn read_all_refused<'a>(ring: &mut Ring<'a>, source: &'a File) -> usize {
    let refused = (0..8_u64).filter(|page| {
        let queued = ring.read(source.as_fd(), 0, page * PAGE_SIZE, 4096, *page);
        matches!(queued, Err(Error::Refused(Refusal::Private { .. })))
    });
    refused.count()
}

#[test]
fn what_can_not_be_is_refused_and_pins_nothing() {
    let Some(memory) = memory(4) else { return };
    let source = file(&[1; 4096]);
    let none = memory.ring(disk(), 0, OnBusy::Refuse).unwrap_err();
    assert_eq!(none.errno(), polder::Errno::EINVAL);
    let mut ring = memory.ring(disk(), 1, OnBusy::Refuse).unwrap();
    let mut read = |offset, count| ring.read(source.as_fd(), 0, offset, count, 0).unwrap_err();
    assert!(matches!(read(0, 0), Error::Refused(Refusal::Range(_))));
    assert!(matches!(read(u64::MAX, 2), Error::Refused(Refusal::Range(_))));
    assert!(matches!(read(4 * PAGE_SIZE - 1, 2), Error::Refused(Refusal::Beyond { .. })));
    assert!(matches!(read(0, u32::MAX), Error::Refused(Refusal::Beyond { .. })));
    let beyond = ring.register(&[pages(3, 5)]).unwrap_err();
    assert!(matches!(beyond, Error::Refused(Refusal::Beyond { .. })), "{beyond}");
    // More than there is room for: the one that does not fit is not pinned.
    let mut queued = 0_u32;
    let full = loop {
        match ring.read(source.as_fd(), 0, u64::from(queued) * PAGE_SIZE, 4096, 0) {
            Ok(()) => queued += 1,
            Err(full) => break full,
        }
    };
    assert_eq!(full, Error::RingFull { in_flight: queued });
    assert!(full.way_out().is_some());
    to(&memory, pages(queued.into(), 4), Private).unwrap();
    assert_eq!(ring.in_flight(), all(&mut ring).len());
    to(&memory, pages(0, 4), Private).unwrap();
    // What the file refuses is told as it is.
    let write_only = File::options().write(true).open("/dev/null").unwrap();
    to(&memory, pages(0, 4), Shared).unwrap();
    let mut ring = memory.ring(disk(), 1, OnBusy::Refuse).unwrap();
    ring.read(write_only.as_fd(), 0, 0, 4096, 3).unwrap();
    let done = all(&mut ring);
    assert!(matches!(done[..], [Completed { tag: 3, result: Err(_) }]), "{done:?}");
    drop(ring);
    let simulated = Memory::builder(PageCount::from(4)).host(HostKind::Machine).build().unwrap();
    let refused = simulated.ring(disk(), 4, OnBusy::Refuse).unwrap_err();
    assert!(matches!(refused, Error::NotOffered { .. }));
}

#[test]
fn a_ring_that_goes_cancels_what_never_comes_and_unpins_all() {
    let Some(memory) = memory(8) else { return };
    let (reader, _writer): (PipeReader, PipeWriter) = std::io::pipe().unwrap();
    for submitted in [false, true] {
        let mut ring = memory.ring(disk(), 4, OnBusy::Refuse).unwrap();
        ring.register(&[pages(0, 2)]).unwrap();
        ring.read(reader.as_fd(), 0, 0, 4096, 1).unwrap();
        ring.read(reader.as_fd(), 0, 4 * PAGE_SIZE, 4096, 2).unwrap();
        if submitted {
            ring.submit(0).unwrap();
        }
        // Unregistering tells of what it has cancelled.
        if submitted {
            ring.unregister().unwrap();
            let tags: Vec<u64> = std::iter::from_fn(|| ring.complete()).map(|it| it.tag).collect();
            assert_eq!(tags.len(), 2, "{tags:?}");
            ring.read(reader.as_fd(), 0, 4 * PAGE_SIZE, 4096, 2).unwrap();
        }
        drop(ring);
        to(&memory, pages(0, 8), Private).unwrap();
        to(&memory, pages(0, 8), Shared).unwrap();
    }
}

#[test]
fn the_pins_of_a_ring_whose_thread_dies_are_given_back_and_named() {
    let Some(memory) = memory(8) else { return };
    let source = file(&[5; 4096]);
    let (reader, _writer): (PipeReader, PipeWriter) = std::io::pipe().unwrap();
    let died = std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            let mut ring = memory.ring(disk(), 4, OnBusy::Refuse).unwrap();
            ring.register(&[pages(0, 2)]).unwrap();
            let mut read = |file, page| ring.read(file, 0, page * PAGE_SIZE, 4096, page);
            // Of a fixed buffer; one that never comes; one that is over, and not told of; one that
            // was told of; one that was not even submitted.
            read(reader.as_fd(), 1).unwrap();
            read(reader.as_fd(), 3).unwrap();
            read(source.as_fd(), 5).unwrap();
            ring.submit(1).unwrap();
            assert_eq!(ring.complete(), Some(Completed { tag: 5, result: Ok(4096) }));
            ring.read(source.as_fd(), 0, 6 * PAGE_SIZE, 4096, 6).unwrap();
            ring.submit(1).unwrap();
            ring.read(source.as_fd(), 0, 7 * PAGE_SIZE, 4096, 7).unwrap();
            assert_eq!(to(&memory, pages(2, 8), Private), Err(pinned(3, Short)));
            // No message of a panic's: it is meant.
            std::panic::resume_unwind(Box::new("a device model's bug"));
        });
        device.join()
    });
    assert!(died.is_err());
    let dead = memory.dead_pins();
    let of = |start, end, kind| DeadPin { range: pages(start, end), kind, holder: disk() };
    let mut ranges = dead.clone();
    ranges.sort_by_key(|pin| pin.range.start());
    let expected = [of(0, 2, LongTerm), of(3, 4, Short), of(6, 7, Short), of(7, 8, Short)];
    assert_eq!(ranges, expected, "in what order they went is nobody's affair");
    to(&memory, pages(0, 8), Private).unwrap();
    drop(memory.ring(disk(), 4, OnBusy::Refuse).unwrap());
    assert_eq!(memory.dead_pins(), dead, "who lets go by himself is none of them");
}

#[test]
fn where_io_uring_is_forbidden_the_way_out_is_told() {
    let Some(memory) = memory(1) else { return };
    let forbidden = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // Of this thread alone.
            forbid_io_uring()?;
            Ok::<_, seccompiler::Error>(memory.ring(disk(), 1, OnBusy::Refuse).err())
        });
        thread.join().unwrap()
    });
    let Some(forbidden) = require(Facility::Seccomp, forbidden) else { return };
    let Some(error @ Error::Missing { .. }) = forbidden else { panic!("{forbidden:?}") };
    assert!(error.to_string().contains("may not use io_uring"), "{error}");
    assert!(error.way_out().is_some_and(|way_out| way_out.contains("io_uring_disabled")));
}

fn forbid_io_uring() -> Result<(), seccompiler::Error> {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    let rules = std::iter::once((libc::SYS_io_uring_setup, Vec::new())).collect();
    let (allow, eperm) = (SeccompAction::Allow, SeccompAction::Errno(libc::EPERM.unsigned_abs()));
    let filter = SeccompFilter::new(rules, allow, eperm, seccompiler::TargetArch::x86_64);
    let program: BpfProgram = filter.and_then(TryInto::try_into)?;
    seccompiler::apply_filter(&program)
}

/// The pages of the stress test, of which the last are fixed buffers, one half after the other.
const PAGES: u64 = 64;
const FIXED: u64 = 48;
/// The blocks of the file: each is its number, over and over.
const BLOCKS: u64 = 251;

fn rounds() -> u64 {
    let rounds = std::env::var("POLDER_RING_ROUNDS").ok();
    rounds.map_or(500, |rounds| rounds.parse().expect("POLDER_RING_ROUNDS is a number"))
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("a page of the test")
}

fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

/// A file is read into pages at random, while pages at random are made private and shared again.
/// Once nobody can be at it (an exclusive pin), each page is as its last read left it, to the byte:
/// what came late, or went into a page that was private, would be seen.
#[test]
fn no_byte_goes_astray_where_pages_are_converted_under_reads() {
    let Some(memory) = memory(64) else { return };
    let blocks = (0..BLOCKS).flat_map(|block| vec![u8::try_from(block).expect("few"); 4096]);
    let file = file(&blocks.collect::<Vec<u8>>());
    // What each page was last read from, and is perhaps being read from.
    let read: Vec<[AtomicU64; 2]> = (0..PAGES).map(|_| Default::default()).collect();
    let stop = AtomicBool::new(false);
    let (converted, refused, reads) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_at_random(&memory, &file, &read, &stop));
        let converted = convert_at_random(&memory, &read, rounds());
        stop.store(true, Ordering::Relaxed);
        let reads = reader.join().expect("the reader is well");
        (converted.0, converted.1, reads)
    });
    assert_eq!(converted, rounds());
    assert!(refused > 0 && reads > rounds() / 10, "{refused} refused, {reads} reads");
    println!("{converted} conversions, {refused} refused, {reads} reads");
}

fn read_at_random(memory: &Memory, file: &File, read: &[[AtomicU64; 2]], stop: &AtomicBool) -> u64 {
    let mut ring = memory.ring(disk(), 16, OnBusy::Refuse).expect("nothing is wrong with it");
    let (mut seed, mut reads) = (1, 0);
    let mut busy = [false; 64];
    while !stop.load(Ordering::Relaxed) {
        if random(&mut seed).is_multiple_of(256) {
            let half = random(&mut seed) % 2 * 8;
            // Refused while a page of it is converted: then there is none.
            let _ = ring.register(&[pages(FIXED + half, FIXED + half + 8)]);
        }
        for _ in 0..8 {
            let (page, block) = (random(&mut seed) % PAGES, random(&mut seed) % BLOCKS);
            let at = index(page);
            if busy[at] {
                continue;
            }
            // Said before: from when it is pinned on the page may be either.
            read[at][1].store(block, Ordering::SeqCst);
            let queued = ring.read(
                file.as_fd(),
                block * PAGE_SIZE,
                page * PAGE_SIZE,
                4096,
                page << 8 | block,
            );
            match queued {
                Ok(()) => busy[at] = true,
                Err(Error::Refused(_)) => {
                    read[at][1].store(read[at][0].load(Ordering::SeqCst), Ordering::SeqCst);
                }
                Err(error) => panic!("{error}"),
            }
        }
        ring.submit(1).expect("nothing is wrong with it");
        while let Some(done) = ring.complete() {
            assert_eq!(done.result, Ok(4096), "page {:#x}", done.tag >> 8);
            let at = index(done.tag >> 8);
            read[at][0].store(done.tag & 0xff, Ordering::SeqCst);
            busy[at] = false;
            reads += 1;
        }
    }
    reads
}

/// Returns how often a page was converted to and fro, and how often that was refused.
fn convert_at_random(memory: &Memory, read: &[[AtomicU64; 2]], rounds: u64) -> (u64, u64) {
    let (mut seed, mut converted, mut refused) = (2, 0, 0);
    let mut bytes = [0; 4096];
    while converted < rounds {
        let page = random(&mut seed) % PAGES;
        let range = pages(page, page + 1);
        let on_busy = match random(&mut seed) % 2 {
            0 => OnBusy::Refuse,
            _ => OnBusy::WaitForPins { at_most: Duration::from_millis(20) },
        };
        match memory.convert(range, Private, Contents::Preserve, on_busy) {
            Err(Error::Refused(Refusal::Pinned { page: at, kind, holder })) => {
                assert_eq!((at.get(), holder), (page, disk()));
                assert!(kind == Short || page >= FIXED, "only those are fixed buffers");
                refused += 1;
                continue;
            }
            done => drop(done.expect("nothing is wrong with it")),
        }
        let denied = memory.host_view().touch_read(page * PAGE_SIZE, &mut [0]);
        assert!(denied.is_err(), "page {page:#x} is private");
        to(memory, range, Shared).expect("nothing is wrong with it");
        converted += 1;
        let waits = OnBusy::WaitForPins { at_most: Duration::from_secs(10) };
        let held = match memory.pin_with(range, Exclusive, Holder::new("a checker"), waits) {
            // It may have become a fixed buffer meanwhile.
            Err(Error::Refused(Refusal::Pinned { kind: LongTerm, .. })) => continue,
            held => held.expect("nothing is wrong with it"),
        };
        // Read before the bytes: a read that is noted later has not begun.
        let expected = read[index(page)].each_ref().map(|at| at.load(Ordering::SeqCst));
        memory
            .host_view()
            .touch_read(page * PAGE_SIZE, &mut bytes)
            .expect("nothing is wrong with it");
        drop(held);
        let (first, last) = (bytes[0], bytes[4095]);
        assert!(bytes.iter().all(|byte| *byte == first), "page {page:#x}: {first} to {last}");
        assert!(expected.contains(&first.into()), "page {page:#x} is {first}, not {expected:?}");
    }
    (converted, refused)
}
