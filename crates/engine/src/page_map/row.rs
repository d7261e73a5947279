//! The rows of the map: a few bits for each page of a level, packed into atomic words.
//!
//! One writer at a time, which is why a change is a load and a store and no read-modify-write.
//! Every load of a reader acquires and every store releases: see the protocol in [`super`].

use alloc::boxed::Box;
use core::ops::Range;

use super::facts::{Change, FACTS};
use crate::sync::{AtomicU64, Ordering, zeroed_words};

/// Of a large page: its pages differ, or are about to. Its bits of [`FACTS`] are 0 then.
pub(super) const MIXED: u8 = 0b0100;
/// Of a large page: it is or has been mixed, so what is finer than it is kept true.
pub(super) const SPLIT: u8 = 0b1000;

/// Large pages of one level: the bits of their facts, [`MIXED`] and [`SPLIT`].
pub(super) type LargePages = Row<4>;
/// 4K pages, the two bits of their facts each.
pub(super) type Leaves = Row<2>;

/// Pages of one level, `BITS` bits each; `BITS` divides 64.
pub(super) struct Row<const BITS: usize> {
    words: Box<[AtomicU64]>,
}

impl<const BITS: usize> Row<BITS> {
    /// The pages in a word.
    const PER_WORD: usize = 64 / BITS;
    /// The bits of one page.
    const PAGE: u8 = (1 << BITS) - 1;
    /// The lowest bit of every page of a word: times the bits of one page, a word full of them.
    const ONES: u64 = u64::MAX / ((1 << BITS) - 1);

    /// A row of `len` pages, all 0.
    pub(super) fn new(len: usize) -> Self {
        Self { words: zeroed_words(len.div_ceil(Self::PER_WORD)) }
    }

    #[inline]
    pub(super) fn get(&self, index: usize) -> u8 {
        let word = self.words[index / Self::PER_WORD].load(Ordering::Acquire);
        let [bits, ..] = (word >> Self::shift(index)).to_le_bytes();
        bits & Self::PAGE
    }

    /// Sets all bits of one page.
    pub(super) fn put(&self, index: usize, bits: u8) {
        self.change(index..index + 1, Change { mask: Self::PAGE, value: bits });
    }

    /// Changes every page of `range`, a word at a time: one store, and none where it would store
    /// what is there.
    pub(super) fn change(&self, range: Range<usize>, change: Change) {
        let (mask, value) = (Self::all(change.mask), Self::all(change.value));
        for (index, within) in Self::words_of(range) {
            let old = self.words[index].load(Ordering::Relaxed);
            let new = (old & !(mask & within)) | (value & within);
            if new != old {
                self.words[index].store(new, Ordering::Release);
            }
        }
    }

    /// The facts of all of `range`, if they are the same and none of it is mixed.
    pub(super) fn uniform(&self, range: Range<usize>) -> Option<u8> {
        let first = self.get(range.start);
        let uniform = first & MIXED == 0 && self.run_end(range.clone()) == range.end;
        uniform.then_some(first & FACTS)
    }

    /// Where the run of pages with equal facts, or of mixed ones, that starts with `range` ends:
    /// in it, or at its end.
    pub(super) fn run_end(&self, range: Range<usize>) -> usize {
        let first = Self::all(self.get(range.start));
        let compared = Self::all((FACTS | MIXED) & Self::PAGE);
        let (start, end) = (range.start / Self::PER_WORD, range.end.div_ceil(Self::PER_WORD));
        let from = u64::MAX << Self::shift(range.start);
        let differing = |word: &AtomicU64| (word.load(Ordering::Relaxed) ^ first) & compared;
        let found = |index: usize, differing: u64| {
            index * Self::PER_WORD + differing.trailing_zeros() as usize / BITS
        };
        // The first word has pages before the range; what the last one has after it is cut off.
        let at_start = differing(&self.words[start]) & from;
        if at_start != 0 {
            return found(start, at_start).min(range.end);
        }
        let mut rest = (start + 1..).zip(&self.words[start + 1..end]);
        let other = rest.find_map(|(index, word)| match differing(word) {
            0 => None,
            differing => Some(found(index, differing)),
        });
        other.map_or(range.end, |other| other.min(range.end))
    }

    pub(super) fn heap_bytes(&self) -> usize {
        size_of_val(&*self.words)
    }

    /// A word with `bits` for every page.
    const fn all(bits: u8) -> u64 {
        bits as u64 * Self::ONES
    }

    const fn shift(index: usize) -> usize {
        index % Self::PER_WORD * BITS
    }

    /// The words that hold `range`, which is not empty, each with a mask of its part of it.
    fn words_of(range: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
        let (first, last) = (range.start / Self::PER_WORD, (range.end - 1) / Self::PER_WORD);
        let from = u64::MAX << Self::shift(range.start);
        let to = u64::MAX >> (64 - BITS - Self::shift(range.end - 1));
        (first..=last).map(move |index| {
            let from = if index == first { from } else { u64::MAX };
            let to = if index == last { to } else { u64::MAX };
            (index, from & to)
        })
    }
}

/// A copy of what the words hold now. Zeros are not written, so memory that the system has not
/// given yet stays so.
impl<const BITS: usize> Clone for Row<BITS> {
    fn clone(&self) -> Self {
        let words = zeroed_words(self.words.len());
        for (copy, word) in words.iter().zip(&*self.words) {
            match word.load(Ordering::Relaxed) {
                0 => {}
                bits => copy.store(bits, Ordering::Relaxed),
            }
        }
        Self { words }
    }
}
