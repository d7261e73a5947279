//! Folios: which huge page each range of the object sits in, and how far it is split.
//!
//! A folio sits at an offset of the object that is a multiple of its size, so it has no name but
//! its pages. Where the host can split one ([`Backing::splits`]), a folio never holds pages of both
//! kinds once a conversion is true: to share a page splits the huge pages that it lies in, along
//! the path and no further (1G to 2M, and only the touched 2M to 4K); what has become private as a
//! whole is merged again, level by level.
//!
//! ```text
//! 1G  |-----------------------------------------------|     one page is shared:
//! 2M  |-----|-----|-----|-----|-----|-----|-----|-----|     511 tables for the 1G page,
//! 4K              |s....|                                   7 for the 2M page; 7 stay 2M
//! ```
//! A split takes memory, for what is kept of each page (Linux
//! `Documentation/mm/vmemmap_dedup.rst`). It is had before anybody is cut off, by
//! [`Step::PrepareSplit`]: where there is none, nothing has changed. The tables that a merge frees
//! are given back last of all, so that undoing a merge needs none.

use alloc::borrow::Cow;
use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use polder_units::{Geometry, Level, PageCount, PageIndex, PageRange};

use crate::plant::Bug;
use crate::{Engine, RangeSet, Step, Visibility};

/// What the object's memory is made of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Backing {
    /// The pages that it is allocated in, of which the object's size is a multiple.
    pub folio: Level,
    /// The smallest page that the views can map: on hugetlb the huge page, else 4K. What the host
    /// can't map smaller it unmaps, poisons and shows as a whole.
    pub granule: Level,
    /// Whether the host splits the folios that hold pages of both kinds, and merges them. One that
    /// does not maps a part of them.
    pub splits: bool,
}

impl Backing {
    /// Pages of 4K.
    pub const SMALL: Self = Self { folio: Level::Size4K, granule: Level::Size4K, splits: false };
    /// Transparent huge pages: 2M that any view may map 4K of. The kernel splits and collapses
    /// them as it likes: the level is what there is at most.
    pub const THP: Self = Self { folio: Level::Size2M, granule: Level::Size4K, splits: false };
    /// Whatever the host makes of it, up to 1G: the host knows, and the engine does not.
    pub const ANY: Self = Self { folio: Level::Size1G, granule: Level::Size4K, splits: false };

    /// Hugetlb pages: mapped as a whole, or not at all.
    pub const fn hugetlb(level: Level) -> Self {
        Self { folio: level, granule: level, splits: false }
    }

    /// Huge pages that are split as far as sharing needs.
    pub const fn split(level: Level) -> Self {
        Self { folio: level, granule: Level::Size4K, splits: true }
    }
}

/// How many folios of each level an object consists of.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct FolioCounts {
    /// Those of 4K.
    pub size_4k: u64,
    /// Those of 2M.
    pub size_2m: u64,
    /// Those of 1G.
    pub size_1g: u64,
}

/// How often folios were split and merged; of operations that became true alone.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct ReshapeCounts {
    /// Folios that were split to those of the next level.
    pub splits: u64,
    /// Folios that were made of those of the next level.
    pub merges: u64,
}

/// The folios of an object.
#[derive(Clone, Debug)]
pub(crate) struct Folios {
    pages: PageCount,
    base: Level,
    geometry: Geometry,
    /// The 1G pages that are split to 2M, by their number.
    split_1g: BTreeSet<u64>,
    /// The 2M pages that are split to 4K.
    split_2m: BTreeSet<u64>,
    counts: ReshapeCounts,
}

impl Folios {
    pub(crate) fn new(pages: PageCount, backing: Backing, geometry: Geometry) -> Self {
        let exact = backing.splits || backing.granule > Level::Size4K;
        assert!(
            !exact || pages.get().is_multiple_of(geometry.pages(backing.folio).get()),
            "an object of huge pages ends with one"
        );
        Self {
            pages,
            base: backing.folio,
            geometry,
            split_1g: BTreeSet::new(),
            split_2m: BTreeSet::new(),
            counts: ReshapeCounts::default(),
        }
    }

    fn pages_of(&self, level: Level) -> u64 {
        self.geometry.pages(level).get()
    }

    fn split(&self, level: Level) -> &BTreeSet<u64> {
        if level == Level::Size1G { &self.split_1g } else { &self.split_2m }
    }

    /// The level of the folio that a page lies in.
    pub(crate) fn level(&self, page: PageIndex) -> Level {
        let whole = |&level: &Level| {
            level == Level::Size4K
                || !self.split(level).contains(&(page.get() / self.pages_of(level)))
        };
        let levels = Level::ALL.into_iter().rev().skip_while(|&level| level > self.base);
        levels.into_iter().find(whole).unwrap_or(Level::Size4K)
    }

