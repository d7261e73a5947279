//! `polder check`.

mod planted;
mod search;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use polder_explore::models::{self, INVARIANTS, Model, ModelWorld};
use polder_explore::polder::{self, Setup, World};
use polder_explore::{How, Report, Told, planted as bugs};
use serde_json::{Value, json};

use self::planted::check_planted;
use self::search::{Searches, rate};
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
        let bugs: Vec<Value> = bugs::all().map(|it| named(it.name, it.about)).collect();
        let none: Vec<Value> = bugs::HARMLESS.iter().map(|it| named(it.name, it.about)).collect();
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
    bugs::all().for_each(|it| text.push_str(&line(it.name, it.about)));
    text.push_str("changes to plant that break nothing\n");
    bugs::HARMLESS.iter().for_each(|it| text.push_str(&line(it.name, it.about)));
    text
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
    let (one, count) = (setups.len() == 1, setups.len());
    let mut searches = Searches::new(arguments);
    let mut text = String::new();
    let mut all: Vec<Searched> = Vec::new();
    for (done, setup) in setups.into_iter().enumerate() {
        // Random ways take all there is; a fifth of it is kept for those that come last.
        let left = searches.left();
        let limit = if done + 1 == count { left } else { left * 4 / 5 };
        let how = if setup.exhaustive { How::All } else { How::Some { seed: arguments.seed } };
        let (report, seconds) = searches.run_within(limit, setup.name, &World::new(&setup), how);
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

fn check_model(name: &str, arguments: &Arguments) -> Result<(String, bool), Failed> {
    let model: Model = models::named(name).ok_or_else(|| unknown("model", name))?;
    let mut searches = Searches::new(arguments);
    let mut text = format!("{}: {}\n", model.name, model.about);
    let mut rows = Vec::new();
    for invariant in INVARIANTS {
        let start = ModelWorld::new(&model, invariant);
        let (report, seconds) = searches.run(invariant, &start, How::Shortest);
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
