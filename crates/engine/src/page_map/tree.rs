//! The three levels of the map and the order in which they are written.

use alloc::boxed::Box;
use core::ops::Range;

use polder_units::{Geometry, Level, PageCount, PageIndex, PageRange};

use super::facts::{Change, FACTS, PageFacts};
use super::row::{LargePages, Leaves, MIXED, SPLIT};
use crate::sync::OnceBox;

/// What the writer and all readers share.
pub(super) struct Tree {
    pages: PageCount,
    shift_2m: u32,
    shift_1g: u32,
    row_1g: LargePages,
    /// Absent until a 1G page is mixed for the first time.
    finer: OnceBox<Finer>,
}

/// What lies below the 1G pages of the whole object.
#[derive(Clone)]
struct Finer {
    row_2m: LargePages,
    leaves: Leaves,
}

impl Tree {
    pub(super) fn new(pages: PageCount, geometry: Geometry, facts: PageFacts) -> Self {
        let shift = |level| geometry.pages(level).get().trailing_zeros();
        let (shift_2m, shift_1g) = (shift(Level::Size2M), shift(Level::Size1G));
        let len = number(pages.get()).div_ceil(1 << shift_1g);
        let row_1g = LargePages::new(len);
        if len > 0 {
            row_1g.change(0..len, facts.into());
        }
        Self { pages, shift_2m, shift_1g, row_1g, finer: OnceBox::new() }
    }

    /// Its size, and the shifts from a page to its large pages.
    pub(super) const fn shape(&self) -> (PageCount, u32, u32) {
        (self.pages, self.shift_2m, self.shift_1g)
    }

    pub(super) const fn pages(&self) -> PageCount {
        self.pages
    }

    pub(super) fn heap_bytes(&self) -> usize {
        let finer = self.finer.get().map_or(0, |finer| {
            size_of_val(finer) + finer.row_2m.heap_bytes() + finer.leaves.heap_bytes()
        });
        size_of_val(self) + self.row_1g.heap_bytes() + finer
    }

    #[inline]
    pub(super) fn get(&self, page: PageIndex) -> PageFacts {
        let page = self.checked(page);
        if let Some(finer) = self.finer.get() {
            let bits = finer.leaves.get(page);
            if bits != 0 {
                return PageFacts::from_bits(bits);
            }
        }
        self.get_coarse(page)
    }

    /// Apart from `get`, for which it would need registers.
    #[inline(never)]
    fn get_coarse(&self, page: usize) -> PageFacts {
        PageFacts::from_bits(self.coarsest(page))
    }

    /// The facts of `page` from the coarsest row that has them.
    #[inline(always)]
    fn coarsest(&self, page: usize) -> u8 {
        let mut entry = self.row_1g.get(page >> self.shift_1g);
        if entry & MIXED != 0 {
            let finer = self.finer();
            entry = finer.row_2m.get(page >> self.shift_2m);
            if entry & MIXED != 0 {
                entry = finer.leaves.get(page);
            }
        }
        entry & FACTS
    }

    #[inline]
    pub(super) fn level(&self, page: PageIndex) -> Level {
        let page = self.checked(page);
        if self.row_1g.get(page >> self.shift_1g) & MIXED == 0 {
            if self.ends_inside(page, self.shift_1g) {
                return Level::Size1G;
            }
        } else if self.finer().row_2m.get(page >> self.shift_2m) & MIXED != 0 {
            return Level::Size4K;
        }
        if self.ends_inside(page, self.shift_2m) { Level::Size2M } else { Level::Size4K }
    }

    /// Whether all of `range` has `facts`; quick where it is one page. Not, if it reaches past the
    /// object.
    #[inline(always)]
    pub(super) fn is(&self, range: PageRange, facts: PageFacts) -> bool {
        range.end() <= self.pages.get()
            && self.coarsest(number(range.start().get())) == facts.bits()
            && (range.count() == PageCount::ONE || self.are_all(range, facts))
    }

