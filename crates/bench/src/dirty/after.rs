//! A guest's accesses to huge pages whose log was stopped, next to some that were never logged:
//! they are as fast only if KVM maps whole huge pages again.

use polder::{Error, PageSize};

use super::Extent;
use crate::hugepages;
use crate::hugepages::accesses::Guest;
use crate::turns::median_of;
use crate::{BenchError, Costs, Row};

const CASE: &str = "random access 2m, after stop_dirty_log";
const NEVER: &str = "never logged";

pub(super) fn row(extent: &Extent) -> Result<Row, BenchError> {
    match measure(extent) {
        Err(BenchError::Memory(error @ Error::HugePages { .. })) => {
            let way_out = error.way_out().unwrap_or_default();
            Ok(Row::left_out(CASE.to_owned(), NEVER, "ns", &format!("{error}; {way_out}")))
        }
        measured => measured,
    }
}

fn measure(extent: &Extent) -> Result<Row, BenchError> {
    let accesses = hugepages::Extent::of(extent.huge, extent.accesses);
    let never = Guest::new(PageSize::Huge2M, &accesses)?;
    let stopped = Guest::new(PageSize::Huge2M, &accesses)?;
    never.fill()?;
    let memory = stopped.memory();
    memory.start_dirty_log()?;
    stopped.fill()?;
    let while_on = (0..extent.rounds).map(|round| stopped.roam(round + 7));
    let while_on = median_of(&while_on.collect::<Result<Vec<_>, _>>()?);
    memory.stop_dirty_log()?;
    // Its first touches, by which KVM maps it again.
    stopped.fill()?;
    let (mut of_never, mut of_stopped) = (Vec::new(), Vec::new());
    for round in 0..extent.rounds {
        of_never.push(never.roam(round + 7)?);
        of_stopped.push(stopped.roam(round + 7)?);
    }
    let costs = Costs { baseline: median_of(&of_never), polder: median_of(&of_stopped) };
    let row = Row::of_costs(CASE.to_owned(), NEVER, "ns", costs);
    Ok(Row { note: format!("{while_on:.1} while the log is on"), ..row })
}
