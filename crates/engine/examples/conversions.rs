//! Conversions of the engine alone, for who counts their instructions (`docs/benchmarks.md`):
//!
//! ```text
//! valgrind --tool=callgrind target/release/examples/conversions 10000
//! ```
//! Each turn converts one page of a terabyte that a VM sees to private, and back; the host does
//! nothing.

use polder_engine::{
    Backing, Config, Contents, Conversion, ConversionRequest, Engine, PageFacts, Platform,
    Population, Slot, Stage, Start, Visibility, VmId,
};
use polder_units::{Geometry, Gfn, Level, PageCount, PageIndex, PageRange};

fn main() {
    let turns: u32 = std::env::args().nth(1).and_then(|turns| turns.parse().ok()).unwrap_or(10_000);
    let mut engine = Engine::new(Config {
        pages: PageCount::from(1 << 28),
        geometry: Geometry::X86_64,
        backing: Backing::ANY,
        platform: Platform::Plain,
        in_place: true,
        host_view_level: Level::Size4K,
        initial: PageFacts { visibility: Visibility::Shared, population: Population::Whole },
    });
    let all = PageRange::between(0, 1 << 28).expect("a terabyte");
    engine.bind(VmId(0), Slot(0), Gfn::from(0), all).expect("no slot is taken");
    for turn in 0..turns {
        let page = PageRange::one(PageIndex::from(turn % 512));
        convert(&mut engine, page, Visibility::Private);
        convert(&mut engine, page, Visibility::Shared);
    }
}

#[inline(never)]
fn convert(engine: &mut Engine, page: PageRange, to: Visibility) {
    let request = ConversionRequest {
        ranges: vec![page],
        to,
        contents: Contents::Preserve,
        by: None,
        by_guest: false,
    };
    let Ok(Start::Claimed(claimed)) = engine.convert(&request) else { return };
    assert!(engine.look_for_pins(&claimed).is_ok(), "nothing is pinned");
    assert!(engine.is_drained(&claimed), "nobody else is here");
    let unmapped = through(engine, claimed);
    let unpinned = through(engine, unmapped);
    let reshaped = through(engine, unpinned);
    let protected = through(engine, reshaped);
    let settled = through(engine, protected);
    engine.finish_conversion(settled);
}

/// Takes all steps of a stage.
fn through<S: Stage>(engine: &mut Engine, conversion: Conversion<S>) -> Conversion<S::Next> {
    let mut step = engine.next_step(&conversion);
    while step.is_some() {
        step = engine.step_taken(&conversion);
    }
    engine.advance(conversion)
}
