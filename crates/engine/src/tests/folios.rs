//! Folios: how far they are split and when they are merged, and at which level pages are mapped,
//! against one that knows no folios but 4K pages.

use std::vec::Vec;

use proptest::prelude::*;

use super::*;

/// 1G pages of four 2M pages of four pages; two of them.
fn huge(backing: Backing, visibility: Visibility) -> Engine {
    Engine::new(Config {
        pages: PageCount::from(32),
        backing,
        initial: PageFacts { visibility, population: Population::Whole },
        host_view_level: Level::Size1G,
        ..*engine(Platform::SwProtected, Population::Whole).config()
    })
}

fn split() -> Engine {
    huge(Backing::split(Level::Size1G), Visibility::Private)
}

fn preserve(engine: &mut Engine, range: PageRange, to: Visibility) -> Vec<Step> {
    convert(engine, &request(range, to, Contents::Preserve), None).unwrap()
}

fn counts(engine: &Engine) -> [u64; 3] {
    let FolioCounts { size_4k, size_2m, size_1g } = engine.folio_counts();
    [size_4k, size_2m, size_1g]
}

#[test]
fn sharing_a_page_splits_along_the_path_alone_and_prepares_that_first() {
    let mut engine = split();
    let (of_1g, of_2m, page) = (pages(0, 16), pages(4, 8), pages(5, 6));
    assert_eq!(
        preserve(&mut engine, page, Visibility::Shared),
        [
            Step::PrepareSplit(of_1g),
            Step::PrepareSplit(of_2m),
            Step::UnmapGuest(of_1g),
            Step::SplitFolio(of_1g),
            Step::SplitFolio(of_2m),
            Step::Protect(page, Visibility::Shared),
        ]
    );
    assert_eq!(counts(&engine), [4, 3, 1]);
    let levels = [(pages(0, 4), 2), (pages(4, 8), 4), (pages(8, 16), 2), (pages(16, 32), 1)];
    let levels = levels.map(|(run, level)| match level {
        1 => (run, Level::Size1G),
        2 => (run, Level::Size2M),
        _ => (run, Level::Size4K),
    });
    assert_eq!(engine.folio_runs(), levels);
    assert_eq!(engine.reshape_counts(), ReshapeCounts { splits: 2, merges: 0 });
    assert_eq!(preserve(&mut engine, pages(6, 7), Visibility::Shared).len(), 2, "no more");
}

#[test]
fn what_is_shared_as_a_whole_is_not_split() {
    let mut engine = split();
    preserve(&mut engine, pages(16, 32), Visibility::Shared);
    assert_eq!(counts(&engine), [0, 0, 2]);
    preserve(&mut engine, pages(4, 8), Visibility::Shared);
    assert_eq!(counts(&engine), [0, 4, 1], "all of a 2M page");
    assert_eq!(engine.level_limits(View::Host, page(5), None).level(), Level::Size2M);
}

#[test]
fn what_is_private_again_is_merged_level_by_level_and_its_tables_go_last() {
    let mut engine = split();
    preserve(&mut engine, pages(5, 7), Visibility::Shared);
    preserve(&mut engine, pages(9, 10), Visibility::Shared);
    let steps = preserve(&mut engine, pages(5, 6), Visibility::Private);
    assert!(!steps.iter().any(|step| matches!(step, Step::MergeFolio(_))), "6 is shared yet");
    preserve(&mut engine, pages(6, 7), Visibility::Private);
    assert_eq!(counts(&engine), [4, 3, 1]);
    let steps = preserve(&mut engine, pages(9, 10), Visibility::Private);
    assert_eq!(
        steps,
        [
            Step::UnmapHost(pages(0, 16)),
            Step::UnmapGuest(pages(0, 16)),
            Step::CheckReferences(pages(9, 10)),
            Step::MergeFolio(pages(8, 12)),
            Step::MergeFolio(pages(0, 16)),
            Step::Protect(pages(9, 10), Visibility::Private),
            Step::ReleaseTables(pages(8, 12)),
            Step::ReleaseTables(pages(0, 16)),
        ]
    );
    assert_eq!(counts(&engine), [0, 0, 2]);
}

#[test]
fn a_step_that_fails_leaves_folios_as_they_were_and_gives_tables_back() {
    for fail in 0..6 {
        let mut engine = split();
        let share = request(pages(5, 6), Visibility::Shared, Contents::Preserve);
        let undone = convert(&mut engine, &share, Some(fail)).unwrap_err();
        assert_eq!(counts(&engine), [0, 0, 2]);
        let released = undone.iter().filter(|it| matches!(it, Step::ReleaseTables(_))).count();
        assert_eq!(released, (fail + 1).min(2), "{undone:?}");
        let merged = undone.iter().filter(|it| matches!(it, Step::MergeFolio(_))).count();
        assert_eq!(merged, (fail + 1).saturating_sub(3).min(2), "{undone:?}");
    }
}