    /// The level of the huge page that is all of `range`.
    fn level_of(&self, range: PageRange) -> Level {
        let level =
            Level::ALL.into_iter().find(|&level| self.geometry.pages(level) == range.count());
        level.expect("a folio is a page of one level")
    }

    fn note(&mut self, range: PageRange, is_split: bool) {
        let level = self.level_of(range);
        let number = range.start().get() / self.pages_of(level);
        let set = if level == Level::Size1G { &mut self.split_1g } else { &mut self.split_2m };
        let changed = if is_split { set.insert(number) } else { set.remove(&number) };
        assert!(changed, "the folio of pages {range} is split or merged once");
    }

    /// The numbers of the pages of a level that are split and that a range touches.
    fn split_in(&self, level: Level, range: PageRange) -> impl Iterator<Item = u64> {
        let pages = self.pages_of(level);
        let (first, end) = (range.start().get() / pages, range.end().div_ceil(pages));
        self.split(level).range(first..end).copied()
    }

    fn counts(&self) -> FolioCounts {
        let (of_2m, of_1g) = (self.pages_of(Level::Size2M), self.pages_of(Level::Size1G));
        let (split_2m, split_1g) = (self.split_2m.len() as u64, self.split_1g.len() as u64);
        let all = self.pages.get();
        match self.base {
            Level::Size4K => FolioCounts { size_4k: all, ..FolioCounts::default() },
            Level::Size2M => FolioCounts {
                size_4k: split_2m * of_2m,
                size_2m: all / of_2m - split_2m,
                size_1g: 0,
            },
            Level::Size1G => FolioCounts {
                size_4k: split_2m * of_2m,
                size_2m: split_1g * (of_1g / of_2m) - split_2m,
                size_1g: all / of_1g - split_1g,
            },
        }
    }

    #[cfg(feature = "explore")]
    pub(crate) fn fingerprint<H: core::hash::Hasher>(&self, state: &mut H) {
        core::hash::Hash::hash(&(&self.split_1g, &self.split_2m), state);
    }
}

/// What a conversion does to folios.
#[derive(Clone, Default, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Reshape {
    /// The folios to split to the next level, the largest first.
    pub(crate) splits: Vec<PageRange>,
    /// The folios to make of those of the next level, the smallest first.
    pub(crate) merges: Vec<PageRange>,
}

impl Reshape {
    pub(crate) fn is_empty(&self) -> bool {
        self.splits.is_empty() && self.merges.is_empty()
    }

    pub(crate) fn folios(&self) -> impl Iterator<Item = PageRange> {
        self.splits.iter().chain(&self.merges).copied()
    }

    /// What is had before anybody is cut off.
    pub(crate) fn prepare(&self) -> impl Iterator<Item = Step> {
        self.splits.iter().copied().map(Step::PrepareSplit)
    }

    /// What gives the huge pages the shape they need.
    pub(crate) fn steps(&self) -> impl Iterator<Item = Step> {
        let splits = self.splits.iter().copied().map(Step::SplitFolio);
        splits.chain(self.merges.iter().copied().map(Step::MergeFolio))
    }

    /// What is given back when nothing can fail any more.
    pub(crate) fn release(&self) -> impl Iterator<Item = Step> {
        self.merges.iter().copied().map(Step::ReleaseTables)
    }
}

impl Engine {
    /// The level of the folio that a page lies in.
    pub fn folio_level(&self, page: PageIndex) -> Level {
        self.folios.level(page)
    }

    /// How many folios of each level there are.
    pub fn folio_counts(&self) -> FolioCounts {
        self.folios.counts()
    }

    /// The runs of pages whose folios are of one level, in order.
    pub fn folio_runs(&self) -> Vec<(PageRange, Level)> {
        let mut runs: Vec<(PageRange, Level)> = Vec::new();
        let (mut at, end) = (0, self.config.pages.get());
        while let Some(page) = PageIndex::new(at).filter(|_| at < end) {
            let level = self.folios.level(page);
            // What is split to 4K is so up to the end of its 2M page.
            let step = level.max(Level::Size2M.min(self.config.backing.folio));
            let whole = PageRange::enclosing(page, step, self.config.geometry);
            let next = if self.config.backing.folio == Level::Size4K { end } else { whole.end() };
            let run = PageRange::between(at, next.min(end)).expect("it goes on");
            match runs.last_mut().filter(|last| last.1 == level) {
                Some(last) => last.0 = last.0.append(run).expect("they follow each other"),
                None => runs.push((run, level)),
            }
            at = run.end();
        }
        runs
    }

