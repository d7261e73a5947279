//! The pool against one that counts everything anew, by what the words mean.

use std::collections::BTreeMap;
use std::string::ToString;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

/// How many random operations; `POLDER_POOL_OPS` says otherwise.
fn operations() -> usize {
    std::env::var("POLDER_POOL_OPS").ok().and_then(|ops| ops.parse().ok()).unwrap_or(400)
}

#[test]
fn what_is_promised_is_there_and_what_is_refused_has_changed_nothing() {
    let mut pool = Pool::new(4);
    let first = pool.reserve(None, 3).unwrap();
    let before = pool.clone();
    let refused = pool.reserve(None, 2).unwrap_err();
    assert_eq!(refused, PoolError::TooFew { asked: 2, available: 1, pending: 0 });
    assert_eq!(pool, before);
    assert_eq!(pool.shrink(4), 1, "what is promised is not taken away");
    let pages: Vec<_> = std::iter::from_fn(|| pool.take(first)).collect();
    assert_eq!(pages.len(), 3);
    assert_eq!(pool.counts(), PoolCounts { total: 3, ..PoolCounts::default() });
    pool.discard(first, pages[1]);
    assert_eq!(
        pool.reserve(None, 1).unwrap_err().to_string(),
        "1 huge pages were asked for, and 0 of the pool are available"
    );
    pool.release(first, |page| page == pages[0]);
    let counts = PoolCounts { total: 3, free: 2, reserved: 0, pending: 1 };
    assert_eq!(pool.counts(), counts);
    let waits = pool.reserve(None, 3).unwrap_err();
    assert_eq!(waits, PoolError::TooFew { asked: 3, available: 2, pending: 1 });
    pool.returned(pages[0]);
    pool.reserve(None, 3).unwrap();
    assert_eq!(pool.audit(), Ok(()));
}

#[test]
#[should_panic(expected = "given back once")]
fn a_huge_page_is_given_back_once() {
    let mut pool = Pool::new(1);
    let object = pool.reserve(None, 1).unwrap();
    let page = pool.take(object).unwrap();
    pool.release(object, |_| true);
    pool.returned(page);
    pool.returned(page);
}

#[test]
fn a_subpool_keeps_its_minimum_and_its_maximum() {
    let mut pool = Pool::new(8);
    let subpool = pool.create_subpool(2, Some(4)).unwrap();
    assert_eq!(pool.counts().reserved, 2);
    let first = pool.reserve(Some(subpool), 3).unwrap();
    assert_eq!(pool.counts().reserved, 3, "two of them were reserved at its birth");
    let over = pool.reserve(Some(subpool), 2).unwrap_err();
    assert_eq!(over, PoolError::Subpool { asked: 2, left: 1, max: 4 });
    assert_eq!(pool.remove_subpool(subpool), Err(PoolError::InUse));
    pool.release(first, |_| false);
    assert_eq!(pool.counts().reserved, 2);
    pool.remove_subpool(subpool).unwrap();
    assert_eq!(pool.counts(), PoolCounts { total: 8, free: 8, reserved: 0, pending: 0 });
    assert_eq!(pool.create_subpool(3, Some(2)), Err(PoolError::Bounds { min: 3, max: 2 }));
}

#[test]
fn two_that_allocate_in_one_huge_page_never_overshoot_the_subpool() {
    // Both find the page missing, both take one, and the later gives its own back.
    let mut pool = Pool::new(2);
    let subpool = pool.create_subpool(0, Some(1)).unwrap();
    let object = pool.reserve(Some(subpool), 1).unwrap();
    let first = pool.take(object);
    assert!(first.is_some());
    assert_eq!(pool.take(object), None, "nothing is promised any more");
    assert!(pool.reserve(Some(subpool), 1).is_err());
    pool.untake(object, first.unwrap());
    assert_eq!(pool.of(object), (1, 0));
    assert_eq!(pool.audit(), Ok(()));
}

/// What is had, by what it means: who has each page, and what was promised to whom.
#[derive(Default)]
struct Naive {
    total: u64,
    objects: BTreeMap<ReservationId, (Option<SubpoolId>, u64, Vec<HugePage>)>,
    pending: Vec<(HugePage, Option<SubpoolId>)>,
    subpools: BTreeMap<SubpoolId, (u64, Option<u64>)>,
}

impl Naive {
    fn used(&self, id: SubpoolId) -> u64 {
        let of = |subpool: &Option<SubpoolId>| *subpool == Some(id);
        let objects = self.objects.values().filter(|(subpool, ..)| of(subpool));
        objects.map(|(_, promised, held)| promised + held.len() as u64).sum::<u64>()
            + self.pending.iter().filter(|(_, subpool)| of(subpool)).count() as u64
    }

