//! Memory that is filled from a source, on each host that this machine has.

#![expect(clippy::unwrap_used, reason = "a failing test may panic anywhere")]

use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use polder::source::{Fault, FaultySource, FileSource, SourceError, ZeroSource};
use polder::units::{PAGE_BYTES, PAGE_SIZE, PageCount, PageIndex, PageRange};
use polder::{Error, HostKind, Memory, OnBusy, PageSize, Population, ReadAhead, Refusal, Source};
use polder_require::{Facility, HugetlbPages, patience, require};
use proptest::prelude::*;

const PAGES: u64 = 512;

/// What page `page` of a test's file holds.
fn contents(page: u64) -> Vec<u8> {
    (0..PAGE_SIZE / 8).flat_map(|word| (page << 32 | word | 1 << 63).to_le_bytes()).collect()
}

/// A file of its own, gone when it is closed.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("polder-{}-{name}", std::process::id()));
        let mut file = std::fs::File::create(&path).unwrap();
        (0..PAGES).for_each(|page| file.write_all(&contents(page)).unwrap());
        Self(path)
    }

    fn source(&self) -> FileSource {
        FileSource::open(&self.0).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

/// Memory of that source, all of it shared, on each host whose views can be had here.
fn each(source: impl Fn() -> Arc<dyn Source>, test: impl Fn(&Memory)) {
    each_within(Duration::from_secs(20), source, test);
}

/// The same, with a deadline for every fault.
fn each_within(deadline: Duration, source: impl Fn() -> Arc<dyn Source>, test: impl Fn(&Memory)) {
    for host in [HostKind::Memfd, HostKind::Machine] {
        let builder = Memory::builder(count(PAGES)).host(host).shared().source(source());
        let builder = builder.fault_deadline(patience(deadline));
        let Some(memory) = require(Facility::Userfault, builder.build()) else { continue };
        test(&memory);
    }
}

fn count(pages: u64) -> PageCount {
    PageCount::new(pages).unwrap()
}

fn touch(memory: &Memory, page: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; PAGE_BYTES];
    memory.host_view().touch_read(page * PAGE_SIZE, &mut bytes).map(|()| bytes)
}

fn population(memory: &Memory, page: u64) -> Population {
    memory.facts(pages(page, page + 1)).unwrap()[0].1.population
}

#[test]
fn a_touch_brings_its_page_and_some_after_it() {
    let file = Scratch::new("touch");
    each(
        || Arc::new(file.source()),
        |memory| {
            assert_eq!(memory.owed().get(), PAGES);
            for page in [7, 300, 301, 511, 0] {
                assert_eq!(touch(memory, page).unwrap(), contents(page), "page {page}");
            }
            let statistics = memory.source_statistics();
            assert!(statistics.demanded >= 4 && statistics.ahead > 0, "{statistics:?}");
            assert_eq!(population(memory, 400), Population::Owed, "nobody touched it");
        },
    );
}

#[test]
fn all_that_is_filled_is_there_and_then_nothing_is_owed() {
    let file = Scratch::new("fill");
    each(
        || Arc::new(file.source()),
        |memory| {
            memory.fill();
            memory.fetch(pages(0, PAGES)).unwrap();
            assert!(memory.owed().is_zero());
            (0..PAGES).for_each(|page| assert_eq!(touch(memory, page).unwrap(), contents(page)));
        },
    );
}

