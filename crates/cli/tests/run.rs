//! `polder run` as a user sees it.
//!
//! `POLDER_SEEDS` is how many seeds each number of vCPUs is run with, 1 if that is not set.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::time::Duration;

use polder_require::{Facility, require};
use serde_json::Value;

fn polder(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polder"));
    command.args(arguments.split_whitespace());
    command
}

fn output(arguments: &str) -> Output {
    polder(arguments).output().expect("the program starts")
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Whether a guest can run here at all; says so if not.
fn can_run() -> bool {
    let first = output("run --host memfd --guest triple-fault --json");
    let found = match &json(&first)["error"] {
        Value::Null => Ok(()),
        error => Err(error.to_string()),
    };
    require(Facility::Kvm, found).is_some()
}

#[test]
fn every_check_passes_for_every_number_of_vcpus_and_seed() {
    if !can_run() {
        return;
    }
    let seeds =
        std::env::var("POLDER_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(1);
    for vcpus in [1, 2, 4] {
        for seed in 1..=seeds {
            let output = output(&format!("run --json --host memfd --vcpus {vcpus} --seed {seed}"));
            let report = json(&output);
            assert!(output.status.success(), "{vcpus} vCPUs, seed {seed}: {report}");
            assert_eq!(report["host"], "memfd");
            assert_eq!(report["accelerator"], "kvm");
            assert_eq!(report["guest"]["exit"], "ok");
            assert_eq!(report["guest"]["checks_failed"], 0);
            let count = |path: &str| report.pointer(path).and_then(Value::as_u64).unwrap();
            assert!(count("/guest/checks_passed") > 1000, "{report}");
            for path in [
                "/conversions/to_private",
                "/conversions/to_shared",
                "/conversions/refused",
                "/faults/denied",
            ] {
                assert!(count(path) > 0, "{path} in {report}");
            }
        }
    }
}

#[test]
fn every_check_passes_when_operations_are_held_up_at_their_stages() {
    if !can_run() {
        return;
    }
    for seed in [1, 2] {
        let arguments = format!("run --json --host memfd --vcpus 4 --seed {seed} --delays 200");
        let output = output(&arguments);
        assert!(output.status.success(), "seed {seed}: {}", json(&output));
    }
}

#[test]
fn a_kvm_without_private_memory_runs_the_guest_on_a_guest_memfd_that_is_all_shared() {
    let first = output("run --host guest_memfd --guest triple-fault --json");
    let found = match (&json(&first)["error"], &json(&first)["private_memory"]) {
        (Value::Null, Value::Bool(false)) => Ok(()),
        (Value::Null, _) => return,
        (error, _) => Err(error.to_string()),
    };
    if require(Facility::SharedGuestMemfd, found).is_none() {
        return;
    }
    for vcpus in [1, 2, 4] {
        let output = output(&format!("run --json --host guest_memfd --vcpus {vcpus}"));
        let report = json(&output);
        assert!(output.status.success(), "{vcpus} vCPUs: {report}");
        assert_eq!(
            (&report["host"], &report["guest"]["exit"]),
            (&"guest_memfd".into(), &"ok".into())
        );
        assert_eq!(report["conversions"]["to_private"], 0);
        let refused = report["conversions"]["refused"].as_u64();
        assert!(refused > Some(60), "each wish for private memory is refused: {report}");
        assert!(report["guest"]["checks_passed"].as_u64() > Some(1000), "{report}");
    }
}

#[test]
fn the_simulated_machine_needs_nothing_and_passes_every_check() {
    for (vcpus, seed) in [(1, 1), (2, 2), (4, 3)] {
        let arguments = format!("run --json --host machine --vcpus {vcpus} --seed {seed}");
        let output = output(&arguments);
        let report = json(&output);
        assert!(output.status.success(), "{vcpus} vCPUs, seed {seed}: {report}");
        assert_eq!(
            (&report["host"], &report["accelerator"]),
            (&"machine".into(), &"machine".into())
        );
        assert_eq!(report["guest"]["checks_failed"], 0);
        for path in
            ["/guest/checks_passed", "/conversions/refused", "/faults/guest", "/faults/denied"]
        {
            assert!(report.pointer(path).and_then(Value::as_u64) > Some(0), "{path} in {report}");
        }
    }
    for (guest, exit) in
        [("triple-fault", "triple-fault"), ("spin", "timeout"), ("flood", "timeout")]
    {
        let timeout = if exit == "timeout" { "--timeout 1" } else { "" };
        let output = output(&format!("run --json --host machine {timeout} --guest {guest}"));
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(json(&output)["guest"]["exit"], exit, "{guest}");
    }
}

#[test]
fn memory_far_beyond_the_machine_s_is_paid_for_by_the_touch() {
    if !can_run() {
        return;
    }
    let mut run = polder("run --json --memory 256G --vcpus 1")
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", run.id());
    let mut peak = 0;
    let result = loop {
        if let Some(result) = run.try_wait().unwrap() {
            break result;
        }
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let resident = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|text| text.split_whitespace().next()?.parse().ok());
        peak = peak.max(resident.unwrap_or(0u64));
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(result.success());
    assert!(peak < 200 << 10, "{peak} KiB resident for a guest that touches 8M");
}

#[test]
fn misbehaving_guests_end_and_are_named() {
    if !can_run() {
        return;
    }
    for (guest, exit) in
        [("triple-fault", "triple-fault"), ("spin", "timeout"), ("flood", "timeout")]
    {
        let timeout = if exit == "timeout" { "--timeout 1" } else { "" };
        let output = output(&format!("run --json {timeout} --guest {guest}"));
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(json(&output)["guest"]["exit"], exit, "{guest}");
    }
    let output = output("run --guest triple-fault");
    let text = String::from_utf8_lossy(&output.stdout);
    let starts: Vec<&str> = text.lines().take(3).map(start).collect();
    assert_eq!(starts, ["FAILED: ", "  why: ", "  try: "], "{text}");
}

/// What a line says is to follow.
fn start(line: &str) -> &str {
    line.split_inclusive(": ").next().unwrap_or_default()
}

#[test]
fn a_user_who_may_not_use_kvm_or_userfaultfd_is_told_how_he_may() {
    // Another user can't look into the directory that the program was built in.
    let program = std::env::temp_dir().join(format!("polder-of-nobody-{}", std::process::id()));
    std::fs::copy(env!("CARGO_BIN_EXE_polder"), &program).unwrap();
    let as_nobody = |arguments: &str| {
        Command::new(&program).args(arguments.split_whitespace()).uid(65534).gid(65534).output()
    };
    let outputs = ["run --host memfd", "run --guest triple-fault"].map(as_nobody);
    std::fs::remove_file(&program).unwrap();
    let [Ok(memfd), Ok(auto)] = outputs else {
        println!("SKIPPED: only root can be another user");
        return;
    };
    if memfd.status.success() {
        println!("SKIPPED: everybody may use KVM and userfaultfd here");
        return;
    }
    assert_eq!(memfd.status.code(), Some(2));
    let text = String::from_utf8_lossy(&memfd.stderr);
    let starts: Vec<&str> = text.lines().map(start).collect();
    assert_eq!(starts, ["error: ", "  why: ", "  try: "], "{text}");

    assert_eq!(auto.status.code(), Some(1), "the simulated machine needs nothing");
    let text = String::from_utf8_lossy(&auto.stderr);
    let starts: Vec<&str> = text.lines().map(start).collect();
    assert_eq!(starts, ["note: ", "  why: ", "  try: "], "{text}");
}

#[test]
fn memory_of_huge_pages_is_reported_with_its_levels_splits_and_pool() {
    let huge = output("run --json --host machine --memory 16M --page-size 2m --guest triple-fault");
    let report = json(&huge);
    assert_eq!(report["page_size"], "2m", "{report}");
    let levels = |level| report["levels"][level].as_u64().expect("a count");
    assert_eq!(levels("4k") + 512 * levels("2m"), 4096, "{report}");
    assert_eq!(report["pool"]["total"], 8);
    assert!(report["splits"].is_u64() && report["merges"].is_u64(), "{report}");
    let text = output("run --host machine --memory 16M --page-size 2m --guest triple-fault");
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("MMMM") && text.contains("pool "), "{text}");
    let small = output("run --json --host machine --memory 16M --guest triple-fault");
    assert!(json(&small)["pool"].is_null());
}

#[test]
fn every_key_is_in_every_report_and_figures_are_those_of_the_text() {
    let keys = |value: &Value| -> Vec<String> {
        let object = value.as_object().expect("an object");
        object.keys().cloned().collect()
    };
    let ok = json(&output("run --json --host machine --memory 16M --prefault all"));
    let ended = json(&output("run --json --host machine --memory 16M --guest triple-fault"));
    assert_eq!(keys(&ok), keys(&ended));
    assert_eq!(keys(&ok["guest"]), keys(&ended["guest"]));
    assert!(ok["guest"]["why"].is_null() && ended["guest"]["why"].is_string(), "{ended}");
    assert!(ended["prefault"].is_null() && ended["virtqueue"].is_null(), "{ended}");
    let touched = |kind: &str| ok["touched"][kind].as_u64().expect("bytes");
    assert_eq!(touched("private_bytes") + touched("shared_bytes"), 16 << 20, "{ok}");
}

#[test]
fn the_program_goes_by_its_name() {
    let version = output("--version").stdout;
    assert!(version.starts_with(b"polder "), "{}", String::from_utf8_lossy(&version));
}

#[test]
fn an_interrupt_ends_the_run_with_a_report() {
    if !can_run() {
        return;
    }
    let run =
        polder("run --json --guest spin").stdout(std::process::Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(600));
    let kill = Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = run.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(json(&output)["guest"]["exit"], "interrupted");
}

#[test]
fn impossible_arguments_are_refused_with_a_way_out() {
    for (arguments, says) in [
        ("--memory 0", "16M to 1T"),
        ("--memory 4097", "16M to 1T"),
        ("--memory -1", "K, M, G or T"),
        ("--memory 20000001", "multiple of the page size"),
        ("--memory 16384P", "K, M, G or T"),
        ("--memory 99999999999T", "2^64"),
        ("--memory 1025G", "16M to 1T"),
        ("--vcpus 0", "1 to 4"),
        ("--vcpus 5000", "1 to 4"),
        ("--vcpus many", "whole number"),
        ("--page-size 3m", "4k, thp, 2m or 1g"),
        ("--host machine --page-size thp", "--page-size 2m or 1g"),
        ("--host machine --memory 17M --page-size 2m", "multiple of the page size"),
        ("--host abacus", "one of auto, memfd"),
        ("--seed -1", "whole number"),
        ("--timeout soon", "whole number"),
        ("--timeout 99999999999999999999", "too large"),
        ("--memroy 64M", "did you mean --memory"),
        ("--memory=", "K, M, G or T"),
        ("--prefault 0x1000", "START+SIZE, such as 16M+32M"),
    ] {
        let output = output(&format!("run {arguments}"));
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments}");
        assert!(text.contains(says), "{arguments}: {text}");
        let starts: Vec<&str> = text.lines().map(start).collect();
        assert_eq!(starts, ["error: ", "  why: ", "  try: "], "{arguments}: {text}");
        assert!(output.stdout.is_empty());

        let error = &json(&self::output(&format!("run --json {arguments}")))["error"];
        for part in ["what", "why", "try"] {
            assert!(text.contains(error[part].as_str().unwrap()), "{arguments}: {error}");
        }
    }
}

