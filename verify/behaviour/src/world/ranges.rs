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

/// Up to so many pages are gone through one by one: as many as memory of 2M pages has here at most.
const MOST: u64 = 4096;
/// Of more, so many at the start of each 1G, which is two of its 2M pages and a part of the third,
/// and at its end.
const FIRST: u64 = 1032;
const LAST: u64 = 8;

/// The pages of a range that a row fills, checks or touches one by one: a 1G page would take
/// minutes. The same of every range of that size, by pages and by frames, since [`BASE`] is a
/// multiple of 1G. Of more than [`MOST`] there have to be some among them.
pub(super) fn walked(start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    let whole = Geometry::X86_64.pages(Level::Size1G).get();
    let ends = move |page: u64| [(page, page + FIRST), (page + whole - LAST, page + whole)];
    let huge = (start - start % whole..end).step_by(usize::try_from(whole).expect("2^18"));
    let parts = huge.flat_map(ends).map(move |(first, last)| (first.max(start), last.min(end)));
    let all = (end - start <= MOST).then_some((start, end));
    let parts = parts.filter(move |(first, last)| first < last && all.is_none());
    let mut walked = all.into_iter().chain(parts).peekable();
    assert!(walked.peek().is_some(), "pages {start} to {end}: none would be looked at");
    walked
}

/// [`walked`], page by page.
pub(crate) fn each_of(range: PageRange) -> impl Iterator<Item = u64> {
    walked(range.start().get(), range.end()).flat_map(|(start, end)| start..end)
}

const _: () = assert!(BASE.is_multiple_of(1 << 18));