    fn counts(&self) -> PoolCounts {
        let held = self.objects.values().map(|(.., held)| held.len() as u64).sum::<u64>();
        let pending = self.pending.len() as u64;
        let promised = self.objects.values().map(|(_, promised, _)| promised).sum::<u64>();
        let minimum = |(&id, &(min, _)): (&SubpoolId, &(u64, _))| min.saturating_sub(self.used(id));
        PoolCounts {
            total: self.total,
            free: self.total - held - pending,
            reserved: promised + self.subpools.iter().map(minimum).sum::<u64>(),
            pending,
        }
    }

    /// Whether it adds up, and no subpool is above its maximum.
    fn fits(&self) -> bool {
        let counts = self.counts();
        counts.free >= counts.reserved
            && self
                .subpools
                .iter()
                .all(|(&id, (_, max))| max.is_none_or(|max| self.used(id) <= max))
    }
}

fn pick<T: Copy>(from: impl ExactSizeIterator<Item = T>, by: u8) -> Option<T> {
    let len = from.len();
    (len > 0).then(|| from.into_iter().nth(usize::from(by) % len)).flatten()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn it_agrees_with_one_that_counts_anew(
        total in 0u64..12,
        ops in prop::collection::vec((0u8..10, any::<u8>(), 0u64..5, any::<u8>()), 1..operations()),
    ) {
        let mut pool = Pool::new(total);
        let mut naive = Naive { total, ..Naive::default() };
        for (op, by, count, pins) in ops {
            let object = pick(naive.objects.keys().copied().collect::<Vec<_>>().into_iter(), by);
            match (op, object) {
                // Few of each, which meet often; many would be counted anew for ever.
                (0, _) if naive.subpools.len() < 6 => {
                    let max = (pins % 3 > 0).then(|| count + u64::from(by % 4));
                    if let Ok(id) = pool.create_subpool(count, max) {
                        naive.subpools.insert(id, (count, max));
                    } else {
                        prop_assert!(naive.counts().available() < count);
                    }
                }
                (1, _) => {
                    let ids: Vec<_> = naive.subpools.keys().copied().collect();
                    if let Some(id) = pick(ids.into_iter(), by) {
                        let unused = naive.used(id) == 0
                            && naive.objects.values().all(|(of, ..)| *of != Some(id));
                        prop_assert_eq!(pool.remove_subpool(id).is_ok(), unused);
                        if unused { naive.subpools.remove(&id); }
                    }
                }
                (2 | 3, _) if naive.objects.len() < 12 => {
                    let ids: Vec<_> = naive.subpools.keys().copied().collect();
                    let subpool = if op == 2 { None } else { pick(ids.into_iter(), by) };
                    let id = pool.reserve(subpool, count);
                    let key = id.unwrap_or(ReservationId(u64::MAX));
                    naive.objects.insert(key, (subpool, count, Vec::new()));
                    prop_assert_eq!(id.is_ok(), naive.fits());
                    if id.is_err() { naive.objects.remove(&key); }
                }
                (4 | 5, Some(id)) => {
                    let (_, promised, held) = naive.objects.get_mut(&id).unwrap();
                    let taken = pool.take(id);
                    prop_assert_eq!(taken.is_some(), *promised > 0);
                    if let Some(page) = taken { *promised -= 1; held.push(page); }
                }
                (6, Some(id)) => {
                    let (_, promised, held) = naive.objects.get_mut(&id).unwrap();
                    if let Some(page) = held.pop() {
                        if pins % 2 == 0 { pool.discard(id, page); } else { pool.untake(id, page); }
                        *promised += 1;
                    }
                }
                (7, Some(id)) => {
                    let (subpool, _, held) = naive.objects.remove(&id).unwrap();
                    let pinned = |page: &HugePage| (page.0 ^ u64::from(pins)) & 1 == 0;
                    pool.release(id, |page| pinned(&page));
                    naive.pending.extend(held.into_iter().filter(pinned).map(|it| (it, subpool)));
                }
                (8, _) => {
                    let count = naive.pending.len();
                    if let Some(at) = usize::from(by).checked_rem(count) {
                        pool.returned(naive.pending.swap_remove(at).0);
                    }
                }
                (9, _) if pins % 2 == 0 => { pool.grow(count); naive.total += count; }
                (9, _) => {
                    let gone = count.min(naive.counts().available());
                    prop_assert_eq!(pool.shrink(count), gone);
                    naive.total -= gone;
                }
                _ => {}
            }
            prop_assert_eq!(pool.counts(), naive.counts());
            prop_assert!(naive.fits());
            prop_assert_eq!(pool.audit(), Ok(()));
        }
    }
}
