//! The table, as `table.md` has it.

use std::fmt::Write;

use crate::{Case, Host, Section, cases, hosts};

/// One case on one host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cell {
    /// It is run, and passes.
    Runs,
    /// It makes no sense there, or can't be tried there: why.
    NotApplicable(&'static str),
}

/// The cell of a case and a host.
pub fn cell(host: &dyn Host, case: &Case) -> Cell {
    let reason = host.not_applicable().iter().find(|(name, _)| *name == case.name);
    let reason = reason.map(|(_, reason)| *reason).or_else(|| host.lacks(case.section));
    reason.map_or(Cell::Runs, Cell::NotApplicable)
}

const INTRODUCTION: &str = "\
# What memory promises, and on which host

One row is one case, one column one host. A cell *runs*: `cargo test -p polder-behaviour` tries it
and it passes. Or it is *n/a*, not applicable, for the reason in its footnote. `cargo xtask
behaviours` runs all of it here and now. This file is written by `cargo xtask behaviours --write`;
a test fails if it is not what the code declares.
";

/// The table as text.
pub fn render() -> String {
    let mut reasons: Vec<&'static str> = Vec::new();
    let mut text = INTRODUCTION.to_owned();
    let columns: Vec<String> = hosts().iter().map(|host| host.name()).collect();
    for section in Section::ALL {
        let rule = "|---".repeat(columns.len() + 1);
        let _ = write!(text, "\n## {section}\n\n| case | {} |\n{rule}|\n", columns.join(" | "));
        for case in cases().filter(|case| case.section == section) {
            let _ = write!(text, "| {} |", case.name);
            for host in hosts() {
                match cell(*host, case) {
                    Cell::Runs => text.push_str(" runs |"),
                    Cell::NotApplicable(reason) => {
                        let _ = write!(text, " n/a[^{}] |", footnote(&mut reasons, reason));
                    }
                }
            }
            text.push('\n');
        }
    }
    text.push('\n');
    for (number, reason) in (1..).zip(reasons) {
        let _ = writeln!(text, "[^{number}]: {reason}");
    }
    text
}

/// The number of a reason: the same reason has one number.
fn footnote(reasons: &mut Vec<&'static str>, reason: &'static str) -> usize {
    let at = reasons.iter().position(|known| *known == reason);
    at.unwrap_or_else(|| {
        reasons.push(reason);
        reasons.len() - 1
    }) + 1
}
