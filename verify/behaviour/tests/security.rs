//! `docs/security.md` says of every cell which test shows it, and is right.

use std::collections::{BTreeMap, BTreeSet};

use polder_behaviour::{Cell, Host, Way, cases, cell, hosts, way_of};

fn root() -> &'static str {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../..")
}

/// The cells of the first two tables: who reaches what, and the tests.
fn tables() -> [Vec<Vec<String>>; 2] {
    let text = std::fs::read_to_string(format!("{}/docs/security.md", root())).expect("a page");
    let mut tables = Vec::new();
    let mut rows: Vec<Vec<String>> = Vec::new();
    for line in text.lines().chain([""]) {
        let cells = line.strip_prefix('|').and_then(|line| line.strip_suffix('|'));
        match cells {
            Some(cells) => rows.push(cells.split('|').map(|it| it.trim().to_owned()).collect()),
            None if rows.is_empty() => {}
            None => tables.push(std::mem::take(&mut rows)),
        }
    }
    let [reach, tests, ..] = tables.as_slice() else { panic!("{} tables", tables.len()) };
    [reach.clone(), tests.clone()]
}

/// What a cell says, and the letter of its test.
fn parse(text: &str) -> Option<(&str, &str)> {
    let (says, letter) = text.strip_suffix(']')?.split_once(" [")?;
    ["can", "can't", "n/a"].contains(&says).then_some((says, letter))
}

/// Whether a test shows what a cell of a host says.
fn shows(test: &str, host: &dyn Host, says: &str) -> Result<(), String> {
    if let Some(name) = test.strip_prefix('*').and_then(|test| test.strip_suffix('*')) {
        let case = cases().find(|case| case.name == name);
        let case = case.ok_or_else(|| format!("there is no row \"{name}\""))?;
        return match (cell(host, case), says, way_of(case)) {
            (Cell::NotApplicable(_), "n/a", _) => Ok(()),
            (Cell::NotApplicable(why), ..) => Err(format!("the row does not run there: {why}")),
            (Cell::Runs, "n/a", _) => Err("the row runs there".into()),
            (Cell::Runs, says, Some(way)) if host.reaches(way) != (says == "can") => {
                Err("the row says otherwise".into())
            }
            (Cell::Runs, ..) => Ok(()),
        };
    }
    let quoted: Vec<&str> = test.split('`').collect();
    let [_, file, _, name, _] = quoted.as_slice() else {
        return Err(format!("\"{test}\" names no test"));
    };
    let text = std::fs::read_to_string(format!("{}/{file}", root()));
    let text = text.map_err(|error| format!("{file}: {error}"))?;
    let has = match file.ends_with(".rs") {
        true => text.contains(&format!("#[test]\nfn {name}()")),
        false => text.contains(name),
    };
    has.then_some(()).ok_or_else(|| format!("{file} has no {name}"))
}

#[test]
fn every_cell_of_the_page_about_security_names_the_test_that_shows_it() {
    let [reach, tests] = tables();
    let tests: BTreeMap<&str, &str> =
        tests.iter().skip(2).map(|row| (row[0].as_str(), row[1].as_str())).collect();
    let columns: Vec<&dyn Host> = reach[0][1..]
        .iter()
        .map(|name| *hosts().iter().find(|host| host.name() == *name).expect("a host"))
        .collect();
    assert!(columns.len() == 4 && reach.len() > 20, "{columns}", columns = columns.len());
    let (mut used, mut wrong) = (BTreeSet::new(), Vec::new());
    for row in &reach[2..] {
        assert_eq!(row.len(), columns.len() + 1, "{row:?}");
        for (host, text) in columns.iter().zip(&row[1..]) {
            let shown = match parse(text) {
                None => Err(format!("\"{text}\" is no cell")),
                Some((says, letter)) => {
                    used.insert(letter);
                    match tests.get(letter) {
                        Some(test) => shows(test, *host, says),
                        None => Err(format!("there is no test [{letter}]")),
                    }
                }
            };
            if let Err(why) = shown {
                wrong.push(format!("{}, on {}: {text}: {why}", row[0], host.name()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    assert_eq!(used, tests.keys().copied().collect(), "a test that no cell names");
}

/// The checker above can find something.
#[test]
fn a_cell_that_is_wrong_is_noticed() {
    let memfd = hosts()[0];
    let descriptor = "*who reaches: the process, by the memory's descriptors*";
    assert_eq!(shows(descriptor, memfd, "can"), Ok(()));
    assert!(shows(descriptor, memfd, "can't").is_err());
    assert!(shows(descriptor, memfd, "n/a").is_err());
    assert!(shows("*who reaches: nobody*", memfd, "can").is_err());
    assert!(shows("`crates/linux/tests/reach.rs`: `nothing`", memfd, "can").is_err());
    assert!(shows("`crates/linux/tests/none.rs`: `nothing`", memfd, "can").is_err());
    assert!(shows("somebody has tried it", memfd, "can").is_err());
    assert_eq!(parse("may [a]"), None);
    let by_way = cases().filter(|case| way_of(case) == Some(Way::Descriptor)).count();
    assert_eq!(by_way, 1);
}
