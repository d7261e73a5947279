//! Every interleaving, and every stale value the memory model allows, of a page map's reader and
//! writer.

#![expect(clippy::unwrap_used, reason = "a failing test may panic anywhere")]

use polder_loom::{PageFacts, PageMap, PageReader, Population, Visibility};
use polder_units::{Geometry, Level, PageIndex, PageRange};

/// What a writer does, one call each.
#[derive(Clone, Copy)]
enum Step {
    Visibility(u64, u64, Visibility),
    Population(u64, u64, Population),
}
use Population::{Owed, Whole};
use Step::{Population as Populate, Visibility as Convert};
use Visibility::{Private, Shared};

/// Not all zeroes, so that a leaf nobody has filled yet can't be taken for one that is.
const FIRST: PageFacts = PageFacts { visibility: Shared, population: Whole };
/// Two 2M pages of two pages each.
const SMALL: Geometry = Geometry::new(2, 2).unwrap();
/// Two 2M pages whose leaves have two words each, so that they don't change by one store.
const WIDE: Geometry = Geometry::new(64, 2).unwrap();

fn apply(map: &mut PageMap, step: Step) {
    match step {
        Convert(start, end, visibility) => {
            map.set_visibility(PageRange::between(start, end).unwrap(), visibility);
        }
        Populate(start, end, population) => {
            map.set_population(PageRange::between(start, end).unwrap(), population);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Seen {
    Facts(PageIndex, PageFacts),
    Level(PageIndex, Level),
}

/// The facts of all pages at one moment, apart from the map, whose every access loom would count.
type State = Vec<PageFacts>;

/// Whether `seen` is right of a page while `state` holds. A level may be too small.
fn holds(state: &State, geometry: Geometry, seen: Seen) -> bool {
    let around = |page: PageIndex, level| {
        let pages = PageRange::enclosing(page, level, geometry).frames();
        pages.map(|page| state[usize::try_from(page.get()).unwrap()]).collect::<Vec<_>>()
    };
    match seen {
        Seen::Facts(page, facts) => around(page, Level::Size4K) == [facts],
        Seen::Level(page, level) => around(page, level).windows(2).all(|pair| pair[0] == pair[1]),
    }
}

/// The states that are passed through: a call that changes several pages changes one at a time.
fn states(steps: &[Step], geometry: Geometry) -> Vec<State> {
    let pages = usize::try_from(geometry.pages(Level::Size1G).get()).unwrap();
    let mut states = vec![vec![FIRST; pages]];
    for step in steps {
        let (Convert(start, end, _) | Populate(start, end, _)) = *step;
        for page in start..end {
            let mut state = states.last().unwrap().clone();
            let facts = &mut state[usize::try_from(page).unwrap()];
            match *step {
                Convert(.., visibility) => facts.visibility = visibility,
                Populate(.., population) => facts.population = population,
            }
            states.push(state);
        }
    }
    states
}

/// As [`explore_in`], in a [`SMALL`] map.
fn explore<const N: usize>(
    steps: &'static [Step],
    observe: impl Fn(&PageReader) -> [Seen; N] + Copy + Send + Sync + 'static,
) {
    explore_in(SMALL, steps, observe);
}

/// Runs `steps` on a map of one 1G page against a reader that makes a few observations, and
/// asserts that there are moments, none before the one before it, at which they were right.
fn explore_in<const N: usize>(
    geometry: Geometry,
    steps: &'static [Step],
    observe: impl Fn(&PageReader) -> [Seen; N] + Copy + Send + Sync + 'static,
) {
    let states = states(steps, geometry);
    let mut model = loom::model::Builder::new();
    // Every stale value all the same; without the bound the search takes ten times as long.
    model.preemption_bound = Some(2);
    model.check(move || {
        let mut map = PageMap::new(geometry.pages(Level::Size1G), geometry, FIRST);
        let reader = map.reader();
        let observer = loom::thread::spawn(move || observe(&reader));
        steps.iter().for_each(|step| apply(&mut map, *step));
        let seen = observer.join().unwrap();
        let mut moment = 0;
        for seen in seen {
            let later = states[moment..].iter().position(|state| holds(state, geometry, seen));
            moment += later.unwrap_or_else(|| panic!("{seen:?} was never true, or no longer is"));
        }
    });
}

fn facts_of(reader: &PageReader, page: u32) -> Seen {
    Seen::Facts(page.into(), reader.get(page.into()))
}

fn level_of(reader: &PageReader, page: u32) -> Seen {
    Seen::Level(page.into(), reader.level(page.into()))
}

#[test]
fn a_page_is_converted_out_of_a_1g_page() {
    const STEPS: &[Step] = &[Convert(1, 2, Private)];
    explore(STEPS, |reader| [facts_of(reader, 0), facts_of(reader, 0)]);
    explore(STEPS, |reader| [facts_of(reader, 1), facts_of(reader, 1)]);
    explore(STEPS, |reader| [facts_of(reader, 1), level_of(reader, 0)]);
    explore(STEPS, |reader| [level_of(reader, 0), facts_of(reader, 3)]);
}

#[test]
fn a_page_is_converted_and_back() {
    const STEPS: &[Step] = &[Convert(1, 2, Private), Convert(1, 2, Shared)];
    explore(STEPS, |reader| [facts_of(reader, 0), level_of(reader, 0)]);
    explore(STEPS, |reader| [facts_of(reader, 1), facts_of(reader, 1)]);
    explore(STEPS, |reader| [facts_of(reader, 1), level_of(reader, 1)]);
}

#[test]
fn a_leaf_is_used_again_with_other_facts() {
    const STEPS: &[Step] = &[
        Convert(1, 2, Private),
        Convert(0, 2, Private),
        Populate(0, 2, Owed),
        Convert(0, 1, Shared),
    ];
    explore(STEPS, |reader| [facts_of(reader, 1), facts_of(reader, 1)]);
    explore(STEPS, |reader| [facts_of(reader, 0), level_of(reader, 0)]);
    explore(STEPS, |reader| [facts_of(reader, 1), facts_of(reader, 0)]);
}

#[test]
fn a_1g_page_is_converted_after_it_was_mixed() {
    const STEPS: &[Step] = &[Convert(1, 2, Private), Convert(0, 4, Private), Populate(0, 4, Owed)];
    explore(STEPS, |reader| [facts_of(reader, 3), facts_of(reader, 1)]);
    explore(STEPS, |reader| [facts_of(reader, 0), level_of(reader, 3)]);
    explore(&STEPS[..2], |reader| [facts_of(reader, 0), facts_of(reader, 3), facts_of(reader, 0)]);
}

#[test]
fn a_1g_page_is_not_called_uniform_while_it_is_converted() {
    const STEPS: &[Step] = &[Convert(1, 2, Private), Convert(1, 2, Shared), Populate(0, 4, Owed)];
    explore(STEPS, |reader| [facts_of(reader, 0), level_of(reader, 0), facts_of(reader, 3)]);
}

/// Shared and owed are the bits that a leaf has before it is filled.
#[test]
fn a_leaf_of_zeros_is_told_from_one_not_filled_yet() {
    const STEPS: &[Step] = &[Populate(0, 2, Owed), Convert(1, 2, Private), Convert(1, 2, Shared)];
    explore(STEPS, |reader| [facts_of(reader, 0), facts_of(reader, 0)]);
    explore(STEPS, |reader| [facts_of(reader, 1), facts_of(reader, 0)]);
    explore(STEPS, |reader| [facts_of(reader, 1), level_of(reader, 1)]);
}

#[test]
fn a_leaf_of_zeros_is_filled_with_others_and_back() {
    const STEPS: &[Step] = &[
        Populate(1, 2, Owed),
        Populate(0, 2, Owed),
        Populate(0, 2, Whole),
        Convert(0, 1, Private),
    ];
    explore(STEPS, |reader| [facts_of(reader, 1), facts_of(reader, 1)]);
    explore(STEPS, |reader| [facts_of(reader, 0), facts_of(reader, 1)]);
    explore(STEPS, |reader| [level_of(reader, 0), facts_of(reader, 1)]);
}

#[test]
fn a_2m_page_that_was_split_is_called_mixed_while_it_is_converted() {
    const STEPS: &[Step] =
        &[Convert(1, 2, Private), Convert(1, 2, Shared), Convert(0, 64, Private)];
    explore_in(WIDE, STEPS, |reader| {
        [facts_of(reader, 0), level_of(reader, 0), facts_of(reader, 63)]
    });
    explore_in(WIDE, STEPS, |reader| [facts_of(reader, 63), facts_of(reader, 0)]);
}

#[test]
fn a_2m_page_is_filled_before_it_is_called_mixed() {
    const STEPS: &[Step] = &[Convert(63, 64, Private), Convert(0, 63, Private)];
    explore_in(WIDE, STEPS, |reader| [facts_of(reader, 0), facts_of(reader, 63)]);
    explore_in(WIDE, STEPS, |reader| {
        [facts_of(reader, 63), level_of(reader, 63), facts_of(reader, 0)]
    });
}
