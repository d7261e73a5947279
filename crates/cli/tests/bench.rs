//! `polder bench` as a user sees it. The benches themselves are tested where they are, with less
//! of everything.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use serde_json::Value;

fn polder(arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polder"));
    command.args(arguments.split_whitespace()).output().expect("the program starts")
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn the_benches_are_listed() {
    let output = polder("bench list");
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("map "));
    assert_eq!(polder("bench").stdout, output.stdout);
    assert_eq!(json(&polder("bench list --json"))["benches"][0]["bench"], "map");
}

#[test]
fn an_unknown_bench_is_answered_with_those_there_are() {
    let output = polder("bench mop --json");
    assert_eq!(output.status.code(), Some(2));
    let error = &json(&output)["error"];
    assert_eq!(error["what"], "there is no bench `mop`");
    assert!(error["try"].as_str().is_some_and(|names| names.contains("map")), "{error}");
}

#[test]
fn a_bench_of_guests_says_what_this_machine_lacks_and_what_to_do() {
    // Another user can't look into the directory that the program was built in.
    let program = std::env::temp_dir().join(format!("polder-bench-{}", std::process::id()));
    std::fs::copy(env!("CARGO_BIN_EXE_polder"), &program).unwrap();
    let outputs = ["faults", "convert", "stall"].map(|bench| {
        Command::new(&program).args(["bench", bench, "--json"]).uid(65534).gid(65534).output()
    });
    std::fs::remove_file(&program).unwrap();
    for output in outputs {
        let Ok(output) = output else {
            println!("SKIPPED: only root can be another user");
            return;
        };
        if output.status.success() {
            println!("SKIPPED: everybody may use KVM and userfaultfd here");
            return;
        }
        assert_eq!(output.status.code(), Some(2));
        let error = &json(&output)["error"];
        assert_eq!(error["what"], "there is no VM to measure");
        let why = error["why"].as_str().unwrap();
        assert!(why.contains("KVM") || why.contains("userfaultfd"), "{error}");
        assert!(error["try"].is_string(), "{error}");
    }
}

#[test]
fn help_shows_examples() {
    let output = polder("bench --help");
    assert!(String::from_utf8_lossy(&output.stdout).contains("polder bench map --json"));
}
