//! Errors as a person reads them: what, why, and what to do.

use std::error::Error;
use std::fmt;

use serde::Serialize;

/// The exit status for a command that could not be carried out.
pub(crate) const STATUS: u8 = 2;

/// An error, told.
#[derive(Serialize)]
pub(crate) struct Trouble {
    what: String,
    why: Option<String>,
    #[serde(rename = "try")]
    way_out: Option<String>,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        for more in [&self.why, &self.way_out].into_iter().flatten() {
            write!(f, "; {more}")?;
        }
        Ok(())
    }
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

    /// Prints it: three lines for a person, one object for a program.
    pub(crate) fn print(&self, json: bool) {
        if json {
            println!("{}", serde_json::json!({ "error": self }));
            return;
        }
        eprintln!("error: {}", self.what);
        if let Some(why) = &self.why {
            eprintln!("  why: {why}");
        }
        if let Some(way_out) = &self.way_out {
            eprintln!("  try: {way_out}");
        }
    }
}
