//! Memory of huge pages, on this kernel's and on the simulated machine's.

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use polder::units::{Gfn, Gpa, Level, PageCount, PageRange};
use polder::vm_memory::{Bytes, GuestAddress};
use polder::{
    Contents, Delays, Error, Holder, HostKind, HugePool, Limit, Memory, OnBusy, PageSize, PinKind,
    Platform, PoolCounts, Refusal, Slot, View, Visibility,
};
use polder_require::{Facility, HugetlbPages, Thp, patience, require};

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in the test")
}

fn to(memory: &Memory, range: PageRange, visibility: Visibility) -> Result<PageCount, Error> {
    memory.convert(range, visibility, Contents::Preserve, OnBusy::Wait)
}

fn first_byte(memory: &Memory, page: u64) -> Result<u8, Error> {
    let mut byte = [0];
    memory.host_view().touch_read(page * 4096, &mut byte)?;
    Ok(byte[0])
}

/// Memory of `count` 2M pages on a memfd, of hugetlb pages set aside for it.
fn hugetlb(count: u32) -> Option<(Memory, HugetlbPages)> {
    let set_aside = require(Facility::HugePages, HugetlbPages::of_2m(count.into()))?;
    let memory = Memory::builder(PageCount::from(count * 512)).page_size(PageSize::Huge2M);
    let memory = require(Facility::Userfault, memory.build())?;
    Some((memory, set_aside))
}

#[test]
fn hugetlb_pages_are_reserved_at_creation_or_refused_with_the_way_out() {
    let Some((memory, set_aside)) = hugetlb(4) else { return };
    let pool = memory.pool().unwrap();
    assert!(pool.reserved >= 4, "{pool:?}");
    assert_eq!(memory.existing().unwrap(), [], "reserved, and not allocated");
    let many = Memory::builder(PageCount::new(1 << 40).unwrap()).page_size(PageSize::Huge2M);
    match many.build().unwrap_err() {
        Error::HugePages { level: Level::Size2M, asked, .. } => assert_eq!(asked, 1 << 31),
        // More than an address space has.
        other => assert_eq!(other.errno(), polder::Errno::ENOMEM, "{other:?}"),
    }
    let more = PageCount::new((pool.available() + 1000) * 512).unwrap();
    let refused = Memory::builder(more).page_size(PageSize::Huge2M).build().unwrap_err();
    assert!(matches!(refused, Error::HugePages { .. }), "{refused:?}");
    assert!(refused.way_out().unwrap().contains("hugepages-2048kB/nr_hugepages"));
    // Others take pages meanwhile, and give them back; nothing is held by each.
    let counts = || (set_aside.free(), set_aside.reserved());
    let holds = |_| {
        let before = counts();
        assert!(Memory::builder(more).page_size(PageSize::Huge2M).build().is_err());
        counts() != before
    };
    assert!(!(0..50).all(holds), "a refused memory holds pages");
    let odd = Memory::builder(PageCount::from(513)).page_size(PageSize::Huge2M).build();
    assert!(matches!(odd, Err(Error::Unaligned { .. })), "{odd:?}");
}

