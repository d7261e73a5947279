//! The table is what it says: every cell that runs passes, and `table.md` shows all of them.

use std::collections::BTreeSet;

use polder_behaviour::{Cell, Section, Verdict, cases, cell, hosts, render, run};
use polder_require::require;

#[test]
fn the_checked_in_table_is_what_is_declared() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/table.md");
    let checked_in = std::fs::read_to_string(path).unwrap();
    assert!(checked_in == render(), "table.md is out of date: cargo xtask behaviours --write");
}

#[test]
fn every_case_has_a_sentence_of_its_own_and_every_reason_a_case() {
    let names: Vec<&str> = cases().map(|case| case.name).collect();
    let known: BTreeSet<&str> = names.iter().copied().collect();
    assert_eq!(known.len(), names.len());
    for host in hosts() {
        let reasons: Vec<&str> = host.not_applicable().iter().map(|(name, _)| *name).collect();
        assert!(reasons.iter().all(|name| known.contains(name)), "{}: {reasons:?}", host.name());
        let once: BTreeSet<&str> = reasons.iter().copied().collect();
        assert_eq!(once.len(), reasons.len(), "{}: a case twice", host.name());
    }
}

/// The rows in docs/snp.md are promises, too.
#[test]
fn the_rows_that_the_page_about_snp_names_exist() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/snp.md");
    let text = std::fs::read_to_string(path).unwrap().replace('\n', " ");
    let rows: BTreeSet<&str> = cases().map(|case| case.name).collect();
    // Bold is no row, and a row is a sentence: longer than a word with stress.
    let text = text.replace("**", "\u{1}");
    let slanted = text.split('*').skip(1).step_by(2);
    let named: Vec<&str> = slanted.filter(|name| name.split(' ').count() > 2).collect();
    let none: Vec<_> = named.iter().filter(|name| !rows.contains(*name)).collect();
    assert!(none.is_empty(), "{none:?}");
    assert!(named.len() > 8);
}

/// Runs the cells of a section, on every host.
fn section(section: Section) {
    let mut failed = Vec::new();
    for host in hosts() {
        for case in cases().filter(|case| case.section == section) {
            if cell(*host, case) != Cell::Runs {
                continue;
            }
            match run(*host, case) {
                Verdict::Ok => {}
                Verdict::Failed(why) => {
                    failed.push(format!("{}: {}: {why}", host.name(), case.name));
                }
                Verdict::Skipped(skipped) => {
                    let why = format!("{}: {}: {}", host.name(), case.name, skipped.why);
                    require(skipped.facility, Err::<(), _>(why));
                }
            }
        }
    }
    assert!(failed.is_empty(), "\n{}", failed.join("\n"));
}

#[test]
fn create() {
    section(Section::Create);
}

#[test]
fn bind() {
    section(Section::Bind);
}

#[test]
fn host_view() {
    section(Section::HostView);
}

#[test]
fn discard() {
    section(Section::Discard);
}

#[test]
fn conversion() {
    section(Section::Conversion);
}

#[test]
fn huge_pages() {
    section(Section::HugePages);
}

#[test]
fn rmp() {
    section(Section::Rmp);
}

#[test]
fn exits() {
    section(Section::Exits);
}

#[test]
fn population() {
    section(Section::Population);
}

#[test]
fn userfault() {
    section(Section::Userfault);
}

#[test]
fn kernel_access() {
    section(Section::KernelAccess);
}

#[test]
fn prefault() {
    section(Section::Prefault);
}

#[test]
fn reach() {
    section(Section::Reach);
}

#[test]
fn pins() {
    section(Section::Pins);
}

#[test]
fn devices() {
    section(Section::Devices);
}

#[test]
fn dirty_log() {
    section(Section::DirtyLog);
}

#[test]
fn preload_and_move() {
    section(Section::Move);
}

#[test]
fn pkvm() {
    section(Section::Pkvm);
}

#[test]
fn selftests() {
    section(Section::Selftests);
}
