//! Pages converted to and fro under raw touches of the host view.
//!
//! Lasts `POLDER_STRESS_SECONDS`, 2 if that is not set: half of it with operations held up by
//! chance at each of their stages.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use polder::units::{PAGE_SIZE, PageCount, PageRange};
use polder::{Contents, Delays, Error, Memory, OnBusy, Refusal, Visibility};
use polder_require::{Facility, require};

const PAGES: u64 = 256;
const SHARED: u64 = 0;
const PRIVATE: u64 = 1;
const CHANGING: u64 = 2;

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)) % bound
    }
}

/// What every word of a page holds, always.
fn word(page: u64) -> u64 {
    (page + 1).wrapping_mul(0x0123_4567_89ab_cdef)
}

/// The state of each page and how often it changed, in one word: (changes << 2) | state.
struct States(Vec<AtomicU64>);

impl States {
    fn set(&self, range: PageRange, state: u64) {
        for page in range.frames() {
            let cell = &self.0[usize::try_from(page.get()).expect("256 pages")];
            let changes = cell.load(Ordering::SeqCst) >> 2;
            cell.store((changes + 1) << 2 | state, Ordering::SeqCst);
        }
    }

    fn get(&self, page: u64) -> u64 {
        self.0[usize::try_from(page).expect("256 pages")].load(Ordering::SeqCst)
    }
}

#[derive(Default)]
struct Seen {
    touches: AtomicU64,
    denied: AtomicU64,
    conversions: AtomicU64,
}

/// Reads and writes words of random pages. The bytes are right whenever there are any; a page that
/// stayed shared all the while is never denied, one that stayed private always.
fn touch(memory: &Memory, states: &States, seen: &Seen, stop: &AtomicBool, seed: u64) {
    let mut random = Random(seed);
    let view = memory.host_view();
    while !stop.load(Ordering::Relaxed) {
        let page = random.below(PAGES);
        let offset = page * PAGE_SIZE + random.below(512) * 8;
        let before = states.get(page);
        let allowed = if random.below(2) == 0 {
            let mut bytes = [0; 8];
            let read = view.touch_read(offset, &mut bytes);
            if read.is_ok() {
                assert_eq!(u64::from_le_bytes(bytes), word(page), "wrong bytes in page {page:#x}");
            }
            read.is_ok()
        } else {
            view.touch_write(offset, &word(page).to_le_bytes()).is_ok()
        };
        let after = states.get(page);
        if before == after && before & 3 != CHANGING {
            assert_eq!(allowed, before & 3 == SHARED, "page {page:#x} in state {}", before & 3);
        }
        seen.touches.fetch_add(1, Ordering::Relaxed);
        seen.denied.fetch_add(u64::from(!allowed), Ordering::Relaxed);
    }
}

/// Which pages of a range are mapped in the host view, by the kernel's own account.
fn mapped(pagemap: &File, memory: &Memory, range: PageRange) -> Vec<u64> {
    let first = memory.host_view().as_ptr().expect("real memory").addr() as u64 / PAGE_SIZE
        + range.start().get();
    let mut entries = vec![0; 8 * usize::try_from(range.count().get()).expect("256 pages")];
    pagemap.read_exact_at(&mut entries, first * 8).expect("pagemap of our own mapping");
    (range.start().get()..)
        .zip(entries.chunks_exact(8))
        .filter(|(_, entry)| entry[7] & 0x80 != 0)
        .map(|(page, _)| page)
        .collect()
}

fn convert(memory: &Memory, states: &States, seen: &Seen, stop: &AtomicBool) {
    let pagemap = File::open("/proc/self/pagemap").expect("procfs");
    let mut random = Random(7);
    while !stop.load(Ordering::Relaxed) {
        let start = random.below(PAGES);
        let most = if random.below(4) == 0 { PAGES } else { 4 };
        let end = PAGES.min(start + 1 + random.below(most));
        let range = PageRange::between(start, end).expect("start is below end");
        let (to, state) = match random.below(2) {
            0 => (Visibility::Private, PRIVATE),
            _ => (Visibility::Shared, SHARED),
        };
        states.set(range, CHANGING);
        memory.convert(range, to, Contents::Preserve, OnBusy::Wait).expect("nobody holds a pin");
        states.set(range, state);
        if to == Visibility::Private {
            // The touchers have had time to be answered late, if late answers there are.
            std::thread::yield_now();
            let late = mapped(&pagemap, memory, range);
            assert!(late.is_empty(), "private pages {late:x?} of {range} are mapped");
        }
        seen.conversions.fetch_add(1, Ordering::Relaxed);
    }
}

