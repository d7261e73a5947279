//! Ranges of frames and of bytes: never empty, never past the end of their space.

use core::fmt;
use core::str::FromStr;

use crate::{
    Frame, Geometry, Gfn, L2Gfn, Level, Lpn, PAGE_SHIFT, PAGE_SIZE, PageCount, PageIndex,
    ParseError, Pfn, Vpn,
};

/// Why two numbers are no range.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum RangeError {
    /// No page in it.
    #[error("the range is empty")]
    Empty,
    /// It reaches past the end of the address space.
    #[error("the range starting at {start:#x} reaches past the end of the address space")]
    Overflow {
        /// Where it starts, in the unit it was given in.
        start: u64,
    },
    /// A byte address or length that is no multiple of 4 KiB.
    #[error("{value:#x} is not a multiple of the page size, 4096")]
    Unaligned {
        /// The value, in bytes.
        value: u64,
    },
}

/// A run of frames `[start..end)`: at least one, and none past 2^52.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameRange<F> {
    start: F,
    count: PageCount,
}

/// Pages of a memory object.
pub type PageRange = FrameRange<PageIndex>;
/// Guest frames.
pub type GfnRange = FrameRange<Gfn>;
/// Host frames.
pub type PfnRange = FrameRange<Pfn>;
/// Pages of a guest's linear addresses.
pub type LpnRange = FrameRange<Lpn>;
/// Guest frames of a guest's guest.
pub type L2GfnRange = FrameRange<L2Gfn>;

/// Pages of a process's address space.
pub type VpnRange = FrameRange<Vpn>;

impl<F: Frame> FrameRange<F> {
    /// `count` frames from `start` on.
    ///
    /// # Errors
    /// [`RangeError::Empty`] for no frame, [`RangeError::Overflow`] past the last frame.
    pub fn new(start: F, count: PageCount) -> Result<Self, RangeError> {
        if count.is_zero() {
            return Err(RangeError::Empty);
        }
        match start.get().checked_add(count.get() - 1).and_then(F::new) {
            Some(_) => Ok(Self { start, count }),
            None => Err(RangeError::Overflow { start: start.get() }),
        }
    }

    /// The range of one frame.
    pub fn one(frame: F) -> Self {
        Self { start: frame, count: PageCount::ONE }
    }

    /// The frames of `size` bytes at byte address `address`.
    ///
    /// # Errors
    /// [`RangeError::Unaligned`] if either is no multiple of 4 KiB, and as [`FrameRange::new`].
    pub fn from_bytes(address: u64, size: u64) -> Result<Self, RangeError> {
        for value in [address, size] {
            if !value.is_multiple_of(PAGE_SIZE) {
                return Err(RangeError::Unaligned { value });
            }
        }
        let overflow = RangeError::Overflow { start: address };
        let start = F::new(address >> PAGE_SHIFT).ok_or(overflow)?;
        Self::new(start, PageCount::new(size >> PAGE_SHIFT).ok_or(overflow)?)
            .map_err(|error| if error == RangeError::Empty { error } else { overflow })
    }

    /// The frames `[start..end)` by number; `None` if that is empty or past 2^52.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        let count = PageCount::new(end.checked_sub(start)?)?;
        Self::new(F::new(start)?, count).ok()
    }

    /// The first frame.
    pub const fn start(self) -> F {
        self.start
    }

    /// How many frames; at least 1.
    pub const fn count(self) -> PageCount {
        self.count
    }

    /// The number after the last frame's: at most 2^52, and so perhaps no frame's.
    pub fn end(self) -> u64 {
        self.start.get() + self.count.get()
    }

    /// Whether `frame` lies in it.
    pub fn contains(self, frame: F) -> bool {
        self.start <= frame && frame.get() < self.end()
    }

    /// Whether all of `other` lies in it.
    pub fn contains_range(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// Whether they share a frame.
    pub fn overlaps(self, other: Self) -> bool {
        self.intersection(other).is_some()
    }

    /// The frames in both.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        Self::between(start.get(), self.end().min(other.end()))
    }

    /// The two as one, if `next` starts where this ends.
    pub fn append(self, next: Self) -> Option<Self> {
        let touching = self.end() == next.start.get();
        touching.then(|| Self::between(self.start.get(), next.end())).flatten()
    }

    /// What is left of it without `hole`: the part before and the part after.
    pub fn without(self, hole: Self) -> [Option<Self>; 2] {
        match self.intersection(hole) {
            None => [Some(self), None],
            Some(hole) => [
                Self::between(self.start.get(), hole.start.get()),
                Self::between(hole.end(), self.end()),
            ],
        }
    }

    /// Its frames, in order.
    pub fn frames(self) -> impl DoubleEndedIterator<Item = F> {
        (self.start.get()..self.end()).filter_map(F::new)
    }

    /// The page of `level` that `frame` lies in.
    pub fn enclosing(frame: F, level: Level, geometry: Geometry) -> Self {
        let pages = geometry.pages(level);
        let first = frame.get() & !(pages.get() - 1);
        // A power of two divides 2^52, so a page that starts below it ends there at the latest.
        Self { start: F::new(first).unwrap_or(frame), count: pages }
    }

    /// Whether it starts and ends on multiples of `level`.
    pub fn is_aligned(self, level: Level, geometry: Geometry) -> bool {
        let pages = geometry.pages(level).get();
        self.start.get().is_multiple_of(pages) && self.count.get().is_multiple_of(pages)
    }

    /// The bytes of it.
    pub fn bytes(self) -> ByteRange {
        ByteRange { start: self.start.get() << PAGE_SHIFT, pages: self.count }
    }
}