#[test]
fn a_slice_of_a_single_shared_page_of_a_hugetlb_page_can_be_touched_and_pins_it() {
    let Some((memory, _set_aside)) = hugetlb(1) else { return };
    let memory = Arc::new(memory);
    let kvm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    let Some(kvm) = require(Facility::Kvm, kvm) else { return };
    let vm = memory.attach(Arc::new(kvm)).unwrap();
    memory.bind(vm, Slot(0), Gfn::from(0), pages(0, 512)).unwrap();
    to(&memory, pages(3, 4), Visibility::Shared).unwrap();
    let guest = memory.guest_memory(vm, Holder::new("virtio-net"), OnBusy::Wait).unwrap();
    memory.write(vm, Gpa::new(0x3000), b"hello").unwrap();
    let slice = guest.get_slice(GuestAddress(0x3000), 5).unwrap();
    assert!(!memory.is_shown(3u32.into()), "the raw view does not have it");
    let mut bytes = [0; 5];
    slice.read_slice(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"hello");
    slice.write_slice(b"there", 0).unwrap();
    memory.read(vm, Gpa::new(0x3000), &mut bytes).unwrap();
    assert_eq!(&bytes, b"there");
    let pinned = to(&memory, pages(3, 4), Visibility::Private).unwrap_err();
    assert!(matches!(pinned, Error::Refused(Refusal::Pinned { .. })), "{pinned}");
    drop(slice);
    // The kernel's transfers go the same way.
    let zeros = std::fs::File::open("/dev/zero").unwrap();
    let ring = memory.ring(Holder::new("virtio-blk"), 4, OnBusy::Wait);
    if let Some(mut ring) = require(Facility::IoUring, ring) {
        ring.read(zeros.as_fd(), 0, 0x3000, 5, 1).unwrap();
        ring.submit(1).unwrap();
        assert_eq!(ring.complete().unwrap().result, Ok(5));
        memory.read(vm, Gpa::new(0x3000), &mut bytes).unwrap();
        assert_eq!(bytes, [0; 5]);
    }
    to(&memory, pages(3, 4), Visibility::Private).unwrap();
    let private = guest.get_slice(GuestAddress(0x3000), 5).unwrap_err();
    assert!(polder::guest_memory::refusal(&private).is_some(), "{private}");
}

#[test]
fn single_pages_of_a_hugetlb_page_are_shared_by_the_api_and_the_raw_view_shows_it_as_a_whole() {
    let Some((memory, _set_aside)) = hugetlb(2) else { return };
    let vm = None;
    to(&memory, pages(3, 5), Visibility::Shared).unwrap();
    let pin = memory.pin(pages(3, 4), PinKind::Short, Holder::new("virtio-net")).unwrap();
    assert!(first_byte(&memory, 3).is_err() && !memory.is_shown(3u32.into()));
    let limits = memory.level_limits(View::Host, 3u32.into(), vm).unwrap();
    assert_eq!(limits.limiting(), Some(Limit::Visibility));
    to(&memory, pages(5, 6), Visibility::Shared).unwrap();
    to(&memory, pages(5, 6), Visibility::Private).unwrap();
    drop(pin);

    // All of the first huge page: the raw view shows it by one entry.
    to(&memory, pages(0, 512), Visibility::Shared).unwrap();
    memory.host_view().touch_write(4096 * 7, &[7]).unwrap();
    assert!(memory.is_shown(3u32.into()) && first_byte(&memory, 511).is_ok());
    assert!(first_byte(&memory, 512).is_err());
    to(&memory, pages(511, 512), Visibility::Private).unwrap();
    assert!(first_byte(&memory, 7).is_err(), "its neighbour is private");
    to(&memory, pages(511, 512), Visibility::Shared).unwrap();
    assert_eq!(first_byte(&memory, 7), Ok(7), "contents are preserved");
    let levels = memory.levels();
    assert_eq!((levels.size_4k, levels.size_2m, levels.size_1g), (0, 2, 0));
}

#[test]
fn a_discard_of_less_than_a_hugetlb_page_makes_zeros_and_one_of_all_frees_it_and_keeps_it_promised()
{
    let Some((memory, set_aside)) = hugetlb(2) else { return };
    to(&memory, pages(0, 1024), Visibility::Shared).unwrap();
    memory.host_view().touch_write(0, &vec![1; 1024 * 4096]).unwrap();
    assert_eq!(memory.existing().unwrap(), [pages(0, 1024)]);
    memory.discard(pages(1, 3), OnBusy::Wait).unwrap();
    assert_eq!(memory.existing().unwrap(), [pages(0, 1024)]);
    assert_eq!([0, 1, 2, 3].map(|page| first_byte(&memory, page).unwrap()), [1, 0, 0, 1]);
    let reserved = set_aside.reserved();
    memory.discard(pages(511, 1024), OnBusy::Wait).unwrap();
    assert_eq!(memory.existing().unwrap(), [pages(0, 512)]);
    assert!(set_aside.reserved() > reserved, "its promise stands");
    assert_eq!([510, 511, 512, 1023].map(|page| first_byte(&memory, page).unwrap()), [1, 0, 0, 0]);
}

