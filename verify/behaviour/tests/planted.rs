//! Bugs planted in the simulated machine, and in the engine and its host for it: the row that is
//! about each one breaks, and not by hanging.
//!
//! `Plant::StaleSequence` is not among them: what it does shows only where a slot moves between two
//! steps of one answer, which the row about moving slots meets often and not always. The machine's
//! own tests walk through those steps.

use polder::machine::Plant;
use polder::{Bug, HostKind, Memory, Platform};
use polder_behaviour::{Host, Verdict, cases, planted, run};
use polder_play::{Options, Verdict as Played};

/// What the row says of a host with a bug; none if it passes.
fn broken(host: &'static dyn Host, name: &str) -> Option<String> {
    let row = cases().find(|case| case.name == name).expect("a row of the table");
    match run(host, row) {
        Verdict::Failed(why) => Some(why),
        Verdict::Ok | Verdict::Skipped(_) => None,
    }
}

fn breaks(plant: Plant, name: &str) {
    let host = planted(Platform::Plain, move |memory| {
        memory.simulated(|machine, _, _| machine.plant(plant, true)).expect("the machine");
    });
    let why = broken(host, name);
    assert!(why.as_ref().is_some_and(|why| !why.contains("it hangs")), "{plant:?}: {why:?}");
}

/// Why the scenario fails with a bug planted into the engine.
fn scenario_breaks(bug: Bug, name: &str) -> String {
    let file = format!("{}/../../scenarios/{name}.toml", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(file).expect("a scenario");
    let scenario = polder_play::parse(&text).expect("it can be read");
    let verdict = |options| polder_play::play(&scenario, HostKind::Machine, options).verdict;
    assert_eq!(verdict(Options::default()), Played::Passed, "{name} without the bug");
    let prepare = |memory: &Memory| memory.plant(bug);
    match verdict(Options { prepare: Some(&prepare), ..Options::default() }) {
        Played::Failed(why) => why,
        verdict => panic!("{name} does not notice {bug:?}: {verdict:?}"),
    }
}

#[test]
fn scenarios_notice_what_is_planted_into_the_engine() {
    for (bug, name, noticed) in [
        (Bug::ForgottenSmash, "part-to-shared", "FAIL_OVERLAP"),
        (Bug::MisalignedLarge, "misaligned-slot", "page 0: the RMP entry is 2M"),
        (Bug::NotReverted, "entry-in-use", "page 0: the RMP entry is 4K, and \"none\""),
        (Bug::ForwardUndo, "folio-locked-while-made-zeros", "page 512: the RMP entry is 4K"),
        (Bug::SkippedFailed, "entry-in-use-after-a-large-one", "page 512: the RMP entry is 4K"),
    ] {
        let why = scenario_breaks(bug, name);
        assert!(why.contains(noticed), "{bug:?}: {why}");
    }
}

fn bug_breaks(bug: Bug, name: &str) {
    let host = planted(Platform::Snp, move |memory| memory.plant(bug));
    let why = broken(host, name);
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
    bug_breaks(Bug::ForwardUndo, "what could not be made zeros is its guest's no more");
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
