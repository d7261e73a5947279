//! The program `polder`.

mod bench;
mod check;
mod control;
mod doctor;
mod explain;
mod interrupt;
mod output;
mod picture;
mod play;
mod run;
mod run_from;
mod run_report;
mod trouble;
mod usage;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// A virtual machine's memory: private and shared pages in one object, converted in place.
#[derive(Parser)]
#[command(name = "polder", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Arguments),
    Explain(explain::Arguments),
    Play(play::Arguments),
    Bench(bench::Arguments),
    Check(check::Arguments),
    Doctor(doctor::Arguments),
}

fn main() -> ExitCode {
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => return usage::refuse(&error, &Cli::command()),
    };
    match command {
        Command::Run(arguments) => run::main(&arguments),
        Command::Explain(arguments) => explain::main(&arguments),
        Command::Play(arguments) => play::main(&arguments),
        Command::Bench(arguments) => bench::main(&arguments),
        Command::Check(arguments) => check::main(&arguments),
        Command::Doctor(arguments) => doctor::main(&arguments),
    }
}
