//! The page map: for every 4K page of a memory object, whether it is private or shared, and
//! whether its contents are there yet.
//!
//! It is the truth about the object and is never asked of the kernel. Rare facts (claims,
//! quarantine, pins) are not in it. A page is a [`PageIndex`], a large page one of 2M or 1G by the
//! object's [`Geometry`]; a large page is *uniform* if all its pages have the same facts and
//! *mixed* if not.
//!
//! # What it is made of
//! ```text
//!            four bits for each 1G page: its facts, MIXED, SPLIT
//! row_1g     | p | M | s |                    512 bytes for 1T, always there
//!                  :
//! row_2m     |0..0|psMp..s|0..0|              four bits for each 2M page of the whole object
//!                    :
//! leaves     |0000|..psps..|0000|             two bits for each 4K page of the whole object
//! ```
//! - `row_2m` and `leaves` are made when a page is *split* (becomes mixed) for the first time. All
//!   of them is 0 and takes no memory until it is written to. What is below a large page is filled
//!   at its first split and from then on **kept true**, also while it is uniform again.
//! - So two bits in a leaf are the page's facts, unless they are 0: then the 1G page is asked, if
//!   that is mixed the 2M page, and if that is mixed the leaf again, where 0 is now facts like any
//!   other. A lookup in mixed memory is one load of a leaf; in uniform memory one more, of a row
//!   that fits a few cache lines. That, and few instructions, is what its speed comes from: at 1T
//!   every lookup in a leaf misses the cache.
//! - A large page that was never split is converted by one store. One that was costs a store for
//!   each of its 2M pages, and 16 for those of them that were split: some 20 us for a 1G page all
//!   of whose 2M pages were, twice what a bitmap takes.
//! - The pages that would fill up the object's last 1G page always have the facts of the object's
//!   last page, so that a large page cut short by the end is kept as one, not page by page.
//!   [`PageMap::level`] does not let it pass for a large page: it names only what lies wholly
//!   inside the object.
//!
//! # Readers without a lock
//! There is one writer: whoever has the `&mut PageMap`, which the engine's lock gives out. A
//! [`PageReader`] takes no lock and never waits or retries. Because of it nothing is given back
//! before the object dies: a row that is of no use now is left as it is and used again. (Freeing
//! it would need a reader to say when it is done, which is the lock's cost again.)
//!
//! Every store of the writer is a release and every load of a reader an acquire: a reader that has
//! seen a store sees all that were made before it. The writer keeps this order:
//! - *Mixed before it is.* A large page is split by filling what is below it with what is true
//!   already, then calling it mixed, then changing what is below.
//! - *Uniform after it is.* The finer row is uniform before the coarser one says so.
//! - So what a page's facts are changes at one store: of a word of a row, or of a leaf. No other
//!   store changes the facts of any page, wherever a reader found them.
//! - A reader that found 0 in a leaf and then a mixed 2M page looks at the leaf again, because the
//!   0 may be from before it was filled. It need not ask whether the page is still mixed: what is
//!   below a page is true from its split on, for good.
//!
//! What a reader may count on while the writer is at work (a change happens, to a reader, when its
//! store becomes visible to it: at once or a little late, and at the latest when the reader
//! synchronizes with whoever knows of the change):
//! - *[`PageReader::get`]* returns facts that the page had at some moment between the call's start
//!   and its end, never one fact from before a change and the other from after it.
//! - *Never back.* After a call that saw a change, no later call of that reader sees the map from
//!   before it, be it of this page or another. The same goes for another thread that is told by
//!   way of anything that synchronizes.
//! - *[`PageReader::level`]* returns a level no larger than was right at some moment of the call.
//!   It may be smaller than ever was right: a page is called mixed a little early and uniform a
//!   little late.
//! - *Nothing about two pages or two calls together.* A conversion of a range is seen in part, and
//!   a level is no promise about the facts that the next `get` returns.
//!
//! No reader may act on what it read alone: it announces itself first (a pin, a fault's claim) and
//! looks again, and the writer changes the map first and then looks for announcements. Either sees
//! the other only with a sequentially consistent fence between the two steps on both sides; acquire
//! and release do not order a store before a later load. So far every answer and copy is given
//! under the engine's lock; whoever adds a reader that goes without puts those fences at its
//! announcement and at the drain.
//!
//! `verify/loom/tests/page_map.rs` checks this against every interleaving of a small map.
//!
//! # Holes
//! - `leaves` are a quarter of a byte a page, asked of the system zeroed and untouched: with an
//!   allocator that clears memory by hand, the first split costs 64 MiB of it at 1T.
//! - A lookup in a leaf that nobody wrote to makes the system map its zero page there: no memory,
//!   but one page fault for every 64M of guest memory.

mod facts;
mod row;
#[cfg(test)]
mod tests;
mod tree;

use alloc::sync::Arc;
use core::fmt;
use core::hash::{Hash, Hasher};

use polder_units::{Geometry, Level, PageCount, PageIndex, PageRange};

pub use facts::{PageFacts, Population, Visibility};
use tree::Tree;

/// The [`PageFacts`] of all pages of one object; who has it may change them.
///
/// ```
/// use polder_engine::{PageFacts, PageMap, Population, Visibility};
/// use polder_units::{Geometry, Level, PageIndex, PageRange};
///
/// let facts = PageFacts { visibility: Visibility::Private, population: Population::Whole };
/// let mut map = PageMap::new(1024.into(), Geometry::X86_64, facts);
/// map.set_visibility(PageRange::one(PageIndex::from(700)), Visibility::Shared);
///
/// assert_eq!(map.level(PageIndex::from(5)), Level::Size2M);
/// assert_eq!(map.level(PageIndex::from(600)), Level::Size4K);
/// let all = PageRange::between(0, 1024).unwrap();
/// let lengths: Vec<_> = map.runs(all).map(|(range, _)| range.count().get()).collect();
/// assert_eq!(lengths, [700, 1, 323]);
/// ```
pub struct PageMap {
    tree: Arc<Tree>,
}

