//! What came of a scenario, and how it is told.

use std::fmt;

use polder::HostKind;

use crate::outcome::Outcome;
use crate::state::PageState;

/// How a scenario ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// All was as expected.
    Passed,
    /// Something was not, and why.
    Failed(String),
    /// It could not be played here, and why.
    Skipped(String),
}

/// A scenario that was played on a host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Played {
    /// The host.
    pub host: HostKind,
    /// How it ended.
    pub verdict: Verdict,
    /// The steps that were played: all of them, or up to the first that was not as expected.
    pub steps: Vec<PlayedStep>,
}

impl Played {
    pub(crate) fn none(host: HostKind, verdict: Verdict) -> Self {
        Self { host, verdict, steps: Vec::new() }
    }
}

/// A step that was played.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlayedStep {
    /// Its line.
    pub line: usize,
    /// Who did it.
    pub actor: String,
    /// What was done, in words.
    pub did: String,
    /// What came of it.
    pub outcome: Outcome,
    /// Why that was not as expected, if it was not.
    pub unmet: Option<String>,
    /// The pages that it was about.
    pub pages: Vec<Change>,
    /// What happened on the way, in order.
    pub trace: Vec<String>,
}

/// A run of pages, alike before and alike after a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// The first page.
    pub start: u64,
    /// The page behind the last.
    pub end: u64,
    /// What was so of each before.
    pub before: PageState,
    /// And after.
    pub after: PageState,
}

impl Change {
    pub(crate) fn between(before: &[(u64, PageState)], after: &[(u64, PageState)]) -> Vec<Self> {
        let mut changes: Vec<Self> = Vec::new();
        for ((page, before), (_, after)) in before.iter().zip(after) {
            match changes.last_mut() {
                Some(last)
                    if last.end == *page && last.before == *before && last.after == *after =>
                {
                    last.end = page + 1;
                }
                _ => changes.push(Self {
                    start: *page,
                    end: page + 1,
                    before: before.clone(),
                    after: after.clone(),
                }),
            }
        }
        changes
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, end, before, after } = self;
        match end - start {
            1 => write!(f, "page {start}: ")?,
            _ => write!(f, "pages {start}..{end}: ")?,
        }
        match before == after {
            true => write!(f, "{after}"),
            false => write!(f, "{before}  ->  {after}"),
        }
    }
}
