//! The kernel's pool of hugetlb pages: what is promised is there, and all of it comes back.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use polder::units::{Level, PageCount};
use polder::{Delays, Error, Memory, OnBusy, PageSize, Visibility};
use polder_require::{Facility, HugetlbPages, patience, require};

use super::hugetlb::hugetlb;
use super::{first_byte, pages, to};

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
    let name = "hugetlb_pool::every_huge_page_is_back_after_a_kill_in_the_middle_of_a_conversion";
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
    let name =
        "hugetlb_pool::two_processes_that_race_for_the_pool_have_all_or_are_refused_and_lose_none";
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

/// Huge pages that no other test has a part of; says so where that can't be.
fn alone(count: u64) -> Option<HugetlbPages> {
    let found = HugetlbPages::of_2m_alone(count, patience(Duration::from_secs(10)));
    found.map_err(|why| println!("SKIPPED: {why}")).ok()
}
