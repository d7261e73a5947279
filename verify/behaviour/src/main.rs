//! `cargo xtask behaviours`: runs the table, here and now.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use polder::{HostKind, PageSize};
use polder_behaviour::{Case, Cell, Host, Verdict, cases, cell, hosts, render, run, run_within};
use serde_json::{Value, json};

/// Runs every cell of the behaviour table that runs on this machine.
#[derive(Parser)]
#[command(name = "cargo xtask behaviours")]
struct Arguments {
    /// Only the cells of these hosts
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    host: Vec<HostKind>,
    /// Only the columns whose memory is of pages of these sizes, where a case doesn't say
    #[arg(long, value_name = "SIZE,..", value_delimiter = ',')]
    page_size: Vec<PageSize>,
    /// Only the cases in whose sentence this occurs
    #[arg(long, value_name = "TEXT")]
    case: Option<String>,
    /// Seconds after which a cell counts as hung
    #[arg(long, value_name = "SECONDS")]
    limit: Option<u64>,
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
    /// Run nothing; write verify/behaviour/table.md
    #[arg(long, conflicts_with_all = ["host", "page_size", "case", "json"])]
    write: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.write {
        let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("table.md");
        return match std::fs::write(&table, render()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}: {error}", table.display());
                ExitCode::FAILURE
            }
        };
    }
    let mut rows = Vec::new();
    let (mut failed, mut looked) = (0, 0);
    let wanted = |host: &&&dyn Host| {
        (arguments.host.is_empty() || arguments.host.contains(&host.kind()))
            && (arguments.page_size.is_empty() || arguments.page_size.contains(&host.page_size()))
    };
    for host in hosts().iter().filter(wanted) {
        let asked = |case: &&Case| arguments.case.as_ref().is_none_or(|a| case.name.contains(a));
        for case in cases().filter(asked) {
            let (word, why) = came(*host, case, arguments.limit);
            looked += 1;
            failed += u32::from(word == "FAILED");
            if arguments.json {
                rows.push(row(*host, case, word, why));
            } else {
                let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
                println!("{word:8} {}: {}: {}{why}", host.name(), case.section, case.name);
            }
        }
    }
    if looked == 0 {
        eprintln!("no cell of the table has such a host and case");
        return ExitCode::FAILURE;
    }
    if arguments.json {
        println!("{}", json!({ "behaviours": rows, "failed": failed }));
    } else if failed > 0 {
        println!("{failed} FAILED");
    }
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn limited(host: &'static dyn Host, case: &'static Case, limit: Option<u64>) -> Verdict {
    match limit {
        Some(seconds) => run_within(host, case, Duration::from_secs(seconds)),
        None => run(host, case),
    }
}

/// What came of a cell, in a word, and why it is not `ok`.
fn came(
    host: &'static dyn Host,
    case: &'static Case,
    limit: Option<u64>,
) -> (&'static str, Option<String>) {
    match cell(host, case) {
        Cell::NotApplicable(reason) => ("n/a", Some(reason.to_owned())),
        Cell::Runs => match limited(host, case, limit) {
            Verdict::Ok => ("ok", None),
            Verdict::Failed(why) => ("FAILED", Some(why)),
            Verdict::Skipped(skipped) => {
                let word = if skipped.facility.is_required() { "FAILED" } else { "skipped" };
                let name = skipped.facility.name();
                (word, Some(format!("needs {name}: {}", skipped.why)))
            }
        },
    }
}

fn row(host: &dyn Host, case: &Case, word: &str, why: Option<String>) -> Value {
    json!({
        "host": host.name(),
        "section": case.section.to_string(),
        "case": case.name,
        "result": word.to_lowercase(),
        "why": why,
    })
}
