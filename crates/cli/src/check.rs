//! `polder check`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use polder_explore::models::{self, INVARIANTS, Model, ModelWorld};
use polder_explore::planted::{self, Harmless, PlantedBug};
use polder_explore::polder::{self, Setup, World};
use polder_explore::{How, Report, System, Told, check};
use serde_json::{Value, json};

use crate::trouble::Trouble;
use crate::{interrupt, output};

/// A year, in seconds.
const LONGEST: u64 = 365 * 24 * 60 * 60;

/// Search the interleavings of Polder's protocols for one that breaks an invariant.
///
/// Polder's own engine is run on the simulated machine by guests, threads and callers, in every
/// order of their steps. After each step the invariants of ARCHITECTURE.md are checked. A finding
/// is printed as the shortest list of steps that leads there.
#[derive(Args)]
#[command(after_help = "\
Examples:
  polder check                            every configuration, a minute at most
  polder check --config list              what there is: configurations, models, bugs
  polder check --config conversion        one of them, and which overlaps never came
  polder check --planted all              is every planted bug found?
  polder check --planted no-drain         the shortest way to one of them
  polder check --planted one-table        a change that breaks nothing, searched to the end
  polder check --planted all --save DIR   as scenarios for `polder play`
  polder check --model hugetlb-rfc        which invariants does another order keep?

