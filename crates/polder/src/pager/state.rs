//! What there is to bring, and what is being brought: demands first, then what is read ahead.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use polder_units::{PageIndex, PageRange};

use crate::read_ahead::Windows;
use crate::source::SourceFailure;

pub(super) struct State {
    /// Pages that somebody waits for.
    pub(super) demands: BTreeMap<PageIndex, Demand>,
    /// What is being read.
    pub(super) reading: Vec<Reading>,
    /// What to read ahead.
    pub(super) ahead: VecDeque<PageRange>,
    pub(super) windows: Windows,
    /// Where filling goes on, if it is asked for.
    pub(super) filling: Option<PageIndex>,
    pub(super) failures: Vec<SourceFailure>,
    /// No page before it is owed.
    pub(super) owed_from: PageIndex,
    /// The host has been told that nothing is owed any more.
    pub(super) let_go: bool,
    pub(super) last_id: u64,
}

#[derive(Clone, Copy)]
pub(super) struct Demand {
    pub(super) since: Instant,
    /// It is not being read, nor was it tried since it was asked for last.
    pub(super) pending: bool,
}

#[derive(Clone, Copy)]
pub(super) struct Reading {
    pub(super) id: u64,
    pub(super) range: PageRange,
}

/// Something to bring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Job {
    pub(super) id: u64,
    pub(super) range: PageRange,
    pub(super) why: Why,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Why {
    /// Somebody waits for this page.
    Demand(PageIndex),
    /// Somebody may, soon.
    Ahead,
    /// All is to be brought.
    Fill,
}

impl State {
    pub(super) fn has_work(&self) -> bool {
        self.next_demand().is_some() || !self.ahead.is_empty() || self.filling.is_some()
    }

    /// The pages that somebody waits for, and that are not being read.
    pub(super) fn pending(&self) -> impl Iterator<Item = (PageIndex, &Demand)> {
        let pending = self.demands.iter().filter(|(page, demand)| {
            demand.pending && !self.reading.iter().any(|it| it.range.contains(**page))
        });
        pending.map(|(page, demand)| (*page, demand))
    }

    /// That of them that somebody has waited for longest.
    pub(super) fn next_demand(&self) -> Option<PageIndex> {
        self.pending().min_by_key(|(_, demand)| demand.since).map(|(page, _)| page)
    }

    /// What to read ahead next, `at_once` pages at most.
    pub(super) fn next_ahead(&mut self, at_once: u64) -> Option<PageRange> {
        while let Some(range) = self.ahead.pop_front() {
            let start = range.start().get();
            let now = PageRange::between(start, range.end().min(start + at_once))?;
            if let Some(rest) = PageRange::between(now.end(), range.end()) {
                self.ahead.push_front(rest);
            }
            if !self.reading.iter().any(|it| it.range.overlaps(now)) {
                return Some(now);
            }
        }
        None
    }

    /// The part of `[start..end)` around `page` that is not being read.
    pub(super) fn unread(&self, page: PageIndex, (start, end): (u64, u64)) -> PageRange {
        let (mut start, mut end) = (start, end);
        for reading in &self.reading {
            if reading.range.start() > page {
                end = end.min(reading.range.start().get());
            } else {
                start = start.max(reading.range.end());
            }
        }
        PageRange::between(start, end).unwrap_or(PageRange::one(page))
    }

    pub(super) fn begin(&mut self, range: PageRange, why: Why) -> Job {
        self.last_id += 1;
        let id = self.last_id;
        self.reading.push(Reading { id, range });
        Job { id, range, why }
    }
}
