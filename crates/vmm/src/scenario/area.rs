//! An area whose pages change hands: what its pages hold and who may reach them, kept while the
//! ops are written, so that each step can be followed by a check of everything.

use core::ops::Range;

use polder_units::{GfnRange, Gpa, PAGE_SIZE};

use super::generate::Conversions;
use super::layout::bytes;
use super::op::{HostAccess, Op, Outcome, Pattern, Visibility};
use super::random::Random;

/// Pages of 2 MiB.
const PAGES_2M: u64 = 512;

/// Offset and size, in pages: the table of the kernel's selftest `private_mem_conversions_test`.
const PATTERNS: [(u64, u64); 5] = [(0, 1), (0, PAGES_2M), (1, 1), (1, PAGES_2M), (PAGES_2M, 1)];

/// Pages that are converted one by one.
const WINDOW: u64 = 32;

/// Seeded ranges that are shared, and their longest length.
const RANGES: u64 = 6;
const RANGE_MAX: u64 = 64;

#[derive(Clone, Copy)]
struct Page {
    pattern: Pattern,
    visibility: Visibility,
}

/// The area. Pages are counted from its start.
pub(super) struct Area {
    start: Gpa,
    pages: Vec<Page>,
    conversions: Conversions,
    /// How often contents that were lost have been replaced: part of the next ones' seed.
    refills: u64,
}

impl Area {
    /// `range` as memory is at first: zero, and private where it can be.
    pub(super) fn new(range: GfnRange, conversions: Conversions) -> Self {
        let page = Page { pattern: Pattern::Zero, visibility: conversions.initial() };
        let pages = range.frames().map(|_| page).collect();
        Self { start: range.start().gpa(), pages, conversions, refills: 0 }
    }

    /// The number of pages.
    pub(super) fn len(&self) -> u64 {
        self.pages.len() as u64
    }

    /// The address of a page.
    pub(super) const fn gpa(&self, page: u64) -> Gpa {
        Gpa::new(self.start.get() + page * PAGE_SIZE)
    }

    /// Checks all of it, one op for each run of pages that hold the same pattern.
    pub(super) fn check(&self, ops: &mut Vec<Op>) {
        let mut first = 0;
        for run in self.pages.chunk_by(|a, b| a.pattern == b.pattern) {
            let len = run.len() as u64 * PAGE_SIZE;
            ops.push(Op::Check { gpa: self.gpa(first), len, pattern: run[0].pattern });
            first += run.len() as u64;
        }
    }

    /// Has the host try `pages` and the page on each side of them, all as they are now.
    pub(super) fn probe(&self, ops: &mut Vec<Op>, pages: Range<u64>) {
        let around = pages.start.saturating_sub(1)..(pages.end + 1).min(self.len());
        let mut first = around.start;
        while first < around.end {
            // Own pages and neighbours are apart, so that a failure tells which it was.
            let end = [pages.start, pages.end, around.end].into_iter().find(|&end| end > first);
            let visibility = self.visibility(first);
            let run = (first..end.unwrap_or(around.end))
                .take_while(|&p| self.visibility(p) == visibility);
            let count = run.count() as u64;
            let expect = match visibility {
                Visibility::Private => HostAccess::Denied,
                Visibility::Shared => HostAccess::Readable,
            };
            ops.push(Op::Probe { gpa: self.gpa(first), pages: count, expect });
            first += count;
        }
    }

    /// Fills `pages` from one seed, and checks.
    pub(super) fn fill(&mut self, ops: &mut Vec<Op>, pages: Range<u64>, seed: u64) {
        self.fill_unchecked(ops, pages, seed);
        self.check(ops);
    }

    /// Fills `pages` from one seed.
    pub(super) fn fill_unchecked(&mut self, ops: &mut Vec<Op>, pages: Range<u64>, seed: u64) {
        let pattern = Pattern::Seeded { seed };
        let len = (pages.end - pages.start) * PAGE_SIZE;
        ops.push(Op::Fill { gpa: self.gpa(pages.start), len, pattern });
        self.each(pages, |page| page.pattern = pattern);
    }

    /// Converts `pages`, whatever they are, checks the whole area and probes. Contents that were
    /// lost by it are replaced by new ones.
    pub(super) fn convert(&mut self, ops: &mut Vec<Op>, pages: Range<u64>, to: Visibility) {
        let count = pages.end - pages.start;
        let (gpa, expect) = (self.gpa(pages.start), self.conversions.outcome(to));
        ops.push(Op::Convert { gpa, pages: count, to, expect });
        let lost = match expect {
            Outcome::Done => self.convert_to(pages.clone(), to),
            _ => Vec::new(),
        };
        self.check(ops);
        self.probe(ops, pages);
        for run in lost {
            // Far from any seed that is drawn at random, as likely as not.
            self.refills += 1;
            self.fill_unchecked(ops, run, !self.start.get() ^ self.refills);
        }
    }

