//! `polder play` as a user sees it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

fn scenarios() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios")
}

fn play(path: &Path, options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_polder"))
        .arg("play")
        .arg(path)
        .args(options)
        .output()
        .expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A file with this text, named after the test.
fn file(name: &str, text: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, text).expect("a file for the test");
    path
}

#[test]
fn all_scenarios_pass_on_the_machine() {
    let output = play(&scenarios(), &["--host", "machine", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert!(output.status.success(), "{report}");
    assert!(report["passed"].as_u64() >= Some(20), "{report}");
    assert_eq!((&report["failed"], &report["skipped"]), (&0.into(), &0.into()));
    let first = &report["scenarios"][0];
    assert_eq!(first["verdict"], "passed");
    assert_eq!(first["steps"][0]["met"], true);
    assert!(first["steps"][0]["trace"].is_null(), "asked for by --trace only");
}

#[test]
fn a_step_is_told_in_a_line_with_its_pages_before_and_after() {
    let path = scenarios().join("refused-by-a-pin.toml");
    let output = play(&path, &["--host", "machine", "--trace"]);
    let told = text(&output.stdout);
    assert!(output.status.success(), "{told}");
    for line in [
        "guest  convert pages 2..8 to private, contents preserve: pinned: page 0x5 is pinned",
        "page 5: shared, in the host view, referred to",
        ". guest: unmap pages [0x2..0x8) from the host view",
        "1 passed, 0 failed, 0 skipped",
    ] {
        let line = line.replace(", referred to", "");
        assert!(told.contains(&line), "{line} is not in:\n{told}");
    }
}

#[test]
fn what_is_not_as_expected_fails_with_line_and_reason() {
    let path = file(
        "fails.toml",
        "about = \"a\"\n[memory]\npages = 2\n[[step]]\nactor = \"device\"\ndo = \"read\"\npage = 1\n",
    );
    let output = play(&path, &[]);
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output.stdout);
    assert!(told.contains("FAILED: line 4: denied: byte 0x1000"), "{told}");
    assert!(told.contains("\"ok\" was expected"), "{told}");
    assert!(told.ends_with("0 passed, 1 failed, 0 skipped\n"), "{told}");
}

#[test]
fn what_is_no_scenario_is_refused_with_file_and_line() {
    let path = file("bad.toml", "about = \"a\"\n[memory]\npages = 2\n[[stop]]\n");
    let output = play(&path, &[]);
    assert_eq!(output.status.code(), Some(2));
    let told = text(&output.stderr);
    let expected = "bad.toml:4:3: a scenario has no key `stop`; did you mean `step`?\n";
    assert!(told.ends_with(expected), "{told}");
    let output = play(&path, &["--json"]);
    assert_eq!(output.status.code(), Some(2));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert!(report["error"]["what"].as_str().is_some_and(|what| what.contains("`step`")));
}

#[test]
fn what_is_no_file_of_sensible_size_is_refused() {
    // A named pipe that nobody writes to.
    let pipe = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pipe.toml");
    let _ = std::fs::remove_file(&pipe);
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, mode, 0).expect("a pipe for the test");
    for (path, why) in [
        (pipe, "this is no file"),
        (PathBuf::from("/dev/zero"), "this is no file"),
        (PathBuf::from("/does/not/exist"), "No such file"),
        (file("large.toml", &"#\n".repeat(1 << 20)), "tell a shorter story"),
    ] {
        let output = play(&path, &[]);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(why), "{}", text(&output.stderr));
    }
}

/// A story of some seconds: somebody waits all the while, and has to be found waiting after each
/// step.
fn long_story() -> String {
    let begins = "about = \"a\"\n[memory]\npages = 4\nstarts = \"shared\"\n\
        [[step]]\nactor = \"guest\"\ndo = \"convert\"\npages = \"0..2\"\nto = \"private\"\n\
        hold = \"unmapped\"\n\
        [[step]]\nactor = \"vmm\"\ndo = \"convert\"\npages = \"1..3\"\nto = \"private\"\n\
        wait = true\nexpect = \"waits\"\n";
    let step = "[[step]]\nactor = \"device\"\ndo = \"read\"\npage = 3\n";
    let ends = "[[step]]\nactor = \"guest\"\ndo = \"resume\"\nexpect = { converted = 2 }\n\
        [[step]]\nactor = \"vmm\"\ndo = \"resume\"\nexpect = { converted = 1 }\n";
    [begins, &step.repeat(80), ends].concat()
}

#[test]
fn who_is_interrupted_ends_soon_and_tells_what_was_played() {
    const TIMES: usize = 100;
    let path = file("long.toml", &long_story());
    for signal in ["-INT", "-TERM"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polder"));
        command.args(["play", "--json", "--host", "machine"]).args(vec![&path; TIMES]);
        let child = command.stdout(Stdio::piped()).spawn().expect("it starts");
        // Its actors have threads of their own.
        let tasks = format!("/proc/{}/task", child.id());
        while std::fs::read_dir(&tasks).expect("it runs").count() < 4 {
            std::thread::sleep(Duration::from_millis(5));
        }
        let kill = Command::new("kill").args([signal, &child.id().to_string()]).status();
        assert!(kill.expect("kill").success());
        let output = child.wait_with_output().expect("it ends");
        let report: Value = serde_json::from_slice(&output.stdout).expect("one object");
        assert_eq!(output.status.code(), Some(130), "{report}");
        assert_eq!((&report["interrupted"], &report["failed"]), (&true.into(), &0.into()));
        let played = report["scenarios"].as_array().expect("those played");
        assert!(!played.is_empty() && played.len() < TIMES, "{} were played", played.len());
        // Between two of them nobody is interrupted.
        let left = played.iter().filter(|played| played["verdict"] == "skipped");
        assert!(left.clone().count() <= 1 && left.clone().all(|it| it["why"] == "interrupted"));
    }
}

#[test]
fn a_host_that_a_scenario_is_not_for_is_skipped_with_the_reason() {
    let output = play(&scenarios().join("psmash-raced.toml"), &["--host", "memfd"]);
    assert!(output.status.success());
    let told = text(&output.stdout);
    assert!(told.contains("SKIPPED: it is not for host memfd"), "{told}");
    assert!(told.ends_with("0 passed, 0 failed, 1 skipped\n"), "{told}");
}
