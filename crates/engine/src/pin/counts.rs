//! How many pins of one holder each page has.
//!
//! A pin counts in the coarsest row that it fills: a pin of a terabyte is a thousand counts, not a
//! quarter of a billion. What lies below a 1G page is made when it is pinned for the first time and
//! kept until the holder goes.

use alloc::boxed::Box;

use polder_units::{Geometry, Level, PageCount, PageIndex, PageRange};

use crate::sync::{AtomicU32, OnceBox, Ordering};

/// Of a 2M page: pages below it are or have been pinned, so its 4K pages have to be looked at.
const BELOW: u32 = 1 << 31;
/// The most pins of one page, as for `Arc`: who forgets as many ends the program.
const MOST: u32 = BELOW - 1;

/// The counts of all pages of the object.
pub(super) struct Counts {
    pages: usize,
    shift_2m: u32,
    shift_1g: u32,
    pages_1g: Box<[OnceBox<Below>]>,
}

/// A 1G page's own pins, and those of what it is made of.
struct Below {
    whole: AtomicU32,
    pages_2m: Box<[AtomicU32]>,
    pages_4k: Box<[AtomicU32]>,
}

impl Counts {
    pub(super) fn new(pages: PageCount, geometry: Geometry) -> Self {
        let shift = |level| geometry.pages(level).get().trailing_zeros();
        let (shift_2m, shift_1g) = (shift(Level::Size2M), shift(Level::Size1G));
        let pages = index(pages.get());
        let pages_1g = (0..pages.div_ceil(1 << shift_1g)).map(|_| OnceBox::new()).collect();
        Self { pages, shift_2m, shift_1g, pages_1g }
    }

    /// Counts a pin of `range`, which lies in the object.
    #[inline]
    pub(super) fn add(&self, range: PageRange) {
        self.each(range, |count| {
            let before = count.fetch_add(1, Ordering::SeqCst);
            assert!(before & !BELOW < MOST, "a page was pinned two billion times");
        });
    }

    /// Counts it no more.
    #[inline]
    pub(super) fn remove(&self, range: PageRange) {
        self.each(range, |count| {
            let before = count.fetch_sub(1, Ordering::SeqCst);
            assert!(before & !BELOW != 0, "what is unpinned was pinned");
        });
    }

    /// The first page of `range` that has a pin.
    pub(super) fn first_in(&self, range: PageRange) -> Option<PageIndex> {
        let (start, end) = (index(range.start().get()), index(range.end()));
        let mut at = start;
        while at < end {
            let next = (((at >> self.shift_1g) + 1) << self.shift_1g).min(end);
            if let Some(below) = self.pages_1g[at >> self.shift_1g].get()
                && let Some(page) = self.first_below(below, at, next)
            {
                return PageIndex::new(page as u64);
            }
            at = next;
        }
        None
    }

    /// The same, of the pages `start..end` of one 1G page.
    fn first_below(&self, below: &Below, start: usize, end: usize) -> Option<usize> {
        if below.whole.load(Ordering::Acquire) != 0 {
            return Some(start);
        }
        let mut at = start;
        while at < end {
            let next = (((at >> self.shift_2m) + 1) << self.shift_2m).min(end);
            let count = below.pages_2m[self.of_2m(at)].load(Ordering::Acquire);
            if count & !BELOW != 0 {
                return Some(at);
            }
            if count & BELOW != 0 {
                let first = self.of_4k(at);
                let counts = &below.pages_4k[first..first + (next - at)];
                let pinned = |count: &AtomicU32| count.load(Ordering::Acquire) != 0;
                if let Some(place) = counts.iter().position(pinned) {
                    return Some(at + place);
                }
            }
            at = next;
        }
        None
    }

    /// Every count that makes up `range`.
    #[inline]
    fn each(&self, range: PageRange, mut each: impl FnMut(&AtomicU32)) {
        let (start, end) = (index(range.start().get()), index(range.end()));
        if end - start == 1 {
            return each(self.of_page(start));
        }
        let mut at = start;
        while at < end {
            let fits = |shift: u32| at & ((1 << shift) - 1) == 0 && at + (1 << shift) <= end;
            at += if fits(self.shift_1g) {
                each(&self.below(at).whole);
                1 << self.shift_1g
            } else if fits(self.shift_2m) {
                each(&self.below(at).pages_2m[self.of_2m(at)]);
                1 << self.shift_2m
            } else {
                each(self.of_page(at));
                1
            };
        }
    }

