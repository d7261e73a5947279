//! The simulated machine's pool: what goes back to it, and when.

use std::time::Duration;

use polder::units::{Level, PageCount};
use polder::{
    Contents, Error, HostKind, HugePool, Memory, OnBusy, PageSize, Platform, PoolCounts, Refusal,
    Visibility,
};
use polder_require::patience;

use super::{first_byte, pages, simulated, to};

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
