//! `polder play`.

use std::fmt::Write;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use polder::HostKind;
use polder_play::{Options, Played, PlayedStep, Scenario, Verdict, limits, parse, play};
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

use crate::trouble::Trouble;
use crate::{interrupt, output};

/// Play scenarios: stories about a VM's memory, step by step.
///
/// A scenario (TOML) has memory, VMs, actors, steps in an order, and what is expected of them. Each
/// step is printed as one line, with the state of every page that it is about, before and after.
#[derive(Args)]
#[command(after_help = "\
Examples:
  polder play scenarios                                     all of a folder
  polder play scenarios/cut-off-before-check.toml --trace   what happens on the way
  polder play scenarios --json | jq .failed                 for programs

Exit status: 0 all was as expected, 1 something was not, 2 a scenario can't be played, 130
interrupted: what was played by then is told.")]
pub(crate) struct Arguments {
    /// Scenarios, and folders of them
    #[arg(required = true, value_name = "FILE|DIR")]
    paths: Vec<PathBuf>,
    /// Only on this host, and only the scenarios that are for it
    #[arg(long, value_enum)]
    host: Option<Host>,
    /// Also print what the engine and its host do on the way
    #[arg(long)]
    trace: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Host {
    /// A memfd on KVM
    Memfd,
    /// The kernel's guest_memfd, on a KVM with TDP
    #[value(name = "guest_memfd")]
    GuestMemfd,
    /// The simulated machine
    Machine,
}

impl From<Host> for HostKind {
    fn from(host: Host) -> Self {
        match host {
            Host::Memfd => Self::Memfd,
            Host::GuestMemfd => Self::GuestMemfd,
            Host::Machine => Self::Machine,
        }
    }
}

/// A file that can't be played, and why.
struct Unreadable {
    file: PathBuf,
    why: String,
}

pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    let mut unreadable = Vec::new();
    let mut scenarios = Vec::new();
    for file in files(&arguments.paths, &mut unreadable) {
        match read(&file).and_then(|text| parse(&text).map_err(|error| error.to_string())) {
            Ok(scenario) => scenarios.push((file, scenario)),
            Err(why) => unreadable.push(Unreadable { file, why }),
        }
    }
    if !unreadable.is_empty() {
        return refuse(&unreadable, arguments.json);
    }
    if let Err(error) = interrupt::hear() {
        return Trouble::new(&error, None).print(arguments.json);
    }
    let mut tally = Tally::default();
    'all: for (file, scenario) in &scenarios {
        let hosts: Vec<HostKind> = match arguments.host {
            None => scenario.hosts.clone(),
            Some(host) => vec![host.into()],
        };
        for host in hosts {
            if interrupt::asked() {
                break 'all;
            }
            let played = if scenario.hosts.contains(&host) {
                play(
                    scenario,
                    host,
                    Options { stop: Some(&interrupt::asked), ..Options::default() },
                )
            } else {
                let why = format!("it is not for host {host}");
                Played { host, verdict: Verdict::Skipped(why), steps: Vec::new() }
            };
            tally.add(arguments, (file, scenario), &played);
        }
    }
    tally.print(arguments.json)
}

/// The scenarios that are named, those of a folder in the order of their names.
fn files(paths: &[PathBuf], unreadable: &mut Vec<Unreadable>) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).map(|entries| {
            let paths = entries.flatten().map(|entry| entry.path());
            paths.filter(|path| path.extension().is_some_and(|kind| kind == "toml"))
        });
        let mut found: Vec<PathBuf> = match entries {
            Ok(entries) => entries.collect(),
            Err(error) => {
                unreadable.push(Unreadable { file: path.clone(), why: error.to_string() });
                continue;
            }
        };
        if found.is_empty() {
            let why = "there is no scenario (*.toml) in this folder".into();
            unreadable.push(Unreadable { file: path.clone(), why });
        }
        found.sort();
        files.extend(found);
    }
    files
}

