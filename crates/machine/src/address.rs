//! Host-virtual addresses; the other spaces are [`polder_units`]'.

use core::fmt;

use polder_units::{Frame, FrameRange, PAGE_SHIFT, PAGE_SIZE};

/// A page of a process's address space, by number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vpn(u64);

/// Pages of a process's address space.
pub type VpnRange = FrameRange<Vpn>;

impl Vpn {
    /// The page with this number, or `None` from 2^52 on (no 64-bit byte address).
    pub const fn new(number: u64) -> Option<Self> {
        if number < 1 << (u64::BITS - PAGE_SHIFT) { Some(Self(number)) } else { None }
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address of the page's first byte.
    pub const fn hva(self) -> Hva {
        Hva(self.0 << PAGE_SHIFT)
    }
}

impl Frame for Vpn {
    fn new(number: u64) -> Option<Self> {
        Self::new(number)
    }

    fn get(self) -> u64 {
        self.0
    }
}

impl From<u32> for Vpn {
    fn from(number: u32) -> Self {
        Self(u64::from(number))
    }
}

impl fmt::LowerHex for Vpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl fmt::Display for Vpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Vpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vpn({:#x})", self.0)
    }
}

/// A host-virtual address in some process, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hva(u64);

impl Hva {
    /// The address `address`.
    pub const fn new(address: u64) -> Self {
        Self(address)
    }

    /// The address in bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The page the address lies in.
    pub const fn vpn(self) -> Vpn {
        Vpn(self.0 >> PAGE_SHIFT)
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

impl fmt::Display for Hva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Hva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hva({:#x})", self.0)
    }
}
