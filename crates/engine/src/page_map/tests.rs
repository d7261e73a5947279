//! The page map against a vector with one entry a page.

use std::hash::DefaultHasher;
use std::vec::Vec;
use std::{format, vec};

use proptest::prelude::*;

use super::*;

const PRIVATE: Visibility = Visibility::Private;
const SHARED: Visibility = Visibility::Shared;
const OWED: Population = Population::Owed;
const WHOLE: Population = Population::Whole;

/// The map as anybody would write it first, and what it is asked.
struct Oracle {
    geometry: Geometry,
    pages: Vec<PageFacts>,
}

impl Oracle {
    fn level(&self, page: usize) -> Level {
        let is_uniform = |level: &Level| {
            let len = usize::try_from(self.geometry.pages(*level).get()).unwrap();
            let start = page / len * len;
            let around = self.pages.get(start..start + len);
            around.is_some_and(|pages| pages.iter().all(|facts| *facts == pages[0]))
        };
        Level::ALL.into_iter().rev().find(is_uniform).unwrap()
    }

    fn runs(&self, start: usize, end: usize) -> Vec<(PageRange, PageFacts)> {
        let mut at = start;
        let equal = self.pages[start..end].chunk_by(PartialEq::eq);
        let runs = equal.map(|run| {
            at += run.len();
            (range(at - run.len(), at), run[0])
        });
        runs.collect()
    }

    fn check(&self, map: &PageMap) -> Result<(), TestCaseError> {
        let reader = map.reader();
        for (number, facts) in self.pages.iter().enumerate() {
            let page = range(number, number + 1).start();
            prop_assert_eq!(map.get(page), *facts, "facts of page {}", page);
            prop_assert_eq!(map.level(page), self.level(number), "level of page {}", page);
            prop_assert_eq!((reader.get(page), reader.level(page)), (*facts, map.level(page)));
        }
        let all = range(0, self.pages.len());
        prop_assert_eq!(map.runs(all).collect::<Vec<_>>(), self.runs(0, self.pages.len()));
        Ok(())
    }

    /// The same map, with nothing having happened to it.
    fn anew(&self) -> PageMap {
        let pages = PageCount::new(self.pages.len() as u64).unwrap();
        let mut map = PageMap::new(pages, self.geometry, self.pages[0]);
        for (run, facts) in self.runs(0, self.pages.len()) {
            map.set_visibility(run, facts.visibility);
            map.set_population(run, facts.population);
        }
        map
    }
}

fn hash(map: &PageMap) -> u64 {
    let mut hasher = DefaultHasher::new();
    map.hash(&mut hasher);
    hasher.finish()
}

fn range(start: usize, end: usize) -> PageRange {
    PageRange::between(start as u64, end as u64).unwrap()
}

fn facts(visibility: Visibility, population: Population) -> PageFacts {
    PageFacts { visibility, population }
}

#[derive(Clone, Copy, Debug)]
enum Set {
    Visibility(Visibility),
    Population(Population),
}

fn sets() -> impl Strategy<Value = Set> {
    prop_oneof![
        Just(Set::Visibility(PRIVATE)),
        Just(Set::Visibility(SHARED)),
        Just(Set::Population(OWED)),
        Just(Set::Population(WHOLE)),
    ]
}

/// A part of the object, in 2^16ths of it, and how far to round it out to large pages: random
/// ends alone would hardly ever make one uniform again.
fn parts() -> impl Strategy<Value = (usize, usize, Option<Level>)> {
    let level = prop_oneof![
        Just(None),
        Just(Some(Level::Size4K)),
        Just(Some(Level::Size2M)),
        Just(Some(Level::Size1G))
    ];
    (0usize..1 << 16, 0usize..1 << 16, level)
}

fn part(
    (a, b, level): (usize, usize, Option<Level>),
    pages: usize,
    geometry: Geometry,
) -> (usize, usize) {
    let (start, end) = ((a.min(b) * pages) >> 16, ((a.max(b) * pages) >> 16) + 1);
    let Some(level) = level else { return (start, start + 1) };
    let len = usize::try_from(geometry.pages(level).get()).unwrap();
    (start / len * len, end.next_multiple_of(len).min(pages))
}

