//! Guest memory as an array of words, and the guest's tables walked entry by entry each time.

use std::collections::{BTreeMap, BTreeSet};

use polder_machine::Pte;

use crate::rig::PAGES;

/// Where a page is, by the guest's tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Where {
    At { gfn: u64, writable: bool },
    Nowhere,
    NoSlot { writable: bool },
}

#[derive(Default)]
pub(crate) struct Naive {
    pub(crate) words: BTreeMap<(u64, u64), u64>,
    /// What each vCPU may still remember: by vCPU, top table and page.
    pub(crate) stale: BTreeMap<(usize, u64, u64), BTreeSet<Where>>,
    /// The top tables that each vCPU has been given.
    pub(crate) tops: [BTreeSet<u64>; 2],
}

/// log2 of the pages that an entry of each level of table covers, from the first level on.
const SHIFTS: [u32; 5] = [0, 2, 4, 13, 22];

/// The pages that are accessed.
pub(crate) const SPACE: u64 = 32;

pub(crate) fn index(page: u64, level: usize) -> u64 {
    (page >> SHIFTS[level - 1]) & ((1 << (SHIFTS[level] - SHIFTS[level - 1])) - 1)
}

impl Naive {
    pub(crate) fn word(&self, gfn: u64, word: u64) -> u64 {
        self.words.get(&(gfn, word)).copied().unwrap_or(0)
    }

    /// The entries on the way to a page, from the top, and where it is.
    pub(crate) fn walk(&self, top: u64, page: u64) -> (Vec<(u64, u64)>, Where) {
        let (mut table, mut path, mut writable, mut user) = (top, Vec::new(), true, true);
        for level in (1..=4).rev() {
            if table >= PAGES {
                return (path, Where::NoSlot { writable: true });
            }
            let at = (table, index(page, level));
            let entry = Pte(self.word(at.0, at.1));
            path.push(at);
            if !entry.has(Pte::PRESENT) {
                return (path, Where::Nowhere);
            }
            writable &= entry.has(Pte::WRITABLE);
            user &= entry.has(Pte::USER);
            let covers = 1 << SHIFTS[level - 1];
            let reserved = level > 1
                && entry.has(Pte::LARGE)
                && (level == 4 || !entry.gfn().get().is_multiple_of(covers));
            if reserved {
                return (path, Where::Nowhere);
            }
            if level == 1 || entry.has(Pte::LARGE) {
                let gfn = entry.gfn().get() + page % covers;
                return match (user, gfn >= PAGES) {
                    (false, _) => (path, Where::Nowhere),
                    (_, true) => (path, Where::NoSlot { writable }),
                    _ => (path, Where::At { gfn, writable }),
                };
            }
            table = entry.gfn().get();
        }
        unreachable!("the last level has no tables");
    }

    /// What vCPUs may remember from before a change.
    pub(crate) fn remember(&mut self) {
        for vcpu in 0..2 {
            for top in self.tops[vcpu].clone() {
                for page in 0..SPACE {
                    let (_, is) = self.walk(top, page);
                    if matches!(is, Where::At { .. }) {
                        self.stale.entry((vcpu, top, page)).or_default().insert(is);
                    }
                }
            }
        }
    }

    /// Drops what the vCPU may remember of a root, now that it is flushed.
    pub(crate) fn flush(&mut self, vcpu: usize, top: u64) {
        self.stale.retain(|(cpu, of, _), _| (*cpu, *of) != (vcpu, top));
    }
}
