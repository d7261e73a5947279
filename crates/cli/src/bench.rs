//! `polder bench`.

use std::process::ExitCode;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use polder_bench::{ALL, Bench, BenchError, Progress, Report, Row};
use serde_json::json;

use crate::output;
use crate::trouble::Trouble;

/// Measure what a part of Polder costs, next to what one would use instead.
///
/// Each row is a case and a baseline, measured in turns in the same run; its ratio is above 1 where
/// Polder is better.
#[derive(Args)]
#[command(after_help = "\
Examples:
  polder bench                            what there is
  polder bench map                        the page map, as a table
  polder bench pins                       pins, next to a lock over a tree of them
  polder bench machine                    the simulated machine
  polder bench faults                     a guest's faults on KVM, next to a bare loop
  polder bench map --json | jq '.rows[] | select(.ratio < 1)'

Exit status: 0 measured, 2 it could not be.")]
pub(crate) struct Arguments {
    /// What to measure; without a name, or with `list`, what there is to measure
    #[arg(value_name = "NAME", default_value = "list", hide_default_value = true)]
    name: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(arguments: &Arguments) -> ExitCode {
    if arguments.name == "list" {
        return output::print(&list(arguments.json), ExitCode::SUCCESS);
    }
    let bench = match Bench::named(&arguments.name) {
        Ok(bench) => bench,
        Err(error) => return Trouble::new(&error, Some(&error.way_out())).print(arguments.json),
    };
    match measure(bench, arguments.json) {
        Ok(report) => {
            let text =
                if arguments.json { format!("{}\n", json!(report)) } else { to_text(&report) };
            output::print(&text, ExitCode::SUCCESS)
        }
        Err(error) => Trouble::new(&error, error.way_out()).print(arguments.json),
    }
}

fn list(as_json: bool) -> String {
    if as_json {
        let benches = ALL.iter().map(|bench| json!({ "bench": bench.name, "about": bench.about }));
        return format!("{}\n", json!({ "benches": benches.collect::<Vec<_>>() }));
    }
    ALL.iter().map(|bench| format!("{:10} {}\n", bench.name, bench.about)).collect()
}

fn measure(bench: &Bench, json: bool) -> Result<Report, BenchError> {
    // On standard error, and only where that is a terminal.
    let bar = if json { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let report = bench.report(&mut |Progress { done, of, doing }| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
        bar.set_message(doing);
    });
    bar.finish_and_clear();
    report
}

fn to_text(report: &Report) -> String {
    let heads = ["case", "baseline", "its", "Polder's", "unit", "ratio", "note"];
    let mut table: Vec<[String; 7]> = vec![heads.map(String::from)];
    table.extend(report.rows.iter().map(cells));
    let width = |column: usize| table.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 7] = std::array::from_fn(width);
    let lines = table.iter().map(|row| {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
            // Numbers to the right.
            if [2, 3, 5].contains(&column) {
                format!("{cell:>width$}")
            } else {
                format!("{cell:width$}")
            }
        });
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    });
    format!("{}: {}\n\n{}", report.bench, report.machine, lines.collect::<String>())
}

fn cells(row: &Row) -> [String; 7] {
    [
        row.case.clone(),
        row.baseline.to_owned(),
        number(row.baseline_value),
        number(row.polder_value),
        row.unit.to_owned(),
        number(row.ratio),
        row.note.clone(),
    ]
}

/// Three digits that count, or all before the point; a dash for what was not measured.
fn number(value: f64) -> String {
    match value.abs() {
        value if value.is_nan() => "-".to_owned(),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        0.1.. => format!("{value:.2}"),
        0.001.. => format!("{value:.4}"),
        _ => format!("{value:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_and_its_numbers_are_short() {
        let row = |case: &str, value| Row {
            case: case.into(),
            baseline: "naive",
            unit: "ns",
            baseline_value: value,
            polder_value: 2.0,
            ratio: value / 2.0,
            note: String::new(),
        };
        let rows = vec![row("short", 1234.56), row("rather long", 0.000_01)];
        let report = Report { bench: "x", machine: "m".into(), rows };
        let expected = "\
x: m

case         baseline     its  Polder's  unit   ratio  note
short        naive       1235      2.00  ns       617
rather long  naive     1.0e-5      2.00  ns    5.0e-6
";
        assert_eq!(to_text(&report), expected);
    }
}
