//! Objects, folios and their counts.

use polder_machine::{Config, Contents, Error, GUP_PIN_COUNTING_BIAS, Machine, PinKind, View};
use polder_units::{Geometry, Level, PageCount};

use crate::{OWNER, Rig, page, pages, vpn, vpns};

#[test]
fn a_machine_of_nothing_or_of_an_odd_tlb_is_refused() {
    let good = Config::x86_64(PageCount::ONE);
    for bad in [
        Config { frames: PageCount::ZERO, ..good },
        Config { tlb_entries: 0, ..good },
        Config { tlb_entries: 24, ..good },
    ] {
        assert_eq!(Machine::new(bad).err(), Some(Error::Config));
    }
    let too_many = Config::x86_64(PageCount::new((1 << 40) + 1).unwrap());
    assert!(matches!(Machine::new(too_many), Err(Error::Space { .. })));
}

#[test]
fn an_allocation_that_does_not_fit_changes_nothing() {
    let mut rig = Rig::new(View::HOST);
    let free = rig.machine.free_frames();
    let mut allocate = |at, level| rig.machine.allocate(rig.object, page(at), level).unwrap_err();
    assert!(matches!(allocate(2, Level::Size2M), Error::Misaligned { number: 2, .. }));
    assert!(matches!(allocate(16, Level::Size4K), Error::Beyond { .. }));
    rig.machine.fail_allocation(Some(1));
    rig.machine.allocate(rig.object, page(5), Level::Size4K).unwrap();
    let failed = rig.machine.allocate(rig.object, page(6), Level::Size4K);
    assert_eq!(failed, Err(Error::NoMemory { level: Level::Size4K }));
    let overlapping = rig.machine.allocate(rig.object, page(4), Level::Size2M);
    assert_eq!(overlapping, Err(Error::Exists { number: 5 }));
    rig.machine.allocate(rig.object, page(6), Level::Size4K).unwrap();
    assert_eq!(rig.machine.free_frames(), free - 2);
}

#[test]
fn a_pin_of_a_small_folio_is_1024_references_and_of_a_large_one_a_count_apart() {
    let (mut rig, large) = Rig::with_folio(View::PLAIN);
    let small = rig.machine.allocate(rig.object, page(4), Level::Size4K).unwrap();
    let pin = |rig: &mut Rig, at| {
        rig.machine.pin_user_pages(rig.process, vpns(at, at + 1), true, PinKind::LongTerm).unwrap()
    };
    pin(&mut rig, 1);
    pin(&mut rig, 4);
    let counts = [large, small].map(|pfn| rig.machine.counts(pfn).unwrap());
    assert_eq!(counts.map(|it| it.foreign()), [1, GUP_PIN_COUNTING_BIAS]);
    assert_eq!(counts.map(|it| it.pincount), [1, 0]);
    assert_eq!(counts.map(|it| it.mapcount), [1, 1]);
    assert!(counts.iter().all(|it| it.maybe_dma_pinned()));
}

#[test]
fn counts_are_only_vouched_for_under_the_lock() {
    let (mut rig, pfn) = Rig::with_folio(View::HOST);
    assert_eq!(rig.machine.locked_counts(pfn, OWNER), Err(Error::NotLocked { pfn }));
    rig.machine.lock_folio(pfn, OWNER).unwrap();
    assert_eq!(rig.machine.lock_folio(pfn, OWNER), Err(Error::Locked { pfn }));
    assert_eq!(rig.machine.locked_counts(pfn, OWNER).unwrap().foreign(), 0);
    let mapped = rig.machine.host_map(rig.process, vpn(0), Level::Size4K);
    assert_eq!(mapped, Err(Error::Locked { pfn }));
}

#[test]
fn a_pinned_folio_outlives_its_page_and_is_freed_whole_by_the_last_unpin() {
    let (mut rig, pfn) = Rig::with_folio(View::PLAIN);
    let free = rig.machine.free_frames();
    let short = PinKind::Short;
    let pins = [0, 3]
        .map(|at| rig.machine.pin_user_pages(rig.process, vpns(at, at + 1), true, short).unwrap());
    rig.machine.zap_object(rig.object, pages(0, 4)).unwrap();
    rig.machine.flush_object(rig.object, pages(0, 4)).unwrap();
    rig.machine.punch(rig.object, pages(0, 4), None).unwrap();
    rig.machine.unpin(pins[0]).unwrap();
    assert_eq!(rig.machine.free_frames(), free);
    rig.machine.dma_write(pins[1], 0, b"in time!").unwrap();
    rig.machine.unpin(pins[1]).unwrap();
    assert_eq!(rig.machine.free_frames(), free + 4);
    assert_eq!(rig.machine.counts(pfn), Err(Error::Free { pfn }));
    assert!(matches!(rig.machine.unpin(pins[1]), Err(Error::Gone { what: "pin", .. })));
}

