//! Why a text is no scenario.

use std::fmt;

/// Why a text is no scenario: where, what is wrong, and what was meant perhaps.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct ScenarioError {
    /// The line, from 1; 0 where it is about the text as a whole.
    pub line: usize,
    /// The column in characters, from 1; 0 with line 0.
    pub column: usize,
    /// What is wrong.
    pub what: String,
    /// What was meant, or what can be done.
    pub meant: Option<String>,
}

impl ScenarioError {
    /// About the text as a whole.
    pub(crate) fn whole(what: impl Into<String>, meant: Option<String>) -> Self {
        Self { line: 0, column: 0, what: what.into(), meant }
    }
}

impl fmt::Display for ScenarioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "{}:{}: ", self.line, self.column)?;
        }
        f.write_str(&self.what)?;
        match &self.meant {
            Some(meant) => write!(f, "; {meant}"),
            None => Ok(()),
        }
    }
}
