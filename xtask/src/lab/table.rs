//! What the lab runs if it is given no command: the behaviour table, `polder run`, calls that fail,
//! a page of 1G that is filled from a file, and random programs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;

use serde_json::Value;

use super::guest::Kernel;
use super::{Lab, kernel};

/// The hosts that are the kernel's affair: the simulated machine needs nothing of it, and is the
/// same outside.
pub(super) const HOSTS: &str = "memfd,guest_memfd";

/// What must not be missing in the lab (`polder_require`), whichever kernel with private memory it
/// is given.
const REQUIRED: &str = "kvm,userfault,private-memory,huge-pages,gigantic-pages";
/// What the kernel that is built here has besides.
const REQUIRED_OF_OURS: &str = "seccomp,cachestat";

/// Pages of 1G that the kernel sets aside as it boots: elsewhere memory is seldom in one piece.
pub(super) const GIGANTIC: u32 = 1;

/// Seconds that `polder run` may take: emulated, it is a matter of ten.
const RUN_SECONDS: &str = "600";

/// A guest reads all of a page of 1G that is filled from a file, of which a few pages are no holes.
const FROM: &str = "truncate -s 1G /tmp/1g.img
    for page in 0 5 511 100000 262143; do
        head -c 4096 /dev/urandom | dd of=/tmp/1g.img bs=4096 seek=$page conv=notrunc 2>/dev/null
    done
    exec \"$1\" run --from /tmp/1g.img --page-size 1g --deadline 300 --timeout 600 --json";

/// Programs that are compared: a matter of half a minute.
const PROGRAMS: &str = "100";

/// What came of it all.
struct Summary {
    passed: bool,
    lines: Vec<String>,
}

impl Summary {
    fn add(&mut self, passed: bool, line: String) {
        self.passed &= passed;
        self.lines.push(line);
    }
}

/// 0 if everything passed, else 1.
pub(super) fn run(lab: &Lab, kernel: &Kernel) -> Result<u8, String> {
    lab.build()?;
    let required = match kernel::given() {
        Some(_) => REQUIRED.to_owned(),
        None => format!("{REQUIRED},{REQUIRED_OF_OURS}"),
    };
    println!("lab: {required} may not be missing");
    let require = OsString::from(format!("POLDER_REQUIRE={required}"));
    let mut summary = Summary { passed: true, lines: Vec::new() };
    for host in behaviours(lab, kernel, &require, &mut summary)? {
        run_guest(lab, kernel, &host, &mut summary)?;
    }
    fail_calls(lab, kernel, &require, &mut summary)?;
    fill_from_file(lab, kernel, &mut summary)?;
    compare_programs(lab, kernel, require, &mut summary)?;
    for line in summary.lines {
        println!("lab: {line}");
    }
    Ok(u8::from(!summary.passed))
}

/// The behaviour table. Returns the hosts that it was run on.
fn behaviours(
    lab: &Lab,
    kernel: &Kernel,
    require: &OsString,
    summary: &mut Summary,
) -> Result<Vec<String>, String> {
    println!("lab: the behaviour table");
    let table = [
        "env".into(),
        require.clone(),
        lab.program("polder-behaviour"),
        "--host".into(),
        HOSTS.into(),
        // On 2M pages they are run outside, where one of 1G is seldom to be had.
        "--page-size".into(),
        "4k,1g".into(),
    ];
    let (status, text) = shown(lab, kernel, &table)?;
    let counts = counts(&text);
    // A table of nothing has nothing that failed.
    let passed = status == 0 && counts.get("ok").is_some_and(|ok| *ok > 0);
    summary.add(passed, format!("the behaviour table: {}", words(&counts)));
    Ok(hosts(&text).into_iter().map(str::to_owned).collect())
}

