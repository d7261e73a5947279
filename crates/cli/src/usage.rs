//! A command line that can't be: told as any other error, and as JSON if that was asked for.

use std::error::Error;
use std::num::{IntErrorKind, ParseIntError};
use std::process::ExitCode;

use clap::error::{ContextKind, ErrorKind};

use crate::trouble::Trouble;

/// Tells what is wrong with the command line, or prints the help that it asks for. Returns the exit
/// status.
pub(crate) fn refuse(error: &clap::Error, cli: &clap::Command) -> ExitCode {
    let asks_for_help = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if asks_for_help || !error.use_stderr() {
        error.exit();
    }
    // It was not parsed to its end, so this looks for itself.
    let json = std::env::args_os().any(|argument| argument == "--json");
    let named = std::env::args().nth(1).and_then(|first| cli.find_subcommand(first));
    let command = named.map_or_else(String::new, |command| format!(" {}", command.get_name()));
    trouble(error, cli, &format!("polder{command}")).print(json)
}

fn trouble(error: &clap::Error, cli: &clap::Command, command: &str) -> Trouble {
    use ErrorKind::{
        ArgumentConflict, InvalidSubcommand, InvalidValue, MissingRequiredArgument,
        UnknownArgument, ValueValidation,
    };
    let said = |kind| error.get(kind).map(ToString::to_string);
    let context = |kind| said(kind).filter(|text| !text.is_empty());
    let argument = context(ContextKind::InvalidArg).unwrap_or_default();
    let one_of = context(ContextKind::ValidValue).map(|valid| format!("it is one of {valid}"));
    let (what, why) = match (error.kind(), context(ContextKind::InvalidValue)) {
        (ValueValidation, None) => {
            (format!("{argument} can't be empty"), error.source().map(reason))
        }
        (InvalidValue | ValueValidation, Some(value)) => {
            let why = one_of.or_else(|| error.source().map(reason));
            (format!("{argument} can't be `{value}`"), why)
        }
        (InvalidValue, None) => (format!("{argument} lacks its value"), one_of),
        (UnknownArgument, _) => {
            let why = format!("`{command}` does not take it");
            (format!("there is no argument `{argument}`"), Some(why))
        }
        (InvalidSubcommand, _) => {
            let name = context(ContextKind::InvalidSubcommand).unwrap_or_default();
            let names: Vec<&str> = cli.get_subcommands().map(clap::Command::get_name).collect();
            (
                format!("there is no command `{name}`"),
                Some(format!("it is one of {}", names.join(", "))),
            )
        }
        (MissingRequiredArgument, _) => {
            // Each stands in a line of its own.
            let missing = argument.split_whitespace().collect::<Vec<_>>().join(" ");
            (format!("{missing} is missing"), None)
        }
        (ArgumentConflict, _) => match context(ContextKind::PriorArg) {
            Some(other) if other != argument => {
                (format!("{argument} can't be used with {other}"), None)
            }
            _ => (format!("{argument} is given twice"), None),
        },
        _ => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            (first.trim_start_matches("error: ").to_owned(), None)
        }
    };
    let meant =
        [ContextKind::SuggestedSubcommand, ContextKind::SuggestedArg, ContextKind::SuggestedValue]
            .into_iter()
            .find_map(context);
    let meant = meant.map_or_else(String::new, |meant| format!("did you mean {meant}? "));
    Trouble::told(what, why, format!("{meant}see `{command} --help`"))
}

/// Why a value is none.
fn reason(error: &(dyn Error + 'static)) -> String {
    match error.downcast_ref::<ParseIntError>().map(ParseIntError::kind) {
        Some(IntErrorKind::PosOverflow) => "the number is too large".into(),
        Some(_) => "expected a whole number".into(),
        None => error.to_string(),
    }
}