#[test]
fn a_step_of_a_merge_that_fails_leaves_folios_and_their_tables_as_they_were() {
    let private = request(pages(5, 6), Visibility::Private, Contents::Preserve);
    let steps = {
        let mut engine = split();
        preserve(&mut engine, pages(5, 6), Visibility::Shared);
        convert(&mut engine, &private, None).unwrap()
    };
    let merges = steps.iter().filter(|it| matches!(it, Step::MergeFolio(_))).count();
    assert_eq!(merges, 2);
    // The tables go when nothing can fail any more.
    let last = steps.iter().position(|it| matches!(it, Step::ReleaseTables(_))).unwrap();
    for fail in 0..last {
        let mut engine = split();
        preserve(&mut engine, pages(5, 6), Visibility::Shared);
        let before = (counts(&engine), engine.reshape_counts());
        let undone = convert(&mut engine, &private, Some(fail)).unwrap_err();
        assert_eq!((counts(&engine), engine.reshape_counts()), before);
        assert!(!undone.iter().any(|it| matches!(it, Step::ReleaseTables(_))), "{undone:?}");
        let tried = steps[..=fail].iter().filter(|it| matches!(it, Step::MergeFolio(_))).count();
        let split = undone.iter().filter(|it| matches!(it, Step::SplitFolio(_))).count();
        assert_eq!(split, tried, "step {fail}: {undone:?}");
        convert(&mut engine, &private, None).unwrap();
        assert_eq!(counts(&engine), [0, 0, 2]);
    }
}

#[test]
fn who_touches_a_neighbour_waits_while_the_folio_is_reshaped() {
    let mut engine = split();
    preserve(&mut engine, pages(20, 24), Visibility::Shared);
    let share = request(pages(5, 6), Visibility::Shared, Contents::Preserve);
    let Start::Claimed(draining) = claim(&mut engine, &share).unwrap() else { panic!() };
    assert!(waits(&mut engine, page(15)), "of the same 1G page");
    let other = now(engine.touch(View::Host, page(20)));
    assert_eq!(other.range(), pages(20, 24));
    engine.answered(other, None);
    drop(draining);
}

#[test]
fn a_pinned_neighbour_refuses_what_would_split_its_folio_and_is_named() {
    let mut engine = huge(Backing::split(Level::Size2M), Visibility::Shared);
    let pin = engine.pin(pages(6, 7), PinKind::LongTerm, Holder::new("virtio-blk")).unwrap();
    let private = request(pages(4, 5), Visibility::Private, Contents::Preserve);
    let refusal = claim(&mut engine, &private).unwrap_err();
    assert!(matches!(refusal, Refusal::Pinned { page: at, .. } if at == page(6)), "{refusal:?}");
    let share = request(pages(8, 9), Visibility::Private, Contents::Preserve);
    convert(&mut engine, &share, None).unwrap();
    engine.unpin(pin);
    convert(&mut engine, &private, None).unwrap();
    assert_eq!(counts(&engine), [8, 6, 0]);
}

#[test]
fn the_clause_that_keeps_a_mapping_small_is_named() {
    let mut engine = split();
    let vm = VmId(0);
    let binding = engine.bind(vm, Slot(0), 0u32.into(), pages(0, 16)).unwrap();
    let odd = engine.bind(VmId(1), Slot(0), 4u32.into(), pages(0, 16)).unwrap();
    let of = |engine: &Engine, at, binding: &Binding| {
        let limits = engine.level_limits(View::Guest, page(at), Some(binding));
        (limits.level(), limits.limiting())
    };
    assert_eq!(of(&engine, 9, &binding), (Level::Size1G, None));
    assert_eq!(of(&engine, 9, &odd), (Level::Size2M, Some(Limit::Binding)));
    preserve(&mut engine, pages(5, 6), Visibility::Shared);
    assert_eq!(of(&engine, 4, &binding), (Level::Size4K, Some(Limit::Folio)));
    assert_eq!(of(&engine, 9, &binding), (Level::Size2M, Some(Limit::Folio)));
    let limits = engine.level_limits(View::Guest, page(9), Some(&binding));
    let smashed = limits.with_hardware(Level::Size4K);
    assert_eq!(smashed.limiting(), Some(Limit::HardwareEntry));
    let any = huge(Backing::ANY, Visibility::Private);
    let seen = any.level_limits(View::Guest, page(9), Some(&binding));
    assert_eq!(seen.limiting(), None);
    let small = Engine::new(Config { host_view_level: Level::Size4K, ..*any.config() });
    let seen = small.level_limits(View::Host, page(9), None);
    assert_eq!(seen.limiting(), Some(Limit::View));
}