#[test]
fn a_punch_takes_all_of_its_folios_or_none() {
    let (mut rig, pfn) = Rig::with_folio(View::HOST);
    rig.machine.allocate(rig.object, page(4), Level::Size4K).unwrap();
    let part = rig.machine.punch(rig.object, pages(2, 6), None);
    assert_eq!(part, Err(Error::Part { page: page(0), level: Level::Size2M }));
    rig.machine.host_map(rig.process, vpn(1), Level::Size4K).unwrap();
    let mapped = rig.machine.punch(rig.object, pages(0, 8), None);
    assert_eq!(mapped, Err(Error::Mapped { pfn, mapcount: 1 }));
    rig.machine.zap_object(rig.object, pages(0, 8)).unwrap();
    rig.machine.lock_folio(pfn, OWNER).unwrap();
    assert_eq!(rig.machine.punch(rig.object, pages(0, 8), None), Err(Error::Locked { pfn }));
    assert_eq!(rig.machine.punch(rig.object, pages(0, 8), Some(OWNER)), Ok(PageCount::from(5)));
}

#[test]
fn a_split_and_merged_folio_is_what_it_was() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    rig.machine.object_write(rig.object, 0x2000, b"kept....").unwrap();
    rig.machine.punch(rig.object, pages(0, 4), None).unwrap();
    let pfn = rig.machine.allocate(rig.object, page(0), Level::Size1G).unwrap();
    rig.machine.object_write(rig.object, 0x6000, b"kept....").unwrap();
    let level = |rig: &Rig, at| rig.machine.backing(rig.object, page(at)).unwrap().unwrap().level;
    rig.machine.lock_folio(pfn, OWNER).unwrap();
    assert_eq!(rig.machine.split_folio(rig.object, page(6), OWNER), Ok(Level::Size2M));
    assert_eq!(rig.machine.split_folio(rig.object, page(6), OWNER), Ok(Level::Size4K));
    assert_eq!((level(&rig, 0), level(&rig, 6)), (Level::Size2M, Level::Size4K));
    let untouched = rig.machine.split_folio(rig.object, page(0), OWNER);
    assert_eq!(untouched, Err(Error::NotLocked { pfn }));
    rig.machine.merge_folios(rig.object, page(0), Level::Size1G, OWNER).unwrap();
    assert_eq!(level(&rig, 6), Level::Size1G);
    rig.machine.unlock_folio(pfn, OWNER).unwrap();
    let mut bytes = [0; 8];
    rig.machine.object_read(rig.object, 0x6000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"kept....");
    rig.machine.audit().unwrap();
}

#[test]
fn folios_from_different_blocks_do_not_merge_and_pinned_ones_do_not_split() {
    let (mut rig, pfn) = Rig::with_folio(View::PLAIN);
    for at in [5, 4, 6, 7] {
        rig.machine.allocate(rig.object, page(at), Level::Size4K).unwrap();
    }
    let merged = rig.machine.merge_folios(rig.object, page(4), Level::Size2M, OWNER);
    assert!(matches!(merged, Err(Error::Scattered { .. })));
    rig.machine.pin_user_pages(rig.process, vpns(0, 1), false, PinKind::Short).unwrap();
    rig.machine.zap_object(rig.object, pages(0, 4)).unwrap();
    rig.machine.lock_folio(pfn, OWNER).unwrap();
    let split = rig.machine.split_folio(rig.object, page(0), OWNER);
    assert_eq!(split, Err(Error::Referenced { pfn, foreign: 1 }));
}

#[test]
fn freed_memory_comes_back_as_zeros() {
    let (mut rig, _) = Rig::with_folio(View::HOST);
    rig.machine.object_write(rig.object, 8, b"a secret").unwrap();
    rig.machine.punch(rig.object, pages(0, 4), None).unwrap();
    for at in 0..16 {
        rig.machine.allocate(rig.object, page(at), Level::Size4K).unwrap();
    }
    let mut all = [1; 16 << 12];
    rig.machine.object_read(rig.object, 0, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
}

#[test]
fn bytes_past_the_end_are_refused_and_holes_read_as_zeros() {
    let mut rig = Rig::new(View::HOST);
    let mut byte = [7];
    rig.machine.object_read(rig.object, (16 << 12) - 1, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    let past = rig.machine.object_read(rig.object, 16 << 12, &mut byte);
    assert!(matches!(past, Err(Error::OutOfBounds { .. })));
    let hole = rig.machine.object_write(rig.object, 0, &byte);
    assert_eq!(hole, Err(Error::Hole { object: rig.object, page: page(0) }));
    let in_use = rig.machine.destroy_object(rig.object);
    assert_eq!(in_use, Err(Error::InUse { object: rig.object }));
}

#[test]
fn bytes_of_a_real_machine_are_bytes() {
    let config = Config {
        geometry: Geometry::X86_64,
        contents: Contents::Bytes,
        ..Config::x86_64(PageCount::from(2048))
    };
    let mut machine = Machine::new(config).unwrap();
    let object = machine.create_object(PageCount::from(1024)).unwrap();
    machine.allocate(object, page(512), Level::Size2M).unwrap();
    let bytes: Vec<u8> = (0..9000u32).map(|at| (at % 251) as u8).collect();
    machine.object_write(object, (600 << 12) + 77, &bytes).unwrap();
    let mut read = vec![0; 9000];
    machine.object_read(object, (600 << 12) + 77, &mut read).unwrap();
    assert_eq!(read, bytes);
    machine.zero(object, pages(601, 602)).unwrap();
    machine.object_read(object, (600 << 12) + 77, &mut read).unwrap();
    let page_1 = 4096 - 77..8192 - 77;
    assert!(read[page_1.clone()].iter().all(|byte| *byte == 0));
    assert_eq!((&read[..page_1.start], &read[page_1.end..]), (&bytes[..4019], &bytes[8115..]));
}