impl<F: Frame> fmt::Display for FrameRange<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}..{:#x})", self.start.get(), self.end())
    }
}

impl<F: Frame> fmt::Debug for FrameRange<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The bytes of a [`FrameRange`]: page-aligned, printed and parsed as `[0x1000..0x3000)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    pages: PageCount,
}

impl ByteRange {
    /// The first byte's address.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The length in bytes, or `None` for a whole 64-bit space.
    pub const fn len(self) -> Option<u64> {
        self.pages.bytes()
    }

    /// Never: a range has at least one page.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// The frames of it.
    pub fn frames<F: Frame>(self) -> Option<FrameRange<F>> {
        FrameRange::new(F::new(self.start >> PAGE_SHIFT)?, self.pages).ok()
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = u128::from(self.start) + u128::from(self.pages.get()) * u128::from(PAGE_SIZE);
        write!(f, "[{:#x}..{end:#x})", self.start)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ByteRange {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(')'));
        let (start, end) =
            inner.and_then(|inner| inner.split_once("..")).ok_or(ParseError::RangeForm)?;
        let [start, end] = [start, end].map(|number| match number.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => number.parse(),
        });
        let (start, end) =
            (start.map_err(|_| ParseError::Number)?, end.map_err(|_| ParseError::Number)?);
        let size = end.checked_sub(start).ok_or(ParseError::Range(RangeError::Empty))?;
        Ok(PageRange::from_bytes(start, size)?.bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::format;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::between(start, end).unwrap()
    }

    #[test]
    fn a_range_is_never_empty_and_never_wraps() {
        let last = Gfn::new((1 << 52) - 1).unwrap();
        assert_eq!(FrameRange::new(last, PageCount::ZERO), Err(RangeError::Empty));
        assert_eq!(GfnRange::one(last).end(), 1 << 52);
        assert_eq!(
            FrameRange::new(last, PageCount::from(2)),
            Err(RangeError::Overflow { start: last.get() })
        );
    }

    #[test]
    fn bytes_are_refused_by_what_is_wrong_with_them() {
        let refused = |address, size| GfnRange::from_bytes(address, size).unwrap_err();
        assert_eq!(refused(0x1001, 0x1000), RangeError::Unaligned { value: 0x1001 });
        assert_eq!(refused(0x1000, 0x10), RangeError::Unaligned { value: 0x10 });
        assert_eq!(refused(0x1000, 0), RangeError::Empty);
        let top = !(PAGE_SIZE - 1);
        assert_eq!(refused(top, 0x2000), RangeError::Overflow { start: top });
    }

    #[test]
    fn the_level_page_around_a_frame() {
        let of =
            |frame, level| PageRange::enclosing(PageIndex::from(frame), level, Geometry::X86_64);
        assert_eq!(of(513, Level::Size2M), range(512, 1024));
        assert_eq!(of(513, Level::Size1G), range(0, 1 << 18));
        assert!(range(512, 1536).is_aligned(Level::Size2M, Geometry::X86_64));
        assert!(!range(512, 1537).is_aligned(Level::Size2M, Geometry::X86_64));
    }

    #[test]
    fn byte_ranges_parse_as_they_print() {
        let bytes = range(1, 3).bytes();
        assert_eq!(format!("{bytes}"), "[0x1000..0x3000)");
        assert_eq!("[0x1000..0x3000)".parse(), Ok(bytes));
        assert_eq!("[4096..12288)".parse(), Ok(bytes));
        for (text, error) in [
            ("0x1000..0x3000", ParseError::RangeForm),
            ("[0x1000)", ParseError::RangeForm),
            ("[x..0x3000)", ParseError::Number),
            ("[0x3000..0x1000)", ParseError::Range(RangeError::Empty)),
            ("[0x1000..0x1000)", ParseError::Range(RangeError::Empty)),
            ("[0x1000..0x1800)", ParseError::Range(RangeError::Unaligned { value: 0x800 })),
        ] {
            assert_eq!(text.parse::<ByteRange>(), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn set_operations_agree_with_sets_of_frames(
            a in 0u64..24, a_len in 1u64..12, b in 0u64..24, b_len in 1u64..12,
        ) {
            let (x, y) = (range(a, a + a_len), range(b, b + b_len));
            let in_both: Vec<_> = x.frames().filter(|&frame| y.contains(frame)).collect();
            let in_x_only: Vec<_> = x.frames().filter(|&frame| !y.contains(frame)).collect();
            let frames = |ranges: &[PageRange]| -> Vec<_> {
                ranges.iter().flat_map(|range| range.frames()).collect()
            };
            let intersection = frames(&Vec::from_iter(x.intersection(y)));
            let without = frames(&Vec::from_iter(x.without(y).into_iter().flatten()));
            prop_assert_eq!(&intersection, &in_both);
            prop_assert_eq!(without, in_x_only);
            prop_assert_eq!(x.overlaps(y), !in_both.is_empty());
            prop_assert_eq!(y.contains_range(x), x.frames().all(|frame| y.contains(frame)));
            let appended = x.append(y).map(|r| (r.start(), r.end()));
            prop_assert_eq!(appended, (x.end() == b).then_some((x.start(), y.end())));
        }

        #[test]
        fn parsing_never_panics(text in "\\PC{0,24}") {
            let _ = text.parse::<ByteRange>();
        }
    }
}
