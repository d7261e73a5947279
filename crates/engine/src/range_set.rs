//! A set of pages kept as runs, for facts that are rare.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use polder_units::{PageIndex, PageRange};

/// Adds a run to a list of them, as a part of the last where it follows on.
pub(crate) fn push_run(runs: &mut Vec<PageRange>, run: PageRange) {
    match runs.last_mut().and_then(|last| Some((last.append(run)?, last))) {
        Some((longer, last)) => *last = longer,
        None => runs.push(run),
    }
}

/// A set of pages. Runs in it neither overlap nor touch.
#[derive(Clone, Default, PartialEq, Eq, Hash, Debug)]
pub struct RangeSet {
    /// Start to end, exclusive.
    runs: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Whether no page is in it.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether `page` is in it.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.first_in(PageRange::one(page)).is_some()
    }

    /// The first of its pages that lies in `range`.
    pub fn first_in(&self, range: PageRange) -> Option<PageIndex> {
        self.within(range).next().map(PageRange::start)
    }

    /// The first page of `range` that is not in it.
    pub fn first_not_in(&self, range: PageRange) -> Option<PageIndex> {
        let mut next = range.start().get();
        for run in self.within(range) {
            if run.start().get() > next {
                break;
            }
            next = run.end();
        }
        PageRange::between(next, range.end()).map(PageRange::start)
    }

    /// Its runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> {
        self.runs.iter().filter_map(|(&start, &end)| PageRange::between(start, end))
    }

    /// The parts of `range` that are in it, in order.
    pub fn within(&self, range: PageRange) -> impl Iterator<Item = PageRange> {
        let first = range.start().get();
        let before = self.runs.range(..first).next_back();
        before
            .into_iter()
            .chain(self.runs.range(first..range.end()))
            .filter_map(move |(&start, &end)| PageRange::between(start, end)?.intersection(range))
    }

    /// Puts every page of `range` in.
    pub fn insert(&mut self, range: PageRange) {
        let (mut start, mut end) = (range.start().get(), range.end());
        while let Some((&other, &other_end)) = self.runs.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.runs.remove(&other);
            start = start.min(other);
            end = end.max(other_end);
        }
        self.runs.insert(start, end);
    }

    /// Takes every page of `range` out.
    pub fn remove(&mut self, range: PageRange) {
        while let Some(page) = self.first_in(range) {
            let start = page.get();
            let (&run, &run_end) = self.runs.range(..=start).next_back().expect("part of a run");
            self.runs.remove(&run);
            if run < start {
                self.runs.insert(run, start);
            }
            if range.end() < run_end {
                self.runs.insert(range.end(), run_end);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_agrees_with_a_set_of_pages(
            changes in prop::collection::vec((0u64..40, 1u64..12, any::<bool>()), 0..30),
            start in 0u64..40, count in 1u64..20,
        ) {
            let (mut set, mut naive) = (RangeSet::default(), BTreeSet::new());
            for (start, count, insert) in changes {
                let range = PageRange::between(start, start + count).unwrap();
                if insert { set.insert(range) } else { set.remove(range) }
                for page in range.frames() {
                    if insert { naive.insert(page); } else { naive.remove(&page); }
                }
            }
            let runs: Vec<_> = set.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].start().get()));
            let pages: Vec<_> = runs.into_iter().flat_map(PageRange::frames).collect();
            prop_assert_eq!(pages, naive.iter().copied().collect::<Vec<_>>());
            let window = PageRange::between(start, start + count).unwrap();
            let within: Vec<_> = set.within(window).flat_map(PageRange::frames).collect();
            let outside = window.frames().find(|page| !naive.contains(page));
            prop_assert_eq!(set.first_not_in(window), outside);
            let naive: Vec<_> = naive.into_iter().filter(|&p| window.contains(p)).collect();
            prop_assert_eq!(within, naive);
        }
    }
}
