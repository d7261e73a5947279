//! The scenarios of the repository: each passes, is about something, and notices what it is there
//! to notice.

use std::path::PathBuf;

use polder::machine::Plant;
use polder::{HostKind, Memory, PageSize};
use polder_play::{Options, Played, Scenario, Verdict, parse, play};
use polder_require::{Facility, HugetlbPages, require};

fn all() -> Vec<(String, Scenario)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../scenarios");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("the folder")
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    let read = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).expect("a scenario");
        let name = path.file_stem().expect("a file has a name").to_string_lossy().into_owned();
        let scenario = parse(&text).unwrap_or_else(|error| panic!("{name}.toml:{error}"));
        (name, scenario)
    };
    files.iter().map(read).collect()
}

fn named(name: &str) -> Scenario {
    let found = all().into_iter().find(|(other, _)| other == name);
    found.unwrap_or_else(|| panic!("there is no scenario {name}")).1
}

fn on_the_machine(scenario: &Scenario) -> Played {
    play(scenario, HostKind::Machine, Options::default())
}

#[test]
fn every_scenario_passes_and_names_its_thread_and_invariant() {
    let all = all();
    for (name, scenario) in &all {
        assert!(scenario.thread.is_some_and(|thread| thread <= 4), "{name}: its thread");
        assert!(!scenario.invariants.is_empty(), "{name}: its invariant");
        for &host in &scenario.hosts {
            let huge = scenario.memory.page_size == PageSize::Huge2M && host == HostKind::Memfd;
            let set_aside = || HugetlbPages::of_2m(scenario.memory.pages.get() / 512);
            let held = huge.then(|| require(Facility::HugePages, set_aside()));
            if held.as_ref().is_some_and(Option::is_none) {
                continue;
            }
            let played = play(scenario, host, Options::default());
            match played.verdict {
                Verdict::Passed => assert_eq!(played.steps.len(), scenario.steps.len()),
                Verdict::Skipped(why) if host != HostKind::Machine => {
                    let found: Result<(), _> = Err(format!("{name} on {host}: {why}"));
                    let _: Option<()> = require(Facility::Kvm, found);
                }
                verdict => panic!("{name} on {host}: {verdict:?}"),
            }
        }
    }
    let about = |thread| all.iter().filter(|(_, it)| it.thread == Some(thread)).count();
    assert!(about(0) + about(1) >= 20, "{} and {}", about(0), about(1));
}

#[test]
fn the_same_scenario_is_the_same_run() {
    for (name, scenario) in all() {
        let told = |played: Played| {
            let step = |step: polder_play::PlayedStep| (step.outcome, step.pages);
            played.steps.into_iter().map(step).collect::<Vec<_>>()
        };
        let first = told(on_the_machine(&scenario));
        assert_eq!(told(on_the_machine(&scenario)), first, "{name}");
    }
}

#[test]
fn a_scenario_that_is_written_is_read_as_the_same() {
    for (name, mut scenario) in all() {
        let text = scenario.to_string();
        let mut again = parse(&text).unwrap_or_else(|error| panic!("{name}: {error}\n{text}"));
        for scenario in [&mut scenario, &mut again] {
            forget_lines(scenario);
        }
        assert_eq!(again, scenario, "{name}");
    }
}

fn forget_lines(scenario: &mut Scenario) {
    for step in &mut scenario.steps {
        step.line = 0;
        if let polder_play::Verb::Look(look) = &mut step.verb {
            look.line = 0;
        }
    }
    scenario.expect.iter_mut().for_each(|look| look.line = 0);
}

/// Why the scenario fails with a bug planted into the machine.
fn broken(plant: Plant, name: &str) -> String {
    let prepare = |memory: &Memory| {
        memory.simulated(|machine, _, _| machine.plant(plant, true)).expect("it is the machine");
    };
    let options = Options { prepare: Some(&prepare), ..Options::default() };
    match play(&named(name), HostKind::Machine, options).verdict {
        Verdict::Failed(why) => why,
        verdict => panic!("{name} does not notice {plant:?}: {verdict:?}"),
    }
}

#[test]
fn a_flush_that_is_skipped_is_noticed() {
    let why = broken(Plant::SkipFlush, "device-keeps-a-translation");
    assert!(why.contains("\"denied\" was expected"), "{why}");
}

#[test]
fn a_gup_fast_that_does_not_look_again_is_noticed() {
    let why = broken(Plant::StaleGup, "gup-fast-across-a-conversion");
    assert!(why.contains("\"not-pinned\" was expected"), "{why}");
}

#[test]
fn a_pin_that_is_not_counted_is_noticed() {
    let why = broken(Plant::LostPin, "reference-that-nobody-told-of");
    assert!(why.contains("\"referenced\" was expected"), "{why}");
}

#[test]
fn a_psmash_that_loses_validated_is_noticed() {
    let why = broken(Plant::SmashUnvalidates, "part-to-shared");
    assert!(why.contains("validated"), "{why}");
}

#[test]
fn a_large_entry_over_assigned_ones_is_noticed() {
    let why = broken(Plant::LargeOverAssigned, "size-bit-when-unassigning");
    assert!(why.contains("\"FAIL_OVERLAP\" was expected"), "{why}");
}

#[test]
fn a_size_check_that_is_missing_is_noticed() {
    let why = broken(Plant::NoSizeCheck, "psmash-raced");
    assert!(why.contains("\"page-size\" was expected"), "{why}");
}
