//! The dirty log: which pages of the object were written since it was last taken.
//!
//! Who writes is logged by whoever sees it:
//!
//! | who writes | logged by |
//! |---|---|
//! | a guest, and KVM for it | the slot (`KVM_MEM_LOG_DIRTY_PAGES`), or the simulated machine's |
//! | the API, slices of `vm-memory`, a [`Ring`](crate::Ring) | [`Marks`], once the bytes are there |
//! | a population, a discard, a conversion | [`Marks`], while the pages are claimed |
//! | a device behind an IOMMU | [`Marks`], for as long as it has a page mapped |
//! | a raw pointer | its user, by [`Memory::mark_dirty`](crate::Memory::mark_dirty) |
//!
//! # No write is lost
//! A page is marked *after* it was written, and copied *after* the log was taken. Whoever copies a
//! page too early to have a write's bytes therefore finds its mark the next time: it was not there
//! yet when the log was taken. Setting a mark and taking it are atomic instructions on one word, so
//! who takes a mark sees the bytes it was set for. It is set also where it is set already: the
//! instruction orders the bytes before the next taking.
//!
//! What is on or off is looked at by a plain load, after the bytes were stored. Who turns the log on
//! has every thread pass a barrier (`membarrier(2)`) once it is on: a thread that found it off had
//! its bytes stored before that, and they are seen by whoever copies after it.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, compiler_fence};

use polder_units::{PAGE_SIZE, PageCount, PageIndex, PageRange};

/// Pages in a word.
const BITS: u64 = u64::BITS as u64;

/// Pages that were written, but not by a guest; and what guests wrote, once it was asked for.
#[derive(Default)]
pub(crate) struct Marks {
    on: AtomicBool,
    /// A bit for each page of the object, from the first time on that it is on.
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Marks {
    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Notes writes from now on, of an object of so many pages.
    pub(crate) fn start(&self, pages: PageCount) {
        let word = |_| AtomicU64::new(0);
        self.words.get_or_init(|| (0..pages.get().div_ceil(BITS)).map(word).collect());
        // What came late when it was on before is old.
        drop(self.take());
        self.on.store(true, Ordering::SeqCst);
        polder_linux::barrier();
    }

    pub(crate) fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
    }

    /// Notes that bytes of the object have been written.
    #[inline(always)]
    pub(crate) fn wrote(&self, offset: u64, count: usize) {
        // The processor may do the load first, but for `start`; the compiler may not.
        compiler_fence(Ordering::SeqCst);
        if self.is_on() {
            self.note_bytes(offset, count);
        }
    }

    /// Notes that pages have been written, or become others.
    pub(crate) fn wrote_pages(&self, pages: PageRange) {
        compiler_fence(Ordering::SeqCst);
        if self.is_on() {
            self.note(pages);
        }
    }

    #[cold]
    fn note_bytes(&self, offset: u64, count: usize) {
        let Some(last) = (count as u64).checked_sub(1) else { return };
        let (first, last) = (offset / PAGE_SIZE, offset.saturating_add(last) / PAGE_SIZE);
        PageRange::between(first, last + 1).into_iter().for_each(|pages| self.note(pages));
    }

    fn note(&self, pages: PageRange) {
        let most = self.words.get().map_or(0, |words| words.len() as u64 * BITS);
        let (mut next, end) = (pages.start().get(), pages.end().min(most));
        while next < end {
            let rest = end - next;
            let (at, bit) = (next / BITS, next % BITS);
            let count = rest.min(BITS - bit);
            self.set(at, (u64::MAX >> (BITS - count)) << bit);
            next += count;
        }
    }

    /// Notes pages by words of their bits, from page `first` on.
    pub(crate) fn note_words(&self, first: PageIndex, words: &[u64]) {
        let (at, shift) = (first.get() / BITS, first.get() % BITS);
        for (at, &bits) in (at..).zip(words) {
            self.set(at, bits << shift);
            // Without a shift nothing is left over.
            self.set(at + 1, bits >> 1 >> (BITS - 1 - shift));
        }
    }

    /// Whether a byte's page is noted.
    pub(crate) fn has(&self, offset: u64) -> bool {
        let page = offset / PAGE_SIZE;
        self.word(page / BITS)
            .is_some_and(|it| it.load(Ordering::Relaxed) >> (page % BITS) & 1 == 1)
    }

    fn word(&self, at: u64) -> Option<&AtomicU64> {
        self.words.get()?.get(usize::try_from(at).ok()?)
    }