#[test]
fn a_fill_before_every_fault_thread_is_there_comes_to_its_end() {
    for _ in 0..200 {
        let memory = Memory::builder(count(16)).host(HostKind::Machine).shared();
        let memory = memory.source(Arc::new(ZeroSource)).build().unwrap();
        memory.fill();
        let mut left = patience(Duration::from_secs(5)).as_millis();
        while memory.owed() > PageCount::ZERO {
            left = left.checked_sub(1).expect("the fill was forgotten");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn without_read_ahead_a_page_at_a_time_is_brought() {
    let file = Scratch::new("alone");
    let builder = Memory::builder(count(PAGES)).shared().source(Arc::new(file.source()));
    let built = builder.read_ahead(ReadAhead::Off).build();
    let Some(memory) = require(Facility::Userfault, built) else { return };
    (0..8).for_each(|page| assert_eq!(touch(&memory, page).unwrap(), contents(page)));
    assert_eq!(memory.owed().get(), PAGES - 8);
    assert_eq!(memory.source_statistics().reads, 8);
}

#[test]
fn holes_are_zeros_that_are_never_read() {
    let file = Scratch::new("holes");
    let sparse = std::fs::OpenOptions::new().write(true).open(&file.0).unwrap();
    sparse.set_len(0).unwrap();
    sparse.set_len(PAGES * PAGE_SIZE).unwrap();
    let mut sparse = sparse;
    sparse.seek(SeekFrom::Start(100 * PAGE_SIZE)).unwrap();
    sparse.write_all(&contents(100)).unwrap();
    drop(sparse);
    for index in 0..2 {
        let source = |file: &Scratch| -> Arc<dyn Source> {
            if index == 0 { Arc::new(file.source()) } else { Arc::new(ZeroSource) }
        };
        each(
            || source(&file),
            |memory| {
                assert_eq!(touch(memory, 3).unwrap(), [0; PAGE_BYTES]);
                assert_eq!(memory.source_statistics().bytes, 0);
                memory.fetch(pages(0, PAGES)).unwrap();
                let expected = if index == 0 { contents(100) } else { vec![0; PAGE_BYTES] };
                assert_eq!(touch(memory, 100).unwrap(), expected);
                assert_eq!(touch(memory, 511).unwrap(), [0; PAGE_BYTES]);
                let resident = memory.resident().unwrap().get();
                assert!(resident < 64, "zeros that nobody touched take up no memory: {resident}");
            },
        );
    }
}

#[test]
fn a_source_that_fails_denies_exactly_its_pages_and_names_them() {
    let file = Scratch::new("fails");
    for fault in [Fault::Fails, Fault::Ragged, Fault::TooLong, Fault::Ends, Fault::Panics] {
        each(
            || Arc::new(FaultySource::new(file.source(), fault, PageIndex::from(9), 100)),
            |memory| {
                let denied = |page: u64| page >= 9 && (page - 9).is_multiple_of(100);
                for page in [8, 9, 10, 11, 109, 110] {
                    let seen = touch(memory, page);
                    assert_eq!(seen.is_err(), denied(page), "{fault:?} {page}: {seen:?}");
                    assert!(seen.map_or(true, |bytes| bytes == contents(page)), "{fault:?} {page}");
                }
                let failed: Vec<_> = memory.source_failures();
                let named: Vec<_> = failed.iter().map(|it| it.pages).collect();
                assert_eq!(named, [pages(9, 10), pages(109, 110)], "{fault:?}");
                assert!(failed[0].to_string().contains(&file.0.display().to_string()));
                let refused = memory.fetch(pages(9, 10));
                let expected = Refusal::SourceFailed { page: PageIndex::from(9) };
                assert_eq!(refused, Err(Error::Refused(expected)));
                memory.discard(pages(9, 10), OnBusy::Wait).unwrap();
                assert_eq!(touch(memory, 9).unwrap(), [0; PAGE_BYTES]);
                // The rest can be filled, and what fails is named then, too.
                memory.fill();
                for page in 0..PAGES {
                    let brought = memory.fetch(pages(page, page + 1));
                    assert_eq!(brought.is_err(), denied(page) && page != 9, "{page}");
                }
                assert_eq!(memory.source_statistics().failed, 6);
                assert!(memory.owed().is_zero());
            },
        );
    }
}

#[test]
fn a_source_that_brings_less_than_asked_for_is_asked_again() {
    let file = Scratch::new("short");
    each(
        || Arc::new(FaultySource::new(file.source(), Fault::Short, PageIndex::from(0), 3)),
        |memory| {
            for page in 0..64 {
                assert_eq!(touch(memory, page).unwrap(), contents(page));
            }
        },
    );
}

#[test]
fn who_waits_for_a_source_that_does_not_answer_is_denied_and_others_are_answered_meanwhile() {
    let file = Scratch::new("late");
    let hang = Fault::Slow(patience(Duration::from_secs(2)));
    each_within(
        Duration::from_millis(400),
        || Arc::new(FaultySource::new(file.source(), hang, PageIndex::from(0), 64)),
        |memory| {
            assert_eq!(touch(memory, 20).unwrap(), contents(20));
            std::thread::scope(|scope| {
                // More hang than there are threads to read.
                let late: Vec<_> =
                    (0..6).map(|n| scope.spawn(move || touch(memory, 64 * n).is_err())).collect();
                std::thread::sleep(patience(Duration::from_millis(100)));
                let start = polder_linux::now();
                assert_eq!(touch(memory, 21).unwrap(), contents(21), "it is there already");
                assert!(start.elapsed() < patience(Duration::from_millis(250)));
                assert!(late.into_iter().all(|late| late.join().unwrap()));
            });
            let failures = memory.source_failures();
            assert!(matches!(failures[0].why, SourceError::Late(_)), "{failures:?}");
            assert_eq!(memory.source_statistics().failed, 6);
            // What comes too late is dropped.
            std::thread::sleep(patience(Duration::from_secs(2)));
            assert!(touch(memory, 0).is_err());
            assert_eq!(touch(memory, 1).unwrap(), contents(1));
        },
    );
}

#[test]
fn what_is_discarded_while_it_is_read_is_zeros() {
    let file = Scratch::new("discard");
    let slow = Fault::Slow(patience(Duration::from_millis(150)));
    each(
        || Arc::new(FaultySource::new(file.source(), slow, PageIndex::from(0), 1)),
        |memory| {
            std::thread::scope(|scope| {
                let waits = scope.spawn(|| touch(memory, 5).unwrap());
                std::thread::sleep(patience(Duration::from_millis(50)));
                memory.discard(pages(5, 6), OnBusy::Refuse).expect("a read holds nothing");
                assert_eq!(waits.join().unwrap(), [0; PAGE_BYTES]);
            });
            std::thread::sleep(patience(Duration::from_millis(200)));
            assert_eq!(touch(memory, 5).unwrap(), [0; PAGE_BYTES]);
            assert_eq!(touch(memory, 6).unwrap(), contents(6));
        },
    );
}

#[test]
fn a_file_that_changes_or_ends_meanwhile_fails_what_was_not_brought_before() {
    type Change = fn(&std::fs::File);
    let changes: [(&str, Change); 3] = [
        ("longer", |file| file.set_len((PAGES + 1) * PAGE_SIZE).unwrap()),
        ("truncated", |file| file.set_len(100 * PAGE_SIZE).unwrap()),
        ("written to", |mut file| {
            file.seek(SeekFrom::Start(0)).unwrap();
            file.write_all(b"other").unwrap();
        }),
    ];
    for (what, change) in changes {
        let files = std::cell::RefCell::new(Vec::new());
        each(
            || {
                let mut files = files.borrow_mut();
                let name = format!("{what}-{}", files.len());
                files.push(Scratch::new(&name));
                Arc::new(files.last().unwrap().source())
            },
            |memory| {
                assert_eq!(touch(memory, 200).unwrap(), contents(200));
                std::thread::sleep(Duration::from_millis(20));
                let path = files.borrow().last().unwrap().0.clone();
                change(&std::fs::OpenOptions::new().write(true).open(path).unwrap());
                assert!(touch(memory, 400).is_err(), "{what}");
                assert_eq!(touch(memory, 200).unwrap(), contents(200), "it was there before");
                let why = &memory.source_failures()[0].why;
                assert!(matches!(why, SourceError::Ended(_) | SourceError::Changed), "{why:?}");
            },
        );
    }
}

#[test]
fn a_file_that_has_lost_its_name_or_given_it_away_is_read_to_its_end() {
    for replaced in [false, true] {
        let file = Scratch::new("nameless");
        let source = file.source();
        std::fs::remove_file(&file.0).unwrap();
        if replaced {
            std::fs::write(&file.0, [7; 2 * PAGE_BYTES]).unwrap();
        }
        let memory = Memory::builder(count(PAGES)).host(HostKind::Machine).shared();
        let memory = memory.source(Arc::new(source)).build().unwrap();
        for page in [0, 1, 400, PAGES - 1] {
            assert_eq!(touch(&memory, page).unwrap(), contents(page), "page {page}");
        }
    }
}

/// What somebody does to a file while memory is filled from it, or a touch.
#[derive(Clone, Debug)]
enum Act {
    Resize(u64),
    Write(u64),
    Touch(u64),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        1 => (0..2 * PAGES * PAGE_SIZE).prop_map(Act::Resize),
        1 => (0..PAGES).prop_map(Act::Write),
        6 => (0..PAGES).prop_map(Act::Touch),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Who sees a page sees it as it was when the file was opened; after the first change none
    /// comes that was not there.
    #[test]
    fn a_file_that_anything_is_done_to_is_seen_as_it_was_or_not_at_all(
        acts in prop::collection::vec(act(), 1..24),
    ) {
        let file = Scratch::new("any");
        let memory = Memory::builder(count(PAGES)).host(HostKind::Machine).shared();
        let memory = memory.source(Arc::new(file.source())).read_ahead(ReadAhead::Off).build();
        let memory = memory.unwrap();
        let other = std::fs::OpenOptions::new().write(true).open(&file.0).unwrap();
        // The file system's clock is coarse: what is changed at once has no other time.
        std::thread::sleep(Duration::from_millis(20));
        let mut changed = false;
        for act in acts {
            match act {
                Act::Resize(size) => {
                    other.set_len(size).unwrap();
                    changed = true;
                }
                Act::Write(page) => {
                    other.write_all_at(&[0xee; 100], page * PAGE_SIZE).unwrap();
                    changed = true;
                }
                Act::Touch(page) => {
                    let there = population(&memory, page) == Population::Whole;
                    let seen = touch(&memory, page);
                    prop_assert_eq!(seen.is_ok(), there || !changed);
                    prop_assert!(seen.map_or(true, |bytes| bytes == contents(page)));
                }
            }
        }
    }
}

/// Long where it is emulated: a page of 1G is made of zeros first.
#[test]
fn a_page_of_1g_is_brought_as_a_whole_or_denied_as_a_whole() {
    const ALL: u64 = 1 << 18;
    const WRITTEN: [u64; 5] = [0, 5, 511, 100_000, ALL - 1];
    let Some(set_aside) = require(Facility::GiganticPages, HugetlbPages::of_1g(1)) else { return };
    let file = Scratch::new("1g");
    let mut sparse = std::fs::File::create(&file.0).unwrap();
    sparse.set_len(ALL * PAGE_SIZE).unwrap();
    for page in WRITTEN {
        sparse.seek(SeekFrom::Start(page * PAGE_SIZE)).unwrap();
        sparse.write_all(&contents(page)).unwrap();
    }
    let build = |source: Arc<dyn Source>| {
        let builder = Memory::builder(count(ALL)).page_size(PageSize::Huge1G).shared();
        let builder = builder.fault_deadline(patience(Duration::from_secs(20))).source(source);
        require(Facility::Userfault, builder.build())
    };

    let Some(memory) = build(Arc::new(file.source())) else { return };
    assert_eq!((memory.owed().get(), memory.resident().unwrap().get()), (ALL, 0));
    assert_eq!(touch(&memory, 100_000).unwrap(), contents(100_000));
    assert!(memory.owed().is_zero(), "one touch brings all of it");
    for page in WRITTEN {
        assert_eq!(touch(&memory, page).unwrap(), contents(page), "page {page}");
    }
    for page in [1, 512, 99_999, 262_000] {
        assert_eq!(touch(&memory, page).unwrap(), [0; PAGE_BYTES], "a hole at page {page}");
    }
    drop(memory);

    let fails = FaultySource::new(file.source(), Fault::Fails, PageIndex::from(77_777u32), ALL);
    let Some(memory) = build(Arc::new(fails)) else { return };
    assert!(touch(&memory, 5).is_err(), "the kernel can't show a part of it");
    let failed: Vec<_> = memory.source_failures().iter().map(|failure| failure.pages).collect();
    assert_eq!(failed, [pages(77_777, 77_778)], "it is the page that is named");
    memory.discard(pages(0, ALL), OnBusy::Wait).unwrap();
    assert_eq!(touch(&memory, 5).unwrap(), [0; PAGE_BYTES]);
    drop((memory, set_aside));
}