#[test]
fn what_a_view_maps_as_a_whole_is_shown_and_denied_as_a_whole() {
    let backing = Backing::hugetlb(Level::Size2M);
    let mut engine = huge(backing, Visibility::Private);
    preserve(&mut engine, pages(4, 7), Visibility::Shared);
    let denied = now(engine.touch(View::Host, page(5)));
    assert_eq!((denied.response(), denied.range()), (Response::Poison, pages(4, 8)));
    engine.answered(denied, Some(Response::Poison));
    let copying = engine.copy(&[pages(5, 6)]).expect("by the API it is reached");
    engine.copied(copying);
    // The last page of it lifts the marker of all.
    let steps = preserve(&mut engine, pages(7, 8), Visibility::Shared);
    assert!(steps.contains(&Step::UnmapHost(pages(4, 8))), "{steps:?}");
    assert!(engine.markers(View::Host).is_empty());
    let mapped = now(engine.touch(View::Host, page(5)));
    assert_eq!((mapped.response(), mapped.range()), (Response::Map, pages(4, 8)));
    engine.answered(mapped, Some(Response::Map));
    // A pin of a page that the raw view may show keeps its neighbours shared.
    let pin = engine.pin(pages(4, 5), PinKind::Short, Holder::new("virtio-net")).unwrap();
    let private = request(pages(6, 7), Visibility::Private, Contents::Preserve);
    assert!(matches!(claim(&mut engine, &private), Err(Refusal::Pinned { .. })));
    engine.unpin(pin);
    let steps = preserve(&mut engine, pages(6, 7), Visibility::Private);
    assert_eq!(steps[0], Step::UnmapHost(pages(4, 8)));
    let guest = now(engine.touch(View::Guest, page(6)));
    assert_eq!(guest.range(), pages(4, 8), "the guest's sees both kinds");
    engine.answered(guest, Some(Response::Map));
}

#[test]
fn a_granule_is_shown_once_all_of_it_is_whole() {
    let initial = PageFacts { visibility: Visibility::Private, population: Population::Owed };
    let config = *huge(Backing::hugetlb(Level::Size2M), Visibility::Private).config();
    let mut engine = Engine::new(Config { initial, ..config });
    let fill = |engine: &mut Engine, range| {
        let writing = engine.populate(range).unwrap();
        assert!(matches!(engine.touch(View::Guest, range.start()), TouchAnswer::Wait));
        let published = stage(engine, writing, &mut Vec::new(), &mut None).unwrap();
        let shown = engine.finish_population(published);
        let range = shown.as_ref().map(Answer::range);
        shown.into_iter().for_each(|answer| engine.answered(answer, Some(Response::Map)));
        range
    };
    assert_eq!(fill(&mut engine, pages(4, 7)), None);
    assert!(matches!(engine.touch(View::Guest, page(5)), TouchAnswer::Owed));
    assert_eq!(fill(&mut engine, pages(7, 9)), Some(pages(4, 8)));
    assert_eq!(fill(&mut engine, pages(9, 15)), Some(pages(8, 12)));
    engine.fail(pages(15, 16)).unwrap();
    let denied = now(engine.touch(View::Guest, page(13)));
    assert_eq!((denied.response(), denied.range()), (Response::Poison, pages(12, 16)));
    engine.answered(denied, Some(Response::Poison));
}

/// Pages, each with its kind and the level of its folio, by what the words mean.
struct Naive {
    base: Level,
    shared: Vec<bool>,
    folio: Vec<Level>,
}

impl Naive {
    fn block(level: Level, at: usize) -> std::ops::Range<usize> {
        let pages = usize::try_from(Geometry::new(4, 4).unwrap().pages(level).get()).unwrap();
        at - at % pages..at - at % pages + pages
    }

    fn is_uniform(&self, level: Level, at: usize) -> bool {
        Self::block(level, at).all(|page| self.shared[page] == self.shared[at])
    }

