//! The project's own chores: `cargo xtask NAME`.

mod lab;
mod layers;
mod readme;
mod soak;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const USAGE: &str = "\
usage: cargo xtask NAME
  behaviours [--host NAME] [--case TEXT] [--json] [--write]
           run the behaviour table (verify/behaviour), or write it to its file
  differential [--hosts NAME,..] [--seconds N] [--programs N] [--seed N] [--save DIR] [--json]
           play random programs on hosts that have to agree (docs/differential.md)
  lab [--cpus N] [--memory MIB] [--timeout SECONDS] [-- COMMAND]
           run a command, else the behaviour table, in a Linux with private memory (docs/lab.md)
  lab --matrix [--json]
           run the behaviour table in Debian's kernels too, and write docs/kernels.md
  layers   check which crate uses which, and where `unsafe` stands (crates/README.md)
  readme   run the commands that README.md and docs/ show, each once
  soak [--seconds N] [--part NAME] [--seed N] [--json]
           run the long forms of what CI runs for seconds";

/// The project's folder.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn main() -> ExitCode {
    let done = match std::env::args().nth(1).as_deref() {
        Some("behaviours") => return program(&root(), "polder-behaviour", &[]),
        // Optimized: the more programs in the same time.
        Some("differential") => return program(&root(), "polder-differential", &["--release"]),
        Some("soak") => return soak::main(&root()),
        Some("lab") => return lab::main(&root()),
        Some(lab::holding::NAME) => return lab::holding::main(std::env::args_os().skip(2)),
        Some("layers") => layers::check(&root()),
        Some("readme") => readme::run(&root()),
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// A program of its own, so that chores that don't need it build without it.
fn program(root: &Path, package: &str, options: &[&str]) -> ExitCode {
    let status = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--package", package])
        .args(options)
        .arg("--")
        .args(std::env::args_os().skip(2))
        .current_dir(root)
        .status();
    match status {
        // As the program says: what differs is another matter than what can't be run.
        Ok(status) => status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .map_or(ExitCode::FAILURE, ExitCode::from),
        Err(error) => {
            eprintln!("cargo run: {error}");
            ExitCode::FAILURE
        }
    }
}
