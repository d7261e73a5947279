//! Frame numbers and addresses.

use core::fmt;

use crate::{PAGE_SHIFT, PAGE_SIZE};

/// The number of frames that have a 64-bit byte address.
pub(crate) const FRAMES: u64 = 1 << (u64::BITS - PAGE_SHIFT);

/// A frame number: what [`FrameRange`](crate::FrameRange) is generic over.
pub trait Frame: Copy + Ord + fmt::Debug + fmt::LowerHex {
    /// The frame with this number, or `None` from 2^52 on.
    fn new(number: u64) -> Option<Self>;
    /// The number.
    fn get(self) -> u64;
}

macro_rules! frame {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The frame with this number, or `None` from 2^52 on (it would have no 64-bit
            /// byte address).
            pub const fn new(number: u64) -> Option<Self> {
                if number < $crate::frame::FRAMES { Some(Self(number)) } else { None }
            }

            /// The number.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The frame `count` further on, or `None` from 2^52 on.
            pub const fn checked_add(self, count: $crate::PageCount) -> Option<Self> {
                match self.0.checked_add(count.get()) {
                    Some(number) => Self::new(number),
                    None => None,
                }
            }

            /// The frames from `earlier` to here, or `None` if `earlier` is the later one.
            pub const fn checked_sub(self, earlier: Self) -> Option<$crate::PageCount> {
                match self.0.checked_sub(earlier.0) {
                    Some(count) => $crate::PageCount::new(count),
                    None => None,
                }
            }

            /// Whether this is a multiple of `count`. Every frame is a multiple of 1, none of 0.
            pub const fn is_multiple_of(self, count: $crate::PageCount) -> bool {
                count.get() != 0 && self.0 % count.get() == 0
            }
        }

        impl $crate::Frame for $name {
            fn new(number: u64) -> Option<Self> {
                Self::new(number)
            }

            fn get(self) -> u64 {
                self.0
            }
        }

        impl From<u32> for $name {
            fn from(number: u32) -> Self {
                Self(u64::from(number))
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl core::fmt::LowerHex for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                core::fmt::LowerHex::fmt(&self.0, f)
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

pub(crate) use frame;

frame! {
    /// A guest frame number: a 4 KiB page of guest-physical space.
    Gfn
}
frame! {
    /// A page frame number: a 4 KiB page of host-physical memory.
    Pfn
}
frame! {
    /// A 4 KiB page of a memory object, counted from its start.
    PageIndex
}

frame! {
    /// A virtual page number: a 4 KiB page of a process's address space.
    Vpn
}

impl Gfn {
    /// The address of the frame's first byte.
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}

impl Vpn {
    /// The address of the page's first byte.
    pub const fn hva(self) -> Hva {
        Hva(self.0 << PAGE_SHIFT)
    }
}

impl PageIndex {
    /// The byte offset of the page in its object.
    pub const fn offset(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $page:ident by $method:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The address `address`.
            pub const fn new(address: u64) -> Self {
                Self(address)
            }

            /// The address in bytes.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The page that the address lies in.
            pub const fn $method(self) -> $page {
                $page(self.0 >> PAGE_SHIFT)
            }

            /// The byte within its page, below [`PAGE_SIZE`].
            pub const fn page_offset(self) -> u64 {
                self.0 % PAGE_SIZE
            }

            /// The address `bytes` further on, or `None` past 2^64.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(address) => Some(Self(address)),
                    None => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

address! {
    /// A guest-physical address, in bytes.
    Gpa, Gfn by gfn
}
address! {
    /// A host-virtual address in some process, in bytes.
    Hva, Vpn by vpn
}

/// A number of 4 KiB pages; may be 0.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageCount(u64);

impl PageCount {
    /// No page.
    pub const ZERO: Self = Self(0);
    /// One page.
    pub const ONE: Self = Self(1);

    /// `count` pages, or `None` above 2^52 (more than a 64-bit byte length holds).
    pub const fn new(count: u64) -> Option<Self> {
        if count <= FRAMES { Some(Self(count)) } else { None }
    }

    /// The number of pages.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whether it is no page at all.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The length in bytes, or `None` for all 2^52 pages: 2^64 bytes.
    pub const fn bytes(self) -> Option<u64> {
        self.0.checked_mul(PAGE_SIZE)
    }

    /// The sum, or `None` above 2^52.
    pub const fn checked_add(self, more: Self) -> Option<Self> {
        match self.0.checked_add(more.0) {
            Some(count) => Self::new(count),
            None => None,
        }
    }

    /// The difference, or `None` below 0.
    pub const fn checked_sub(self, less: Self) -> Option<Self> {
        match self.0.checked_sub(less.0) {
            Some(count) => Some(Self(count)),
            None => None,
        }
    }
}

impl From<u32> for PageCount {
    fn from(count: u32) -> Self {
        Self(u64::from(count))
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, if self.0 == 1 { "page" } else { "pages" })
    }
}

impl fmt::Debug for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageCount({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::format;

    use super::*;

    #[test]
    fn a_frame_number_always_has_a_byte_address() {
        assert_eq!(Gfn::new((1 << 52) - 1).unwrap().gpa().get(), !(PAGE_SIZE - 1));
        assert_eq!(Gfn::new(1 << 52), None);
        assert_eq!(PageIndex::from(u32::MAX).checked_add(PageCount::new(1 << 52).unwrap()), None);
    }

    #[test]
    fn an_address_knows_its_frame() {
        let gpa = Gpa::new(0x1234_5678);
        assert_eq!((gpa.gfn(), gpa.page_offset()), (Gfn::from(0x12345), 0x678));
        assert_eq!(Gpa::new(u64::MAX).checked_add(1), None);
    }

    #[test]
    fn distances_do_not_wrap() {
        let (five, nine) = (Pfn::from(5), Pfn::from(9));
        assert_eq!(nine.checked_sub(five), Some(PageCount::from(4)));
        assert_eq!(five.checked_sub(nine), None);
        assert!(!five.is_multiple_of(PageCount::ZERO));
        assert!(five.is_multiple_of(PageCount::ONE));
    }

    #[test]
    fn numbers_print_in_hex_and_counts_in_words() {
        assert_eq!(format!("{} {:?}", Gfn::from(16), PageIndex::from(17)), "0x10 PageIndex(0x11)");
        assert_eq!(format!("{}, {}", PageCount::ONE, PageCount::from(512)), "1 page, 512 pages");
    }
}
