//! The facts of every page, as runs of equal ones.

use alloc::collections::BTreeMap;

use polder_units::{Geometry, Level, PageCount, PageIndex, PageRange};

/// Who may see a page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Visibility {
    /// The guest alone.
    Private,
    /// Guest and host.
    Shared,
}

impl Visibility {
    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::Private => Self::Shared,
            Self::Shared => Self::Private,
        }
    }
}

impl core::fmt::Display for Visibility {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.pad(match self {
            Self::Private => "private",
            Self::Shared => "shared",
        })
    }
}

/// Whether a page's contents are there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Population {
    /// They must still come from somewhere before anybody may see the page.
    Owed,
    /// Nothing is owed: the page is what was last written to it, zeros where nothing was.
    Whole,
}

/// What is known of every page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageFacts {
    /// Who may see it.
    pub visibility: Visibility,
    /// Whether its contents are there.
    pub population: Population,
}

/// The [`PageFacts`] of all pages of one object.
#[derive(Clone, Debug)]
pub struct PageMap {
    pages: PageCount,
    geometry: Geometry,
    /// The first page of each run; neighbours differ.
    runs: BTreeMap<u64, PageFacts>,
}

impl PageMap {
    /// A map of `pages` pages, all with the same facts.
    pub fn new(pages: PageCount, geometry: Geometry, facts: PageFacts) -> Self {
        Self { pages, geometry, runs: BTreeMap::from([(0, facts)]) }
    }

    /// How many pages it maps.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// The facts of `page`, which must lie in the object.
    pub fn get(&self, page: PageIndex) -> PageFacts {
        assert!(page.get() < self.pages.get(), "{page} is beyond the object");
        self.run_at(page.get()).1
    }

    /// The largest level whose page around `page` is uniform and lies wholly in the object.
    pub fn level(&self, page: PageIndex) -> Level {
        let (run, _) = self.run_at(page.get());
        Level::ALL
            .into_iter()
            .rfind(|&level| run.contains_range(PageRange::enclosing(page, level, self.geometry)))
            .unwrap_or(Level::Size4K)
    }

    /// Makes every page of `range` private or shared.
    pub fn set_visibility(&mut self, range: PageRange, visibility: Visibility) {
        self.update(range, |facts| facts.visibility = visibility);
    }

    /// Makes every page of `range` owed or whole.
    pub fn set_population(&mut self, range: PageRange, population: Population) {
        self.update(range, |facts| facts.population = population);
    }

    /// The maximal runs of equal facts that cover `range`, in order, cut to it.
    pub fn runs(&self, range: PageRange) -> impl Iterator<Item = (PageRange, PageFacts)> {
        let mut next = range.start().get();
        core::iter::from_fn(move || {
            if next >= range.end() {
                return None;
            }
            let (run, facts) = self.run_at(next);
            next = run.end();
            run.intersection(range).map(|run| (run, facts))
        })
    }

    fn run_at(&self, page: u64) -> (PageRange, PageFacts) {
        let (&start, &facts) = self.runs.range(..=page).next_back().expect("a run starts at 0");
        let end = self.runs.range(page + 1..).next().map_or(self.pages.get(), |(&next, _)| next);
        (PageRange::between(start, end).expect("runs are not empty"), facts)
    }

    fn update(&mut self, range: PageRange, change: impl Fn(&mut PageFacts)) {
        for edge in [range.start().get(), range.end()] {
            if edge < self.pages.get() {
                let facts = self.run_at(edge).1;
                self.runs.entry(edge).or_insert(facts);
            }
        }
        for (_, facts) in self.runs.range_mut(range.start().get()..range.end()) {
            change(facts);
        }
        let touched = self.runs.range(range.start().get()..=range.end());
        let same: alloc::vec::Vec<u64> = touched
            .filter(|&(&start, facts)| {
                self.runs.range(..start).next_back().is_some_and(|(_, before)| before == facts)
            })
            .map(|(&start, _)| start)
            .collect();
        for start in same {
            self.runs.remove(&start);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    const PRIVATE: PageFacts =
        PageFacts { visibility: Visibility::Private, population: Population::Whole };

    proptest! {
        #[test]
        fn it_agrees_with_one_entry_a_page(
            pages in 1u64..60,
            changes in prop::collection::vec((0u64..60, 1u64..60, any::<bool>(), any::<bool>()), 0..20),
        ) {
            let geometry = Geometry::new(4, 4).unwrap();
            let mut map = PageMap::new(PageCount::new(pages).unwrap(), geometry, PRIVATE);
            let mut naive = std::vec![PRIVATE; usize::try_from(pages).unwrap()];
            for (start, count, which, value) in changes {
                let Some(range) = PageRange::between(start, (start + count).min(pages)) else { continue };
                let visibility = if value { Visibility::Shared } else { Visibility::Private };
                let population = if value { Population::Owed } else { Population::Whole };
                if which { map.set_visibility(range, visibility) } else { map.set_population(range, population) }
                for page in range.frames() {
                    let facts = &mut naive[usize::try_from(page.get()).unwrap()];
                    if which { facts.visibility = visibility } else { facts.population = population }
                }
            }
            let all = PageRange::between(0, pages).unwrap();
            let of = |page: PageIndex| naive[usize::try_from(page.get()).unwrap()];
            for page in all.frames() {
                prop_assert_eq!(map.get(page), of(page));
                let uniform = |&level: &Level| {
                    let around = PageRange::enclosing(page, level, geometry);
                    all.contains_range(around) && around.frames().all(|other| of(other) == of(page))
                };
                prop_assert_eq!(Some(map.level(page)), Level::ALL.into_iter().rfind(uniform));
            }
            let runs: Vec<_> = map.runs(all).collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].1 != pair[1].1));
            let flat: Vec<_> = runs.iter().flat_map(|(run, facts)| run.frames().map(|page| (page, *facts))).collect();
            prop_assert_eq!(flat, all.frames().map(|page| (page, of(page))).collect::<Vec<_>>());
        }
    }
}