fn geometries() -> impl Strategy<Value = (Geometry, usize)> {
    let most = if cfg!(miri) { 60 } else { 300 };
    let small = (1u32..7, 1u32..5, 1usize..most).prop_map(|(fanout_2m, fanout_1g, pages)| {
        (Geometry::new(1 << fanout_2m, 1 << fanout_1g).unwrap(), pages)
    });
    let real = (1usize..3000).prop_map(|pages| (Geometry::X86_64, pages));
    if cfg!(miri) { small.boxed() } else { prop_oneof![4 => small, 1 => real].boxed() }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 200 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_map_agrees_with_a_vector_of_pages(
        (geometry, len) in geometries(),
        shared in any::<bool>(),
        steps in prop::collection::vec((parts(), sets()), 1..24),
        asked in parts(),
    ) {
        let first = facts(if shared { SHARED } else { PRIVATE }, WHOLE);
        let mut map = PageMap::new(PageCount::new(len as u64).unwrap(), geometry, first);
        let mut oracle = Oracle { geometry, pages: vec![first; len] };
        oracle.check(&map)?;
        for (at, set) in steps {
            let (start, end) = part(at, len, geometry);
            match set {
                Set::Visibility(visibility) => map.set_visibility(range(start, end), visibility),
                Set::Population(population) => map.set_population(range(start, end), population),
            }
            for page in &mut oracle.pages[start..end] {
                match set {
                    Set::Visibility(visibility) => page.visibility = visibility,
                    Set::Population(population) => page.population = population,
                }
            }
            oracle.check(&map)?;
            let (start, end) = part(asked, len, geometry);
            let runs: Vec<_> = map.runs(range(start, end)).collect();
            prop_assert_eq!(runs, oracle.runs(start, end));
        }
        let anew = oracle.anew();
        prop_assert_eq!(&map, &anew);
        prop_assert_eq!(hash(&map), hash(&anew));
        let mut copy = map.clone();
        oracle.check(&copy)?;
        let first_page = range(0, 1);
        copy.set_visibility(first_page, oracle.pages[0].visibility.other());
        prop_assert_ne!(&copy, &map);
        oracle.check(&map)?;
    }
}

const TERABYTE: u64 = 1 << 28;

fn uniform(pages: u64) -> PageMap {
    PageMap::new(PageCount::new(pages).unwrap(), Geometry::X86_64, facts(PRIVATE, WHOLE))
}

#[test]
fn a_uniform_terabyte_takes_next_to_nothing() {
    // The second ends in the middle of a 2M page, and is as uniform for all that.
    for pages in [TERABYTE, TERABYTE - 7] {
        let mut map = uniform(pages);
        let all = PageRange::between(0, pages).unwrap();
        map.set_visibility(all, SHARED);
        assert_eq!(map.runs(all).collect::<Vec<_>>(), [(all, facts(SHARED, WHOLE))]);
        assert!(map.heap_bytes() < 64 << 10, "{} bytes", map.heap_bytes());
    }
}

#[test]
#[cfg_attr(miri, ignore = "a terabyte of leaves")]
fn a_mixed_terabyte_takes_less_than_half_a_byte_a_page() {
    let mut map = uniform(TERABYTE);
    for of_1g in 0..TERABYTE >> 18 {
        let page = PageIndex::new((of_1g << 18) + of_1g).unwrap();
        map.set_visibility(PageRange::one(page), SHARED);
        assert_eq!((map.get(page), map.level(page)), (facts(SHARED, WHOLE), Level::Size4K));
    }
    assert!((map.heap_bytes() as u64) < TERABYTE / 2);
    let all = PageRange::between(0, TERABYTE).unwrap();
    let shared = map.runs(all).filter(|(_, facts)| facts.visibility == SHARED);
    assert!(shared.map(|(range, _)| range.start().get() % (1 << 18)).eq(0..TERABYTE >> 18));
}

#[test]
fn the_last_large_page_is_as_large_as_what_is_there() {
    let geometry = Geometry::new(2, 2).unwrap();
    let levels = |pages: u32| {
        let map = PageMap::new(pages.into(), geometry, facts(PRIVATE, WHOLE));
        (0..pages).map(|page| map.level(page.into())).collect::<Vec<_>>()
    };
    let (k4, m2, g1) = (Level::Size4K, Level::Size2M, Level::Size1G);
    assert_eq!(levels(3), [m2, m2, k4]);
    assert_eq!(levels(7), [g1, g1, g1, g1, m2, m2, k4]);
}

#[test]
fn an_empty_object_has_a_map() {
    let map = PageMap::new(PageCount::ZERO, Geometry::X86_64, facts(PRIVATE, WHOLE));
    assert_eq!(format!("{map:?}"), "{}");
}

#[test]
#[should_panic(expected = "page 0x5 lies past the object's 5 pages")]
fn a_page_past_the_object_has_no_facts() {
    PageMap::new(5.into(), Geometry::X86_64, facts(PRIVATE, WHOLE)).get(5.into());
}

#[test]
#[should_panic(expected = "[0x4..0x6) reaches past the object's 5 pages")]
fn a_range_past_the_object_is_not_converted() {
    let mut map = PageMap::new(5.into(), Geometry::X86_64, facts(PRIVATE, WHOLE));
    map.set_visibility(range(4, 6), SHARED);
}