#[test]
fn owed_hugetlb_pages_are_seen_once_all_of_one_is_whole() {
    let Some(set_aside) = require(Facility::HugePages, HugetlbPages::of_2m(2)) else { return };
    let owed = Memory::builder(PageCount::from(1024)).page_size(PageSize::Huge2M).owed().shared();
    let Some(memory) = require(Facility::Userfault, owed.build()) else { return };
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| first_byte(&memory, 5));
        memory.populate(pages(0, 6), &[9; 6 * 4096]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!toucher.is_finished(), "the rest of the huge page is owed");
        memory.populate(pages(6, 512), &[]).unwrap();
        assert_eq!(toucher.join().unwrap(), Ok(9));
    });
    memory.fail(pages(700, 701)).unwrap();
    assert!(first_byte(&memory, 512).is_err(), "its huge page can't be shown");
    memory.settle().unwrap();
    memory.discard(pages(700, 701), OnBusy::Wait).unwrap();
    assert_eq!(first_byte(&memory, 512), Ok(0));
    drop(set_aside);
}

#[test]
fn memory_of_1g_pages_is_shown_by_one_entry_if_all_of_it_is_shared() {
    let Some(_set_aside) = require(Facility::GiganticPages, HugetlbPages::of_1g(1)) else { return };
    let plain = Memory::builder(PageCount::from(512 * 512)).page_size(PageSize::Huge1G).shared();
    let Some(memory) = require(Facility::Userfault, plain.build()) else { return };
    memory.host_view().touch_write(4096 * 99_999, &[5]).unwrap();
    assert_eq!(memory.statistics().host_faults, 1);
    assert_eq!(first_byte(&memory, 99_999), Ok(5));
    assert_eq!(memory.statistics().host_faults, 1, "one answer for all of it");
    assert_eq!(memory.levels().size_1g, 1);
    let limits = memory.level_limits(View::Host, 7u32.into(), None).unwrap();
    assert_eq!((limits.level(), limits.limiting()), (Level::Size1G, None));
}

#[test]
fn transparent_huge_pages_stay_huge_in_the_guests_view_while_single_pages_are_shared() {
    let Some(_allowed) = require(Facility::HugePages, Thp::allow()) else { return };
    let memory = Memory::builder(PageCount::from(4 * 512)).page_size(PageSize::Thp).owed();
    let Some(memory) = require(Facility::Userfault, memory.build()) else { return };
    assert_eq!(memory.page_size(), PageSize::Thp);
    memory.populate(pages(0, 2048), &vec![3; 2048 * 4096]).unwrap();
    memory.settle().unwrap();
    assert_eq!(memory.levels().size_2m, 4, "once nothing is owed it is mapped huge");

    for page in [0, 5, 511, 700] {
        to(&memory, pages(page, page + 1), Visibility::Shared).unwrap();
        assert_eq!(first_byte(&memory, page), Ok(3));
        assert!(first_byte(&memory, page ^ 1).is_err());
        to(&memory, pages(page, page + 1), Visibility::Private).unwrap();
        assert!(first_byte(&memory, page).is_err());
    }
    assert_eq!(memory.levels().size_2m, 4, "conversions and faults of the host leave it");
    memory.discard(pages(8, 10), OnBusy::Wait).unwrap();
    assert_eq!(memory.collapse_all(), Ok(PageCount::from(2048)), "zeros, and no hole");
    to(&memory, pages(7, 9), Visibility::Shared).unwrap();
    assert_eq!((first_byte(&memory, 7), first_byte(&memory, 8)), (Ok(3), Ok(0)));
    memory.discard(pages(1024, 1536), OnBusy::Wait).unwrap();
    assert_eq!(memory.existing().unwrap(), [pages(0, 1024), pages(1536, 2048)]);
}

