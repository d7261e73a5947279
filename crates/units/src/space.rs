//! The address spaces of a guest, and the pages of those that are not guest-physical.

use core::fmt;

use crate::frame::frame;
use crate::{Frame, Gfn, PAGE_SHIFT};

/// What a vCPU's page tables, as the hypervisor has them, translate from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum AddressSpace {
    /// Guest-physical addresses: two-dimensional paging.
    Gpa,
    /// Linear addresses, by the guest's own page tables: shadow paging.
    Linear,
    /// Guest-physical addresses of a guest's guest, by the nested page tables of the guest.
    L2Gpa,
}

impl AddressSpace {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Gpa, Self::Linear, Self::L2Gpa];
}

impl fmt::Display for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Gpa => "guest-physical",
            Self::Linear => "linear",
            Self::L2Gpa => "L2 guest-physical",
        })
    }
}

/// A page of an address space of a guest: what a call about such pages is generic over, so that
/// its argument's type names the space.
pub trait GuestPage: Frame {
    /// The space.
    const SPACE: AddressSpace;
}

impl GuestPage for Gfn {
    const SPACE: AddressSpace = AddressSpace::Gpa;
}

frame! {
    /// A linear page number: a 4 KiB page of a guest's linear addresses.
    Lpn
}
frame! {
    /// A guest frame number of a guest's guest.
    L2Gfn
}

impl GuestPage for Lpn {
    const SPACE: AddressSpace = AddressSpace::Linear;
}

impl GuestPage for L2Gfn {
    const SPACE: AddressSpace = AddressSpace::L2Gpa;
}

impl Lpn {
    /// The page that a linear address lies in.
    pub const fn of(address: u64) -> Self {
        Self(address >> PAGE_SHIFT)
    }

    /// The address of the page's first byte.
    pub const fn address(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_knows_its_space() {
        fn space<P: GuestPage>(_: P) -> AddressSpace {
            P::SPACE
        }
        assert_eq!(space(Gfn::from(1)), AddressSpace::Gpa);
        assert_eq!(space(Lpn::of(0xffff_8000_0000_1fff)), AddressSpace::Linear);
        assert_eq!(space(L2Gfn::from(1)), AddressSpace::L2Gpa);
        assert_eq!(Lpn::of(u64::MAX).address(), !0xfff);
    }
}
