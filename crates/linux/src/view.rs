//! A view: one mapping of a memfd.

use core::ffi::c_void;
use core::ptr::NonNull;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use polder_units::{ByteRange, PageRange};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::call::{self, Call};
use crate::copy::copy;
use crate::{Error, GuestMemfd, Memfd, sigbus};

/// A copy that ended early: the first byte of the object that could not be touched. Its page is
/// poisoned (somebody denies the touch), or there is no memory for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("byte {offset:#x} can't be touched: its page is poisoned, or memory has run out")]
pub struct Touched {
    /// The byte's offset in the object.
    pub offset: u64,
}

/// A mapping of a whole memfd, or of a guest_memfd in its place. Children don't inherit it (`MADV_DONTFORK`: an inherited copy would
/// not be watched by a userfaultfd), core dumps don't contain it (`MADV_DONTDUMP`).
#[derive(Debug)]
pub struct View {
    base: NonNull<c_void>,
    length: usize,
    memfd: Arc<Memfd>,
}

// SAFETY: it is an address and a length; all access goes through `copy`, which allows for
// concurrent change.
unsafe impl Send for View {}
// SAFETY: as for Send; no method needs exclusive access.
unsafe impl Sync for View {}

impl View {
    /// Maps all of `memfd`.
    ///
    /// # Errors
    /// Of `mmap` (`ENOMEM` where the address space is used up) and `madvise`.
    pub fn new(memfd: &Arc<Memfd>) -> Result<Self, Error> {
        sigbus::install();
        let bytes = memfd.pages().bytes().and_then(|bytes| usize::try_from(bytes).ok());
        let map = Call::new("mmap");
        let length = bytes.ok_or(map.error(Errno::NOMEM))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        let any = core::ptr::null_mut();
        // SAFETY: a new mapping at an address of the kernel's choice touches no other.
        let mapped = || unsafe { rustix::mm::mmap(any, length, protection, flags, memfd, 0) };
        let base = NonNull::new(map.make(mapped)?).ok_or(map.error(Errno::NOMEM))?;
        let view = Self { base, length, memfd: Arc::clone(memfd) };
        view.keep_from_children()?;
        Ok(view)
    }

