//! The page map, and what else could know the facts of every page.

use std::collections::BTreeMap;
use std::iter::repeat_with;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use polder_engine::{PageFacts, PageMap, Population, Visibility};
use polder_units::{Geometry, Level, PageIndex, PageRange};
use rangemap::RangeMap;

/// What every page is at first.
pub(super) const FIRST: PageFacts =
    PageFacts { visibility: Visibility::Private, population: Population::Whole };

/// Something that knows the facts of every page.
pub(super) trait Subject {
    const NAME: &str;
    /// Whether it keeps runs, so that a map of many is large.
    const OF_RUNS: bool;
    /// How many uniform ones are needed to see how large one is.
    const COPIES: u32 = 1024;
    /// Of `pages` pages, all of them [`FIRST`].
    fn new(pages: u32) -> Self;
    fn get(&self, page: u32) -> PageFacts;
    /// The largest level at which the page around is uniform.
    fn level(&self, page: u32) -> Level;
    fn convert(&mut self, pages: Range<u32>, to: Visibility);
}

impl Subject for PageMap {
    const NAME: &str = "Polder";
    const OF_RUNS: bool = false;

    fn new(pages: u32) -> Self {
        PageMap::new(pages.into(), Geometry::X86_64, FIRST)
    }

    #[inline]
    fn get(&self, page: u32) -> PageFacts {
        PageMap::get(self, page.into())
    }

    #[inline]
    fn level(&self, page: u32) -> Level {
        PageMap::level(self, page.into())
    }

    #[inline]
    fn convert(&mut self, pages: Range<u32>, to: Visibility) {
        if let Some(range) = PageRange::between(pages.start.into(), pages.end.into()) {
            self.set_visibility(range, to);
        }
    }
}

/// A bitmap for each fact. They may be read while they are written, as the page map may.
///
/// Both start as ones, so that they are written: zeros that nobody wrote would be one page of the
/// kernel's, always in the cache.
pub(super) struct Bitmaps {
    pages: u32,
    private: Vec<AtomicU64>,
    whole: Vec<AtomicU64>,
}

impl Bitmaps {
    #[inline]
    fn bit(words: &[AtomicU64], page: u32) -> bool {
        words[page as usize / 64].load(Ordering::Acquire) >> (page % 64) & 1 != 0
    }

    fn is_uniform(&self, range: Range<u32>) -> bool {
        range.end <= self.pages
            && [&self.private, &self.whole].into_iter().all(|words| {
                let words = &words[range.start as usize / 64..range.end as usize / 64];
                let mut words = words.iter().map(|word| word.load(Ordering::Acquire));
                let first = words.next();
                (first == Some(0) || first == Some(u64::MAX))
                    && words.all(|word| Some(word) == first)
            })
    }
}

impl Subject for Bitmaps {
    const NAME: &str = "flat bitmaps";
    const OF_RUNS: bool = false;
    const COPIES: u32 = 1;

    fn new(pages: u32) -> Self {
        let len = pages.div_ceil(64) as usize;
        let ones = || repeat_with(|| AtomicU64::new(u64::MAX)).take(len).collect();
        Self { pages, private: ones(), whole: ones() }
    }

    #[inline]
    fn get(&self, page: u32) -> PageFacts {
        assert!(page < self.pages, "the page lies past the object");
        let private = Self::bit(&self.private, page);
        let whole = Self::bit(&self.whole, page);
        PageFacts {
            visibility: if private { Visibility::Private } else { Visibility::Shared },
            population: if whole { Population::Whole } else { Population::Owed },
        }
    }

    #[inline]
    fn level(&self, page: u32) -> Level {
        let fits = |&level: &Level| level == Level::Size4K || self.is_uniform(around(page, level));
        // From the smallest up: what is not uniform in 2M is not in 1G.
        Level::ALL.into_iter().take_while(fits).last().unwrap_or(Level::Size4K)
    }

    #[inline]
    fn convert(&mut self, pages: Range<u32>, to: Visibility) {
        let mut at = pages.start;
        while at < pages.end {
            let count = (64 - at % 64).min(pages.end - at);
            let mask = (u64::MAX >> (64 - count)) << (at % 64);
            let word = &self.private[at as usize / 64];
            let old = word.load(Ordering::Relaxed);
            let new = if to == Visibility::Private { old | mask } else { old & !mask };
            word.store(new, Ordering::Release);
            at += count;
        }
    }
}

