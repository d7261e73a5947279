//! Bugs planted in the simulated machine: the table has a row that each one breaks.

use polder::machine::Plant;
use polder_behaviour::{Cell, Verdict, cases, cell, planted, run};

/// The first row that a bug breaks.
fn breaks(plant: Plant) -> Option<&'static str> {
    let host = planted(plant);
    let runs = cases().filter(|case| cell(host, case) == Cell::Runs);
    runs.into_iter().find(|case| matches!(run(host, case), Verdict::Failed(_))).map(|row| row.name)
}

#[test]
fn a_flush_that_is_skipped_is_seen() {
    assert!(breaks(Plant::SkipFlush).is_some());
}

#[test]
fn a_reader_that_does_not_look_again_is_seen() {
    assert!(breaks(Plant::StaleGup).is_some());
}

#[test]
fn counts_that_are_lost_are_seen() {
    assert!(breaks(Plant::LostMapcount).is_some());
    assert!(breaks(Plant::LostPin).is_some());
}
