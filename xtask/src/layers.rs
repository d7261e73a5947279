//! Which crate may use which, as `crates/README.md` says, and `unsafe` in one of them only.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The one crate that may have `unsafe` in it.
const UNSAFE: &str = "crates/linux";

pub(crate) fn check(root: &Path) -> Result<(), String> {
    let mut wrong = dependencies(root)?;
    wrong.extend(unsafe_code(root)?);
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
}

/// The rule: each crate, and those it may use. It is the table of `crates/README.md`.
fn rule(root: &Path) -> Result<BTreeMap<String, BTreeSet<String>>, String> {
    let text = read(&root.join("crates/README.md"))?;
    let rows = text.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split('|').map(names);
        let name = cells.next()?.into_iter().next()?;
        Some((name, cells.next()?.into_iter().collect()))
    });
    Ok(rows.collect())
}

/// What stands in backquotes in a cell of the table.
fn names(cell: &str) -> Vec<String> {
    cell.trim_end_matches('`')
        .split('`')
        .filter(|name| name.starts_with(|c: char| c.is_ascii_lowercase()))
        .map(str::to_owned)
        .collect()
}

fn dependencies(root: &Path) -> Result<Vec<String>, String> {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
        .current_dir(root)
        .output()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    let metadata: Value = serde_json::from_slice(&metadata.stdout)
        .map_err(|error| format!("cargo metadata: {error}"))?;
    let rule = rule(root)?;
    let ours = |name: &str| name == "polder" || name.starts_with("polder-");
    let mut wrong = Vec::new();
    for package in array(&metadata["packages"]) {
        let name = text(&package["name"]);
        let Some(allowed) = rule.get(name) else {
            wrong.push(format!("{name} has no row in crates/README.md"));
            continue;
        };
        for dependency in array(&package["dependencies"]) {
            let used = text(&dependency["name"]);
            // What only the tests use breaks no layer.
            if ours(used) && dependency["kind"] != "dev" && !allowed.contains(used) {
                wrong.push(format!("{name} may not use {used}: crates/README.md does not say so"));
            }
        }
    }
    Ok(wrong)
}

/// Where `unsafe` stands outside the one crate, and which crates don't take the workspace's lints.
fn unsafe_code(root: &Path) -> Result<Vec<String>, String> {
    let mut wrong = Vec::new();
    for folder in ["crates", "verify", "xtask", "benches", "examples"] {
        let mut files = Vec::new();
        collect(&root.join(folder), &mut files);
        for file in files {
            let name = file.strip_prefix(root).unwrap_or(&file).display().to_string();
            if name.starts_with(UNSAFE) {
                continue;
            }
            let text = read(&file)?;
            if name.ends_with("Cargo.toml") && !text.contains("[lints]\nworkspace = true") {
                wrong.push(format!("{name} does not take the workspace's lints"));
            }
            let found = text.lines().position(|line| name.ends_with(".rs") && has_unsafe(line));
            wrong.extend(found.map(|line| format!("{name}:{}: unsafe code", line + 1)));
        }
    }
    Ok(wrong)
}

fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    ["{", "fn", "impl", "extern", "trait"]
        .iter()
        .any(|what| code.contains(&["unsafe", what].join(" ")))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|kind| kind == "rs" || kind == "toml") {
            files.push(path);
        }
    }
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crates_keep_to_their_layers_and_unsafe_to_its_crate() {
        assert_eq!(check(&crate::root()), Ok(()));
    }

    #[test]
    fn unsafe_code_is_told_from_talk_of_it() {
        assert!(has_unsafe(&format!("    let x = {} {{ f() }};", "unsafe")));
        assert!(!has_unsafe("// an unsafe { block } in a comment"));
        assert!(!has_unsafe("unsafe_code = \"forbid\""));
    }

    #[test]
    fn a_row_of_the_rule_is_read() {
        assert_eq!(names(" `polder-units`, `polder-engine` "), ["polder-units", "polder-engine"]);
        assert!(rule(&crate::root()).unwrap()["polder-engine"].contains("polder-units"));
    }
}
