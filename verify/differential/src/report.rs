//! Telling a difference: both outcomes side by side, and a file to play again.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use polder_play::{Played, Scenario, parse};

use crate::compare::{Difference, Side, name};

/// The scenario of a difference as it is saved, with its lines.
pub fn to_save(found: &Difference, sides: &[Side; 2], seed: u64) -> Scenario {
    let mut hosts = vec![sides[0].host];
    if sides[1].host != sides[0].host {
        hosts.push(sides[1].host);
    }
    let about = format!(
        "The program of seed {seed}: it passes on {}, and differs on {}",
        name(sides, 0),
        name(sides, 1)
    );
    let scenario = Scenario { about, hosts, ..found.scenario.clone() };
    // Read again, so that each step knows its line.
    parse(&scenario.to_string()).unwrap_or(scenario)
}

/// Saves a difference to a file of `folder`, which is made. Returns the file.
///
/// # Errors
/// The file that can't be written, and why.
pub fn save(
    found: &Difference,
    sides: &[Side; 2],
    seed: u64,
    folder: &Path,
) -> Result<PathBuf, String> {
    let file = folder.join(format!("{}-{}-{seed}.toml", sides[0].host, sides[1].host));
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&file, to_save(found, sides, seed).to_string()))
        .map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(file)
}

/// Both outcomes of each step, up to the one that differs.
pub fn side_by_side(found: &Difference, sides: &[Side; 2], seed: u64) -> String {
    let names = [name(sides, 0), name(sides, 1)];
    let scenario = to_save(found, sides, seed);
    let came = |played: &Played, at: usize| {
        played.steps.get(at).map_or_else(|| "not played".to_owned(), |it| it.outcome.line())
    };
    let rows: Vec<[String; 3]> = found.played[0]
        .steps
        .iter()
        .enumerate()
        .map(|(at, step)| {
            let line = scenario.steps.get(at).map_or(step.line, |step| step.line);
            let differs = if found.step == Some(at) { "> " } else { "  " };
            let did = format!("{differs}{line:>4}  {}  {}", step.actor, step.did);
            let [one, other] = [0, 1].map(|side| came(&found.played[side], at));
            [did, one, other]
        })
        .collect();
    let head = [String::new(), names[0].clone(), names[1].clone()];
    let width = |column: usize| {
        let cells = rows.iter().chain([&head]).map(|row| row[column].chars().count());
        cells.max().unwrap_or(0).min(72)
    };
    let widths = [width(0), width(1)];
    let mut text = String::new();
    for [did, one, other] in [&head].into_iter().chain(&rows) {
        let line = format!("{did:0$}  {one:1$}  {other}", widths[0], widths[1]);
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let _ = writeln!(text, "differs: {}", found.what);
    text
}