fn run_guest(lab: &Lab, kernel: &Kernel, host: &str, summary: &mut Summary) -> Result<(), String> {
    println!("lab: polder run --host {host}");
    let polder = lab.program("polder");
    let options = ["run", "--host", host, "--json", "--timeout", RUN_SECONDS];
    let command: Vec<OsString> = [polder].into_iter().chain(options.map(OsString::from)).collect();
    let (status, text) = shown(lab, kernel, &command)?;
    let (line, well) = told(&text);
    summary.add(status == 0 && well, format!("polder run --host {host}: {line}"));
    Ok(())
}

fn fail_calls(
    lab: &Lab,
    kernel: &Kernel,
    require: &OsString,
    summary: &mut Summary,
) -> Result<(), String> {
    println!("lab: each call into the kernel fails in its turn");
    let failing = lab.test("polder-vmm", "nth_call")?;
    // Those of the other host fail outside just as well.
    let command =
        ["env".into(), require.clone(), failing, "guest_memfd".into(), "--nocapture".into()];
    let (status, text) = shown(lab, kernel, &command)?;
    summary.passed &= status == 0;
    summary.lines.extend(failures(&text));
    Ok(())
}

fn fill_from_file(lab: &Lab, kernel: &Kernel, summary: &mut Summary) -> Result<(), String> {
    println!("lab: polder run --from a file, into a page of 1G");
    let command = ["sh".into(), "-c".into(), FROM.into(), "sh".into(), lab.program("polder")];
    let (status, text) = shown(lab, kernel, &command)?;
    let (line, well) = told_from(&text);
    summary.add(status == 0 && well, format!("polder run --from: {line}"));
    Ok(())
}

fn compare_programs(
    lab: &Lab,
    kernel: &Kernel,
    require: OsString,
    summary: &mut Summary,
) -> Result<(), String> {
    println!("lab: random programs on the machine and on guest_memfd");
    let left_out = lab.test("polder-differential", "differential")?;
    let (status, _) =
        shown(lab, kernel, &["env".into(), require, left_out, "what_is_left_out".into()])?;
    summary.passed &= status == 0;
    let save = lab.folder().join("work").into_os_string();
    let options = ["--hosts", "machine,guest_memfd", "--programs", PROGRAMS, "--save"];
    let command: Vec<OsString> = [lab.program("polder-differential")]
        .into_iter()
        .chain(options.map(OsString::from))
        .chain([save])
        .collect();
    let (status, text) = shown(lab, kernel, &command)?;
    summary.passed &= status == 0;
    let differ = text.lines().filter(|line| line.contains(" differ, "));
    summary.lines.extend(differ.map(str::to_owned));
    Ok(())
}

/// Runs a command, shows what it writes, and returns it with the exit status.
fn shown(lab: &Lab, kernel: &Kernel, command: &[OsString]) -> Result<(u8, String), String> {
    let mut text = Vec::new();
    let status = lab.run(kernel, None, command, &mut |bytes| {
        let _ = std::io::stdout().write_all(bytes);
        let _ = std::io::stdout().flush();
        text.extend(bytes);
    })?;
    Ok((status, String::from_utf8_lossy(&text).into_owned()))
}

/// The table's lines, each as its word and its host.
fn cells(text: &str) -> impl Iterator<Item = (&str, &str)> {
    // `ok       memfd: create: ...`, and why a case failed may be any lines.
    const WORDS: [&str; 4] = ["ok", "n/a", "skipped", "FAILED"];
    text.lines().filter_map(|line| {
        let (word, rest) = line.split_once(' ').filter(|(word, _)| WORDS.contains(word))?;
        Some((word, rest.trim_start().split_once(": ")?.0))
    })
}

/// How many of the table's cells have which word.
fn counts(text: &str) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for (word, _) in cells(text) {
        *counts.entry(word).or_default() += 1;
    }
    counts
}

