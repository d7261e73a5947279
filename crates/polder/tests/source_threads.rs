//! Many who touch memory that is filled meanwhile, and threads that die while they fill it.

#![expect(clippy::unwrap_used, reason = "a failing test may panic anywhere")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::Duration;

use polder::source::{Source, SourceError};
use polder::units::{PAGE_BYTES, PAGE_SIZE, PageCount, PageRange};
use polder::{HostKind, Memory, Moment, ReadAhead, Watch};
use polder_require::{Facility, patience, require};

/// A source of pages each of which is full of words that name it.
struct Numbered {
    salt: u64,
}

impl Source for Numbered {
    fn name(&self) -> String {
        "numbers".into()
    }

    fn read(&self, pages: PageRange, into: &mut [u8]) -> Result<usize, SourceError> {
        for (page, bytes) in pages.frames().zip(into.chunks_exact_mut(PAGE_BYTES)) {
            let word = (page.get() ^ self.salt).to_le_bytes();
            bytes.chunks_exact_mut(8).for_each(|to| to.copy_from_slice(&word));
        }
        Ok(into.len())
    }
}

/// splitmix64.
fn random(state: &AtomicU64) -> u64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let state = state.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Reads all pages by the host view, in an order that goes from page to page by `step`, beginning
/// at `first`, and asserts that each is whole.
fn read_all(memory: &Memory, salt: u64, first: u64, step: u64) {
    let pages = memory.pages().get();
    let mut bytes = vec![0; PAGE_BYTES];
    let mut page = first % pages;
    for _ in 0..pages {
        memory.host_view().touch_read(page * PAGE_SIZE, &mut bytes).expect("it is shared");
        let word = (page ^ salt).to_le_bytes();
        assert!(bytes.chunks_exact(8).all(|found| found == word), "page {page} is torn or wrong");
        page = (page + step) % pages;
    }
}

fn memory(host: HostKind, pages: u64, salt: u64, read_ahead: ReadAhead) -> Option<Memory> {
    let builder = Memory::builder(PageCount::new(pages).unwrap()).host(host).shared();
    let builder = builder.source(Arc::new(Numbered { salt })).read_ahead(read_ahead);
    require(Facility::Userfault, builder.build())
}

#[test]
fn four_readers_never_see_a_torn_page() {
    // Ten million in the soak.
    let said = std::env::var("POLDER_POPULATIONS").ok();
    let populations = said.map_or(20_000u64, |said| said.parse().expect("a number of pages"));
    const PAGES: u64 = 1021;
    for host in [HostKind::Memfd, HostKind::Machine] {
        let mut done = 0;
        while done < populations {
            let read_ahead =
                if done.is_multiple_of(2) { ReadAhead::Off } else { ReadAhead::Adaptive };
            let salt = done << 32 | 1 << 63;
            let Some(memory) = memory(host, PAGES, salt, read_ahead) else { break };
            std::thread::scope(|scope| {
                for (first, step) in [(0, 1), (0, 1), (500, 7), (1000, 13)] {
                    let memory = &memory;
                    scope.spawn(move || read_all(memory, salt, first, step));
                }
            });
            assert!(memory.owed().is_zero());
            done += PAGES;
        }
    }
}

/// Kills fault threads: panics at one in so many of the moments that they come to.
struct Killer {
    random: AtomicU64,
    one_in: u64,
    left: AtomicU64,
    /// Those that have died.
    dead: Mutex<Vec<ThreadId>>,
}

impl Watch for Killer {
    fn at(&self, moment: Moment) {
        let of_ours = std::thread::current().name() == Some("polder-faults");
        // That one may be told of with the engine locked.
        if !of_ours || moment == Moment::Waits || !random(&self.random).is_multiple_of(self.one_in)
        {
            return;
        }
        let kill = |left: u64| left.checked_sub(1);
        let killed = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, kill);
        if killed.is_ok() {
            let (me, mut dead) = (std::thread::current().id(), self.dead.lock().unwrap());
            dead.push(me);
            drop(dead);
            panic!("a fault thread dies, as it was told to");
        }
    }
}

#[test]
fn two_hundred_fault_threads_die_and_nobody_waits_long_or_reads_wrong_bytes() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if std::thread::current().name() != Some("polder-faults") {
            hook(info);
        }
    }));
    for (host, one_in) in [(HostKind::Memfd, 6), (HostKind::Machine, 6)] {
        let (mut killed, mut round) = (0, 0);
        while killed < 200 {
            round += 1;
            let Some(memory) = memory(host, 257, round << 32 | 1 << 63, ReadAhead::Off) else {
                break;
            };
            let killer = Arc::new(Killer {
                random: AtomicU64::new(round),
                one_in,
                left: AtomicU64::new(200 - killed),
                dead: Mutex::default(),
            });
            assert!(memory.watch(Arc::clone(&killer) as Arc<dyn Watch>));
            let start = polder_linux::now();
            std::thread::scope(|scope| {
                for step in [1, 3] {
                    let memory = &memory;
                    scope.spawn(move || read_all(memory, round << 32 | 1 << 63, 0, step));
                }
            });
            assert!(memory.owed().is_zero() && memory.source_failures().is_empty());
            let died = 200 - killed - killer.left.load(Ordering::Relaxed);
            let dead = std::mem::take(&mut *killer.dead.lock().unwrap());
            assert_eq!(dead.len() as u64, died);
            let again = |(at, thread): (usize, &ThreadId)| dead[..at].contains(thread);
            assert!(!dead.iter().enumerate().any(again), "who has died is not seen again");
            killed += died;
            // The deadline is ten seconds for each of them.
            assert!(start.elapsed() < patience(Duration::from_secs(60)), "round {round}");
            assert!(round < 200, "too few moments come: {killed} killed");
        }
    }
}
