//! Sizes as people write them: `512M`.

use core::fmt;
use core::str::FromStr;

use crate::{PAGE_SHIFT, PAGE_SIZE, PageCount, RangeError};

/// Why a text is no size, level or range.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum ParseError {
    /// Not a number, or one above 2^64.
    #[error("expected a number below 2^64 such as 4096 or 0x1000")]
    Number,
    /// Not a size.
    #[error("expected bytes, or a number with K, M, G or T, such as 512M")]
    Size,
    /// A size of 2^64 bytes or more.
    #[error("the size is 2^64 bytes or more")]
    TooLarge,
    /// Not a level.
    #[error("expected a page size: 4k, 2m or 1g")]
    Level,
    /// Not of the form of a range.
    #[error("expected a range of bytes such as [0x1000..0x3000)")]
    RangeForm,
    /// Of the form of a range, but none.
    #[error(transparent)]
    Range(#[from] RangeError),
}

/// A length in bytes, parsed and printed with the suffixes K, M, G and T (powers of 1024).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    const SUFFIXES: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

    /// `bytes` bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The pages of it.
    ///
    /// # Errors
    /// [`RangeError::Empty`] for 0, [`RangeError::Unaligned`] for a part of a page.
    pub const fn pages(self) -> Result<PageCount, RangeError> {
        if self.0 == 0 {
            return Err(RangeError::Empty);
        }
        match PageCount::new(self.0 >> PAGE_SHIFT) {
            Some(pages) if self.0.is_multiple_of(PAGE_SIZE) => Ok(pages),
            _ => Err(RangeError::Unaligned { value: self.0 }),
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = Self::SUFFIXES
            .into_iter()
            .find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        match exact {
            Some((suffix, shift)) => write!(f, "{}{suffix}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl fmt::Debug for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ByteSize({self})")
    }
}

impl FromStr for ByteSize {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let suffix = &text[digits.len()..];
        let shift = match suffix.strip_suffix("iB").unwrap_or(suffix) {
            "" if suffix.is_empty() => 0,
            letter => {
                let named = |(known, _): &(char, u32)| {
                    letter.eq_ignore_ascii_case(known.encode_utf8(&mut [0; 4]))
                };
                Self::SUFFIXES.into_iter().find(named).ok_or(ParseError::Size)?.1
            }
        };
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(ParseError::Size);
        }
        let number: u64 = digits.parse().map_err(|_| ParseError::TooLarge)?;
        number.checked_mul(1 << shift).map(Self).ok_or(ParseError::TooLarge)
    }
}

#[cfg(test)]
mod tests {
    use std::format;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4k", 4096),
            ("64M", 64 << 20),
            ("64MiB", 64 << 20),
            ("1g", 1 << 30),
            ("16T", 16 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize::new(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "M", "-1", "1.5G", "64 M", "64MB", "iB", "1MiBiB", "12x", "0x10", "٣"] {
            assert_eq!(text.parse::<ByteSize>(), Err(ParseError::Size), "{text}");
        }
        for text in ["18446744073709551616", "16777216T"] {
            assert_eq!(text.parse::<ByteSize>(), Err(ParseError::TooLarge), "{text}");
        }
    }

    #[test]
    fn a_size_is_whole_pages_or_refused() {
        assert_eq!(ByteSize::new(8192).pages(), Ok(PageCount::from(2)));
        assert_eq!(ByteSize::new(0).pages(), Err(RangeError::Empty));
        assert_eq!(ByteSize::new(4097).pages(), Err(RangeError::Unaligned { value: 4097 }));
    }

    proptest! {
        #[test]
        fn sizes_parse_as_they_print(bytes: u64, shift in 0u32..64) {
            let size = ByteSize::new(bytes << shift);
            prop_assert_eq!(format!("{size}").parse(), Ok(size));
        }

        #[test]
        fn parsing_never_panics(text in "\\PC{0,12}") {
            let _ = text.parse::<ByteSize>();
        }
    }
}