#[test]
fn a_huge_page_is_regained_as_a_move_and_what_is_pinned_does_not_move() {
    let Some(_allowed) = require(Facility::HugePages, Thp::allow()) else { return };
    let memory = Memory::builder(PageCount::from(1100)).page_size(PageSize::Thp).shared();
    let Some(memory) = require(Facility::Userfault, memory.build()) else { return };
    assert_eq!(memory.page_size(), PageSize::Thp);
    for page in [3, 600] {
        memory.host_view().touch_write(page * 4096, &[7]).unwrap();
    }
    assert_eq!(memory.levels().size_2m, 0, "no guest has touched it");
    let holder = Holder::new("vhost-net");
    let pin = memory.pin(pages(600, 601), PinKind::LongTerm, holder.clone()).unwrap();
    let kind = PinKind::LongTerm;
    let pinned: Error = Refusal::Pinned { page: 600u32.into(), kind, holder }.into();
    assert_eq!(memory.collapse(700u32.into(), OnBusy::Refuse), Err(pinned.clone()));
    let waits = OnBusy::WaitForPins { at_most: std::time::Duration::from_millis(5) };
    assert_eq!(memory.collapse(700u32.into(), waits), Err(pinned));
    memory.collapse(5u32.into(), OnBusy::Refuse).unwrap();
    assert_eq!(memory.levels().size_2m, 1);
    assert_eq!(memory.collapse_all(), Ok(PageCount::from(512)), "but what is pinned");
    drop(pin);
    assert_eq!(memory.collapse_all(), Ok(PageCount::from(1024)));
    assert_eq!((first_byte(&memory, 3), first_byte(&memory, 600)), (Ok(7), Ok(7)));
    let beyond = memory.collapse(1050u32.into(), OnBusy::Refuse).unwrap_err();
    assert!(matches!(beyond, Error::Refused(Refusal::Beyond { .. })), "{beyond}");
    let small = Memory::builder(PageCount::from(512)).shared().build().unwrap();
    let refused = small.collapse(0u32.into(), OnBusy::Refuse).unwrap_err();
    assert!(matches!(refused, Error::NotOffered { .. }), "{refused}");
}

#[test]
fn where_transparent_huge_pages_are_not_allowed_memory_is_of_4k_and_says_so() {
    let Some(allowed) = require(Facility::HugePages, Thp::allow()) else { return };
    drop(allowed);
    let thp = Memory::builder(PageCount::from(512)).page_size(PageSize::Thp);
    let Some(memory) = require(Facility::Userfault, thp.build()) else { return };
    let [page_size, asked] = [memory.page_size(), PageSize::Thp];
    // Another test may allow them meanwhile.
    assert!(page_size == PageSize::Small || page_size == asked);
    for (host, size) in
        [(HostKind::Machine, PageSize::Thp), (HostKind::GuestMemfd, PageSize::Huge2M)]
    {
        let refused = Memory::builder(PageCount::from(512)).host(host).page_size(size).build();
        assert!(matches!(refused, Err(Error::NotOffered { .. })), "{refused:?}");
    }
}

const KILLED: &str = "POLDER_KILLED_IN_A_CONVERSION";
const HELD: &str = "all huge pages are held";

