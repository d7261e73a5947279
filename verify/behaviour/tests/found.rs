//! What the search over interleavings finds, played on the product: a scenario that it saves
//! passes, and does not with the bug planted that it was found by.

use polder::machine::Plant;
use polder::{Bug, HostKind, Memory};
use polder_explore::planted;
use polder_play::{Options, Scenario, Verdict};

fn found(name: &str) -> Scenario {
    let bug = planted::all().find(|bug| bug.name == name).expect("a planted bug");
    let text = bug.scenario().unwrap_or_else(|why| panic!("{name}: {why}"));
    polder_play::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}\n{text}"))
}

fn played(scenario: &Scenario, prepare: Option<&dyn Fn(&Memory)>) -> Verdict {
    let options = Options { prepare, ..Options::default() };
    polder_play::play(scenario, HostKind::Machine, options).verdict
}

fn breaks(name: &str, plant: impl Fn(&Memory)) {
    let scenario = found(name);
    assert_eq!(played(&scenario, None), Verdict::Passed, "{name} without the bug");
    let verdict = played(&scenario, Some(&plant));
    assert!(matches!(verdict, Verdict::Failed(_)), "{name} with the bug: {verdict:?}");
}

#[test]
fn what_was_found_of_the_engine_breaks_when_played_with_the_bug() {
    for (name, bug) in [
        ("check-before-cut-off", Bug::CheckBeforeCuttingOff),
        ("commit-before-hardware", Bug::CommitBeforeHardware),
        ("exists-while-claimed", Bug::ExistsWhileClaimed),
        ("denied-while-claimed", Bug::DeniedWhileClaimed),
        ("markers-forgotten", Bug::MarkersForgotten),
        ("pins-forgotten", Bug::PinsForgotten),
        ("owed-shown", Bug::OwedShown),
    ] {
        breaks(name, |memory| memory.plant(bug));
    }
}

#[test]
fn what_was_found_of_the_machine_breaks_when_played_with_the_bug() {
    for (name, plant) in [
        ("no-flush", Plant::SkipFlush),
        ("gup-looks-once", Plant::StaleGup),
        ("lost-mapcount", Plant::LostMapcount),
        ("lost-pin", Plant::LostPin),
    ] {
        breaks(name, |memory| {
            memory.simulated(|machine, _, _| machine.plant(plant, true)).expect("the machine");
        });
    }
}

#[test]
fn whatever_is_saved_passes_on_the_product() {
    for bug in planted::all() {
        match bug.scenario() {
            Ok(text) => {
                let scenario = polder_play::parse(&text).expect("a scenario");
                assert_eq!(played(&scenario, None), Verdict::Passed, "{}", bug.name);
            }
            Err(why) => assert!(!why.contains("without the bug"), "{}: {why}", bug.name),
        }
    }
}
