//! `polder run --from`, as a user meets it.

#![expect(clippy::unwrap_used, reason = "a failing test may panic anywhere")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use polder_require::{Facility, require};

/// A file of 16 MiB and a page, of which no two pages are alike, and some are holes.
struct Scratch(PathBuf);

const PAGES: u64 = 4097;

impl Scratch {
    fn new(name: &str) -> Self {
        use std::os::unix::fs::FileExt;
        let path = std::env::temp_dir().join(format!("polder-cli-{}-{name}", std::process::id()));
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(PAGES * 4096).unwrap();
        for page in (0..PAGES).filter(|page| page % 1000 < 900) {
            let words = (0..512u64).flat_map(|word| (page << 20 | word | 1 << 60).to_le_bytes());
            file.write_all_at(&words.collect::<Vec<u8>>(), page * 4096).unwrap();
        }
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn run(file: &Path, arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polder"));
    command.args(["run", "--json", "--from"]).arg(file);
    command.args(arguments.split_whitespace()).output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).expect("one object")
}

/// The hosts that can run here.
fn hosts() -> Vec<&'static str> {
    let memfd = polder_vmm::check_kvm(polder::HostKind::Memfd).map_err(|error| error.to_string());
    let mut hosts = vec!["machine"];
    hosts.extend(require(Facility::Kvm, memfd).map(|_| "memfd"));
    hosts
}

#[test]
fn every_byte_is_as_in_the_file_in_every_way_of_bringing_it() {
    let file = Scratch::new("all");
    for host in hosts() {
        for how in ["", "--no-read-ahead", "--fill --vcpus 4", "--from-faults slow --vcpus 1"] {
            let output = run(&file.0, &format!("--host {host} {how}"));
            let object = json(&output);
            assert_eq!(output.status.code(), Some(0), "{host} {how}: {object}");
            let from = &object["from"]["pages"];
            let of = |name: &str| from[name].as_u64().unwrap();
            let brought = of("demanded") + of("ahead") + of("zeros");
            assert_eq!(brought, PAGES, "{host} {how}: {object}");
            assert_eq!((of("failed"), of("owed")), (0, 0));
            assert!(how.contains("slow") || of("zeros") == 400, "{object}");
            assert_eq!(how.contains("no-read-ahead"), of("ahead") == 0, "{object}");
            assert_eq!(object["memory_bytes"], PAGES * 4096);
        }
    }
}

#[test]
fn a_page_that_does_not_come_stops_the_guest_and_is_named() {
    let file = Scratch::new("fails");
    for host in hosts() {
        for (how, why) in [("fail", "Input/output error"), ("hang --deadline 0.3", "within 300 ms")]
        {
            let output = run(&file.0, &format!("--host {host} --from-faults {how}"));
            let object = json(&output);
            assert_eq!(output.status.code(), Some(1), "{object}");
            let exit = object["guest"]["exit"].as_str().unwrap();
            assert!(["memory-failure", "memory-fault"].contains(&exit), "{object}");
            let failure = &object["from"]["failures"][0];
            assert_eq!((&failure["first_page"], &failure["pages"]), (&2048.into(), &1.into()));
            assert!(failure["why"].as_str().unwrap().contains(why), "{object}");
            let guest = &object["guest"];
            assert!(guest["what"].as_str().unwrap().starts_with("vCPU "), "{object}");
            assert!(guest["why"].as_str().unwrap().contains(why), "{object}");
            assert!(guest["try"].as_str().unwrap().contains("--from-faults"), "{object}");
        }
    }
}

#[test]
fn a_guest_that_takes_machine_checks_is_told_of_the_page_and_goes_on() {
    let file = Scratch::new("mce");
    for host in hosts() {
        let passed = |how: &str| {
            let output = run(&file.0, &format!("--host {host} {how}"));
            let object = json(&output);
            assert_eq!(output.status.code(), Some(0), "{host} {how}: {object}");
            (object["guest"]["checks_passed"].as_u64().unwrap(), object)
        };
        let (all, whole) = passed("");
        assert_eq!(whole["guest"]["machine_checks"], serde_json::json!([]));
        for (how, vcpus) in [("fail", 1), ("fail", 3), ("hang --deadline 0.2", 2)] {
            let how = format!("--from-faults {how} --on-failed-page mce --vcpus {vcpus}");
            let (rest, object) = passed(&how);
            let [check] = &object["guest"]["machine_checks"].as_array().unwrap()[..] else {
                panic!("one page failed, and is met once: {object}");
            };
            assert_eq!((&check["page"], &check["taken"]), (&2048.into(), &true.into()));
            assert_eq!(check["gpa"], 2 * 1024 * 1024 + 2048 * 4096);
            assert_eq!(rest, all - 1, "all but what it was at: {object}");
        }
    }
}

#[test]
fn what_can_not_be_a_source_is_refused_with_a_way_out() {
    let file = Scratch::new("refused");
    let empty = Scratch::new("empty");
    std::fs::File::create(&empty.0).unwrap();
    let odd = Scratch::new("odd");
    std::fs::write(&odd.0, [1; 5000]).unwrap();
    // A named pipe that nobody writes to.
    let pipe = Scratch::new("pipe");
    std::fs::remove_file(&pipe.0).unwrap();
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe.0, kind, mode, 0).unwrap();
    for (file, arguments, says) in [
        (Path::new("/nowhere/at/all"), "", "check the path"),
        (Path::new("/dev/zero"), "", "regular file"),
        (Path::new("/proc"), "", "regular file"),
        (&pipe.0, "", "regular file"),
        (&empty.0, "", "has contents"),
        (&odd.0, "", "truncate -s 8192"),
        (&file.0, "--memory 16M", "the file's size"),
        (&file.0, "--memory 1G", "the file's size"),
        (&file.0, "--vcpus 9", "--vcpus 1 to 4"),
    ] {
        let output = run(file, &format!("--host machine {arguments}"));
        assert_eq!(output.status.code(), Some(2), "{arguments}");
        let way_out = json(&output)["error"]["try"].as_str().unwrap_or_default().to_owned();
        assert!(way_out.contains(says), "{arguments}: {way_out}");
    }
    // What has no meaning here is refused and not ignored.
    for arguments in [
        "--deadline 0",
        "--deadline -1",
        "--from-faults maybe",
        "--guest spin",
        "--platform snp",
        "--prefault all",
        "--prefault-when running",
        "--no-faults-after-start",
    ] {
        let output = run(&file.0, arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments}");
        assert!(json(&output)["error"]["try"].is_string(), "{arguments}");
    }
}