#[test]
fn every_huge_page_is_back_after_a_kill_in_the_middle_of_a_conversion() {
    if std::env::var_os(KILLED).is_some() {
        return convert_for_ever();
    }
    let Some(set_aside) = require(Facility::HugePages, HugetlbPages::of_2m(8)) else { return };
    let probe = Memory::builder(PageCount::from(512)).page_size(PageSize::Huge2M).build();
    if require(Facility::Userfault, probe).is_none() {
        return;
    }
    let name = "every_huge_page_is_back_after_a_kill_in_the_middle_of_a_conversion";
    let this = std::env::current_exe().unwrap();
    let available = || set_aside.free().saturating_sub(set_aside.reserved());
    for _ in 0..4 {
        let before = available();
        let mut child = Command::new(&this)
            .args(["--exact", name, "--nocapture"])
            .env(KILLED, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It says when it holds all that was set aside, and converts.
        let said = BufReader::new(child.stdout.take().unwrap()).lines();
        let taken = said.map_while(Result::ok).any(|line| line == HELD);
        std::thread::sleep(Duration::from_millis(30));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(taken, "the child had its huge pages");
        let mut left = patience(Duration::from_secs(20)).as_millis() / 10;
        // Others take pages meanwhile, and give them back.
        while available() < before {
            std::thread::sleep(Duration::from_millis(10));
            left = left.checked_sub(1).expect("some are missing");
        }
    }
}

/// As long as its parent lives.
fn convert_for_ever() {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
    let memory = Memory::builder(PageCount::from(8 * 512)).page_size(PageSize::Huge2M);
    let Ok(memory) = memory.build() else { return };
    println!("\n{HELD}");
    memory.watch(Arc::new(Delays::new(1, Duration::from_millis(2))));
    for round in 0u32.. {
        let range = pages(u64::from(round % 7) * 512, u64::from(round % 7) * 512 + 700);
        for kind in [Visibility::Shared, Visibility::Private] {
            to(&memory, range, kind).expect("nobody is in the way");
        }
    }
}

const RACES: &str = "POLDER_RACES_FOR_HUGE_PAGES";

/// Each of two processes wants five of eight pages, again and again.
#[test]
fn two_processes_that_race_for_the_pool_have_all_or_are_refused_and_lose_none() {
    if std::env::var_os(RACES).is_some() {
        return race();
    }
    let Some(alone) = alone(8) else { return };
    let name = "two_processes_that_race_for_the_pool_have_all_or_are_refused_and_lose_none";
    let this = std::env::current_exe().unwrap();
    let children = [(); 2].map(|()| {
        let mut child = Command::new(&this);
        child.args(["--exact", name, "--nocapture"]).env(RACES, "1").stdout(Stdio::null());
        child.spawn().unwrap()
    });
    for mut child in children {
        assert!(child.wait().unwrap().success(), "no SIGBUS, and no other error");
    }
    assert_eq!(alone.free() - alone.reserved(), 8);
}

fn race() {
    let mut had = 0;
    // The other ends some time.
    for _ in 0..100_000 {
        let memory = Memory::builder(PageCount::from(5 * 512)).page_size(PageSize::Huge2M).shared();
        match memory.build() {
            Ok(memory) => {
                had += 1;
                let touch = |page: u64| memory.host_view().touch_write(page * 4096, &[1]);
                (0..5).for_each(|huge| touch(huge * 512).expect("it was promised"));
            }
            Err(Error::HugePages { asked: 5, .. }) => {
                std::thread::sleep(Duration::from_micros(200))
            }
            Err(Error::Missing { .. }) => return,
            Err(other) => panic!("{other:?}"),
        }
        if had >= 20 {
            return;
        }
    }
    panic!("{had} times of 20");
}

/// Huge pages that no other test has a part of; says so where that can't be.
fn alone(count: u64) -> Option<HugetlbPages> {
    let found = HugetlbPages::of_2m_alone(count, patience(Duration::from_secs(10)));
    found.map_err(|why| println!("SKIPPED: {why}")).ok()
}

#[test]
fn a_pool_that_is_shrunk_meanwhile_keeps_what_was_promised_and_no_touch_is_a_sigbus() {
    let Some(mut alone) = alone(4) else { return };
    let memory = Memory::builder(PageCount::from(2 * 512)).page_size(PageSize::Huge2M).shared();
    let Some(memory) = require(Facility::Userfault, memory.build()) else { return };
    alone.shrink();
    let more = Memory::builder(PageCount::from(512)).page_size(PageSize::Huge2M).build();
    assert!(matches!(more, Err(Error::HugePages { available: 0, .. })), "{more:?}");
    for page in [0, 600] {
        memory.host_view().touch_write(page * 4096, &[7]).expect("it was promised");
        assert_eq!(first_byte(&memory, page), Ok(7));
    }
    // What is discarded goes back to a pool that is to have none: it may be gone for good.
    match memory.discard(pages(512, 1024), OnBusy::Wait) {
        Ok(()) => assert_eq!(first_byte(&memory, 600), Ok(0)),
        Err(error) => {
            assert!(matches!(error, Error::Quarantined { .. }), "{error:?}");
            assert!(first_byte(&memory, 600).is_err(), "denied, by a typed error");
            assert_eq!(memory.quarantined(), [pages(512, 1024)]);
        }
    }
    assert_eq!(first_byte(&memory, 0), Ok(7), "the other is as good as ever");
}

/// Memory of `count` huge pages on the simulated machine.
fn simulated(size: PageSize, count: u32, platform: Platform) -> Memory {
    let pages = if size == PageSize::Huge1G { 512 * 512 } else { 512 };
    let builder = Memory::builder(PageCount::from(count * pages)).host(HostKind::Machine);
    builder.platform(platform).page_size(size).build().expect("the machine has all it takes")
}

#[test]
fn the_machine_splits_a_1g_page_along_the_path_and_merges_it_again() {
    let memory = simulated(PageSize::Huge1G, 1, Platform::Plain);
    let levels = |memory: &Memory| {
        let levels = memory.levels();
        (levels.size_1g, levels.size_2m, levels.size_4k)
    };
    to(&memory, pages(1000, 1001), Visibility::Shared).unwrap();
    assert_eq!(levels(&memory), (0, 511, 512));
    assert_eq!(memory.existing().unwrap(), [], "nothing was there, and nothing is");
    memory.host_view().touch_write(1000 * 4096, &[7]).unwrap();
    let machine = |memory: &Memory| {
        memory
            .simulated(|machine, object, _| {
                let folios = machine.folios(object, pages(0, 1 << 18)).unwrap().count();
                machine.audit().expect("it adds up");
                folios
            })
            .unwrap()
    };
    assert_eq!(machine(&memory), 511 + 512);
    assert_eq!(first_byte(&memory, 1000), Ok(7));
    assert!(first_byte(&memory, 1001).is_err());
    to(&memory, pages(2048, 2560), Visibility::Shared).unwrap();
    assert_eq!(first_byte(&memory, 2100), Ok(0));
    assert_eq!(memory.reshaped().splits, 2, "a whole 2M page is not split");
    to(&memory, pages(2048, 2560), Visibility::Private).unwrap();
    to(&memory, pages(1000, 1001), Visibility::Private).unwrap();
    assert_eq!((levels(&memory), machine(&memory)), ((1, 0, 0), 1));
    assert_eq!((memory.reshaped().splits, memory.reshaped().merges), (2, 2));
}

#[test]
fn a_discard_of_a_whole_huge_page_gives_it_back_and_its_shape_is_kept() {
    for platform in [Platform::Plain, Platform::Snp] {
        let memory = simulated(PageSize::Huge2M, 2, platform);
        let share = |range| {
            memory.convert(range, Visibility::Shared, Contents::Unspecified, OnBusy::Wait).unwrap()
        };
        share(pages(3, 4));
        memory.host_view().touch_write(3 * 4096, &[7]).unwrap();
        let counts = |free, pending| PoolCounts { total: 2, free, reserved: free, pending };
        assert_eq!(memory.pool(), Some(counts(1, 0)));
        memory.discard(pages(0, 2), OnBusy::Wait).unwrap();
        assert_eq!(memory.pool(), Some(counts(1, 0)), "a part of it");
        memory.discard(pages(0, 512), OnBusy::Wait).unwrap();
        assert_eq!(memory.pool(), Some(counts(2, 0)));
        assert_eq!((first_byte(&memory, 3), memory.levels().size_4k), (Ok(0), 512));
        assert!(first_byte(&memory, 4).is_err());
        memory
            .simulated(|machine, _, _| {
                machine.audit().expect("it adds up");
            })
            .unwrap();
    }
}

#[test]
fn a_pin_by_somebody_else_keeps_a_discarded_huge_page_pending_until_it_goes() {
    let memory = simulated(PageSize::Huge2M, 1, Platform::Plain);
    to(&memory, pages(3, 4), Visibility::Shared).unwrap();
    memory.host_view().touch_write(3 * 4096, &[7]).unwrap();
    let pin = memory
        .simulated(|machine, _, process| {
            let page = polder::machine::VpnRange::between((1 << 18) + 3, (1 << 18) + 4).unwrap();
            let pinned =
                machine.pin_user_pages(process, page, true, polder::machine::PinKind::LongTerm);
            pinned.expect("it is shared, and mapped")
        })
        .unwrap();
    memory.discard(pages(0, 512), OnBusy::Wait).unwrap();
    assert_eq!(memory.pool().unwrap().pending, 1);
    memory.simulated(|machine, _, _| machine.unpin(pin)).unwrap().unwrap();
    assert_eq!(memory.pool().unwrap().pending, 0);
    assert_eq!(first_byte(&memory, 3), Ok(0));
    memory
        .simulated(|machine, _, _| {
            machine.audit().expect("it adds up");
        })
        .unwrap();
}

/// What of memory on the machine an operation that is refused leaves as it was.
fn state(memory: &Memory) -> impl PartialEq + std::fmt::Debug + use<> {
    let all = pages(0, memory.pages().get());
    let inside = memory.simulated(|machine, object, _| {
        machine.audit().expect("it adds up");
        let folios = machine.folios(object, all).expect("the memory's");
        let levels: Vec<Level> = folios.map(|(_, folio)| folio.level).collect();
        (machine.free_frames(), levels)
    });
    let facts = memory.facts(all).expect("all of it");
    (inside.expect("it is the machine"), memory.levels(), memory.reshaped(), memory.pool(), facts)
}

/// Has the first allocation that an operation makes fail, then the second, and so on, until it is
/// done without one. How many there were.
fn every_allocation_fails(memory: &Memory, operation: impl Fn() -> Result<(), Error>) -> u64 {
    for nth in 0.. {
        let fail = |nth| {
            let set = memory.simulated(|machine, _, _| machine.fail_allocation(nth));
            set.expect("it is the machine");
        };
        let before = state(memory);
        fail(Some(nth));
        let done = operation();
        fail(None);
        match done {
            Ok(()) => return nth,
            Err(error) => assert_eq!(error.errno(), polder::Errno::ENOMEM, "{error:?}"),
        }
        assert_eq!(state(memory), before, "allocation {nth}");
        assert!(memory.quarantined().is_empty());
    }
    unreachable!("there are as many numbers as there are")
}

#[test]
fn no_memory_at_any_point_of_a_split_merge_or_discard_changes_nothing() {
    let memory = simulated(PageSize::Huge1G, 1, Platform::Plain);
    let convert = |range: PageRange, kind| {
        every_allocation_fails(&memory, || to(&memory, range, kind).map(drop))
    };
    let touch = |page: u64| memory.host_view().touch_write(page * 4096, &[7]);
    // What is not there yet: the tables are had for it, and then its touch takes one page of 1G.
    assert_eq!(convert(pages(1000, 1001), Visibility::Shared), 511 + 7);
    touch(1000).unwrap();
    assert_eq!(convert(pages(5000, 5001), Visibility::Shared), 7);
    assert_eq!(convert(pages(2048, 2560), Visibility::Shared), 0, "a whole 2M page");
    // Merges: nothing is needed, and nothing given back before all is done.
    assert_eq!(convert(pages(2048, 2560), Visibility::Private), 0);
    assert_eq!(convert(pages(1000, 1001), Visibility::Private), 0);
    assert_eq!(convert(pages(5000, 5001), Visibility::Private), 0);
    assert_eq!(memory.levels().size_1g, 1);
    // Of what is there, from 1G on.
    assert_eq!(convert(pages(1000, 1001), Visibility::Shared), 511 + 7);
    let discard = || memory.discard(pages(0, 512 * 512), OnBusy::Wait);
    assert_eq!(every_allocation_fails(&memory, discard), 0, "its tables are kept for it");
    assert_eq!(first_byte(&memory, 1000), Ok(0));
}

#[test]
fn memories_draw_from_one_pool_and_the_next_waits_for_what_comes_back() {
    let pool = HugePool::new(Level::Size2M, 3);
    let of = |count: u32| {
        let builder = Memory::builder(PageCount::from(count * 512)).host(HostKind::Machine);
        builder.page_size(PageSize::Huge2M).pool(&pool).build()
    };
    let first = of(2).unwrap();
    let refused = of(2).unwrap_err();
    let too_few = Error::HugePages { level: Level::Size2M, asked: 2, available: 1, pending: 0 };
    assert_eq!((refused, pool.counts().reserved), (too_few, 2));
    assert!(!pool.wait_for(2, Duration::from_millis(30)));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| pool.wait_for(3, patience(Duration::from_secs(20))));
        drop(first);
        assert!(waiter.join().unwrap());
    });
    drop(of(3).unwrap());
    assert_eq!(pool.counts(), PoolCounts { total: 3, free: 3, reserved: 0, pending: 0 });
    let other = Memory::builder(PageCount::from(1 << 18)).host(HostKind::Machine);
    let refused = other.page_size(PageSize::Huge1G).pool(&pool).build().unwrap_err();
    assert!(matches!(refused, Error::NotOffered { .. }), "{refused:?}");
}