    fn keep_from_children(&self) -> Result<(), Error> {
        let (base, length) = (self.base.as_ptr(), self.length);
        for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
            // SAFETY: the mapping is ours; neither advice changes its contents.
            let advise = || unsafe { rustix::mm::madvise(base, length, advice) };
            Call::new("madvise").make(advise)?;
        }
        Ok(())
    }

    /// Shows all of a guest_memfd instead, at the same address; what was shown is seen no more,
    /// and nothing of it is watched. Of the same size, and made to be shared with the host.
    ///
    /// # Errors
    /// Of `mmap`: `ENODEV` for a guest_memfd that can't be mapped, `EINVAL` for one of another
    /// size; then the view shows what it did. Of `madvise`.
    pub fn show(&self, guest_memfd: &GuestMemfd) -> Result<(), Error> {
        if guest_memfd.pages() != self.memfd.pages() {
            return Err(Call::new("mmap").error(Errno::INVAL));
        }
        self.replace(guest_memfd.as_fd())
    }

    /// Shows its memfd again.
    ///
    /// # Errors
    /// As [`View::show`].
    pub fn show_memfd(&self) -> Result<(), Error> {
        self.replace(self.memfd.as_fd())
    }

    fn replace(&self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        let (base, length) = (self.base.as_ptr(), self.length);
        // SAFETY: the addresses are this mapping's, which is replaced as a whole; there is no Rust
        // reference to what it shows, and a raw touch meanwhile finds the one or the other.
        let replace = || unsafe { rustix::mm::mmap(base, length, protection, flags, fd, 0) };
        Call::new("mmap").make(replace)?;
        self.keep_from_children()
    }

    /// The memfd that it was made of.
    pub fn memfd(&self) -> &Arc<Memfd> {
        &self.memfd
    }

    /// Where it starts. Every use of the pointer is raw: valid while the view lives, changed by
    /// others at any time, and a touch may wait or raise SIGBUS.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr().cast()
    }

    /// The address of its first byte.
    pub fn address(&self) -> usize {
        self.base.as_ptr().addr()
    }

    /// Its length in bytes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The byte of the object at an address in the view.
    pub fn offset_of(&self, address: usize) -> Option<u64> {
        let offset = address.checked_sub(self.address())?;
        (offset < self.length).then_some(offset as u64)
    }

    /// Takes the pages out of this mapping; they stay in the memfd. Lifts poison markers too.
    ///
    /// # Errors
    /// Of `madvise(MADV_DONTNEED)`.
    pub fn zap(&self, range: PageRange) -> Result<(), Error> {
        self.advise(range, Advice::LinuxDontNeed, "madvise(MADV_DONTNEED)")
    }

    /// Makes the pages exist and maps them here for writing, without changing their contents.
    ///
    /// # Errors
    /// Of `madvise(MADV_POPULATE_WRITE)`: `ENOMEM`, `EHWPOISON`.
    pub fn populate(&self, range: PageRange) -> Result<(), Error> {
        self.advise(range, Advice::LinuxPopulateWrite, "madvise(MADV_POPULATE_WRITE)")
    }

    /// Makes the pages exist and maps them here as reads would.
    ///
    /// # Errors
    /// Of `madvise(MADV_POPULATE_READ)`: `ENOMEM`, `EHWPOISON`.
    pub fn populate_read(&self, range: PageRange) -> Result<(), Error> {
        self.advise(range, Advice::LinuxPopulateRead, "madvise(MADV_POPULATE_READ)")
    }

    /// Copies bytes of the object at `offset` out of memory.
    ///
    /// # Errors
    /// [`Touched`] at the first byte that could not be read; those before it were.
    ///
    /// # Panics
    /// If the bytes reach beyond the view.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Touched> {
        let from = self.bytes(offset, into.len());
        // SAFETY: `from` is `into.len()` bytes of this mapping, which lives as long as `self`; a
        // Rust slice does not overlap it; `new` installed the SIGBUS handler.
        let left = unsafe { copy(into.as_mut_ptr(), from, into.len()) };
        ended(offset, into.len(), left)
    }

    /// Copies bytes into memory at `offset` of the object.
    ///
    /// # Errors
    /// [`Touched`] at the first byte that could not be written; those before it were.
    ///
    /// # Panics
    /// If the bytes reach beyond the view.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Touched> {
        let to = self.bytes(offset, from.len());
        // SAFETY: as in `read`, the other way.
        let left = unsafe { copy(to, from.as_ptr(), from.len()) };
        ended(offset, from.len(), left)
    }

    /// Reads up to `count` bytes of a file into memory at `offset`, by one `read(2)`; returns how
    /// many came.
    ///
    /// # Errors
    /// Of `read`: `EFAULT` where the first page is poisoned.
    ///
    /// # Panics
    /// If the bytes reach beyond the view.
    pub fn read_from(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        count: usize,
    ) -> Result<usize, Error> {
        let to = self.bytes(offset, count);
        let read = || {
            // SAFETY: the bytes lie in this mapping, and no Rust reference points there.
            let read = unsafe { libc::read(file.as_raw_fd(), to.cast(), count) };
            usize::try_from(read).map_err(|_| call::last())
        };
        Call::new("read").make(read)
    }

    /// `count` bytes at `offset` of the object, for what is written for the `vm-memory` crate. The
    /// slice lives no longer than the view; `bitmap` goes with it, and is what tells others that
    /// the bytes are in use.
    ///
    /// # Panics
    /// If the bytes reach beyond the view.
    #[inline(always)]
    pub fn slice<B: BitmapSlice>(
        &self,
        offset: u64,
        count: usize,
        bitmap: B,
    ) -> VolatileSlice<'_, B> {
        let start = self.bytes(offset, count);
        // SAFETY: the bytes lie in this mapping, which the slice borrows. `vm-memory` touches them
        // by volatile accesses and copies of its own, as it does for its own mappings, which guest
        // and kernel change meanwhile, too.
        unsafe { VolatileSlice::with_bitmap(start, count, bitmap, None) }
    }

    #[inline(always)]
    fn bytes(&self, offset: u64, count: usize) -> *mut u8 {
        let start = usize::try_from(offset)
            .ok()
            .filter(|start| start.checked_add(count).is_some_and(|end| end <= self.length));
        let start = start.expect("the caller checked the bounds");
        self.as_ptr().wrapping_add(start)
    }

    fn advise(&self, range: PageRange, advice: Advice, call: &'static str) -> Result<(), Error> {
        let bytes = range.bytes();
        let call = Call::on(call, bytes);
        let (start, length) = self.within(bytes).ok_or(call.error(Errno::INVAL))?;
        let address = self.as_ptr().wrapping_add(start).cast();
        // SAFETY: the bytes lie in this mapping. What is advised here drops translations or makes
        // pages exist; it changes no byte of the memfd, and no Rust reference points there.
        call.make(|| unsafe { rustix::mm::madvise(address, length, advice) })
    }

    /// Start and length of a range, if it lies in the view.
    fn within(&self, bytes: ByteRange) -> Option<(usize, usize)> {
        let start = usize::try_from(bytes.start()).ok()?;
        let length = usize::try_from(bytes.len()?).ok()?;
        (start.checked_add(length)? <= self.length).then_some((start, length))
    }
}

fn ended(offset: u64, count: usize, left: usize) -> Result<(), Touched> {
    match left {
        0 => Ok(()),
        left => Err(Touched { offset: offset + (count - left) as u64 }),
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and everything that knows its address holds it.
        let unmap = || unsafe { rustix::mm::munmap(self.base.as_ptr(), self.length) };
        // For want of memory it can fail. Then addresses are lost that nobody uses.
        let _ = Call::new("munmap").make(unmap);
    }
}
