//! Bugs planted in the simulated machine, and in the engine and its host for it: the row that is
//! about each one breaks, and not by hanging.
//!
//! `Plant::StaleSequence` is not among them: what it does shows only where a slot moves between two
//! steps of one answer, which the row about moving slots meets often and not always. The machine's
//! own tests walk through those steps.

use polder::Bug;
use polder::machine::Plant;
use polder_behaviour::{Host, Verdict, cases, planted, planted_in_engine, run};

/// What the row says of a host with a bug; none if it passes.
fn broken(host: &'static dyn Host, name: &str) -> Option<String> {
    let row = cases().find(|case| case.name == name).expect("a row of the table");
    match run(host, row) {
        Verdict::Failed(why) => Some(why),
        Verdict::Ok | Verdict::Skipped(_) => None,
    }
}

fn breaks(plant: Plant, name: &str) {
    let why = broken(planted(plant), name);
    assert!(why.as_ref().is_some_and(|why| !why.contains("it hangs")), "{plant:?}: {why:?}");
}

fn bug_breaks(bug: Bug, name: &str) {
    let why = broken(planted_in_engine(bug), name);
    assert!(why.as_ref().is_some_and(|why| !why.contains("it hangs")), "{bug:?}: {why:?}");
}

#[test]
fn a_smash_that_is_forgotten_is_seen() {
    let part = "a part of a large entry becomes shared, and its neighbours stay";
    bug_breaks(Bug::ForgottenSmash, part);
    bug_breaks(
        Bug::ForgottenSmash,
        "a folio that was split leaves a large entry, smashed when met",
    );
}

#[test]
fn a_large_entry_for_an_unaligned_guest_frame_is_seen() {
    let row = "where guest frames are not congruent, entries are 4K, and work";
    bug_breaks(Bug::MisalignedLarge, row);
}

#[test]
fn an_rmp_that_is_not_reverted_is_seen() {
    bug_breaks(Bug::NotReverted, "a conversion to private that fails leaves the RMP as it was");
    bug_breaks(Bug::NotReverted, "a conversion to shared that fails leaves the RMP as it was");
}

#[test]
fn undoing_in_forward_order_is_seen() {
    bug_breaks(Bug::ForwardUndo, "a conversion to private that fails leaves the RMP as it was");
}

#[test]
fn undoing_that_leaves_out_the_failed_page_is_seen() {
    bug_breaks(Bug::SkippedFailed, "a conversion to private that fails leaves the RMP as it was");
    bug_breaks(Bug::SkippedFailed, "a conversion to shared that fails leaves the RMP as it was");
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
