//! Splits and merges, a step of which goes wrong.

use polder_engine::pool::PoolCounts;
use polder_engine::{Backing, FolioCounts, ReshapeCounts};

use super::*;

/// Memory of one 1G page, which is there: pages 5 and 600 are shared, and hold 7.
fn of_1g(trouble: Trouble) -> Set {
    let pages = PageCount::from(512 * 512);
    let level = Level::Size1G;
    let host = MachineHost::of_huge_pages(pages, Platform::Plain, level, None).unwrap();
    let config = Config {
        pages,
        geometry: Geometry::X86_64,
        platform: Platform::Plain,
        in_place: true,
        host_view_level: level,
        backing: Backing::split(level),
        initial: PageFacts { visibility: Visibility::Private, population: Population::Whole },
    };
    let set = Set::over(Box::new(host), None, config, trouble, Duration::from_secs(3600));
    for page in [5, 600] {
        set.convert(pages_of(page), Visibility::Shared, Contents::Preserve).unwrap();
        set.driver.host.views().touch_write(page * 4096, &[7]).unwrap();
    }
    set
}

fn pages_of(page: u64) -> PageRange {
    pages(page, page + 1)
}

/// What a conversion that is undone leaves as it was.
#[derive(PartialEq, Debug)]
struct Seen {
    engine: (FolioCounts, ReshapeCounts),
    /// How many folios of each level.
    machine: [usize; 3],
    free: u64,
    pool: PoolCounts,
    bytes: Vec<Option<u8>>,
}

fn seen(set: &Set) -> Seen {
    let bytes = [5, 6, 600, 700, 1300].map(|page| {
        let mut byte = [0];
        let read = set.driver.host.views().touch_read(page * 4096, &mut byte);
        read.ok().map(|()| byte[0])
    });
    assert!(set.becomes_idle());
    let engine = set.driver.engine();
    assert!(engine.quarantine().is_empty());
    let counts = (engine.folio_counts(), engine.reshape_counts());
    drop(engine);
    let pool = set.driver.host.pool().unwrap();
    let (object, _) = set.driver.host.machine().unwrap().parts();
    let machine = set.driver.host.machine().unwrap().lock();
    machine.audit().expect("it adds up");
    let folios = |level| {
        let all = machine.folios(object, pages(0, 512 * 512)).unwrap();
        all.filter(|(_, folio)| folio.level == level).count()
    };
    let machine_levels = Level::ALL.map(folios);
    let free = machine.free_frames();
    Seen { engine: counts, machine: machine_levels, free, pool, bytes: bytes.to_vec() }
}

/// INV-4 and INV-6: a split along the path, and a merge of all to 1G.
#[test]
fn a_split_or_merge_whose_nth_step_goes_wrong_leaves_folios_tables_and_pool_as_they_were() {
    for trouble in [Trouble::Fail, Trouble::Panic] {
        for (range, to) in [
            (pages_of(1300), Visibility::Shared),
            (pages(5, 601), Visibility::Private),
            (pages(3, 1300), Visibility::Shared),
        ] {
            let steps = (0..).take_while(|&n| goes_wrong(trouble, range, to, n)).count();
            assert!(steps >= 4, "{steps} steps of a conversion of {range} to {to}");
        }
    }
}

fn goes_wrong(trouble: Trouble, range: PageRange, to: Visibility, n: usize) -> bool {
    let set = of_1g(trouble);
    let before = seen(&set);
    *set.plan.lock() = (n, 1);
    let convert = || set.convert(range, to, Contents::Preserve);
    let result = catch_unwind(AssertUnwindSafe(convert));
    let went_wrong = set.plan.lock().1 == 0;
    *set.plan.lock() = (usize::MAX, 0);
    assert_eq!(!matches!(result, Ok(Ok(()))), went_wrong);
    if went_wrong {
        // Where its thread is dead, who comes next undoes it: a touch would meet an earlier marker.
        let _ = set.driver.discard(pages_of(1301), false, OnBusy::Wait);
        assert_eq!(seen(&set), before, "step {n} of a conversion of {range} to {to}");
        set.convert(range, to, Contents::Preserve).unwrap();
    }
    assert_ne!(seen(&set).engine, before.engine);
    went_wrong
}