    /// How often folios were split and merged.
    pub fn reshape_counts(&self) -> ReshapeCounts {
        self.folios.counts
    }

    /// What becomes of the folios around `parts` once those are `to`.
    pub(crate) fn reshape(&self, parts: &[PageRange], to: Visibility) -> Reshape {
        let Backing { folio, splits, .. } = self.config.backing;
        if folio == Level::Size4K || !splits {
            return Reshape::default();
        }
        let mut set = RangeSet::default();
        parts.iter().for_each(|&part| set.insert(part));
        let splits = self.splits(&set, to);
        let merges = match to {
            Visibility::Private => self.merges(&set),
            Visibility::Shared => Vec::new(),
        };
        Reshape { splits, merges }
    }

    /// The folios that `parts` becoming `to` would leave with both kinds of page. Such a one holds
    /// the first or the last page of a run.
    fn splits(&self, parts: &RangeSet, to: Visibility) -> Vec<PageRange> {
        let mut splits = Vec::new();
        for level in [Level::Size1G, Level::Size2M] {
            if level > self.config.backing.folio {
                continue;
            }
            let around = |page| PageRange::enclosing(page, level, self.config.geometry);
            let ends = parts.runs().flat_map(|run| {
                let last = run.frames().next_back().unwrap_or(run.start());
                [around(run.start()), around(last)]
            });
            for folio in ends {
                let is_whole = self.folios.level(folio.start()) >= level;
                let mixed = !self.becomes(folio, to, parts);
                if is_whole && (mixed || self.plants.has(Bug::SplitNotMinimal)) {
                    splits.push(folio);
                }
            }
            splits.dedup();
        }
        splits
    }

    /// The folios that become private as a whole with `parts`, and are in pieces.
    fn merges(&self, parts: &RangeSet) -> Vec<PageRange> {
        let mut merges: Vec<PageRange> = Vec::new();
        for level in [Level::Size2M, Level::Size1G] {
            let pages = self.config.geometry.pages(level).get();
            let touched: BTreeSet<u64> =
                parts.runs().flat_map(|run| self.folios.split_in(level, run)).collect();
            let folios = touched
                .into_iter()
                .filter_map(|number| PageRange::between(number * pages, (number + 1) * pages));
            for folio in folios {
                let pieces_whole = level == Level::Size2M
                    || self.folios.split_in(Level::Size2M, folio).all(|number| {
                        let of_2m = self.config.geometry.pages(Level::Size2M).get();
                        merges.iter().any(|it| it.start().get() == number * of_2m)
                    });
                let private = self.becomes(folio, Visibility::Private, parts);
                if private && pieces_whole && self.quarantine.first_in(folio).is_none() {
                    merges.push(folio);
                }
            }
        }
        merges
    }

    /// Whether all of `range` is `to` once `parts` are.
    fn becomes(&self, range: PageRange, to: Visibility, parts: &RangeSet) -> bool {
        self.pages.runs(range).all(|(run, facts)| {
            facts.visibility == to || parts.within(run).next().is_some_and(|within| within == run)
        })
    }

    /// Makes a reshape true.
    pub(crate) fn reshape_done(&mut self, reshape: &Reshape) {
        for &folio in &reshape.splits {
            self.folios.note(folio, true);
            self.folios.counts.splits += 1;
        }
        for &folio in &reshape.merges {
            self.folios.note(folio, false);
            self.folios.counts.merges += 1;
        }
    }

    /// The pages that the views map together with some of `range`: all of its granules.
    pub(crate) fn granules(&self, range: PageRange) -> PageRange {
        self.config.granules(range)
    }

    /// Runs with all of the granules, and with the folios that are reshaped: nobody may map a part
    /// of one meanwhile.
    pub(crate) fn with_neighbours<'a>(
        &self,
        runs: &'a [PageRange],
        reshape: &Reshape,
    ) -> Cow<'a, [PageRange]> {
        if self.config.backing.granule == Level::Size4K && reshape.is_empty() {
            return runs.into();
        }
        let mut set = RangeSet::default();
        runs.iter().for_each(|&run| set.insert(self.granules(run)));
        reshape.folios().for_each(|folio| set.insert(folio));
        set.runs().collect()
    }
}

impl crate::Config {
    /// All of the granules that a range touches.
    pub(crate) fn granules(&self, range: PageRange) -> PageRange {
        let granule = self.geometry.pages(self.backing.granule).get();
        let (start, end) = (range.start().get(), range.end());
        let whole = PageRange::between(start - start % granule, end.next_multiple_of(granule));
        whole.unwrap_or(range)
    }
}
