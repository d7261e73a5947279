//! Bugs planted in the simulated machine: the row that is about each one breaks, and not by
//! hanging.
//!
//! `Plant::StaleSequence` is not among them: what it does shows only where a slot moves between two
//! steps of one answer, which the row about moving slots meets often and not always. The machine's
//! own tests walk through those steps.

use polder::machine::Plant;
use polder_behaviour::{Verdict, cases, planted, run};

/// What the row says of a machine with the bug; none if it passes.
fn broken(plant: Plant, name: &str) -> Option<String> {
    let row = cases().find(|case| case.name == name).expect("a row of the table");
    match run(planted(plant), row) {
        Verdict::Failed(why) => Some(why),
        Verdict::Ok | Verdict::Skipped(_) => None,
    }
}

fn breaks(plant: Plant, name: &str) {
    let why = broken(plant, name);
    assert!(why.as_ref().is_some_and(|why| !why.contains("it hangs")), "{plant:?}: {why:?}");
}

#[test]
fn a_flush_that_is_skipped_is_seen() {
    breaks(Plant::SkipFlush, "a page that a thread has used is denied to it once it is private");
}

#[test]
fn a_reader_that_does_not_look_again_is_seen() {
    breaks(
        Plant::StaleGup,
        "GUP-fast that began before a conversion does not end in a pin after it",
    );
}

#[test]
fn counts_that_are_lost_are_seen() {
    let row = "what the kernel counts adds up after conversions, pins and discards";
    breaks(Plant::LostMapcount, row);
    breaks(Plant::LostPin, row);
}