    fn convert(&mut self, range: std::ops::Range<usize>, shared: bool) {
        self.shared[range.clone()].fill(shared);
        for at in 0..self.shared.len() {
            while self.folio[at] > Level::Size4K && !self.is_uniform(self.folio[at], at) {
                let (block, below) = (Self::block(self.folio[at], at), self.folio[at].smaller());
                self.folio[block].fill(below.unwrap());
            }
        }
        for level in [Level::Size2M, Level::Size1G] {
            for at in range.clone().filter(|_| !shared && level <= self.base) {
                let block = Self::block(level, at);
                let pieces = block
                    .clone()
                    .all(|page| self.folio[page].larger() == Some(level) && !self.shared[page]);
                if pieces {
                    self.folio[block].fill(level);
                }
            }
        }
    }

    /// The largest level at which a page can be mapped through a binding of `[from..to)` whose gfns
    /// are off by `offset`.
    fn level(&self, at: usize, (from, to, offset): (usize, usize, usize)) -> Level {
        let fits = |level: &Level| {
            let block = Self::block(*level, at);
            self.folio[at] >= *level
                && self.is_uniform(*level, at)
                && offset.is_multiple_of(block.len())
                && block.start >= from
                && block.end <= to
        };
        Level::ALL.into_iter().rfind(fits).unwrap_or(Level::Size4K)
    }

    fn counts(&self) -> [u64; 3] {
        Level::ALL.map(|level| {
            let pages = self.folio.iter().filter(|&&it| it == level).count() as u64;
            pages / Geometry::new(4, 4).unwrap().pages(level).get()
        })
    }
}

/// How many random operations; `POLDER_FOLIO_OPS` says otherwise.
fn operations() -> usize {
    std::env::var("POLDER_FOLIO_OPS").ok().and_then(|ops| ops.parse().ok()).unwrap_or(300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn levels_agree_with_an_oracle_that_knows_pages_alone(
        base in prop::sample::select(Level::ALL.to_vec()),
        initially_shared in any::<bool>(),
        bound in (0usize..8, 20usize..33, prop::sample::select(std::vec![0usize, 1, 4, 16])),
        ops in prop::collection::vec(
            (0usize..32, 1usize..20, any::<bool>(), prop::option::weighted(0.3, 0usize..10), any::<bool>()),
            1..operations(),
        ),
    ) {
        let visibility = if initially_shared { Visibility::Shared } else { Visibility::Private };
        let mut engine = huge(Backing::split(base), visibility);
        let (from, to, offset) = bound;
        let gfn = u32::try_from(from + offset).unwrap();
        engine.bind(VmId(0), Slot(0), gfn.into(), pages(from as u64, to as u64)).unwrap();
        let mut naive = Naive {
            base,
            shared: std::vec![initially_shared; 32],
            folio: std::vec![base; 32],
        };
        let mut pinned = None;
        for (start, len, shared, fail, pin) in ops {
            let end = (start + len).min(32);
            let to_kind = if shared { Visibility::Shared } else { Visibility::Private };
            let range = pages(start as u64, end as u64);
            let before = counts(&engine);
            match claim(&mut engine, &request(range, to_kind, Contents::Preserve)) {
                Ok(Start::Claimed(conversion)) => {
                    // Undone by whoever meets it: it is run anew below, to its end or its failure.
                    let operation = engine.undo(conversion);
                    undo(&mut engine, operation, true);
                    let done = convert(&mut engine, &request(range, to_kind, Contents::Preserve), fail);
                    match done {
                        Ok(_) => naive.convert(start..end, shared),
                        Err(_) => prop_assert_eq!(counts(&engine), before),
                    }
                }
                Ok(Start::AlreadySo) => {}
                Err(refusal) => {
                    prop_assert!(matches!(refusal, Refusal::Pinned { .. }), "{refusal:?}");
                    prop_assert!(pinned.is_some());
                }
            }
            prop_assert_eq!(counts(&engine), naive.counts());
            for at in 0..32usize {
                let index = page(u32::try_from(at).unwrap());
                prop_assert_eq!(engine.folio_level(index), naive.folio[at]);
                if !(from..to).contains(&at) { continue; }
                let visibility =
                    if naive.shared[at] { Visibility::Shared } else { Visibility::Private };
                let gfn = u32::try_from(at + offset).unwrap().into();
                match engine.guest_fault(VmId(0), GuestAccess { gfn, visibility }) {
                    GuestAnswer::Now(answer) => {
                        let level = naive.level(at, (from, to, offset));
                        let range = PageRange::enclosing(index, level, engine.config().geometry);
                        prop_assert_eq!(answer.range(), range);
                        engine.answered(answer, Some(Response::Map));
                    }
                    other => prop_assert!(false, "{other:?}"),
                }
            }
            if let Some(id) = pinned.take() {
                engine.unpin(id);
            } else if pin {
                pinned = engine.pin(PageRange::one(range.start()), PinKind::Short, Holder::new("a device")).ok();
            }
        }
    }
}