/// The crate `rangemap`.
pub(super) struct Ranges(RangeMap<u64, PageFacts>);

impl Subject for Ranges {
    const NAME: &str = "rangemap";
    const OF_RUNS: bool = true;

    fn new(pages: u32) -> Self {
        Self([(0..u64::from(pages), FIRST)].into_iter().collect())
    }

    #[inline]
    fn get(&self, page: u32) -> PageFacts {
        *self.0.get(&page.into()).expect("the page lies in the object")
    }

    #[inline]
    fn level(&self, page: u32) -> Level {
        let run = self.0.get_key_value(&page.into()).expect("the page lies in the object").0;
        level_in(run, page)
    }

    #[inline]
    fn convert(&mut self, pages: Range<u32>, to: Visibility) {
        let facts = PageFacts { visibility: to, ..FIRST };
        self.0.insert(pages.start.into()..pages.end.into(), facts);
    }
}

/// A `BTreeMap` with the first page of each run of equal ones.
pub(super) struct Starts {
    pages: u64,
    starts: BTreeMap<u64, PageFacts>,
}

impl Subject for Starts {
    const NAME: &str = "BTreeMap";
    const OF_RUNS: bool = true;

    fn new(pages: u32) -> Self {
        Self { pages: pages.into(), starts: BTreeMap::from([(0, FIRST)]) }
    }

    #[inline]
    fn get(&self, page: u32) -> PageFacts {
        *self.starts.range(..=u64::from(page)).next_back().expect("a run starts at 0").1
    }

    #[inline]
    fn level(&self, page: u32) -> Level {
        let page_number = u64::from(page);
        let start = self.starts.range(..=page_number).next_back().map_or(0, |(&start, _)| start);
        let next = self.starts.range(page_number + 1..).next();
        level_in(&(start..next.map_or(self.pages, |(&next, _)| next)), page)
    }

    #[inline]
    fn convert(&mut self, pages: Range<u32>, to: Visibility) {
        let facts = PageFacts { visibility: to, ..FIRST };
        let (start, end) = (u64::from(pages.start), u64::from(pages.end));
        let before = pages.start.checked_sub(1).map(|before| self.get(before));
        let after = (end < self.pages).then(|| self.get(pages.end));
        while let Some((&inside, _)) = self.starts.range(start..end).next() {
            self.starts.remove(&inside);
        }
        if before != Some(facts) {
            self.starts.insert(start, facts);
        }
        match after {
            Some(after) if after == facts => self.starts.remove(&end),
            Some(after) => self.starts.insert(end, after),
            None => None,
        };
    }
}

/// The large page of `level` around `page`.
fn around(page: u32, level: Level) -> Range<u32> {
    let range = PageRange::enclosing(PageIndex::from(page), level, Geometry::X86_64);
    let number = |number: u64| u32::try_from(number).expect("the benches' objects are that small");
    number(range.start().get())..number(range.end())
}

/// The largest level of which the page around `page` lies in its run of equal ones.
fn level_in(run: &Range<u64>, page: u32) -> Level {
    let fits = |&level: &Level| {
        let around = around(page, level);
        run.start <= around.start.into() && run.end >= around.end.into()
    };
    Level::ALL.into_iter().rfind(fits).unwrap_or(Level::Size4K)
}

#[cfg(test)]
mod tests {
    use super::super::pattern::Random;
    use super::*;

    const PAGES: u32 = 600_000;

    /// What each page is found to be, after random conversions.
    fn found<S: Subject>(pages: impl Iterator<Item = u32>) -> Vec<(PageFacts, Level)> {
        let mut subject = S::new(PAGES);
        let mut random = Random::new(7);
        for _ in 0..300 {
            let (a, b) = (random.below(PAGES), random.below(PAGES));
            let to = if random.below(2) == 0 { Visibility::Private } else { Visibility::Shared };
            subject.convert(a.min(b)..(a.max(b) + 1).min(a.min(b) + 3000), to);
        }
        pages.map(|page| (subject.get(page), subject.level(page))).collect()
    }

    #[test]
    fn all_that_are_compared_give_the_same_answers() {
        let pages = || (0..PAGES).step_by(7);
        let polder = found::<PageMap>(pages());
        assert!(polder == found::<Bitmaps>(pages()), "flat bitmaps");
        assert!(polder == found::<Ranges>(pages()), "rangemap");
        assert!(polder == found::<Starts>(pages()), "BTreeMap");
    }
}
