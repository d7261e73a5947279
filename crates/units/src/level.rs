//! Page-table levels and how many pages each holds.

use core::fmt;
use core::str::FromStr;

use crate::{PageCount, ParseError};

/// The level at which a page is mapped or a folio allocated: the page sizes of x86-64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Level {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl Level {
    /// Every level, smallest first.
    pub const ALL: [Self; 3] = [Self::Size4K, Self::Size2M, Self::Size1G];

    /// The next larger level.
    pub const fn larger(self) -> Option<Self> {
        match self {
            Self::Size4K => Some(Self::Size2M),
            Self::Size2M => Some(Self::Size1G),
            Self::Size1G => None,
        }
    }

    /// The next smaller level.
    pub const fn smaller(self) -> Option<Self> {
        match self {
            Self::Size4K => None,
            Self::Size2M => Some(Self::Size4K),
            Self::Size1G => Some(Self::Size2M),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Size4K => "4K",
            Self::Size2M => "2M",
            Self::Size1G => "1G",
        })
    }
}

impl FromStr for Level {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|level| {
                let name = match level {
                    Self::Size4K => "4k",
                    Self::Size2M => "2m",
                    Self::Size1G => "1g",
                };
                text.eq_ignore_ascii_case(name)
            })
            .ok_or(ParseError::Level)
    }
}

/// How many pages each level holds.
///
/// Real machines have one answer, [`Geometry::X86_64`]. The simulated machine and the search over
/// interleavings use smaller ones, so that a huge page of few pages shows what a huge page does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Geometry {
    pages_2m: u32,
    pages_1g: u32,
}

impl Geometry {
    /// 512 pages of 4 KiB to 2 MiB, 512 of those to 1 GiB (AMD APM volume 2, section 5.3).
    pub const X86_64: Self = Self { pages_2m: 512, pages_1g: 512 * 512 };

    /// A geometry with `fanout_2m` pages in a 2M page and `fanout_1g` of those in a 1G page;
    /// `None` unless both are powers of two, at least 2 and at most 512.
    pub const fn new(fanout_2m: u32, fanout_1g: u32) -> Option<Self> {
        const fn fits(fanout: u32) -> bool {
            fanout.is_power_of_two() && fanout >= 2 && fanout <= 512
        }
        if fits(fanout_2m) && fits(fanout_1g) {
            Some(Self { pages_2m: fanout_2m, pages_1g: fanout_2m * fanout_1g })
        } else {
            None
        }
    }

    /// The 4 KiB pages in one page of `level`; a power of two.
    pub fn pages(self, level: Level) -> PageCount {
        match level {
            Level::Size4K => PageCount::ONE,
            Level::Size2M => self.pages_2m.into(),
            Level::Size1G => self.pages_1g.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::format;

    use super::*;

    #[test]
    fn levels_parse_as_they_print() {
        for level in Level::ALL {
            assert_eq!(format!("{level}").parse(), Ok(level));
            assert_eq!(format!("{level}").to_lowercase().parse(), Ok(level));
        }
        assert_eq!("3M".parse::<Level>(), Err(ParseError::Level));
    }

    #[test]
    fn larger_and_smaller_are_inverse() {
        for level in Level::ALL {
            assert!(level.larger().is_none_or(|larger| larger.smaller() == Some(level)));
        }
    }

    #[test]
    fn a_geometry_is_of_powers_of_two() {
        assert_eq!(Geometry::new(512, 512), Some(Geometry::X86_64));
        assert_eq!(Geometry::new(2, 4).unwrap().pages(Level::Size1G), PageCount::from(8));
        for (fanout_2m, fanout_1g) in [(0, 2), (3, 2), (2, 1), (1024, 2)] {
            assert_eq!(Geometry::new(fanout_2m, fanout_1g), None);
        }
    }
}
