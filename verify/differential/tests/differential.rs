//! Programs agree on the hosts; what differs is found, made small, and can be played again.

use polder::machine::Plant;
use polder::{HostKind, Memory};
use polder_differential::{
    Came, Difference, LEFT_OUT, Side, compare, program, save, shrink, side_by_side, to_save,
};
use polder_play::{Options, Verdict, parse, play, record};
use polder_require::{Facility, require};

const REAL: [HostKind; 2] = [HostKind::Machine, HostKind::Memfd];

/// Programs of the run that is a part of the tests: some 3 s.
const PROGRAMS: u64 = 15;

fn skip(host: HostKind, why: &str) {
    let _: Option<()> = require(Facility::Kvm, Err(format!("host {host}: {why}")));
}

#[test]
fn programs_come_to_the_same_on_the_machine_and_on_a_memfd() {
    let sides = REAL.map(Side::new);
    for seed in 1..=PROGRAMS {
        match compare(&program(seed, &REAL), &sides) {
            Came::Agreed(_) => {}
            Came::Skipped(host, why) => return skip(host, &why),
            Came::Differs(found) => panic!("{}", side_by_side(&found, &sides, seed)),
        }
    }
}

#[test]
fn a_seed_makes_a_program_and_a_program_is_the_same_run_each_time() {
    for seed in 100..110 {
        let made = program(seed, &REAL);
        assert_eq!(made, program(seed, &REAL));
        let recorded = || record(&made, HostKind::Machine, Options::default());
        assert_eq!(recorded(), recorded(), "seed {seed}");
    }
    assert_ne!(program(1, &REAL).steps, program(2, &REAL).steps);
}

#[test]
fn what_is_recorded_can_be_written_read_and_passes_where_it_was_recorded() {
    for seed in 200..210 {
        let recorded = record(&program(seed, &REAL), HostKind::Machine, Options::default());
        let text = recorded.scenario.to_string();
        let read = parse(&text).unwrap_or_else(|error| panic!("seed {seed}: {error}\n{text}"));
        let played = play(&read, HostKind::Machine, Options::default());
        assert_eq!(played.verdict, Verdict::Passed, "seed {seed}\n{text}");
    }
}

fn skip_flushes(memory: &Memory) {
    memory.simulated(|machine, _, _| machine.plant(Plant::SkipFlush, true)).expect("the machine");
}

/// The first difference that is found, made small.
fn found(sides: &[Side; 2]) -> Option<(u64, Difference)> {
    for seed in 1..500 {
        match compare(&program(seed, &REAL), sides) {
            Came::Agreed(_) => {}
            // The audit notices, too: here it is about what a program notices.
            Came::Differs(found) if found.step.is_none() => {}
            Came::Differs(found) => return Some((seed, shrink(*found, sides, || true))),
            Came::Skipped(host, why) => {
                skip(host, &why);
                return None;
            }
        }
    }
    panic!("500 programs don't notice a flush that is skipped");
}

#[test]
fn a_planted_bug_is_found_made_small_and_saved_to_be_played_again() {
    let planted = Side { host: HostKind::Machine, prepare: Some(skip_flushes) };
    for sound in REAL {
        let sides = [Side::new(sound), planted];
        let Some((seed, found)) = found(&sides) else { return };
        let told = side_by_side(&found, &sides, seed);
        assert!(found.scenario.steps.len() <= 4, "{told}");
        assert!(told.contains("denied"), "{told}");
        let folder = std::env::temp_dir().join(format!("polder-{}", std::process::id()));
        let file = save(&found, &sides, seed, &folder).expect("a folder of ours");
        let text = std::fs::read_to_string(&file).expect("it was saved");
        std::fs::remove_dir_all(&folder).expect("it is ours");
        let saved = parse(&text).expect("it can be read");
        assert_eq!(saved, to_save(&found, &sides, seed));
        assert!(saved.about.contains(&format!("seed {seed}")), "{}", saved.about);
        assert_eq!(play(&saved, sound, Options::default()).verdict, Verdict::Passed, "{text}");
        let prepare = |memory: &Memory| skip_flushes(memory);
        let options = Options { prepare: Some(&prepare), ..Options::default() };
        let again = play(&saved, HostKind::Machine, options).verdict;
        assert!(matches!(again, Verdict::Failed(_)), "{again:?}\n{text}");
    }
}

#[test]
fn what_is_left_out_is_offered_by_the_machine_alone() {
    for row in LEFT_OUT {
        let of = |host| {
            let text = format!("about = \"{}\"\nhosts = [\"{host}\"]\n{}", row.what, row.scenario);
            match parse(&text) {
                Ok(scenario) => play(&scenario, host, Options::default()).verdict,
                Err(error) => Verdict::Failed(error.to_string()),
            }
        };
        assert_eq!(of(HostKind::Machine), Verdict::Passed, "{} on the machine", row.what);
        match of(row.host) {
            Verdict::Failed(why) | Verdict::Skipped(why) if why.contains(row.says) => {}
            Verdict::Skipped(why) => {
                // The host can't be asked on this machine.
                let facility = match row.host {
                    HostKind::GuestMemfd => Facility::PrivateMemory,
                    _ => Facility::Kvm,
                };
                let _: Option<()> = require(facility, Err(format!("{}: {why}", row.what)));
            }
            verdict => panic!("{} on {}: {verdict:?}", row.what, row.host),
        }
    }
}
