//! The numbers of guest memory, each a type of its own.
//!
//! | type | counts | space |
//! |---|---|---|
//! | [`Gpa`] | bytes | guest-physical |
//! | [`Gfn`] | 4 KiB pages | guest-physical |
//! | [`Lpn`] | 4 KiB pages | a guest's linear addresses |
//! | [`L2Gfn`] | 4 KiB pages | guest-physical, of a guest's guest |
//! | [`PageIndex`] | 4 KiB pages | the memory object |
//! | [`Hva`] | bytes | a process's virtual addresses |
//! | [`Vpn`] | 4 KiB pages | a process's virtual addresses |
//! | [`Pfn`] | 4 KiB pages | host-physical |
//! | [`PageCount`] | 4 KiB pages | a length, in any of them |
//! | [`ByteSize`] | bytes | a length |
//!
//! None of them has an operator: `checked_add` and `checked_sub` make every caller say what an
//! overflow means. A frame number is below 2^52 (a 64-bit byte address), so that turning it into
//! an address can't overflow. A [`FrameRange`] is never empty and never wraps. Who holds one of
//! these types holds a checked value; what a guest, a file or a command line says becomes one
//! only through a constructor that can refuse it.

#![no_std]

#[cfg(test)]
extern crate std;

mod frame;
mod level;
mod range;
mod size;
mod space;

pub use frame::{Frame, Gfn, Gpa, Hva, PageCount, PageIndex, Pfn, Vpn};
pub use level::{Geometry, Level};
pub use range::{
    ByteRange, FrameRange, GfnRange, L2GfnRange, LpnRange, PageRange, PfnRange, RangeError,
    VpnRange,
};
pub use size::{ByteSize, ParseError};
pub use space::{AddressSpace, GuestPage, L2Gfn, Lpn};

/// Bytes of a page, 4 KiB: the unit of every frame number.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// [`PAGE_SIZE`] as the length of a buffer.
pub const PAGE_BYTES: usize = 1 << PAGE_SHIFT;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
