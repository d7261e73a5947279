//! What the lab runs if it is given no command: the behaviour table, and `polder run`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::process::Command;

use serde_json::Value;

use super::Lab;

/// The hosts that `polder run` is tried on.
const HOSTS: [&str; 2] = ["memfd", "machine"];

/// What must not be missing in the lab, unless the caller says otherwise.
const REQUIRED: &str = "kvm,userfault";

/// Seconds that `polder run` may take: emulated, it is a matter of ten.
const RUN_SECONDS: &str = "600";

/// 0 if everything passed, else 1.
pub(super) fn run(lab: &Lab) -> Result<u8, String> {
    build(lab)?;
    let require = OsString::from(format!("POLDER_REQUIRE={REQUIRED}"));
    let behaviour = lab.target.join("release/polder-behaviour").into_os_string();
    println!("lab: the behaviour table");
    let (status, text) = shown(lab, &["env".into(), require, behaviour])?;
    let counts = counts(&text);
    let mut summary = vec![format!("the behaviour table: {}", words(&counts))];
    // A table of nothing has nothing that failed.
    let mut passed = status == 0 && counts.get("ok").is_some_and(|ok| *ok > 0);
    for host in HOSTS {
        println!("lab: polder run --host {host}");
        let polder = lab.target.join("release/polder").into_os_string();
        let options = ["run", "--host", host, "--json", "--timeout", RUN_SECONDS];
        let command: Vec<OsString> =
            [polder].into_iter().chain(options.map(OsString::from)).collect();
        let (status, text) = shown(lab, &command)?;
        let (line, well) = told(&text);
        passed &= status == 0 && well;
        summary.push(format!("polder run --host {host}: {line}"));
    }
    for line in summary {
        println!("lab: {line}");
    }
    Ok(u8::from(!passed))
}

/// The programs, optimized: the emulation is slow enough.
fn build(lab: &Lab) -> Result<(), String> {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "-p", "polder-behaviour", "-p", "polder-cli"])
        .current_dir(&lab.root)
        .status()
        .map_err(|error| format!("cargo build: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("cargo build: {status}")) }
}

/// Runs a command, shows what it writes, and returns it with the exit status.
fn shown(lab: &Lab, command: &[OsString]) -> Result<(u8, String), String> {
    let mut text = Vec::new();
    let status = lab.run(command, &mut |bytes| {
        let _ = std::io::stdout().write_all(bytes);
        let _ = std::io::stdout().flush();
        text.extend(bytes);
    })?;
    Ok((status, String::from_utf8_lossy(&text).into_owned()))
}

/// How many of the table's lines begin with which word.
fn counts(text: &str) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        // `ok       memfd: create: ...`; the line of the total has no colon.
        if let Some((word, _)) = line.split_once(' ').filter(|(_, rest)| rest.contains(": ")) {
            *counts.entry(word).or_default() += 1;
        }
    }
    counts
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_counted_by_their_word() {
        let text = "ok       memfd: bind: a\nn/a      machine: bind: b (why: so)\n\
                    ok       machine: create: c\nFAILED   memfd: bind: d (x)\n1 FAILED\n";
        assert_eq!(words(&counts(text)), "1 FAILED, 1 n/a, 2 ok");
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
    }
}
