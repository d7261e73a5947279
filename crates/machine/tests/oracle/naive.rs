//! The oracle: frames and folios are never reused, and everything is looked up by searching.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use polder_machine::{HostExit, PinId, Sigbus};
use polder_units::{Geometry, Level};

pub(crate) fn geometry() -> Geometry {
    Geometry::new(4, 2).unwrap()
}

/// Every fact, page by page.
#[derive(Default)]
pub(crate) struct Naive {
    pub(crate) pages: BTreeMap<u64, usize>,
    pub(crate) values: Vec<u64>,
    pub(crate) folio_of: Vec<usize>,
    pub(crate) levels: Vec<Level>,
    pub(crate) entries: [BTreeMap<u64, Level>; 2],
    pub(crate) poison: [BTreeSet<u64>; 2],
    pub(crate) pins: Vec<(PinId, usize)>,
}

pub(crate) fn pages_of(page: u64, level: Level) -> Range<u64> {
    let pages = geometry().pages(level).get();
    page / pages * pages..page / pages * pages + pages
}

pub(crate) fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Naive {
    pub(crate) fn level(&self, page: u64) -> Option<Level> {
        self.pages.get(&page).map(|frame| self.levels[self.folio_of[*frame]])
    }

    pub(crate) fn add(&mut self, page: u64, level: Level) {
        let folio = self.levels.len();
        self.levels.push(level);
        for page in pages_of(page, level) {
            self.pages.insert(page, self.values.len());
            self.values.push(0);
            self.folio_of.push(folio);
        }
    }

    pub(crate) fn entry(&self, process: usize, page: u64) -> Option<Level> {
        let mut entries = self.entries[process].iter();
        entries.find(|(at, level)| pages_of(**at, **level).contains(&page)).map(|(_, it)| *it)
    }

    pub(crate) fn any_entry(&self, process: usize, range: &Range<u64>) -> bool {
        range.clone().any(|page| self.entry(process, page).is_some())
    }

    pub(crate) fn mapped(&self, range: &Range<u64>) -> bool {
        (0..2).any(|process| self.any_entry(process, range))
    }

    pub(crate) fn drop_entries(&mut self, process: usize, range: &Range<u64>) {
        self.entries[process].retain(|at, level| !overlap(&pages_of(*at, *level), range));
    }

    pub(crate) fn pins_of(&self, folio: usize) -> u64 {
        self.pins.iter().filter(|(_, frame)| self.folio_of[*frame] == folio).count() as u64
    }

    /// References, map count and pin count of the folio at `page`, which is in the page cache.
    pub(crate) fn counts(&self, page: u64) -> (u64, u64, u64) {
        let folio = self.folio_of[self.pages[&page]];
        let level = self.levels[folio];
        let range = pages_of(page, level);
        let maps = self.entries.iter().flatten();
        let maps = maps.filter(|(at, level)| overlap(&pages_of(**at, **level), &range)).count();
        let (maps, pins) = (maps as u64, self.pins_of(folio));
        let cached = geometry().pages(level).get();
        if level == Level::Size4K {
            (cached + maps + pins * 1024, maps, 0)
        } else {
            (cached + maps + pins, maps, pins)
        }
    }

    /// What a touch comes to; a touch that the kernel fills in is filled in.
    pub(crate) fn touch(&mut self, process: usize, page: u64) -> Touch {
        if self.entry(process, page).is_some() {
            return Touch::Done;
        }
        if self.poison[process].contains(&page) {
            return Touch::Poisoned;
        }
        if process == 0 {
            return Touch::Fault { minor: self.pages.contains_key(&page) };
        }
        if !self.pages.contains_key(&page) {
            self.add(page, Level::Size4K);
        }
        self.entries[process].insert(page, Level::Size4K);
        Touch::Done
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Touch {
    Done,
    Poisoned,
    Fault { minor: bool },
}

pub(crate) fn touch_of<T>(outcome: &Result<T, HostExit>) -> Touch {
    match outcome {
        Ok(_) => Touch::Done,
        Err(HostExit::Fault(fault)) => Touch::Fault { minor: fault.minor },
        Err(HostExit::Sigbus { why: Sigbus::Poisoned, .. }) => Touch::Poisoned,
        Err(other) => panic!("unexpected: {other}"),
    }
}