    /// Notes that `pages` are `to` now. Returns the runs of those that lost what was in them.
    fn convert_to(&mut self, pages: Range<u64>, to: Visibility) -> Vec<Range<u64>> {
        let kept = self.conversions == Conversions::KeepContents;
        let mut lost: Vec<Range<u64>> = Vec::new();
        let mut at = pages.start;
        self.each(pages, |page| {
            let loses = !kept && page.visibility != to && page.pattern != Pattern::Zero;
            page.visibility = to;
            if loses {
                page.pattern = Pattern::Zero;
                match lost.last_mut().filter(|run| run.end == at) {
                    Some(run) => run.end += 1,
                    None => lost.push(at..at + 1),
                }
            }
            at += 1;
        });
        lost
    }

    /// The whole story of an area, ending private where it can be.
    pub(super) fn story(&mut self, ops: &mut Vec<Op>, random: &mut Random) {
        self.untouched(ops);
        self.offsets_and_sizes(ops, random);
        self.one_page(ops, random);
        self.there_and_back(ops, 0..self.len(), random);
        self.every_page(ops, random);
        self.odd_pages(ops, random);
        self.ranges(ops, random);
        let all = 0..self.len();
        self.convert(ops, all, Visibility::Private);
    }

    /// A page that nobody has touched is shared, and zero. It becomes private and is still zero.
    fn untouched(&mut self, ops: &mut Vec<Op>) {
        self.convert(ops, 0..1, Visibility::Shared);
        self.convert(ops, 0..1, Visibility::Private);
    }

    /// The kernel's table: share, write while shared, unshare.
    fn offsets_and_sizes(&mut self, ops: &mut Vec<Op>, random: &mut Random) {
        let all = 0..self.len();
        self.fill(ops, all, random.word());
        for (offset, size) in PATTERNS {
            self.there_and_back(ops, offset..offset + size, random);
        }
    }

    /// A page anywhere.
    fn one_page(&mut self, ops: &mut Vec<Op>, random: &mut Random) {
        let page = random.below(self.len());
        self.there_and_back(ops, page..page + 1, random);
    }

    /// Shares pages, writes them while they are shared, and takes them back.
    fn there_and_back(&mut self, ops: &mut Vec<Op>, pages: Range<u64>, random: &mut Random) {
        self.convert(ops, pages.clone(), Visibility::Shared);
        self.fill(ops, pages.clone(), random.word());
        self.convert(ops, pages, Visibility::Private);
    }

    /// Every page of a window, one by one.
    fn every_page(&mut self, ops: &mut Vec<Op>, random: &mut Random) {
        let window = self.window(random);
        for page in window.clone() {
            self.convert(ops, page..page + 1, Visibility::Shared);
        }
        self.fill(ops, window.clone(), random.word());
        for page in window {
            self.convert(ops, page..page + 1, Visibility::Private);
        }
    }

    /// The odd pages of a window, each with words of its own.
    fn odd_pages(&mut self, ops: &mut Vec<Op>, random: &mut Random) {
        let window = self.window(random);
        let odd = || window.clone().filter(|page| page % 2 == 1);
        for page in odd() {
            self.convert(ops, page..page + 1, Visibility::Shared);
        }
        for page in odd() {
            self.fill_unchecked(ops, page..page + 1, random.word());
        }
        for page in odd() {
            self.convert(ops, page..page + 1, Visibility::Private);
        }
        self.fill(ops, window, random.word());
    }

    /// Ranges anywhere, which may overlap: a request for what is already so is answered with 0.
    fn ranges(&mut self, ops: &mut Vec<Op>, random: &mut Random) {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for _ in 0..RANGES {
            let count = 1 + random.below(RANGE_MAX);
            let first = random.below(self.len() - count + 1);
            self.convert(ops, first..first + count, Visibility::Shared);
            self.fill(ops, first..first + count, random.word());
            ranges.push(first..first + count);
        }
        for range in ranges {
            self.convert(ops, range, Visibility::Private);
        }
    }

    /// A window at a multiple of its length.
    fn window(&self, random: &mut Random) -> Range<u64> {
        let first = WINDOW * random.below(self.len() / WINDOW);
        first..first + WINDOW
    }

    fn visibility(&self, page: u64) -> Visibility {
        let page = usize::try_from(page).ok().and_then(|page| self.pages.get(page));
        page.map_or(Visibility::Private, |page| page.visibility)
    }

    fn each(&mut self, pages: Range<u64>, change: impl FnMut(&mut Page)) {
        let index = |page| usize::try_from(page).unwrap_or(usize::MAX);
        self.pages[index(pages.start)..index(pages.end)].iter_mut().for_each(change);
    }
}

/// The bytes of a range.
pub(super) const fn len(range: GfnRange) -> u64 {
    bytes(range.count())
}