impl PageMap {
    /// A map of `pages` pages, all of them with `facts`.
    pub fn new(pages: PageCount, geometry: Geometry, facts: PageFacts) -> Self {
        Self { tree: Arc::new(Tree::new(pages, geometry, facts)) }
    }

    /// The pages of the object.
    pub fn pages(&self) -> PageCount {
        self.tree.pages()
    }

    /// The facts of `page`.
    ///
    /// # Panics
    /// If it lies past the object.
    #[inline]
    pub fn get(&self, page: PageIndex) -> PageFacts {
        self.tree.get(page)
    }

    /// The largest level at which the page around `page` is uniform and lies wholly inside the
    /// object.
    ///
    /// # Panics
    /// If it lies past the object.
    #[inline]
    pub fn level(&self, page: PageIndex) -> Level {
        self.tree.level(page)
    }

    /// Makes the pages of `range` private or shared.
    ///
    /// # Panics
    /// If it reaches past the object.
    pub fn set_visibility(&mut self, range: PageRange, visibility: Visibility) {
        self.tree.change(range, visibility.into());
    }

    /// Says whether the contents of the pages of `range` are there.
    ///
    /// # Panics
    /// If it reaches past the object.
    pub fn set_population(&mut self, range: PageRange, population: Population) {
        self.tree.change(range, population.into());
    }

    /// The maximal runs of pages with equal facts that make up `range`, in order.
    ///
    /// # Panics
    /// If it reaches past the object.
    pub fn runs(&self, range: PageRange) -> impl Iterator<Item = (PageRange, PageFacts)> {
        let (start, end) = self.tree.checked_range(range);
        Runs { tree: &self.tree, at: start, end, ahead: None }
    }

    fn all_runs(&self) -> impl Iterator<Item = (PageRange, PageFacts)> {
        PageRange::between(0, self.pages().get()).into_iter().flat_map(|all| self.runs(all))
    }

    /// A reader of this map, for threads that do not hold the engine's lock.
    pub fn reader(&self) -> PageReader {
        PageReader { tree: Arc::clone(&self.tree) }
    }

    /// The bytes of memory the map has asked for. It never shrinks. Of the quarter of a byte for
    /// each page that is asked for at the first split, the system gives only what is used.
    pub fn heap_bytes(&self) -> usize {
        self.tree.heap_bytes()
    }
}

/// A copy of its own: readers of the one don't see changes of the other.
impl Clone for PageMap {
    fn clone(&self) -> Self {
        Self { tree: Arc::new(Tree::clone(&self.tree)) }
    }
}

/// Equal are maps that say the same of every page, whatever happened to them before.
impl PartialEq for PageMap {
    fn eq(&self, other: &Self) -> bool {
        self.tree.shape() == other.tree.shape() && self.all_runs().eq(other.all_runs())
    }
}

impl Eq for PageMap {}

impl Hash for PageMap {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.tree.shape().hash(state);
        self.all_runs().for_each(|run| run.hash(state));
    }
}

impl fmt::Debug for PageMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.all_runs()).finish()
    }
}

/// Reads a [`PageMap`] without a lock, while somebody else changes it.
#[derive(Clone)]
pub struct PageReader {
    tree: Arc<Tree>,
}

impl PageReader {
    /// The pages of the object.
    pub fn pages(&self) -> PageCount {
        self.tree.pages()
    }

    /// As [`PageMap::get`]: the facts of `page` at some moment of the call.
    ///
    /// # Panics
    /// If it lies past the object.
    #[inline]
    pub fn get(&self, page: PageIndex) -> PageFacts {
        self.tree.get(page)
    }

    /// As [`PageMap::level`]: no larger than was right at some moment of the call.
    ///
    /// # Panics
    /// If it lies past the object.
    #[inline]
    pub fn level(&self, page: PageIndex) -> Level {
        self.tree.level(page)
    }

    /// Whether all of `range` is in the object and has `facts`, which do not change meanwhile: the
    /// caller announced itself. If they do, any answer.
    #[inline(always)]
    pub fn are_all(&self, range: PageRange, facts: PageFacts) -> bool {
        self.tree.is(range, facts)
    }
}

impl fmt::Debug for PageReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageReader").field("pages", &self.pages()).finish_non_exhaustive()
    }
}

struct Runs<'a> {
    tree: &'a Tree,
    at: usize,
    end: usize,
    /// The piece that begins at `at`, if it was looked at already.
    ahead: Option<(u8, usize)>,
}

impl Iterator for Runs<'_> {
    type Item = (PageRange, PageFacts);

    fn next(&mut self) -> Option<Self::Item> {
        if self.at == self.end {
            return None;
        }
        let start = self.at;
        let (bits, mut end) = self.ahead.take().unwrap_or_else(|| self.tree.piece(start, self.end));
        while end < self.end {
            let next = self.tree.piece(end, self.end);
            if next.0 != bits {
                self.ahead = Some(next);
                break;
            }
            end = next.1;
        }
        self.at = end.min(self.end);
        let range = PageRange::between(start as u64, self.at as u64)?;
        Some((range, PageFacts::from_bits(bits)))
    }
}
