//! `polder doctor` as a user sees it, on whatever machine this is.

use std::process::{Command, Output};

use polder::HostKind;
use serde_json::Value;

fn output(command: &mut Command) -> Output {
    command.output().expect("the program starts")
}

fn polder(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polder"));
    command.args(arguments.split_whitespace());
    command
}

/// Looks at the machine under limits of the shell's.
fn limited(limits: &str) -> Output {
    let script = format!("{limits}; exec \"$0\" doctor --json");
    output(Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_polder")]))
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn the_object_has_its_keys_whatever_the_machine_has() {
    let paths = [
        "/can_run/host",
        "/can_run/accelerator",
        "/hosts/0/needs/0/name",
        "/hosts/0/needs/0/ok",
        "/hosts/0/needs/0/what",
        "/hosts/0/needs/0/try",
        "/hosts/0/features/0/name",
        "/hosts/0/usable",
        "/hosts/0/why",
        "/machine/kernel",
        "/machine/cpu",
        "/machine/memory_bytes",
        "/machine/memory_available_bytes",
        "/machine/memory_free_bytes",
        "/machine/unread",
        "/kvm/opens",
        "/kvm/why",
        "/kvm/api_version",
        "/kvm/mmu/kind",
        "/kvm/mmu/because",
        "/kvm/hypercalls_by",
        "/kvm/vm_types",
        "/userfaultfd/permitted",
        "/userfaultfd/by",
        "/userfaultfd/why",
        "/userfaultfd/unprivileged_sysctl",
        "/userfaultfd/features",
        "/userfaultfd/features_without_name",
        "/huge_pages",
        "/shmem_thp/all",
        "/shmem_thp/sizes",
        "/limits/address_space",
        "/limits/locked_memory",
        "/limits/open_files",
        "/limits/max_map_count",
    ];
    for object in [json(&output(&mut polder("doctor --json"))), json(&limited("ulimit -n 4"))] {
        for path in paths {
            assert!(object.pointer(path).is_some(), "{path} in {object}");
        }
        let hosts = object["hosts"].as_array().unwrap();
        let named = |name: &str| hosts.iter().any(|host| host["host"] == name);
        assert!(HostKind::ALL.iter().all(|host| named(&host.to_string())), "{object}");
        assert!(named("guest_memfd"), "{object}");
    }
}

#[test]
fn what_can_run_is_what_run_takes() {
    let object = json(&output(&mut polder("doctor --json")));
    let run = output(&mut polder("run --guest triple-fault --json"));
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(object["can_run"]["host"], report["host"]);
    assert_eq!(object["can_run"]["accelerator"], report["accelerator"]);
}

#[test]
fn a_limit_is_seen_and_told() {
    let object = json(&limited("ulimit -v 4000000"));
    assert_eq!(object["limits"]["address_space"], 4_000_000u64 << 10);
    let features = object["hosts"][0]["features"].as_array().unwrap();
    let space = features.iter().find(|feature| feature["name"] == "address space").unwrap();
    assert_eq!((&space["ok"], &space["try"]), (&false.into(), &"ulimit -v unlimited".into()));
}

#[test]
fn a_person_reads_what_can_run_first_and_every_host_after() {
    let output = output(&mut polder("doctor"));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && output.stderr.is_empty());
    assert!(text.starts_with("Polder can run: host "), "{text}");
    for host in HostKind::ALL {
        assert!(text.contains(&format!("  {host:20}")), "{host} in {text}");
    }
    for section in ["\nhosts\n", "\nKVM\n", "\nuserfaultfd\n", "\nmachine\n"] {
        assert!(text.contains(section), "{section} in {text}");
    }
}

#[test]
fn help_shows_examples_and_the_exit_status() {
    let output = output(&mut polder("doctor --help"));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("polder doctor --json | jq .can_run"), "{text}");
    assert!(text.contains("Exit status: 0"), "{text}");
}
