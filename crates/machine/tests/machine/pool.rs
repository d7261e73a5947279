//! A pool of huge pages: what is given out comes back as a whole, once, and a split needs tables.

use polder_machine::{Error, PinKind, Plant, PoolCounts};

use super::*;

/// A pool of one block of each level, and what its frames left free.
fn pooled() -> (Rig, u64) {
    let mut rig = Rig::new(View::PLAIN);
    assert_eq!(rig.machine.fill_pool(Level::Size1G, 1), 1);
    assert_eq!(rig.machine.fill_pool(Level::Size2M, 1), 1);
    let free = rig.machine.free_frames();
    (rig, free)
}

fn counts(rig: &Rig, level: Level) -> [u64; 3] {
    let PoolCounts { total, free, pending } = rig.machine.pool_counts(level);
    [total, free, pending]
}

fn split(rig: &mut Rig, at: u32) -> Result<Level, Error> {
    let pfn = rig.machine.backing(rig.object, page(at)).unwrap().unwrap().pfn;
    rig.machine.lock_folio(pfn, OWNER)?;
    let split = rig.machine.split_folio(rig.object, page(at), OWNER);
    let pfn = rig.machine.backing(rig.object, page(at)).unwrap().unwrap().pfn;
    rig.machine.unlock_folio(pfn, OWNER).unwrap();
    split
}

#[test]
fn a_pool_gives_its_blocks_out_and_no_more() {
    let (mut rig, free) = pooled();
    rig.machine.allocate_from_pool(rig.object, page(0), Level::Size2M).unwrap();
    assert_eq!(counts(&rig, Level::Size2M), [1, 0, 0]);
    let empty = rig.machine.allocate_from_pool(rig.object, page(4), Level::Size2M);
    assert_eq!(empty, Err(Error::NoMemory { level: Level::Size2M }));
    rig.machine.punch(rig.object, pages(0, 4), None).unwrap();
    assert_eq!(counts(&rig, Level::Size2M), [1, 1, 0]);
    assert_eq!(rig.machine.free_frames(), free, "they went to the pool");
    rig.machine.audit().unwrap();
}

#[test]
fn a_split_takes_tables_and_a_merge_gives_them_back() {
    let (mut rig, free) = pooled();
    rig.machine.allocate_from_pool(rig.object, page(0), Level::Size1G).unwrap();
    assert_eq!(split(&mut rig, 6), Ok(Level::Size2M));
    let of_1g = rig.machine.tables_for(Level::Size1G);
    assert_eq!(rig.machine.free_frames(), free - of_1g);
    assert_eq!(split(&mut rig, 6), Ok(Level::Size4K));
    assert_eq!(rig.machine.free_frames(), free - of_1g - rig.machine.tables_for(Level::Size2M));
    rig.machine.audit().unwrap();
    rig.machine.merge_folios(rig.object, page(0), Level::Size1G, OWNER).unwrap();
    assert_eq!(rig.machine.free_frames(), free);
    rig.machine.audit().unwrap();
}

#[test]
fn what_was_prepared_or_kept_is_enough_for_a_split_when_memory_has_run_out() {
    let (mut rig, free) = pooled();
    rig.machine.allocate_from_pool(rig.object, page(0), Level::Size2M).unwrap();
    rig.machine.fail_allocation(Some(0));
    assert_eq!(split(&mut rig, 0), Err(Error::NoMemory { level: Level::Size4K }));
    assert_eq!(rig.machine.backing(rig.object, page(0)).unwrap().unwrap().level, Level::Size2M);
    rig.machine.prepare_split(rig.object, page(0), Level::Size2M).unwrap();
    rig.machine.prepare_split(rig.object, page(0), Level::Size2M).unwrap();
    let left = rig.machine.free_frames();
    rig.machine.fail_allocation(Some(0));
    for _ in 0..2 {
        assert_eq!(split(&mut rig, 0), Ok(Level::Size4K));
        let level = Level::Size2M;
        rig.machine.merge_folios_keeping_tables(rig.object, page(0), level, OWNER).unwrap();
        assert_eq!(rig.machine.free_frames(), left);
    }
    rig.machine.fail_allocation(None);
    rig.machine.release_tables(rig.object, page(0), Level::Size2M);
    assert_eq!(rig.machine.free_frames(), free);
    rig.machine.audit().unwrap();
}

#[test]
fn preparing_takes_all_or_nothing() {
    let (mut rig, free) = pooled();
    for nth in 0..rig.machine.tables_for(Level::Size1G) {
        rig.machine.fail_allocation(Some(nth));
        rig.machine.prepare_split(rig.object, page(0), Level::Size1G).unwrap_err();
        assert_eq!(rig.machine.free_frames(), free);
        rig.machine.audit().unwrap();
    }
}

#[test]
fn the_last_unpin_returns_a_huge_page_once_and_its_tables_with_it() {
    for planted in [false, true] {
        let (mut rig, free) = pooled();
        rig.machine.allocate_from_pool(rig.object, page(0), Level::Size2M).unwrap();
        split(&mut rig, 0).unwrap();
        let pins = [1, 3].map(|at| {
            rig.machine.pin_user_pages(rig.process, vpns(at, at + 1), true, PinKind::LongTerm)
        });
        rig.machine.zap_object(rig.object, pages(0, 4)).unwrap();
        rig.machine.plant(Plant::ReturnedEarly, planted);
        rig.machine.punch(rig.object, pages(0, 4), None).unwrap();
        if planted {
            rig.machine.flush_object(rig.object, pages(0, 4)).unwrap();
            assert!(rig.machine.audit().is_err(), "a page that others use is free");
            continue;
        }
        assert_eq!(counts(&rig, Level::Size2M), [1, 0, 1]);
        let [first, last] = pins.map(Result::unwrap);
        rig.machine.unpin(first).unwrap();
        assert_eq!(counts(&rig, Level::Size2M), [1, 0, 1]);
        rig.machine.flush_object(rig.object, pages(0, 4)).unwrap();
        rig.machine.audit().unwrap();
        rig.machine.unpin(last).unwrap();
        assert_eq!(counts(&rig, Level::Size2M), [1, 1, 0]);
        assert_eq!(rig.machine.free_frames(), free);
        rig.machine.audit().unwrap();
    }
}

#[test]
fn on_x86_64_a_minimal_split_takes_eight_times_fewer_tables_than_one_to_4k() {
    let machine = Machine::new(Config::x86_64(PageCount::from(1))).unwrap();
    assert_eq!([Level::Size1G, Level::Size2M].map(|it| machine.tables_for(it)), [511, 7]);
}
