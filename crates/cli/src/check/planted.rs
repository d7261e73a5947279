//! `polder check --planted`: is every planted bug found, and is nothing found that is none?

use std::fs;
use std::path::{Path, PathBuf};

use polder_explore::models::ModelWorld;
use polder_explore::planted::{self, Harmless, Host, PlantedBug};
use polder_explore::polder::World;
use polder_explore::{How, Report};
use serde_json::{Value, json};

use super::search::Searches;
use super::{Arguments, Failed, Searched, configs_json, end, finding_json, line, trace, unknown};
use crate::interrupt;

/// What came of the search for a bug.
struct Hunt<'a> {
    bug: &'a PlantedBug,
    report: Report,
    seconds: f64,
    /// Where the way to it was written, if it was to be, or why it can't be.
    saved: Option<Result<PathBuf, String>>,
}

pub(super) fn check_planted(name: &str, arguments: &Arguments) -> Result<(String, bool), Failed> {
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
    let mut searches = Searches::new(arguments);
    let mut hunts = Vec::new();
    for bug in &bugs {
        hunts.push(hunt(bug, &mut searches, arguments.save.as_deref())?);
        if interrupt::asked() {
            break;
        }
    }
    let found = hunts.iter().filter(|hunt| hunt.has_found()).count();
    let text = if arguments.json {
        let rows: Vec<Value> = hunts.iter().map(Hunt::to_json).collect();
        format!("{}\n", json!({ "planted": bugs.len(), "found": found, "bugs": rows }))
    } else {
        let lines: String = hunts.iter().map(|hunt| hunt.to_text(bugs.len() == 1)).collect();
        format!("{lines}{found} of {} planted bugs were found\n", bugs.len())
    };
    Ok((text, found == bugs.len() || interrupt::asked()))
}

/// Looks for the shortest way to a bug.
fn hunt<'a>(
    bug: &'a PlantedBug,
    searches: &mut Searches,
    save_in: Option<&Path>,
) -> Result<Hunt<'a>, Failed> {
    let (report, seconds) = match bug.host() {
        Host::Polder(setup) => searches.run(bug.name, &World::new(&setup), How::Shortest),
        Host::Model(model, invariant) => {
            searches.run(bug.name, &ModelWorld::new(&model, invariant), How::Shortest)
        }
    };
    let saved = save_in.map(|folder| save(bug, folder)).transpose()?;
    Ok(Hunt { bug, report, seconds, saved })
}

impl Hunt<'_> {
    /// Whether it came to the invariant that the bug breaks.
    fn has_found(&self) -> bool {
        self.report.finding.as_ref().is_some_and(|told| told.violation.invariant == self.bug.breaks)
    }

    fn to_text(&self, with_trace: bool) -> String {
        let Self { bug, report, .. } = self;
        let came = match &report.finding {
            Some(told) => format!("{} steps: {}", told.trace.len(), told.violation),
            None if !report.complete => "not searched to the end".to_owned(),
            None => "NOT FOUND".to_owned(),
        };
        let mut text = format!("{:24} {:6} states, {came}\n", bug.name, report.states);
        text.extend(report.finding.as_ref().filter(|_| with_trace).map(trace));
        text.extend(self.saved.as_ref().map(|saved| match saved {
            Ok(file) => format!("{:24} saved as {}\n", "", file.display()),
            Err(why) => format!("{:24} not saved: {why}\n", ""),
        }));
        text
    }

    fn to_json(&self) -> Value {
        json!({
            "name": self.bug.name,
            "about": self.bug.about,
            "states": self.report.states,
            "seconds": self.seconds,
            "found": self.report.finding.as_ref().map(finding_json),
            "complete": self.report.complete,
            "saved": self.saved.as_ref().and_then(|saved| saved.as_ref().ok()),
        })
    }
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

/// Searches all that there is of a change that breaks nothing.
fn check_harmless(change: &Harmless, arguments: &Arguments) -> (String, bool) {
    let mut searches = Searches::new(arguments);
    let mut all = Vec::new();
    for setup in change.setups() {
        let (report, seconds) = searches.run(setup.name, &World::new(&setup), How::All);
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
