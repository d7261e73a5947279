//! Every interleaving, and every stale value the memory model allows, of who pins pages without the
//! engine's lock and of who converts them.
//!
//! The page's bytes are a cell that loom watches: whoever has it pinned reads it, whoever has made
//! it private writes it, and no two do at once.

#![expect(clippy::unwrap_used, reason = "a failing test may panic anywhere")]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use polder_loom::{
    Backing, Config, Contents, ConversionRequest, Engine, Holder, Operation, PageFacts, PinKind,
    Pinner, Platform, Population, Stage, Start, Visibility,
};
use polder_units::{Geometry, Level, PageCount, PageRange};

/// The bytes of page 1.
type Bytes = Arc<UnsafeCell<u64>>;

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

fn engine(visibility: Visibility) -> Engine {
    Engine::new(Config {
        pages: PageCount::from(2),
        geometry: Geometry::new(2, 2).unwrap(),
        platform: Platform::Plain,
        in_place: true,
        host_view_level: Level::Size4K,
        backing: Backing::ANY,
        initial: PageFacts { visibility, population: Population::Whole },
    })
}

fn steps<S: Stage>(engine: &mut Engine, operation: Operation<S>) -> Operation<S::Next> {
    let mut step = engine.next_step(&operation);
    while step.is_some() {
        step = engine.step_taken(&operation);
    }
    engine.advance(operation)
}

/// Converts page 1, as the driver does; whether it was not refused.
fn convert(engine: &mut Engine, to: Visibility, meanwhile: impl FnOnce()) -> bool {
    let contents = Contents::Preserve;
    let ranges = vec![pages(1, 2)];
    let request = ConversionRequest { ranges, to, contents, by: None, by_guest: false };
    let Ok(Start::Claimed(draining)) = engine.convert(&request) else { return false };
    if engine.look_for_pins(&draining).is_err() {
        let undoing = engine.undo(draining);
        engine.finish_undo(undoing);
        return false;
    }
    meanwhile();
    let unmapped = steps(engine, draining);
    let unpinned = steps(engine, unmapped);
    let reshaped = steps(engine, unpinned);
    let protected = steps(engine, reshaped);
    let settled = steps(engine, protected);
    engine.finish_conversion(settled);
    true
}

fn read(bytes: &Bytes) {
    bytes.with(|_| ());
}

fn write(bytes: &Bytes) {
    bytes.with_mut(|_| ());
}

/// Reads the bytes while they are pinned by counts.
fn counted(pinner: &Pinner, bytes: &Bytes) -> bool {
    let pinned = pinner.pin(pages(0, 2)).is_ok();
    if pinned {
        read(bytes);
        pinner.unpin(pages(0, 2));
    }
    pinned
}

/// The same by notes of a thread's own; one is cloned, and outlived by its clone.
fn noted(pinner: &Pinner, bytes: &Bytes) -> bool {
    let Ok(local) = pinner.pin_here(0, pages(1, 2)) else { return false };
    let again = local.clone();
    drop(local);
    read(bytes);
    drop(again);
    true
}

/// Runs a pinner against a converter.
fn explore(
    from: Visibility,
    make: fn(&mut Engine) -> Pinner,
    pin: fn(&Pinner, &Bytes) -> bool,
    act: fn(&mut Engine, &Bytes),
) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let mut engine = engine(from);
        let pinner = make(&mut engine);
        let bytes = Bytes::new(UnsafeCell::new(0));
        let device = {
            let bytes = Arc::clone(&bytes);
            loom::thread::spawn(move || {
                pin(&pinner, &bytes);
            })
        };
        act(&mut engine, &bytes);
        device.join().unwrap();
    });
}

fn by_counts(engine: &mut Engine) -> Pinner {
    engine.pinner(Holder::new("a device"), PinKind::LongTerm)
}

fn by_notes(engine: &mut Engine) -> Pinner {
    engine.pinner_here(Holder::new("a device"), true)
}

fn to_private(engine: &mut Engine, bytes: &Bytes) {
    if convert(engine, Visibility::Private, || write(bytes)) {
        write(bytes);
    }
}

fn to_shared(engine: &mut Engine, bytes: &Bytes) {
    write(bytes);
    assert!(convert(engine, Visibility::Shared, || write(bytes)), "nobody pins private pages");
}

#[test]
fn a_page_is_pinned_by_counts_or_private() {
    explore(Visibility::Shared, by_counts, counted, to_private);
}

#[test]
fn a_page_is_pinned_by_a_note_or_private() {
    explore(Visibility::Shared, by_notes, noted, to_private);
}

#[test]
fn who_pins_a_page_by_counts_that_has_become_shared_finds_it_so() {
    explore(Visibility::Private, by_counts, counted, to_shared);
}

#[test]
fn who_pins_a_page_by_a_note_that_has_become_shared_finds_it_so() {
    explore(Visibility::Private, by_notes, noted, to_shared);
}

#[test]
fn a_page_can_be_pinned_again_where_a_conversion_was_refused() {
    explore(Visibility::Shared, by_counts, counted, |engine, _| {
        let pin = engine.pin(pages(1, 2), PinKind::Short, Holder::new("another")).unwrap();
        assert!(!convert(engine, Visibility::Private, || unreachable!("it is pinned")));
        engine.unpin(pin);
        let after = engine.pinner(Holder::new("a third"), PinKind::Short);
        assert!(after.pin(pages(0, 2)).is_ok(), "the gate is open");
        after.unpin(pages(0, 2));
    });
}

/// The checker has to find what it is for.
#[test]
#[should_panic(expected = "Causality violation")]
fn who_pins_what_is_claimed_is_found() {
    explore(Visibility::Shared, by_counts, counted, |engine, bytes| {
        engine.plant(polder_loom::Bug::PinnedWhileDrained);
        to_private(engine, bytes);
    });
}
