//! The engine's huge-page pool, searched by itself: every order of what objects do with one, up to
//! a length, next to a count of who has what. It is not in the configurations of the product, where
//! a memory has all that it was promised.

use std::collections::BTreeMap;

use polder_explored_engine::Bug;
use polder_explored_engine::pool::{HugePage, Pool, ReservationId};

/// What may happen next.
#[derive(Clone, Copy, Debug)]
enum Op {
    /// An object is created, with so many pages.
    Reserve(u64),
    /// Of an object, by place: it takes a page, gives one back unused, discards one.
    Take(usize),
    Untake(usize),
    Discard(usize),
    /// It ends, with its pages pinned or not.
    Release(usize, bool),
    /// The last pin of a pending page goes, by place.
    Unpin(usize),
}

#[derive(Clone)]
struct State {
    pool: Pool,
    total: u64,
    /// What each object is promised yet, and holds.
    objects: BTreeMap<ReservationId, (u64, Vec<HugePage>)>,
    pending: Vec<HugePage>,
}

impl State {
    fn new(total: u64, bug: Option<Bug>) -> Self {
        let mut pool = Pool::new(total);
        if let Some(bug) = bug {
            pool.plant(bug);
        }
        Self { pool, total, objects: BTreeMap::new(), pending: Vec::new() }
    }

    fn ops(&self) -> Vec<Op> {
        let mut ops = vec![Op::Reserve(1), Op::Reserve(2)];
        for at in 0..self.objects.len() {
            ops.extend([Op::Take(at), Op::Untake(at), Op::Discard(at)]);
            ops.extend([Op::Release(at, false), Op::Release(at, true)]);
        }
        ops.extend((0..self.pending.len()).map(Op::Unpin));
        ops
    }

    fn act(&mut self, op: Op) {
        let id = |at| *self.objects.keys().nth(at).expect("one of them");
        match op {
            Op::Reserve(count) => {
                if let Ok(id) = self.pool.reserve(None, count) {
                    self.objects.insert(id, (count, Vec::new()));
                }
            }
            Op::Take(at) => {
                let id = id(at);
                if let Some(page) = self.pool.take(id) {
                    let object = self.objects.get_mut(&id).expect("one of them");
                    object.0 -= 1;
                    object.1.push(page);
                }
            }
            Op::Untake(at) | Op::Discard(at) => {
                let id = id(at);
                let object = self.objects.get_mut(&id).expect("one of them");
                if let Some(page) = object.1.pop() {
                    object.0 += 1;
                    match op {
                        Op::Untake(_) => self.pool.untake(id, page),
                        _ => self.pool.discard(id, page),
                    }
                }
            }
            Op::Release(at, pinned) => {
                let id = id(at);
                let (_, held) = self.objects.remove(&id).expect("one of them");
                self.pool.release(id, |_| pinned);
                self.pending.extend(held.into_iter().filter(|_| pinned));
            }
            Op::Unpin(at) => self.pool.returned(self.pending.swap_remove(at)),
        }
    }

    /// Whether the pool says what who has what adds up to (INV-6).
    fn holds(&self) -> bool {
        let held: u64 = self.objects.values().map(|it| it.1.len() as u64).sum();
        let (promised, pending) =
            (self.objects.values().map(|it| it.0).sum::<u64>(), self.pending.len() as u64);
        let counts = self.pool.counts();
        (counts.total, counts.free) == (self.total, self.total - held - pending)
            && (counts.reserved, counts.pending) == (promised, pending)
            && self.pool.audit().is_ok()
    }
}

/// The shortest list of things after which the pool does not add up, of at most `depth`.
fn search(bug: Option<Bug>, depth: usize) -> Option<Vec<String>> {
    let mut states = vec![(State::new(3, bug), Vec::new())];
    for _ in 0..depth {
        let mut next = Vec::new();
        for (state, way) in &states {
            for op in state.ops() {
                let (mut state, mut way) = (state.clone(), way.clone());
                state.act(op);
                way.push(format!("{op:?}"));
                if !state.holds() {
                    return Some(way);
                }
                next.push((state, way));
            }
        }
        states = next;
    }
    None
}

#[test]
fn a_pool_adds_up_in_every_order_of_what_objects_do() {
    assert_eq!(search(None, 5), None);
}

#[test]
fn a_planted_bug_of_the_pool_is_found() {
    for bug in [Bug::ReturnedTwice, Bug::ReservationLost] {
        let found = search(Some(bug), 5);
        assert!(found.is_some(), "{bug:?}");
    }
}