    /// Whether all of `range` has `facts`. While they stay what they are, it does not matter that
    /// what is around changes: what is uniform with a page of the range has, as far as it lies in
    /// the range, that page's facts.
    #[inline(never)]
    fn are_all(&self, range: PageRange, facts: PageFacts) -> bool {
        let (mut at, end) = (range.start(), range.end());
        loop {
            if self.get(at) != facts {
                return false;
            }
            let shift = match self.level(at) {
                Level::Size4K => 0,
                Level::Size2M => self.shift_2m,
                Level::Size1G => self.shift_1g,
            };
            match PageIndex::new(((at.get() >> shift) + 1) << shift) {
                Some(next) if next.get() < end => at = next,
                _ => return true,
            }
        }
    }

    /// Changes one fact of the pages of `range`. One caller at a time.
    pub(super) fn change(&self, range: PageRange, change: Change) {
        let (start, mut end) = self.checked_range(range);
        if range.end() == self.pages.get() {
            // The pages that fill up the last 1G page go with the last page of the object, so
            // that a large page is uniform as soon as its part inside the object is.
            end = end.next_multiple_of(1 << self.shift_1g);
        }
        for (of_1g, part) in parts(start..end, self.shift_1g) {
            self.change_1g(of_1g, part, change);
        }
    }

    /// A 1G page is called mixed before it is, and uniform only after it is again. What is finer
    /// is filled with what is true already before it counts: wherever a reader finds its answer,
    /// it is the same.
    fn change_1g(&self, of_1g: usize, part: Range<usize>, change: Change) {
        let (old, inside) = (self.row_1g.get(of_1g), self.inside(of_1g));
        let new = change.apply(old);
        if old & MIXED == 0 {
            if new == old {
                return;
            }
            if old & SPLIT == 0 {
                if part.len() == 1 << self.shift_1g {
                    return self.row_1g.put(of_1g, new);
                }
                let finer = self.finer.get_or_init(|| Box::new(self.new_finer()));
                finer.row_2m.change(inside.clone(), PageFacts::from_bits(old).into());
            }
            self.row_1g.put(of_1g, SPLIT | MIXED);
        }
        let finer = self.finer();
        let mut mixed = false;
        for (of_2m, part) in parts(part, self.shift_2m) {
            mixed |= self.change_2m(finer, of_2m, part, change);
        }
        if !mixed && let Some(facts) = finer.row_2m.uniform(inside) {
            self.row_1g.put(of_1g, SPLIT | facts);
        }
    }

    /// As [`Tree::change_1g`]; returns whether the 2M page is mixed now.
    fn change_2m(&self, finer: &Finer, of_2m: usize, part: Range<usize>, change: Change) -> bool {
        let Finer { row_2m, leaves } = finer;
        let whole = of_2m << self.shift_2m..(of_2m + 1) << self.shift_2m;
        let old = row_2m.get(of_2m);
        if old & MIXED == 0 {
            let new = change.apply(old);
            if new == old {
                return false;
            }
            if part == whole {
                if old & SPLIT != 0 {
                    row_2m.put(of_2m, SPLIT | MIXED);
                    leaves.change(part, change);
                }
                row_2m.put(of_2m, new);
                return false;
            }
            if old & SPLIT == 0 {
                leaves.change(whole.clone(), PageFacts::from_bits(old).into());
            }
            row_2m.put(of_2m, SPLIT | MIXED);
        }
        leaves.change(part, change);
        let uniform = leaves.uniform(whole);
        if let Some(facts) = uniform {
            row_2m.put(of_2m, SPLIT | facts);
        }
        uniform.is_none()
    }