    fn set(&self, at: u64, bits: u64) {
        if let Some(word) = self.word(at).filter(|_| bits != 0) {
            word.fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// The pages that are noted, which are no more.
    pub(crate) fn take(&self) -> DirtyPages {
        let words = self.words.get().map_or(&[][..], |words| words);
        let take = |word: &AtomicU64| match word.load(Ordering::Relaxed) {
            // A mark that comes meanwhile is for the next time.
            0 => 0,
            _ => word.swap(0, Ordering::AcqRel),
        };
        DirtyPages { words: words.iter().map(take).collect() }.shortest()
    }
}

/// Pages of an object that were written: what [`Memory::take_dirty_log`] gives.
///
/// [`Memory::take_dirty_log`]: crate::Memory::take_dirty_log
///
/// ```
/// # use polder::{HostKind, Memory, units::PageCount};
/// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
/// memory.start_dirty_log()?;
/// memory.host_view().touch_write(0x3ffe, b"across two pages")?;
/// let mut left = memory.take_dirty_log()?;
/// memory.host_view().touch_write(0x9000, b"another")?;
/// left.add(&memory.take_dirty_log()?);
/// let runs: Vec<String> = left.runs().map(|run| run.to_string()).collect();
/// assert_eq!((runs.len(), left.count().get()), (2, 3));
/// assert!(left.contains(3u32.into()) && !left.contains(5u32.into()));
/// # Ok::<_, polder::Error>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct DirtyPages {
    /// A bit for each page, the lowest of the first word for page 0. The last is not 0: sets of the
    /// same pages are equal.
    words: Vec<u64>,
}

impl DirtyPages {
    /// Without what says nothing.
    fn shortest(mut self) -> Self {
        let last = self.words.iter().rposition(|&word| word != 0);
        self.words.truncate(last.map_or(0, |last| last + 1));
        self
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// How many there are.
    pub fn count(&self) -> PageCount {
        let count = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
        PageCount::new(count).expect("pages of an object")
    }

    /// Whether a page is among them.
    pub fn contains(&self, page: PageIndex) -> bool {
        let word = usize::try_from(page.get() / BITS).ok().and_then(|at| self.words.get(at));
        word.is_some_and(|word| word >> (page.get() % BITS) & 1 == 1)
    }

    /// Adds those of another set.
    pub fn add(&mut self, other: &Self) {
        self.words.resize(self.words.len().max(other.words.len()), 0);
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word |= other);
    }

    /// The pages in runs, in order, each as long as it can be.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = self.first_from(next, true)?;
            next = self.first_from(start, false).unwrap_or(self.words.len() as u64 * BITS);
            PageRange::between(start, next)
        })
    }

    /// The first page from `from` on that is among them, or is not.
    fn first_from(&self, from: u64, dirty: bool) -> Option<u64> {
        let at = from / BITS;
        let mut seen = u64::MAX << (from % BITS);
        let words = self.words.get(usize::try_from(at).ok()?..)?;
        (at..).zip(words).find_map(|(at, &word)| {
            let found = (if dirty { word } else { !word }) & std::mem::replace(&mut seen, u64::MAX);
            (found != 0).then(|| at * BITS + u64::from(found.trailing_zeros()))
        })
    }
}

impl fmt::Debug for DirtyPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.runs()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 300;

    #[derive(Clone, Debug)]
    enum Write {
        Bytes(u64, usize),
        Words(u64, Vec<u64>),
        Take,
    }

    fn write() -> impl Strategy<Value = Write> {
        let words = prop::collection::vec(prop_oneof![any::<u64>(), Just(0), Just(u64::MAX)], 1..3);
        prop_oneof![
            4 => (0..PAGES * PAGE_SIZE, 0..0x9_0000usize).prop_map(|(at, count)| {
                let most = usize::try_from(PAGES * PAGE_SIZE - at).unwrap_or(0);
                Write::Bytes(at, count.min(most))
            }),
            2 => (0..PAGES - 128, words).prop_map(|(first, words)| Write::Words(first, words)),
            1 => Just(Write::Take),
        ]
    }

    fn check(taken: &DirtyPages, naive: &mut BTreeSet<u64>) {
        let pages: BTreeSet<u64> =
            taken.runs().flat_map(|run| run.start().get()..run.end()).collect();
        assert_eq!(pages, *naive);
        assert_eq!((taken.count().get(), taken.is_empty()), (pages.len() as u64, pages.is_empty()));
        let runs: Vec<PageRange> = taken.runs().collect();
        assert!(runs.is_sorted_by(|one, next| one.end() < next.start().get()), "{runs:?}");
        let contained = |page: &u64| PageIndex::new(*page).is_some_and(|page| taken.contains(page));
        assert!((0..PAGES + 100).filter(contained).eq(pages));
        naive.clear();
    }

    proptest! {
        #[test]
        fn what_is_written_is_taken_once(writes in prop::collection::vec(write(), 0..40)) {
            let (marks, mut naive) = (Marks::default(), BTreeSet::new());
            marks.wrote(0, 1);
            marks.start(PageCount::from(300));
            for write in writes {
                match write {
                    Write::Bytes(at, count) => {
                        marks.wrote(at, count);
                        let bytes = (0..count as u64).step_by(1 << 10);
                        let bytes = bytes.chain((count as u64).checked_sub(1));
                        naive.extend(bytes.map(|byte| (at + byte) / PAGE_SIZE));
                    }
                    Write::Words(first, words) => {
                        marks.note_words(PageIndex::new(first).expect("a page"), &words);
                        let bits = (0..words.len() as u64 * BITS).filter(|bit| {
                            words[usize::try_from(bit / BITS).expect("few")] >> (bit % BITS) & 1 == 1
                        });
                        naive.extend(bits.map(|bit| first + bit));
                    }
                    Write::Take => check(&marks.take(), &mut naive),
                }
            }
            check(&marks.take(), &mut naive);
            check(&marks.take(), &mut naive);
        }
    }

    #[test]
    fn what_was_written_while_it_was_off_is_not_taken() {
        let marks = Marks::default();
        assert!(marks.take().is_empty());
        marks.start(PageCount::from(10));
        marks.wrote(0x1000, 1);
        marks.stop();
        marks.wrote(0x2000, 1);
        marks.start(PageCount::from(10));
        assert_eq!(marks.take(), DirtyPages::default());
        // A length that no slice has.
        marks.wrote(0x9000, usize::MAX);
        assert_eq!(marks.take(), DirtyPages { words: vec![u64::MAX << 9] });
        let mut pages = DirtyPages::default();
        pages.add(&DirtyPages { words: vec![0, 1 << 5] });
        assert_eq!(
            format!("{pages:?}"),
            format!("[{:?}]", PageRange::between(69, 70).expect("one"))
        );
    }
}
