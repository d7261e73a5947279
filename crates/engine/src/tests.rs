//! Stories of whole operations, a file for each topic, and random ones against a naive oracle.

mod bindings;
mod conversion;
mod dma;
mod explain;
mod folios;
mod oracle;
mod pkvm;
mod population;
mod rmp;
mod turns;

use std::vec;
use std::vec::Vec;

use polder_units::{Geometry, Gfn, Level, PageCount, PageIndex, PageRange};

use super::*;

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

fn page(index: u32) -> PageIndex {
    PageIndex::from(index)
}

fn engine(platform: Platform, population: Population) -> Engine {
    Engine::new(Config {
        pages: PageCount::from(64),
        geometry: Geometry::new(4, 4).unwrap(),
        platform,
        in_place: true,
        host_view_level: Level::Size4K,
        backing: Backing::ANY,
        initial: PageFacts { visibility: Visibility::Private, population },
    })
}

fn plain() -> Engine {
    engine(Platform::Plain, Population::Whole)
}

fn request(range: PageRange, to: Visibility, contents: Contents) -> ConversionRequest {
    ConversionRequest { ranges: vec![range], to, contents, by: None, by_guest: false }
}

fn claim(engine: &mut Engine, request: &ConversionRequest) -> Result<Start, Refusal> {
    match engine.convert(request) {
        Ok(start) => Ok(start),
        Err(Blocked::Refused(refusal) | Blocked::Busy(refusal)) => Err(refusal),
        Err(Blocked::Abandoned(operation)) => panic!("{operation:?} was abandoned"),
    }
}

/// Takes the steps of a stage, failing the one where `fail` comes down to 0.
fn stage<S: Stage>(
    engine: &mut Engine,
    operation: Operation<S>,
    taken: &mut Vec<Step>,
    fail: &mut Option<usize>,
) -> Result<Operation<S::Next>, Vec<Step>> {
    engine.look_for_pins(&operation).unwrap();
    let mut step = engine.next_step(&operation);
    while let Some(now) = step {
        taken.push(now);
        if *fail == Some(0) {
            let operation = engine.undo(operation);
            return Err(undo(engine, operation, true));
        }
        *fail = fail.map(|left| left - 1);
        step = engine.step_taken(&operation);
    }
    Ok(engine.advance(operation))
}

/// Takes the steps back; they succeed or fail.
fn undo(engine: &mut Engine, operation: Operation<Undoing>, succeed: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    while let Some(step) = engine.next_undo(&operation) {
        steps.push(step);
        engine.undo_taken(&operation, succeed);
    }
    engine.finish_undo(operation);
    steps
}

/// Converts with the `fail`th step failing. The steps taken, or those that undid them.
fn convert(
    engine: &mut Engine,
    request: &ConversionRequest,
    mut fail: Option<usize>,
) -> Result<Vec<Step>, Vec<Step>> {
    let mut taken = Vec::new();
    let Ok(Start::Claimed(draining)) = claim(engine, request) else { return Ok(taken) };
    let unmapped = stage(engine, draining, &mut taken, &mut fail)?;
    let unpinned = stage(engine, unmapped, &mut taken, &mut fail)?;
    let reshaped = stage(engine, unpinned, &mut taken, &mut fail)?;
    let protected = stage(engine, reshaped, &mut taken, &mut fail)?;
    let settled = stage(engine, protected, &mut taken, &mut fail)?;
    engine.finish_conversion(settled);
    Ok(taken)
}

fn share(engine: &mut Engine, range: PageRange) {
    convert(engine, &request(range, Visibility::Shared, Contents::Preserve), None).unwrap();
}

fn now(answer: TouchAnswer) -> Answer {
    match answer {
        TouchAnswer::Now(answer) => answer,
        other => panic!("{other:?}"),
    }
}

fn waits(engine: &mut Engine, page: PageIndex) -> bool {
    matches!(engine.touch(View::Host, page), TouchAnswer::Wait | TouchAnswer::Owed)
}