#[test]
fn a_pinned_neighbour_is_named_where_its_folio_would_have_to_be_split() {
    let builder = Memory::builder(PageCount::from(512)).host(HostKind::Machine).shared();
    let memory = builder.page_size(PageSize::Huge2M).build().unwrap();
    let pin = memory.pin(pages(9, 10), PinKind::LongTerm, Holder::new("virtio-blk")).unwrap();
    let refused = to(&memory, pages(3, 4), Visibility::Private).unwrap_err();
    let named = |error: &Error| matches!(error, Error::Refused(Refusal::Pinned { page, .. }) if page.get() == 9);
    assert!(named(&refused), "{refused:?}");
    drop(pin);
    to(&memory, pages(3, 4), Visibility::Private).unwrap();
}

#[test]
fn a_memory_that_ends_leaves_what_the_kernel_pins_pending_until_the_last_pin_goes() {
    let pool = HugePool::new(Level::Size2M, 3);
    let build = |pages: u64| {
        let builder =
            Memory::builder(PageCount::new(pages).unwrap()).host(HostKind::Machine).shared();
        builder.page_size(PageSize::Huge2M).pool(&pool).build()
    };
    let of = |free, reserved, pending| PoolCounts { total: 3, free, reserved, pending };
    let memory = build(2 * 512).unwrap();
    memory.host_view().touch_write(600 * 4096, &[7]).unwrap();
    let pins = [3, 300].map(|at| memory.simulated_pin(pages(at, at + 1)).unwrap());
    assert_eq!(pool.counts(), of(1, 0, 0));
    drop(memory);
    assert_eq!(pool.counts(), of(2, 0, 1));
    let too_few = Error::HugePages { level: Level::Size2M, asked: 3, available: 2, pending: 1 };
    assert_eq!(build(3 * 512).err(), Some(too_few));
    let [first, last] = pins;
    drop(first);
    assert_eq!(pool.counts(), of(2, 0, 1), "one pin is left");
    // Who waits for it is told.
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| pool.wait_for(3, Duration::from_secs(600)));
        drop(last);
        assert!(waits.join().unwrap());
    });
    assert_eq!(pool.counts(), of(3, 0, 0));
    build(3 * 512).unwrap();
}