/// The same through the API: a refusal names a private page, anything read is right.
fn read_by_api(memory: &Memory, vm: polder::VmId, stop: &AtomicBool) {
    let mut random = Random(99);
    while !stop.load(Ordering::Relaxed) {
        let page = random.below(PAGES);
        let mut bytes = [0; 8];
        let gpa = polder::units::Gpa::new(page * PAGE_SIZE);
        match memory.read(vm, gpa, &mut bytes) {
            Ok(()) => assert_eq!(u64::from_le_bytes(bytes), word(page)),
            Err(Error::Refused(Refusal::Private { page: named })) => assert_eq!(named.get(), page),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn conversions_under_raw_touches_lose_no_byte_and_map_nothing_late() {
    convert_under_raw_touches(None);
    convert_under_raw_touches(Some(Delays::new(1, Duration::from_micros(300))));
}

fn convert_under_raw_touches(delays: Option<Delays>) {
    let memory = Memory::builder(PageCount::new(PAGES).expect("256")).build();
    let Some(memory) = require(Facility::Userfault, memory) else { return };
    let kvm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    let Some(vm) = require(Facility::Kvm, kvm) else { return };
    if let Some(delays) = delays {
        memory.watch(std::sync::Arc::new(delays));
    }
    let all = PageRange::between(0, PAGES).expect("256 pages");
    let vm = memory.attach(std::sync::Arc::new(vm)).expect("a VM of KVM's");
    memory.bind(vm, polder::Slot(0), 0u32.into(), all).expect("a first slot");

    memory.convert(all, Visibility::Shared, Contents::Preserve, OnBusy::Wait).expect("no pins");
    for page in 0..PAGES {
        let bytes = word(page).to_le_bytes().repeat(512);
        memory.host_view().touch_write(page * PAGE_SIZE, &bytes).expect("a shared page");
    }
    let states = States((0..PAGES).map(|_| AtomicU64::new(SHARED)).collect());
    let (seen, stop) = (Seen::default(), AtomicBool::new(false));
    let seconds = std::env::var("POLDER_STRESS_SECONDS").ok();
    let seconds = seconds.and_then(|seconds| seconds.parse().ok()).unwrap_or(2);
    std::thread::scope(|scope| {
        /// Stops the others when the thread ends, by a panic too.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let (memory, states, seen, stop) = (&memory, &states, &seen, &stop);
        for seed in [1, 2] {
            scope.spawn(move || {
                let _stop = Stop(stop);
                touch(memory, states, seen, stop, seed);
            });
        }
        scope.spawn(move || {
            let _stop = Stop(stop);
            convert(memory, states, seen, stop);
        });
        scope.spawn(move || {
            let _stop = Stop(stop);
            read_by_api(memory, vm, stop);
        });
        for _ in 0..seconds * 5 {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let [touches, denied, conversions] = [&seen.touches, &seen.denied, &seen.conversions]
        .map(|counter| counter.load(Ordering::Relaxed));
    eprintln!("{touches} touches, {denied} denied, {conversions} conversions");
    assert!(touches > 100 && denied > 10 && conversions > 10);
    memory.convert(all, Visibility::Shared, Contents::Preserve, OnBusy::Wait).expect("no pins");
    for page in 0..PAGES {
        let mut bytes = vec![0; 4096];
        memory.host_view().touch_read(page * PAGE_SIZE, &mut bytes).expect("a shared page");
        assert_eq!(bytes, word(page).to_le_bytes().repeat(512), "page {page:#x}");
    }
}
