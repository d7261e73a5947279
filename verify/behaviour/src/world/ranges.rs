//! Pages and frames, as a case counts them.

use polder::Memory;
use polder::units::{Geometry, Gfn, GfnRange, Level, PageCount, PageRange};

use super::BASE;

/// Pages by the number of the larger page that they lie in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scale(u64);

impl Scale {
    pub(super) fn of(level: Level) -> Self {
        Self(Geometry::X86_64.pages(level).get())
    }

    /// Whether one is a page of 4K.
    pub(crate) fn is_small(self) -> bool {
        self.0 == 1
    }

    /// The pages of so many.
    pub(crate) fn count(self, of: u64) -> u64 {
        of * self.0
    }

    /// The first page of one.
    pub(crate) fn first(self, of: u64) -> u64 {
        of * self.0
    }

    /// The pages of one.
    pub(crate) fn page(self, of: u64) -> PageRange {
        self.pages(of, of + 1)
    }

    /// The pages of those from `start` to before `end`.
    pub(crate) fn pages(self, start: u64, end: u64) -> PageRange {
        pages(start * self.0, end * self.0)
    }
}

/// Pages `[start..end)` of an object.
pub(crate) fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in a case")
}

/// One page.
pub(crate) fn page(page: u64) -> PageRange {
    pages(page, page + 1)
}

/// All of an object.
pub(crate) fn all(memory: &Memory) -> PageRange {
    pages(0, memory.pages().get())
}

pub(crate) fn count(pages: u64) -> PageCount {
    PageCount::new(pages).expect("a number of pages in a case")
}

pub(crate) fn gfn(number: u64) -> Gfn {
    Gfn::new(number).expect("a frame in a case")
}

/// The guest frames of pages that are bound from [`BASE`] on.
pub(crate) fn gfns(range: PageRange) -> GfnRange {
    let start = BASE + range.start().get();
    GfnRange::between(start, start + range.count().get()).expect("frames of small memory")
}