/// The table's hosts, in its order, each once for its columns.
fn hosts(text: &str) -> Vec<&str> {
    let mut hosts = Vec::new();
    for (_, column) in cells(text) {
        let host = column.split(' ').next().unwrap_or(column);
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    hosts
}

/// What the test of failing calls tells at the end, host by host.
fn failures(text: &str) -> impl Iterator<Item = String> {
    let told = text.lines().map(str::trim_end).filter(|line| line.ends_with(" failures"));
    told.map(|line| format!("calls into the kernel: {line}, engine and kernel agree after each"))
}

fn words(counts: &BTreeMap<&str, usize>) -> String {
    let words: Vec<String> = counts.iter().map(|(word, count)| format!("{count} {word}")).collect();
    words.join(", ")
}

/// What `polder run --json` tells, in a line, and whether all is well.
fn told(json: &str) -> (String, bool) {
    let Ok(told) = serde_json::from_str::<Value>(json) else {
        return ("it wrote no JSON".to_owned(), false);
    };
    let (guest, conversions) = (&told["guest"], &told["conversions"]);
    let line = format!(
        "{}, {} checks passed, {} failed, {} conversions by {}, {} touches denied",
        guest["exit"].as_str().unwrap_or("it was not run"),
        guest["checks_passed"],
        guest["checks_failed"],
        conversions["to_private"].as_u64().unwrap_or(0)
            + conversions["to_shared"].as_u64().unwrap_or(0),
        told["conversion_by"].as_str().unwrap_or("nothing"),
        told["faults"]["denied"],
    );
    (line, guest["exit"] == "ok")
}

/// The same of `polder run --from`.
fn told_from(json: &str) -> (String, bool) {
    let Ok(told) = serde_json::from_str::<Value>(json) else {
        return ("it wrote no JSON".to_owned(), false);
    };
    let (guest, pages) = (&told["guest"], &told["from"]["pages"]);
    let line = format!(
        "{}, {} checks passed, {} pages brought when asked for, {} before, {} zeros, into pages of {}",
        guest["exit"].as_str().unwrap_or("it was not run"),
        guest["checks_passed"],
        pages["demanded"],
        pages["ahead"],
        pages["zeros"],
        told["page_size"].as_str().unwrap_or("no size"),
    );
    (line, guest["exit"] == "ok" && told["page_size"] == "1g")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_counted_by_their_word() {
        let text = "ok       memfd: bind: a\nok       memfd 1g: bind: a\nn/a      machine: bind: b (why: so)\n\
                    ok       machine: create: c\nFAILED   memfd: bind: d (x\n  left: (1)\n\
                    right: (2))\n1 FAILED\n";
        assert_eq!(words(&counts(text)), "1 FAILED, 1 n/a, 3 ok");
        assert_eq!(hosts(text), ["memfd", "machine"]);
    }

    #[test]
    fn failures_are_told_host_by_host() {
        let text = "memfd: mmap, Cannot\nmemfd: 200 failures\ntest x ... ok\n\nfailures:\n";
        let told: Vec<_> = failures(text).collect();
        assert!(told.len() == 1 && told[0].contains("memfd: 200 failures"), "{told:?}");
    }

    #[test]
    fn a_run_is_well_only_if_it_says_so() {
        assert!(!told("").1);
        assert!(!told(r#"{"error":{"what":"x"}}"#).1);
        let well = r#"{"guest":{"exit":"ok","checks_passed":3,"checks_failed":0},
            "conversions":{"to_private":1,"to_shared":2},"conversion_by":"hypercall",
            "faults":{"denied":4}}"#;
        let line = "ok, 3 checks passed, 0 failed, 3 conversions by hypercall, 4 touches denied";
        assert_eq!(told(well), (line.to_owned(), true));
        assert!(!told_from("").1);
        let well = r#"{"guest":{"exit":"ok","checks_passed":9},"page_size":"1g",
            "from":{"pages":{"demanded":1,"ahead":4,"zeros":3}}}"#;
        let line = "ok, 9 checks passed, 1 pages brought when asked for, 4 before, 3 zeros, \
                    into pages of 1g";
        assert_eq!(told_from(well), (line.to_owned(), true));
        assert!(!told_from(&well.replace("1g", "4k")).1);
    }
}
