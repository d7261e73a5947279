//! Sharing a 4K page of a 1G folio: Polder's whole conversion, which splits along the path, next to
//! splitting the folio to 4K alone. On the simulated machine, either of them.

use polder::units::{Level, PAGE_SIZE, PageCount, PageRange};
use polder::{Contents, Memory, OnBusy, PageSize, Visibility};
use polder_machine::{Config, LockOwner, Machine, ObjectId};

use super::{Case, Extent, SIMULATED, all, simulated};
use crate::turns::{median_of, time as timed};
use crate::{BenchError, Costs, Row};

pub(super) const TO_4K: &str = "split to 4k";

const OF_1G: u32 = 512 * 512;
const OWNER: LockOwner = LockOwner(9);

pub(super) fn time(case: &Case, extent: &Extent) -> Result<Row, BenchError> {
    let (mut to_4k, mut minimal) = (Vec::new(), Vec::new());
    for _ in 0..extent.rounds {
        let (mut machine, object) = machine();
        to_4k.push(timed(|| split_to_4k(&mut machine, object)).as_secs_f64() * 1e6);
        let memory = memory()?;
        let mut shared = Ok(());
        minimal.push(timed(|| shared = share(&memory, 1000)).as_secs_f64() * 1e6);
        shared?;
    }
    let costs = Costs { baseline: median_of(&to_4k), polder: median_of(&minimal) };
    let row = Row::of_costs(case.name.clone(), case.baseline, case.unit, costs);
    let note = format!("{SIMULATED}; Polder's is a whole conversion, the other the splits alone");
    Ok(Row { note, ..row })
}

/// The pages that are kept for it, as the kernel keeps `struct page`s.
pub(super) fn tables(case: &Case) -> Result<Row, BenchError> {
    let (mut machine, object) = machine();
    let free = machine.free_frames();
    split_to_4k(&mut machine, object);
    let to_4k = free - machine.free_frames();

    let memory = memory()?;
    let free = |memory: &Memory| memory.simulated(|machine, _, _| machine.free_frames());
    let before = free(&memory)?;
    share(&memory, 1000)?;
    let costs = Costs { baseline: to_4k as f64, polder: (before - free(&memory)?) as f64 };
    let row = Row::of_costs(case.name.clone(), case.baseline, case.unit, costs);
    Ok(Row { note: SIMULATED.to_owned(), ..row })
}

/// A machine with one 1G folio, of its pool.
fn machine() -> (Machine, ObjectId) {
    let config = Config::x86_64(PageCount::from(OF_1G * 2));
    let mut machine = Machine::new(config).expect("a machine of sensible size");
    let object = machine.create_object(PageCount::from(OF_1G)).expect("there is room");
    machine.fill_pool(Level::Size1G, 1);
    let folio = machine.allocate_from_pool(object, 0u32.into(), Level::Size1G);
    machine.lock_folio(folio.expect("the pool has one"), OWNER).expect("nobody else is there");
    (machine, object)
}

fn split_to_4k(machine: &mut Machine, object: ObjectId) {
    let mut split = |at: u32| {
        let folio = machine.backing(object, at.into()).expect("it is there").expect("as is");
        // The first part is locked yet.
        let _ = machine.lock_folio(folio.pfn, OWNER);
        machine.split_folio(object, at.into(), OWNER).expect("there are frames for tables")
    };
    split(0);
    (0..512).for_each(|number| {
        split(number * 512);
    });
}

/// Memory of one 1G folio, which is there.
fn memory() -> Result<Memory, BenchError> {
    let memory = simulated(PageSize::Huge1G)?;
    share(&memory, 5)?;
    memory.host_view().touch_write(5 * PAGE_SIZE, &[1])?;
    memory.convert(all(&memory), Visibility::Private, Contents::Preserve, OnBusy::Wait)?;
    Ok(memory)
}

fn share(memory: &Memory, page: u32) -> Result<(), BenchError> {
    let page = PageRange::one(page.into());
    memory.convert(page, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
    Ok(())
}
