//! [`PageSize`]: what memory is made of.

use std::fmt;
use std::str::FromStr;

use polder_engine::Backing;
use polder_units::Level;

use crate::HostKind;

/// The pages that back a memory.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PageSize {
    /// 4K.
    #[default]
    Small,
    /// Transparent huge pages: 2M where the kernel has one to give, and any 4K of it can be shared
    /// with the host.
    Thp,
    /// Huge pages of 2M, reserved for the memory when it is made. On a memfd hugetlb pages.
    Huge2M,
    /// The same, of 1G.
    Huge1G,
}

impl PageSize {
    /// Every size.
    pub const ALL: [Self; 4] = [Self::Small, Self::Thp, Self::Huge2M, Self::Huge1G];

    /// The level of pages that are reserved for the memory; `None` where none are.
    pub const fn reserved(self) -> Option<Level> {
        match self {
            Self::Small | Self::Thp => None,
            Self::Huge2M => Some(Level::Size2M),
            Self::Huge1G => Some(Level::Size1G),
        }
    }

    /// The level of pages that memory is filled by.
    pub(crate) const fn level(self) -> Level {
        match self {
            Self::Small => Level::Size4K,
            Self::Thp | Self::Huge2M => Level::Size2M,
            Self::Huge1G => Level::Size1G,
        }
    }

    /// What that is to the engine, on a host.
    pub(crate) const fn backing(self, host: HostKind) -> Backing {
        match (self, host) {
            (Self::Huge2M, HostKind::Machine) => Backing::split(Level::Size2M),
            (Self::Huge1G, HostKind::Machine) => Backing::split(Level::Size1G),
            // Scenarios and tests have the machine's kernel collapse and split as it likes.
            (_, HostKind::Machine) => Backing::ANY,
            (Self::Small, _) => Backing::SMALL,
            (Self::Thp, _) => Backing::THP,
            (Self::Huge2M, _) => Backing::hugetlb(Level::Size2M),
            (Self::Huge1G, _) => Backing::hugetlb(Level::Size1G),
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Small => "4k",
            Self::Thp => "thp",
            Self::Huge2M => "2m",
            Self::Huge1G => "1g",
        })
    }
}

impl FromStr for PageSize {
    type Err = UnknownPageSize;

    fn from_str(text: &str) -> Result<Self, UnknownPageSize> {
        let named = |size: &Self| text.eq_ignore_ascii_case(&size.to_string());
        Self::ALL.into_iter().find(named).ok_or(UnknownPageSize)
    }
}

/// A text that names no page size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("expected a page size: 4k, thp, 2m or 1g")]
pub struct UnknownPageSize;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_as_they_print() {
        for size in PageSize::ALL {
            assert_eq!(size.to_string().parse(), Ok(size));
            assert_eq!(size.to_string().to_uppercase().parse(), Ok(size));
        }
        assert_eq!("16m".parse::<PageSize>(), Err(UnknownPageSize));
    }
}