Exit status: 0 nothing is broken (or every planted bug was found; or a model was searched), 1
otherwise, 2 it could not be done, 130 interrupted.")]
pub(crate) struct Arguments {
    /// The configuration to search, or `list` for all that there is to name
    #[arg(long, value_name = "NAME")]
    config: Option<String>,
    /// Another protocol than Polder's to search instead
    #[arg(long, value_name = "NAME", conflicts_with_all = ["config", "planted"])]
    model: Option<String>,
    /// A bug to plant and to find, or `all`
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    planted: Option<String>,
    /// Write the shortest way to each planted bug here, as a scenario for `polder play`, if it can
    /// be one
    #[arg(long, value_name = "DIR", requires = "planted")]
    save: Option<PathBuf>,
    /// How long to search in all; it ends sooner when there is nothing left to search
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=LONGEST))]
    seconds: u64,
    /// The seed for configurations that are too large to search every order of
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Why nothing was searched, or saved.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("there is no {what} `{name}`")]
    Unknown { what: &'static str, name: String },
    #[error("signals can't be heard")]
    Signals(#[source] std::io::Error),
    #[error("`{0}` breaks nothing, so there is nothing to save")]
    NothingToSave(&'static str),
    #[error("{} can't be written", file.display())]
    Unwritten { file: PathBuf, source: std::io::Error },
}

pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    let heard = interrupt::hear().map_err(Failed::Signals);
    let done = heard.and_then(|()| {
        match (
            arguments.planted.as_deref(),
            arguments.model.as_deref(),
            arguments.config.as_deref(),
        ) {
            (Some(name), _, _) | (_, Some(name), _) | (_, _, Some(name)) if name == "list" => {
                Ok((list(arguments.json), true))
            }
            (Some(name), _, _) => check_planted(name, arguments),
            (None, Some(name), _) => check_model(name, arguments),
            (None, None, name) => check_configs(name, arguments),
        }
    });
    match done {
        Ok((text, true)) if interrupt::asked() => output::print(&text, ExitCode::from(130)),
        Ok((text, good)) => output::print(&text, ExitCode::from(u8::from(!good))),
        Err(failed) => {
            let list = "`polder check --config list` says what there is";
            let way_out = matches!(failed, Failed::Unknown { .. }).then_some(list);
            Trouble::new(&failed, way_out).print(arguments.json)
        }
    }
}

fn list(as_json: bool) -> String {
    let configs = polder::all();
    if as_json {
        let named = |name: &str, about: &str| json!({ "name": name, "about": about });
        let configs: Vec<Value> = configs.iter().map(|it| named(it.name, it.about)).collect();
        let models: Vec<Value> = models::ALL.iter().map(|it| named(it.name, it.about)).collect();
        let bugs: Vec<Value> = planted::all().map(|it| named(it.name, it.about)).collect();
        let none: Vec<Value> =
            planted::HARMLESS.iter().map(|it| named(it.name, it.about)).collect();
        let all =
            json!({ "configs": configs, "models": models, "planted": bugs, "harmless": none });
        return format!("{all}\n");
    }
    let mut text = String::from("configurations\n");
    let line = |name: &str, about: &str| format!("  {name:24} {about}\n");
    configs.iter().for_each(|it| text.push_str(&line(it.name, it.about)));
    text.push_str("models\n");
    models::ALL.iter().for_each(|it| text.push_str(&line(it.name, it.about)));
    text.push_str("bugs to plant\n");
    planted::all().for_each(|it| text.push_str(&line(it.name, it.about)));
    text.push_str("changes to plant that break nothing\n");
    planted::HARMLESS.iter().for_each(|it| text.push_str(&line(it.name, it.about)));
    text
}

/// Searches for as long as `limit`, telling how far it is.
fn timed<S: System>(start: &S, how: How, limit: Duration, bar: &ProgressBar) -> (Report, f64) {
    let began = clock();
    let mut at_a_time = began;
    let report = check(start, how, &mut |states, _| {
        let now = clock();
        if now - at_a_time > Duration::from_millis(200) {
            at_a_time = now;
            let passed = (now - began).as_secs_f64();
            bar.set_position(((now - began).as_millis()).try_into().unwrap_or(u64::MAX));
            bar.set_message(format!("{states} states, {}/s", rate(states, passed)));
        }
        now - began < limit && !interrupt::asked()
    });
    (report, (clock() - began).as_secs_f64())
}

#[expect(clippy::disallowed_methods, reason = "a command says how long it took")]
fn clock() -> Instant {
    Instant::now()
}

fn bar(json: bool, limit: Duration, name: &str) -> ProgressBar {
    let length = limit.as_millis().try_into().unwrap_or(u64::MAX);
    let bar = if json { ProgressBar::hidden() } else { ProgressBar::new(length) };
    let style = ProgressStyle::with_template("{prefix:16} {bar:30} {elapsed} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(name.to_owned());
    bar
}

/// So many a second, in thousands.
fn rate(count: usize, seconds: f64) -> String {
    let a_second = u32::try_from(count).map_or(f64::MAX, f64::from) / seconds.max(0.001);
    format!("{:.0}k", a_second / 1000.0)
}

/// A configuration and what came of it.
struct Searched {
    setup: Setup,
    report: Report,
    seconds: f64,
}

fn check_configs(name: Option<&str>, arguments: &Arguments) -> Result<(String, bool), Failed> {
    let setups = match name {
        None => polder::all(),
        Some(name) => vec![polder::named(name).ok_or_else(|| unknown("configuration", name))?],
    };
    let one = setups.len() == 1;
    let mut left = Duration::from_secs(arguments.seconds);
    let mut text = String::new();
    let mut all: Vec<Searched> = Vec::new();
    let count = setups.len();
    for (done, setup) in setups.into_iter().enumerate() {
        // Random ways take all there is; a fifth of it is kept for those that come last.
        let limit = if done + 1 == count { left } else { left * 4 / 5 };
        let bar = bar(arguments.json, limit, setup.name);
        let how = if setup.exhaustive { How::All } else { How::Some { seed: arguments.seed } };
        let (report, seconds) = timed(&World::new(&setup), how, limit, &bar);
        bar.finish_and_clear();
        left = left.saturating_sub(Duration::from_secs_f64(seconds));
        let searched = Searched { setup, report, seconds };
        text.push_str(&line(&searched));
        if one {
            let missing = searched.report.missing.iter().map(|it| format!("  not met: {it}\n"));
            text.extend(missing);
        }
        all.push(searched);
        if interrupt::asked() {
            break;
        }
    }
    let found = all.iter().filter(|it| it.report.finding.is_some()).count();
    text.push_str(&end(&all, count));
    if arguments.json {
        text = format!("{}\n", configs_json(&all));
    }
    Ok((text, found == 0))
}

/// What came of all of them, of which there were to be `of`.
fn end(all: &[Searched], of: usize) -> String {
    let count = |is: &dyn Fn(&Searched) -> bool| all.iter().filter(|it| is(it)).count();
    let found = count(&|it| it.report.finding.is_some());
    let cut_short = count(&|it| it.setup.exhaustive && !it.report.complete) + of - all.len();
    match (found, cut_short) {
        (0, 0) => "no invariant was broken\n".to_owned(),
        (0, some) => {
            format!("no invariant was broken; {some} of {of} not searched to the end\n")
        }
        (found, _) => format!("an invariant was broken in {found} of {of}\n"),
    }
}

fn line(searched: &Searched) -> String {
    let Searched { setup, report, seconds } = searched;
    let extent = match (report.complete, setup.exhaustive, &report.finding) {
        (true, _, _) => "every interleaving",
        (false, _, Some(_)) => "up to what was found",
        (false, true, None) if interrupt::asked() => "not all: interrupted",
        (false, true, None) => "not all: time was up",
        (false, false, None) => "random ways",
    };
    let mut text = format!(
        "{:12} {extent}: {} states, {} steps, {seconds:.1} s, {} states/s; overlaps {} of {}\n",
        setup.name,
        report.states,
        report.steps,
        rate(report.states, *seconds),
        report.covered,
        report.possible,
    );
    if let Some(told) = &report.finding {
        text.push_str(&trace(told));
    }
    text
}

/// A finding, for a person.
fn trace(told: &Told) -> String {
    let kind = if told.shortest { "the shortest way there" } else { "a way there" };
    let mut text = format!("  {}\n  {kind}, {} steps:\n", told.violation, told.trace.len());
    for (number, line) in told.trace.iter().enumerate() {
        text.push_str(&format!("  {:3}. {line}\n", number + 1));
    }
    text
}

fn finding_json(told: &Told) -> Value {
    json!({
        "invariant": told.violation.invariant,
        "what": told.violation.what,
        "steps": told.trace.len(),
        "shortest": told.shortest,
        "trace": told.trace,
    })
}

fn configs_json(all: &[Searched]) -> Value {
    let sum = |of: fn(&Report) -> usize| all.iter().map(|it| of(&it.report)).sum::<usize>();
    let configs: Vec<Value> = all
        .iter()
        .map(|Searched { setup, report, seconds }| {
            json!({
                "name": setup.name,
                "states": report.states,
                "steps": report.steps,
                "depth": report.depth,
                "seconds": seconds,
                "complete": report.complete,
                "violation": report.finding.as_ref().map(finding_json),
                "overlaps": {
                    "covered": report.covered,
                    "possible": report.possible,
                    "missing": report.missing,
                },
            })
        })
        .collect();
    json!({
        "states": sum(|report| report.states),
        "steps": all.iter().map(|it| it.report.steps).sum::<u64>(),
        "seconds": all.iter().map(|it| it.seconds).sum::<f64>(),
        "violations": sum(|report| usize::from(report.finding.is_some())),
        "overlaps": {
            "covered": sum(|report| report.covered),
            "possible": sum(|report| report.possible),
        },
        "configs": configs,
    })
}

fn unknown(what: &'static str, name: &str) -> Failed {
    Failed::Unknown { what, name: name.to_owned() }
}

/// Searches all that there is of a change that breaks nothing.
fn check_harmless(change: &Harmless, arguments: &Arguments) -> (String, bool) {
    let mut left = Duration::from_secs(arguments.seconds);
    let mut all = Vec::new();
    for setup in change.setups() {
        let bar = bar(arguments.json, left, setup.name);
        let (report, seconds) = timed(&World::new(&setup), How::All, left, &bar);
        bar.finish_and_clear();
        left = left.saturating_sub(Duration::from_secs_f64(seconds));
        all.push(Searched { setup, report, seconds });
    }
    let broken = all.iter().any(|it| it.report.finding.is_some());
    if arguments.json {
        return (format!("{}\n", configs_json(&all)), !broken);
    }
    let mut text = format!("{}: {}\n", change.name, change.about);
    text.extend(all.iter().map(line));
    text.push_str(&end(&all, all.len()));
    (text, !broken)
}

fn check_planted(name: &str, arguments: &Arguments) -> Result<(String, bool), Failed> {
    if let Some(change) = planted::HARMLESS.iter().find(|change| change.name == name) {
        return match arguments.save {
            Some(_) => Err(Failed::NothingToSave(change.name)),
            None => Ok(check_harmless(change, arguments)),
        };
    }
    let one = planted::all().find(|bug| bug.name == name);
    let bugs: Vec<&PlantedBug> = match (name, one) {
        ("all", _) => planted::all().collect(),
        (_, Some(bug)) => vec![bug],
        (_, None) => return Err(unknown("bug to plant", name)),
    };
    if let Some(folder) = &arguments.save {
        let unwritten = |source| Failed::Unwritten { file: folder.clone(), source };
        fs::create_dir_all(folder).map_err(unwritten)?;
    }
    let mut left = Duration::from_secs(arguments.seconds);
    let (mut text, mut rows, mut found) = (String::new(), Vec::new(), 0);
    for bug in &bugs {
        let (limit, bar) = (left, bar(arguments.json, left, bug.name));
        let (report, seconds) = match bug.host() {
            planted::Host::Polder(setup) => timed(&World::new(&setup), How::Shortest, limit, &bar),
            planted::Host::Model(model, invariant) => {
                timed(&ModelWorld::new(&model, invariant), How::Shortest, limit, &bar)
            }
        };
        bar.finish_and_clear();
        left = left.saturating_sub(Duration::from_secs_f64(seconds));
        let came = match &report.finding {
            Some(told) => format!("{} steps: {}", told.trace.len(), told.violation),
            None if !report.complete => "not searched to the end".to_owned(),
            None => "NOT FOUND".to_owned(),
        };
        text.push_str(&format!("{:24} {:6} states, {came}\n", bug.name, report.states));
        if let (Some(told), 1) = (&report.finding, bugs.len()) {
            text.push_str(&trace(told));
        }
        let broken = report.finding.as_ref().map(|told| told.violation.invariant);
        found += usize::from(broken == Some(bug.breaks));
        let saved = match &arguments.save {
            Some(folder) => Some(save(bug, folder)?),
            None => None,
        };
        if let Some(saved) = &saved {
            let line = match saved {
                Ok(file) => format!("saved as {}", file.display()),
                Err(why) => format!("not saved: {why}"),
            };
            text.push_str(&format!("{:24} {line}\n", ""));
        }
        rows.push(json!({
            "name": bug.name,
            "about": bug.about,
            "states": report.states,
            "seconds": seconds,
            "found": report.finding.as_ref().map(finding_json),
            "complete": report.complete,
            "saved": saved.and_then(Result::ok),
        }));
        if interrupt::asked() {
            break;
        }
    }
    text.push_str(&format!("{found} of {} planted bugs were found\n", bugs.len()));
    if arguments.json {
        let all = json!({ "planted": bugs.len(), "found": found, "bugs": rows });
        text = format!("{all}\n");
    }
    Ok((text, found == bugs.len() || interrupt::asked()))
}

/// Writes the shortest way to a bug that can be a scenario. If there is none, says why.
fn save(bug: &PlantedBug, folder: &Path) -> Result<Result<PathBuf, String>, Failed> {
    let scenario = match bug.scenario() {
        Ok(scenario) => scenario,
        Err(why) => return Ok(Err(why)),
    };
    let file = folder.join(format!("{}.toml", bug.name));
    match fs::write(&file, scenario) {
        Ok(()) => Ok(Ok(file)),
        Err(source) => Err(Failed::Unwritten { file, source }),
    }
}

fn check_model(name: &str, arguments: &Arguments) -> Result<(String, bool), Failed> {
    let model: Model = models::named(name).ok_or_else(|| unknown("model", name))?;
    let mut left = Duration::from_secs(arguments.seconds);
    let mut text = format!("{}: {}\n", model.name, model.about);
    let mut rows = Vec::new();
    for invariant in INVARIANTS {
        let bar = bar(arguments.json, left, invariant);
        let start = ModelWorld::new(&model, invariant);
        let (report, seconds) = timed(&start, How::Shortest, left, &bar);
        bar.finish_and_clear();
        left = left.saturating_sub(Duration::from_secs_f64(seconds));
        let kept = report.finding.is_none() && report.complete;
        text.push_str(&match (&report.finding, kept) {
            (Some(told), _) => format!("{invariant:7} broken\n{}", trace(told)),
            (None, true) => {
                format!("{invariant:7} kept: {} states, all there are\n", report.states)
            }
            (None, false) => format!("{invariant:7} not broken among {} states\n", report.states),
        });
        rows.push(json!({
            "invariant": invariant,
            "kept": kept,
            "states": report.states,
            "seconds": seconds,
            "violation": report.finding.as_ref().map(finding_json),
        }));
    }
    if arguments.json {
        let all = json!({ "model": model.name, "about": model.about, "invariants": rows });
        text = format!("{all}\n");
    }
    Ok((text, true))
}