    #[inline]
    fn of_page(&self, page: usize) -> &AtomicU32 {
        let below = self.below(page);
        let around = &below.pages_2m[self.of_2m(page)];
        if around.load(Ordering::Relaxed) & BELOW == 0 {
            around.fetch_or(BELOW, Ordering::SeqCst);
        }
        &below.pages_4k[self.of_4k(page)]
    }

    #[inline]
    fn below(&self, page: usize) -> &Below {
        let of_1g = page >> self.shift_1g;
        match self.pages_1g[of_1g].get() {
            Some(below) => below,
            None => self.pages_1g[of_1g].get_or_init(|| Box::new(self.new_below(of_1g))),
        }
    }

    #[cold]
    fn new_below(&self, of_1g: usize) -> Below {
        let pages = (self.pages - (of_1g << self.shift_1g)).min(1 << self.shift_1g);
        Below {
            whole: AtomicU32::new(0),
            pages_2m: crate::sync::zeroed_counts(pages.div_ceil(1 << self.shift_2m)),
            pages_4k: crate::sync::zeroed_counts(pages),
        }
    }

    /// The place of a page's 2M page in its 1G page.
    const fn of_2m(&self, page: usize) -> usize {
        self.of_4k(page) >> self.shift_2m
    }

    /// The place of a page in its 1G page.
    const fn of_4k(&self, page: usize) -> usize {
        page & ((1 << self.shift_1g) - 1)
    }

    /// What is pinned, as often as it is, in order and in the pieces that it was counted in.
    #[cfg(feature = "explore")]
    pub(super) fn pinned(&self) -> alloc::vec::Vec<(usize, u32, u32)> {
        let mut pinned = alloc::vec::Vec::new();
        for (of_1g, below) in self.pages_1g.iter().enumerate() {
            let Some(below) = below.get() else { continue };
            let start = of_1g << self.shift_1g;
            let rows = [
                (self.shift_1g, core::slice::from_ref(&below.whole)),
                (self.shift_2m, &*below.pages_2m),
                (0, &*below.pages_4k),
            ];
            for (shift, row) in rows {
                let counts = row.iter().map(|count| count.load(Ordering::Relaxed) & !BELOW);
                let held = counts.enumerate().filter(|&(_, count)| count != 0);
                pinned.extend(held.map(|(place, count)| (start + (place << shift), shift, count)));
            }
        }
        pinned
    }
}

/// A copy of what is counted now.
impl Clone for Counts {
    fn clone(&self) -> Self {
        let copy = |row: &[AtomicU32]| {
            let copy = crate::sync::zeroed_counts(row.len());
            for (copy, count) in copy.iter().zip(row) {
                match count.load(Ordering::Relaxed) {
                    0 => {}
                    count => copy.store(count, Ordering::Relaxed),
                }
            }
            copy
        };
        let pages_1g = self.pages_1g.iter().map(|ours| {
            let new = OnceBox::new();
            if let Some(Below { whole, pages_2m, pages_4k }) = ours.get() {
                let whole = AtomicU32::new(whole.load(Ordering::Relaxed));
                let (pages_2m, pages_4k) = (copy(pages_2m), copy(pages_4k));
                new.get_or_init(|| Box::new(Below { whole, pages_2m, pages_4k }));
            }
            new
        });
        Self { pages_1g: pages_1g.collect(), ..*self }
    }
}

/// A page's number as an index; the object is not larger than can be counted.
#[inline]
fn index(page: u64) -> usize {
    usize::try_from(page).expect("a page number fits the host's address space")
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u32 = 70;

    fn range() -> impl Strategy<Value = PageRange> {
        (0..PAGES, 1..PAGES).prop_map(|(start, count)| {
            PageRange::between(start.into(), (start + count).min(PAGES).into()).expect("not empty")
        })
    }

    proptest! {
        #[test]
        fn counts_agree_with_a_list_of_ranges(
            acts in prop::collection::vec((range(), any::<bool>()), 0..40),
            asked in prop::collection::vec(range(), 1..20),
        ) {
            let counts = Counts::new(PAGES.into(), Geometry::new(4, 4).expect("powers of two"));
            let mut held: Vec<PageRange> = vec![];
            for (range, pin) in acts {
                if pin {
                    counts.add(range);
                    held.push(range);
                } else if let Some(range) = held.pop() {
                    counts.remove(range);
                }
                let copy = counts.clone();
                for &asked in &asked {
                    let first = held.iter().filter_map(|range| range.intersection(asked));
                    let first = first.map(PageRange::start).min();
                    prop_assert_eq!(counts.first_in(asked), first);
                    prop_assert_eq!(copy.first_in(asked), first);
                }
            }
        }
    }
}
