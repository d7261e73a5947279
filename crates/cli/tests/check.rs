//! `polder check`, from the outside.

use std::process::{Command, Output};

use serde_json::Value;

fn polder(arguments: &[&str]) -> Output {
    let polder = Command::new(env!("CARGO_BIN_EXE_polder")).arg("check").args(arguments).output();
    polder.expect("the program was just built")
}

fn json(arguments: &[&str], status: i32) -> Value {
    let output = polder(&[arguments, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[test]
fn a_configuration_that_keeps_every_invariant_is_told_as_searched_to_its_end() {
    let found = json(&["--config", "apart"], 0);
    assert_eq!(found["violations"], 0);
    assert!(found["states"].as_u64() > Some(100), "{found}");
    assert_eq!(found["overlaps"]["covered"], found["overlaps"]["possible"]);
    assert_eq!(found["configs"][0]["complete"], true);
}

#[test]
fn a_planted_bug_is_told_step_by_step() {
    let output = polder(&["--planted", "exists-while-claimed"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.contains("    1. source: claims pages [0x0..0x2) for a population\n"), "{text}");
    assert!(text.ends_with("1 of 1 planted bugs were found\n"), "{text}");
}

#[test]
fn a_change_that_breaks_nothing_is_told_as_searched_to_its_end() {
    let found = json(&["--planted", "large-without-binding"], 0);
    assert_eq!(found["violations"], 0);
    let configs = found["configs"].as_array().expect("a row for each");
    assert!(configs.iter().all(|config| config["complete"] == true), "{found}");
}

#[test]
fn what_was_found_is_saved_as_a_scenario_that_can_be_played() {
    let folder = std::env::temp_dir().join(format!("polder-check-{}", std::process::id()));
    let save = folder.to_str().expect("a path of text");
    let found = json(&["--planted", "pins-forgotten", "--save", save], 0);
    let file = found["bugs"][0]["saved"].as_str().expect("it was saved");
    let play = Command::new(env!("CARGO_BIN_EXE_polder")).args(["play", file]).output();
    let play = play.expect("the program was just built");
    assert!(play.status.success(), "{play:?}");

    let none = json(&["--planted", "no-drain", "--save", save], 0);
    assert_eq!(none["bugs"][0]["saved"], Value::Null);
    std::fs::remove_dir_all(&folder).expect("it was made");
}

#[test]
fn a_model_is_told_invariant_by_invariant() {
    let found = json(&["--model", "vm-attributes"], 0);
    let rows = found["invariants"].as_array().expect("a row for each");
    let broken = rows.iter().filter(|row| row["kept"] == false).map(|row| &row["invariant"]);
    assert_eq!(broken.collect::<Vec<_>>(), ["INV-10"]);
}

#[test]
fn whatever_can_be_named_can_be_listed() {
    let all = json(&["--config", "list"], 0);
    assert_eq!(json(&["--model", "list"], 0), all);
    assert_eq!(json(&["--planted", "list"], 0), all);
}

#[test]
fn an_interrupt_ends_the_search_with_what_came_of_it_so_far() {
    let mut run = Command::new(env!("CARGO_BIN_EXE_polder"))
        .args(["check", "--config", "snp-large", "--seconds", "600", "--json"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the program was just built");
    let status = format!("/proc/{}/status", run.id());
    // Until it hears SIGTERM, and so SIGINT, which is seen to before.
    let hears = || {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0) & 1 << 14
            != 0
    };
    while !hears() {
        assert!(run.try_wait().expect("it is a child").is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let kill = Command::new("kill").args(["-INT", &run.id().to_string()]).status();
    assert!(kill.expect("there is a kill").success());
    let output = run.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let found: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(found["configs"][0]["complete"], false, "{found}");
}

#[test]
fn what_there_is_not_is_named_and_the_list_pointed_to() {
    for arguments in [["--config", "none"], ["--model", "none"], ["--planted", "none"]] {
        let error = &json(&arguments, 2)["error"];
        assert!(error["what"].as_str().is_some_and(|what| what.contains("`none`")), "{error}");
        assert!(error["try"].as_str().is_some_and(|way| way.contains("--config list")), "{error}");
    }
}
