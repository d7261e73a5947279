//! Random operations against a naive oracle.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// One thing to do to an engine and to its oracle.
#[derive(Clone, Copy, Debug)]
enum Act {
    Convert { range: PageRange, private: bool, fail: Option<usize> },
    Pin { range: PageRange },
    Unpin,
    Touch { page: PageIndex },
    Discard { range: PageRange },
}

fn act() -> impl Strategy<Value = Act> {
    let range =
        (0u64..64, 1u64..20).prop_map(|(start, count)| pages(start, (start + count).min(64)));
    prop_oneof![
        4 => (range.clone(), any::<bool>(), prop::option::of(0usize..12))
            .prop_map(|(range, private, fail)| Act::Convert { range, private, fail }),
        2 => range.clone().prop_map(|range| Act::Pin { range }),
        1 => Just(Act::Unpin),
        2 => (0u32..64).prop_map(|index| Act::Touch { page: index.into() }),
        1 => range.prop_map(|range| Act::Discard { range }),
    ]
}

/// A page, naively.
#[derive(Clone, Copy, Default)]
struct Naive {
    shared: bool,
    pins: u32,
}

/// Does one act to both; they have to agree.
fn both(
    engine: &mut Engine,
    naive: &mut BTreeMap<u64, Naive>,
    pins: &mut Vec<(PinId, PageRange)>,
    act: Act,
) {
    let all = |naive: &BTreeMap<u64, Naive>, range: PageRange, is: &dyn Fn(Naive) -> bool| {
        range.frames().all(|page| is(naive[&page.get()]))
    };
    match act {
        Act::Convert { range, private, fail } => {
            let to = if private { Visibility::Private } else { Visibility::Shared };
            let request = request(range, to, Contents::Preserve);
            let pinned = private && !all(naive, range, &|page| page.pins == 0 || !page.shared);
            if pinned {
                assert!(matches!(claim(engine, &request), Err(Refusal::Pinned { .. })));
            } else if convert(engine, &request, fail).is_ok() {
                for page in range.frames() {
                    naive.get_mut(&page.get()).unwrap().shared = !private;
                }
            }
        }
        Act::Pin { range } => {
            let pin = engine.pin(range, PinKind::Short, Holder::new("test"));
            assert_eq!(pin.is_ok(), all(naive, range, &|page| page.shared));
            let Ok(pin) = pin else { return };
            pins.push((pin, range));
            range.frames().for_each(|page| naive.get_mut(&page.get()).unwrap().pins += 1);
        }
        Act::Unpin => {
            let Some((pin, range)) = pins.pop() else { return };
            engine.unpin(pin);
            range.frames().for_each(|page| naive.get_mut(&page.get()).unwrap().pins -= 1);
        }
        Act::Touch { page } => {
            let answer = now(engine.touch(View::Host, page));
            let response = answer.response();
            assert_eq!(response == Response::Map, naive[&page.get()].shared, "INV-1 at {page}");
            engine.answered(answer, Some(response));
        }
        Act::Discard { range } => {
            let discard = engine.discard(range);
            assert_eq!(discard.is_ok(), all(naive, range, &|page| page.pins == 0), "INV-7");
            let Ok(discard) = discard else { return };
            let cleared = stage(engine, discard, &mut Vec::new(), &mut None).unwrap();
            engine.finish_discard(cleared);
        }
    }
}

proptest! {
    /// INV-1, INV-4 and INV-7, as far as the engine decides them.
    #[test]
    fn random_operations_agree_with_a_page_by_page_oracle(
        acts in prop::collection::vec(act(), 0..60),
    ) {
        let mut engine = plain();
        let mut naive: BTreeMap<u64, Naive> =
            (0..64).map(|page| (page, Naive::default())).collect();
        let mut pins = Vec::new();
        for act in acts {
            both(&mut engine, &mut naive, &mut pins, act);
            prop_assert!(engine.is_idle());
            for (&index, page) in &naive {
                let facts = engine.pages().get(PageIndex::new(index).unwrap());
                prop_assert_eq!(facts.visibility == Visibility::Shared, page.shared);
            }
        }
    }
}