    /// The bits of the facts of `page`, and a later page up to which all pages have the same, which
    /// is looked for up to `until`. Costs a scan of words: of the coarsest row that is not mixed
    /// there, or of a 2M page.
    pub(super) fn piece(&self, page: usize, until: usize) -> (u8, usize) {
        let ceil = |shift: u32| ((until - 1) >> shift) + 1;
        let of_1g = page >> self.shift_1g;
        let entry = self.row_1g.get(of_1g);
        if entry & MIXED == 0 {
            let end = self.pages_1g().min(ceil(self.shift_1g));
            return (entry & FACTS, self.row_1g.run_end(of_1g..end) << self.shift_1g);
        }
        let (finer, of_2m) = (self.finer(), page >> self.shift_2m);
        let entry = finer.row_2m.get(of_2m);
        if entry & MIXED == 0 {
            let end = self.inside(of_1g).end.min(ceil(self.shift_2m));
            return (entry & FACTS, finer.row_2m.run_end(of_2m..end) << self.shift_2m);
        }
        let end = until.min((of_2m + 1) << self.shift_2m);
        (finer.leaves.get(page), finer.leaves.run_end(page..end))
    }

    /// The first page of `range` and the one after its last.
    pub(super) fn checked_range(&self, range: PageRange) -> (usize, usize) {
        let pages = self.pages;
        assert!(range.end() <= pages.get(), "{range} reaches past the object's {pages}");
        (number(range.start().get()), number(range.end()))
    }

    #[inline]
    fn checked(&self, page: PageIndex) -> usize {
        if page.get() >= self.pages.get() {
            refuse(page, self.pages);
        }
        number(page.get())
    }

    /// Whether the large page of `1 << shift` pages around `page` ends inside the object.
    #[inline]
    fn ends_inside(&self, page: usize, shift: u32) -> bool {
        page >> shift < number(self.pages.get()) >> shift
    }

    /// What lies below a 1G page that is or has been mixed.
    #[inline]
    fn finer(&self) -> &Finer {
        self.finer.get().expect("a mixed 1G page has its 2M pages")
    }

    /// What is below every 1G page, of which none has been split yet.
    fn new_finer(&self) -> Finer {
        let len = self.pages_1g();
        let row_2m = LargePages::new(self.inside(len).start);
        Finer { row_2m, leaves: Leaves::new(len << self.shift_1g) }
    }

    /// How many 1G pages there are, the last of them perhaps in part only.
    fn pages_1g(&self) -> usize {
        number(self.pages.get()).div_ceil(1 << self.shift_1g)
    }

    /// The 2M pages of a 1G page.
    const fn inside(&self, of_1g: usize) -> Range<usize> {
        let fanout = self.shift_1g - self.shift_2m;
        of_1g << fanout..(of_1g + 1) << fanout
    }
}

impl Clone for Tree {
    fn clone(&self) -> Self {
        let &Self { pages, shift_2m, shift_1g, .. } = self;
        let finer = OnceBox::new();
        if let Some(ours) = self.finer.get() {
            finer.get_or_init(|| Box::new(ours.clone()));
        }
        Self { pages, shift_2m, shift_1g, row_1g: self.row_1g.clone(), finer }
    }
}

/// `range` cut at the multiples of `1 << shift`: each part, and the multiple it lies in.
fn parts(range: Range<usize>, shift: u32) -> impl Iterator<Item = (usize, Range<usize>)> {
    (range.start >> shift..=(range.end - 1) >> shift).map(move |index| {
        let (start, end) = (index << shift, (index + 1) << shift);
        (index, range.start.max(start)..range.end.min(end))
    })
}

/// Apart from the lookup, which would otherwise prepare the message's arguments every time.
#[cold]
fn refuse(page: PageIndex, pages: PageCount) -> ! {
    panic!("page {page} lies past the object's {pages}")
}

/// `number` as an index. Only a 32-bit host could refuse it, and only for an object larger than
/// it can have room to describe.
#[inline]
fn number(number: u64) -> usize {
    usize::try_from(number).expect("a page number fits the host's address space")
}
