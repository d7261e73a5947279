//! Private pages off the kernel's direct map, on the simulated machine: whatever becomes of a page,
//! it is there if it is shared, and not if it is private.

use polder::units::{PageCount, PageIndex, PageRange};
use polder::{Contents, Errno, HostKind, Memory, OnBusy, Visibility};

use Visibility::{Private, Shared};

const PAGES: u32 = 16;

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in the test")
}

fn memory(owed: bool) -> Memory {
    let builder = Memory::builder(PageCount::from(PAGES)).host(HostKind::Machine).off_direct_map();
    let builder = if owed { builder.owed() } else { builder };
    builder.build().expect("the machine needs nothing")
}

/// Whether the direct map has a page's memory; `None` where it has none.
fn mapped(memory: &Memory, page: PageIndex) -> Option<bool> {
    let mapped = memory.simulated(|machine, object, _| {
        let backing = machine.backing(object, page).expect("a page of the object")?;
        Some(machine.is_in_direct_map(backing.pfn))
    });
    mapped.expect("it is simulated")
}

/// What has to be so of every page; how many have memory.
fn check(memory: &Memory) -> usize {
    let audit = memory.simulated(|machine, _, _| machine.audit()).expect("it is simulated");
    assert_eq!(audit, Ok(()));
    let facts = memory.facts(pages(0, PAGES.into())).expect("all pages");
    let of_page = facts.iter().flat_map(|(run, facts)| run.frames().map(move |page| (page, facts)));
    let with_memory = of_page.filter(|(page, facts)| match mapped(memory, *page) {
        Some(mapped) => {
            assert_eq!(mapped, facts.visibility == Shared, "page {page}");
            true
        }
        None => false,
    });
    with_memory.count()
}

fn to(memory: &Memory, range: PageRange, to: Visibility, contents: Contents) {
    memory.convert(range, to, contents, OnBusy::Wait).expect("nobody is in the way");
}

fn byte(memory: &Memory, page: u64) -> u8 {
    let mut byte = [0];
    memory.host_view().touch_read(page * 4096, &mut byte).expect("the page is shared");
    byte[0]
}

#[test]
fn what_is_populated_is_taken_off_before_it_is_shown() {
    let memory = memory(true);
    memory.populate(pages(2, 5), &[7; 3 * 4096]).unwrap();
    assert_eq!(check(&memory), 3);
    memory.settle().unwrap();
    to(&memory, pages(3, 8), Shared, Contents::Preserve);
    assert_eq!((byte(&memory, 3), byte(&memory, 6)), (7, 0));
    assert_eq!(check(&memory), 4);
    to(&memory, pages(0, 16), Private, Contents::Preserve);
    assert_eq!(check(&memory), 4);
    // It goes back before it is freed, and who has it next can have it zeroed.
    memory.discard(pages(0, 4), OnBusy::Wait).unwrap();
    assert_eq!(check(&memory), 2);
}

#[test]
fn what_is_preloaded_or_moved_is_written_by_a_mapping_for_just_that() {
    let memory = memory(false);
    for byte in [1, 2] {
        memory.preload(pages(4, 6), &[byte; 5000]).unwrap();
        assert_eq!(check(&memory), 2);
    }
    memory.move_pages(pages(0, 16), OnBusy::Wait).unwrap();
    assert_eq!(check(&memory), 2);
    to(&memory, pages(4, 6), Shared, Contents::Preserve);
    assert_eq!((byte(&memory, 4), byte(&memory, 5)), (2, 2));
}

#[test]
fn where_memory_runs_out_nothing_is_left_behind() {
    let memory = memory(true);
    memory.simulated(|machine, _, _| machine.fail_allocation(Some(1))).unwrap();
    let failed = memory.populate(pages(0, 3), &[7; 3 * 4096]).unwrap_err();
    assert_eq!(failed.errno(), Errno::ENOMEM);
    memory.simulated(|machine, _, _| machine.fail_allocation(None)).unwrap();
    assert_eq!(check(&memory), 0);
    memory.populate(pages(0, 3), &[7; 3 * 4096]).unwrap();
    assert_eq!(check(&memory), 3);
}

#[test]
fn whatever_becomes_of_pages_they_are_where_they_belong() {
    let memory = memory(false);
    let mut seed = 7_u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    for _ in 0..2_000 {
        let start = random(15);
        let range = pages(start, start + 1 + random(16 - start));
        match random(6) {
            0 => to(&memory, range, Private, Contents::Preserve),
            1 => to(&memory, range, Shared, Contents::Preserve),
            2 => to(&memory, range, if random(2) == 0 { Private } else { Shared }, Contents::Zero),
            3 => memory.discard(range, OnBusy::Wait).unwrap(),
            4 => memory.move_pages(range, OnBusy::Wait).unwrap(),
            // Denied where it is private.
            _ => drop(memory.host_view().touch_write(start * 4096, &[1; 4096])),
        }
        check(&memory);
    }
}