#[test]
fn memory_is_mapped_ahead_before_the_guest_starts_and_beside_it() {
    let hosts = if can_run() { &["machine", "memfd"][..] } else { &["machine"] };
    for host in hosts {
        for when in ["start", "running"] {
            let output = output(&format!(
                "run --json --host {host} --memory 16M --vcpus 1 --prefault all --prefault-when {when}"
            ));
            let report = json(&output);
            assert!(output.status.success(), "{host}, {when}: {report}");
            assert_eq!(report["guest"]["checks_failed"], 0);
            if when == "start" {
                assert_eq!(report["prefault"]["pages"], 4096, "{report}");
                assert_eq!(report["prefault"]["skipped"], 0);
            }
        }
    }
    // As the help has it.
    let part = output("run --json --host machine --prefault 16M+32M");
    assert_eq!(json(&part)["prefault"]["pages"], 8192, "{part:?}");
    let none = output("run --json --host machine --memory 16M --prefault 0x100000000000+4M");
    assert_eq!(none.status.code(), Some(2));
    let error = &json(&none)["error"];
    assert!(error["try"].as_str().is_some_and(|out| out.contains("--prefault all")), "{error}");
    let more = output("run --json --host memfd --memory 1T --prefault all");
    let total = std::fs::read_to_string("/proc/meminfo").expect("a kernel says what it has");
    let total: u64 = total.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap();
    if total < 1 << 30 {
        let error = &json(&more)["error"];
        assert!(error["why"].as_str().is_some_and(|why| why.contains("available")), "{error}");
    }
    for wrong in ["some", "0x1000", "4096+", "0x1001+4K", "0x1000+0"] {
        let output = output(&format!("run --host machine --prefault {wrong}"));
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
}

#[test]
fn a_guest_that_may_not_fault_is_refused_where_it_would_and_runs_where_it_will_not() {
    let converts = output("run --json --host machine --no-faults-after-start");
    assert_eq!(converts.status.code(), Some(2));
    let error = json(&converts)["error"].to_string();
    assert!(error.contains("converts pages") && error.contains("--guest spin"), "{error}");
    let spins = "run --json --host machine --guest spin --memory 16M --timeout 1";
    let spins = json(&output(&format!("{spins} --no-faults-after-start")));
    assert_eq!(spins["guest"]["exit"], "timeout", "{spins}");
    assert_eq!(spins["prefault"]["pages"], 4096);
    assert_eq!(spins["faults"]["guest"], 0);
    if can_run() {
        // KVM without TDP maps by itself, page by page; with TDP it is locked and mapped.
        let memfd =
            output("run --json --host memfd --guest spin --timeout 1 --no-faults-after-start");
        let report = json(&memfd);
        match memfd.status.code() {
            Some(2) => assert!(report["error"].to_string().contains("KVM_PRE_FAULT_MEMORY")),
            _ => assert_eq!(report["guest"]["exit"], "timeout", "{report}"),
        }
    }
}
