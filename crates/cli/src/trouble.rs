//! Errors as a person reads them: what, why, and what to do.

use std::error::Error;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use crate::output;

/// The exit status for a command that could not be carried out.
const STATUS: u8 = 2;

/// An error, told.
#[derive(Serialize, Deserialize)]
pub(crate) struct Trouble {
    what: String,
    why: Option<String>,
    #[serde(rename = "try")]
    way_out: Option<String>,
}

impl Trouble {
    pub(crate) fn new(error: &dyn Error, way_out: Option<&str>) -> Self {
        let causes = std::iter::successors(error.source(), |&cause| cause.source());
        let why: Vec<String> = causes.map(ToString::to_string).collect();
        Self {
            what: error.to_string(),
            why: (!why.is_empty()).then(|| why.join(": ")),
            way_out: way_out.map(ToOwned::to_owned),
        }
    }

    /// One that is no value of an error type.
    pub(crate) fn told(what: String, why: Option<String>, way_out: String) -> Self {
        Self { what, why, way_out: Some(way_out) }
    }

    /// Prints it: three lines for a person, one object for a program. Returns the exit status.
    pub(crate) fn print(&self, json: bool) -> ExitCode {
        if json {
            let object = serde_json::json!({ "error": self });
            return output::print(&format!("{object}\n"), ExitCode::from(STATUS));
        }
        self.note("error");
        ExitCode::from(STATUS)
    }

    /// Prints it for a person, beside the command's result; `kind` says what it is to him.
    pub(crate) fn note(&self, kind: &str) {
        output::note(&format!("{kind}: {}", self.what));
        for (name, line) in [("why", &self.why), ("try", &self.way_out)] {
            if let Some(line) = line {
                output::note(&format!("  {name}: {line}"));
            }
        }
    }
}
