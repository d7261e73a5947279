//! What becomes of memory where the process may have no more: of addresses, descriptors, mappings,
//! locked memory. Each in a process of its own, which is given the limit.

use std::process::Command;

use polder::units::{ByteSize, PageCount, PageRange};
use polder::{Contents, Errno, Error, Holder, Memory, OnBusy, PinKind, Visibility};
use polder_require::{Facility, require};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Runs a test of this program in a process of its own.
fn alone(test: &str) {
    let itself = std::env::current_exe().expect("procfs");
    let child = Command::new(itself)
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env("POLDER_LIMITED", "1")
        .output()
        .expect("our own program starts");
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
}

/// Whether this is that process.
fn limited() -> bool {
    std::env::var_os("POLDER_LIMITED").is_some()
}

fn memory(size: &str) -> Result<Memory, Error> {
    Memory::builder(size.parse::<ByteSize>().expect("a size").pages().expect("whole pages")).build()
}

fn can_be_made() -> bool {
    require(Facility::Userfault, memory("1M")).is_some()
}

fn limit(resource: Resource, most: u64) {
    let maximum = getrlimit(resource).maximum;
    setrlimit(resource, Rlimit { current: Some(most), maximum }).expect("less than it was");
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("procfs").count()
}

/// Of memory: how many others there are is the allocator's affair.
fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs");
    maps.lines().filter(|line| line.contains("memfd:polder")).count()
}

/// Memory that does what it is to do, also while others can't be made.
fn works(memory: &Memory) {
    let all = PageRange::between(0, memory.pages().get()).expect("it works");
    let to = |to| memory.convert(all, to, Contents::Preserve, OnBusy::Wait).expect("it works");
    to(Visibility::Shared);
    memory.host_view().touch_write(4096, &[7; 4096]).expect("it works");
    drop(memory.pin(all, PinKind::LongTerm, Holder::new("test")).expect("it works"));
    to(Visibility::Private);
    assert!(memory.host_view().touch_read(4096, &mut [0]).is_err());
    memory.discard(all, OnBusy::Wait).expect("it works");
}

#[test]
fn out_of_addresses_is_an_error_with_a_way_out() {
    if !limited() && can_be_made() {
        return alone("out_of_addresses_is_an_error_with_a_way_out");
    }
    if !limited() {
        return;
    }
    let before = memory("16M").unwrap();
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    limit(Resource::As, pages * 4096 + (256 << 20));
    let (had, mapped) = (descriptors(), mappings());
    for size in ["100M", "1G", "1T", "100T"] {
        let refused = memory(size).expect_err(size);
        assert_eq!(refused.errno(), Errno::ENOMEM, "{size}: {refused:?}");
        assert_eq!(
            refused.way_out(),
            Some("ask for less memory, free some, or raise the limit (ulimit -v)")
        );
    }
    assert_eq!((descriptors(), mappings()), (had, mapped), "what was made in part is gone");
    works(&before);
    works(&memory("16M").unwrap());
}

#[test]
fn out_of_descriptors_is_an_error_with_a_way_out() {
    if !limited() && can_be_made() {
        return alone("out_of_descriptors_is_an_error_with_a_way_out");
    }
    if !limited() {
        return;
    }
    let before = memory("1M").unwrap();
    // The listing has one itself.
    let had = descriptors() - 1;
    let mut refused = 0;
    for more in 0.. {
        limit(Resource::Nofile, (had + more) as u64);
        match memory("1M") {
            Ok(made) => {
                works(&made);
                break;
            }
            Err(error) => {
                let Error::Host(host) = &error else { panic!("{error:?}") };
                assert_eq!(host.errno, polder_linux::Errno::MFILE, "{error:?}");
                assert!(error.way_out().is_some_and(|way| way.contains("ulimit -n")));
                refused += 1;
            }
        }
        works(&before);
    }
    assert!(refused > 1, "a memfd, two userfaultfds, an eventfd: {refused}");
    limit(Resource::Nofile, (had + 20) as u64);
    assert_eq!(descriptors() - 1, had, "what was made in part is gone");
}

#[test]
fn no_memory_that_may_be_locked_is_needed() {
    if !limited() && can_be_made() {
        return alone("no_memory_that_may_be_locked_is_needed");
    }
    if !limited() {
        return;
    }
    limit(Resource::Memlock, 0);
    works(&memory("16M").unwrap());
}

/// A view that is watched in part is a mapping for each part.
#[test]
fn out_of_mappings_costs_time_and_nothing_else() {
    if !limited() && can_be_made() {
        return alone("out_of_mappings_costs_time_and_nothing_else");
    }
    if !limited() {
        return;
    }
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let most: u64 = most.trim().parse().unwrap();
    let (had, pages) = (mappings(), 2 * most + 100);
    if pages > 1 << 20 {
        eprintln!("SKIPPED: vm.max_map_count is {most}: that takes too long to reach");
        return;
    }
    let memory = Memory::builder(PageCount::new(pages).unwrap()).owed().build().unwrap();
    for page in (0..pages).step_by(2) {
        memory.fail(PageRange::between(page, page + 1).unwrap()).unwrap();
    }
    let settled = memory.settle();
    let error = settled.expect_err("so many mappings are not to be had");
    assert_eq!(error.errno(), Errno::ENOMEM, "{error:?}");
    // It is true nevertheless: what failed is denied, what was owed is zeros.
    let all = PageRange::between(0, pages).unwrap();
    memory.convert(all, Visibility::Shared, Contents::Preserve, OnBusy::Wait).unwrap();
    assert!(memory.host_view().touch_read(0, &mut [0]).is_err());
    let mut byte = [1];
    memory.host_view().touch_read(4096, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    drop(memory);
    assert_eq!(mappings(), had);
}