#[test]
fn what_was_discarded_and_is_pinned_is_pending_after_its_memory_too() {
    let pool = HugePool::new(Level::Size2M, 1);
    let builder = Memory::builder(PageCount::from(512u32)).host(HostKind::Machine).shared();
    let memory = builder.page_size(PageSize::Huge2M).pool(&pool).build().unwrap();
    let pin = memory.simulated_pin(pages(3, 4)).unwrap();
    let beyond = memory.simulated_pin(pages(511, 513)).map(drop);
    assert!(matches!(beyond, Err(Error::Refused(Refusal::Beyond { .. }))), "{beyond:?}");
    memory.discard(pages(0, 512), OnBusy::Wait).unwrap();
    assert_eq!(memory.pool().unwrap().pending, 1);
    drop(memory);
    assert_eq!((pool.counts().free, pool.counts().pending), (0, 1));
    drop(pin);
    assert_eq!((pool.counts().free, pool.counts().pending), (1, 0));
    // Nothing outlives a memory that nobody pins.
    let memory = Memory::builder(PageCount::from(512u32)).host(HostKind::Machine).shared();
    let memory = memory.page_size(PageSize::Huge2M).pool(&pool).build().unwrap();
    drop(memory.simulated_pin(pages(3, 4)).unwrap());
    drop(memory);
    assert_eq!((pool.counts().free, pool.counts().pending), (1, 0));
}