/// The text of a file, as far as a scenario can reach.
fn read(path: &Path) -> Result<String, String> {
    // Whoever opens a named pipe for reading waits for somebody who writes, unless he says so.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty());
    let file = File::from(file.map_err(|error| io::Error::from(error).to_string())?);
    let kind = file.metadata().map_err(|error| error.to_string())?;
    if !kind.is_file() {
        return Err("this is no file".into());
    }
    let mut bytes = Vec::new();
    file.take(limits::BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    if bytes.len() > limits::BYTES_MAX {
        let size = kind.len();
        let most = limits::BYTES_MAX;
        return Err(format!(
            "a scenario of {size} bytes; {most} are the most: tell a shorter story"
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
        format!("{line}: this is no UTF-8, and so no TOML")
    })
}

fn refuse(unreadable: &[Unreadable], json: bool) -> ExitCode {
    let line = |it: &Unreadable| {
        let colon = if it.why.starts_with(|c: char| c.is_ascii_digit()) { ":" } else { ": " };
        format!("{}{colon}{}", it.file.display(), it.why)
    };
    if json {
        let lines: Vec<String> = unreadable.iter().map(line).collect();
        let what = lines.first().cloned().unwrap_or_default();
        let object = json!({ "error": { "what": what, "all": lines } });
        return output::print(&format!("{object}\n"), ExitCode::from(2));
    }
    for it in unreadable {
        output::note(&format!("error: {}", line(it)));
    }
    ExitCode::from(2)
}

/// What has come of all.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    scenarios: Vec<Value>,
    text: String,
}

impl Tally {
    fn add(&mut self, arguments: &Arguments, story: (&Path, &Scenario), played: &Played) {
        let (verdict, why) = match &played.verdict {
            Verdict::Passed => ("passed", None),
            Verdict::Failed(why) => ("failed", Some(why)),
            Verdict::Skipped(why) => ("skipped", Some(why)),
        };
        *match played.verdict {
            Verdict::Passed => &mut self.passed,
            Verdict::Failed(_) => &mut self.failed,
            Verdict::Skipped(_) => &mut self.skipped,
        } += 1;
        if arguments.json {
            self.scenarios.push(to_json(arguments, story, played, (verdict, why)));
        } else {
            to_text(&mut self.text, arguments, story, played, (verdict, why));
        }
    }

    fn print(self, json: bool) -> ExitCode {
        let Self { passed, failed, skipped, scenarios, mut text } = self;
        let interrupted = interrupt::asked();
        let status = match (failed, interrupted) {
            (0, false) => ExitCode::SUCCESS,
            (0, true) => ExitCode::from(130),
            _ => ExitCode::FAILURE,
        };
        if json {
            let object = json!({
                "passed": passed, "failed": failed, "skipped": skipped,
                "interrupted": interrupted, "scenarios": scenarios,
            });
            return output::print(&format!("{object}\n"), status);
        }
        let _ = writeln!(text, "{passed} passed, {failed} failed, {skipped} skipped");
        if interrupted {
            text.push_str("interrupted: the rest was not played\n");
        }
        output::print(&text, status)
    }
}

fn to_json(
    arguments: &Arguments,
    (file, scenario): (&Path, &Scenario),
    played: &Played,
    (verdict, why): (&str, Option<&String>),
) -> Value {
    let step = |step: &PlayedStep| {
        let page = |change: &polder_play::Change| {
            json!({
                "pages": format!("{}..{}", change.start, change.end),
                "before": change.before.to_string(),
                "after": change.after.to_string(),
            })
        };
        let mut object = json!({
            "line": step.line,
            "actor": step.actor,
            "did": step.did,
            "is": step.outcome.is.name(),
            "outcome": step.outcome.line(),
            "met": step.unmet.is_none(),
            "pages": step.pages.iter().map(page).collect::<Vec<_>>(),
        });
        if let Some(why) = &step.unmet {
            object["why"] = json!(why);
        }
        if arguments.trace {
            object["trace"] = json!(step.trace);
        }
        object
    };
    let mut object = json!({
        "file": file.display().to_string(),
        "about": scenario.about,
        "thread": scenario.thread,
        "invariant": scenario.invariants,
        "host": played.host.to_string(),
        "verdict": verdict,
        "steps": played.steps.iter().map(step).collect::<Vec<_>>(),
    });
    if let Some(why) = why {
        object["why"] = json!(why);
    }
    object
}

fn to_text(
    text: &mut String,
    arguments: &Arguments,
    (file, scenario): (&Path, &Scenario),
    played: &Played,
    (verdict, why): (&str, Option<&String>),
) {
    let _ = writeln!(text, "{} on {}: {}", file.display(), played.host, scenario.about.trim());
    let wide = played.steps.iter().map(|step| step.actor.len()).max().unwrap_or(0);
    for step in &played.steps {
        let PlayedStep { line, actor, did, outcome, unmet, pages, trace } = step;
        if arguments.trace {
            for line in trace {
                let _ = writeln!(text, "           . {line}");
            }
        }
        let met = if unmet.is_none() { "" } else { "UNMET " };
        let _ = writeln!(text, "  {line:>4}  {actor:wide$}  {did}: {met}{}", outcome.line());
        for change in pages {
            let _ = writeln!(text, "        {:wide$}    {change}", "");
        }
        if let Some(why) = unmet {
            let _ = writeln!(text, "        {:wide$}    {why}", "");
        }
    }
    match why {
        None => writeln!(text, "  {verdict}\n"),
        Some(why) => writeln!(text, "  {}: {why}\n", verdict.to_uppercase()),
    }
    .unwrap_or_default();
}
