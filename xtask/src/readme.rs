//! Runs the commands that the documents show: each line of a fenced block marked `sh`, once.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

pub(crate) fn run(root: &Path) -> Result<(), String> {
    let mut documents = vec![root.join("README.md")];
    let docs = std::fs::read_dir(root.join("docs")).into_iter().flatten().flatten();
    documents.extend(
        docs.map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|kind| kind == "md")),
    );
    documents.sort();
    let mut done = arguments(std::env::args().skip(2))?;
    for document in documents {
        let text = std::fs::read_to_string(&document)
            .map_err(|error| format!("{}: {error}", document.display()))?;
        for command in commands(&text) {
            if !done.insert(command.to_owned()) {
                continue;
            }
            println!("$ {command}");
            // The shell says how long it took.
            let timed = "TIMEFORMAT='(that took %1R s)'; time eval \"$1\"";
            let status = Command::new("bash")
                .args(["-o", "pipefail", "-c", timed, "readme", command])
                .current_dir(root)
                .status()
                .map_err(|error| format!("bash: {error}"))?;
            if !status.success() {
                return Err(format!("{}: {command}: {status}", document.display()));
            }
        }
    }
    Ok(())
}

/// The commands that were run already, each after a `--but`.
fn arguments(mut arguments: impl Iterator<Item = String>) -> Result<BTreeSet<String>, String> {
    let mut done = BTreeSet::new();
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next()) {
            ("--but", Some(command)) => done.insert(command),
            _ => return Err("usage: cargo xtask readme [--but COMMAND]...".into()),
        };
    }
    Ok(done)
}

/// The lines of blocks marked `sh`; comments are left out.
fn commands(text: &str) -> Vec<&str> {
    let mut inside = false;
    let mut commands = Vec::new();
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```sh";
        } else if inside && !line.trim().is_empty() && !line.starts_with('#') {
            commands.push(line.split("  #").next().unwrap_or(line));
        }
    }
    commands
}

#[cfg(test)]
mod tests {
    use super::{arguments, commands};

    #[test]
    fn what_was_run_already_is_named() {
        let parse = |text: &str| arguments(text.split_whitespace().map(str::to_owned));
        assert_eq!(parse("--but ls --but pwd").unwrap().len(), 2);
        assert!(parse("").unwrap().is_empty());
        for bad in ["--but", "ls", "--but ls pwd"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_marked_blocks_are_run() {
        let text = "```sh\nls  # list\n\n# no\n```\n```text\nrm\n```\n```sh\npwd\n```\n";
        assert_eq!(commands(text), ["ls", "pwd"]);
    }
}
