//! A view: one mapping of a memfd.

use core::ffi::c_void;
use core::ptr::NonNull;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use polder_units::{ByteRange, Level, PAGE_SHIFT, PageRange};
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

/// A mapping of a whole memfd, or of a guest_memfd in its place. Children don't inherit it
/// (`MADV_DONTFORK`: an inherited copy would not be watched by a userfaultfd), core dumps don't
/// contain it (`MADV_DONTDUMP`).
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
    /// Those of `mmap` (`ENOMEM` where the address space is used up) and `madvise`.
    pub fn new(memfd: &Arc<Memfd>) -> Result<Self, Error> {
        sigbus::install();
        let bytes = memfd.pages().bytes().and_then(|bytes| usize::try_from(bytes).ok());
        let map = Call::new("mmap");
        let length = bytes.ok_or(map.error(Errno::NOMEM))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // Hugetlb pages are reserved by mappings that don't say so: a punched hole would not be.
        let flags = match memfd.granule() {
            Level::Size4K => MapFlags::SHARED | MapFlags::NORESERVE,
            Level::Size2M | Level::Size1G => MapFlags::SHARED,
        };
        let any = core::ptr::null_mut();
        // SAFETY: a new mapping at an address of the kernel's choice touches no other.
        let mapped = || unsafe { rustix::mm::mmap(any, length, protection, flags, memfd, 0) };
        let base = NonNull::new(map.make(mapped)?).ok_or(map.error(Errno::NOMEM))?;
        let view = Self { base, length, memfd: Arc::clone(memfd) };
        view.keep_from_children()?;
        Ok(view)
    }

    /// Maps all of `memfd` at a multiple of 2M, and asks for transparent huge pages there.
    ///
    /// # Errors
    /// As [`View::new`].
    pub fn of_huge_pages(memfd: &Arc<Memfd>) -> Result<Self, Error> {
        const ALIGNMENT: usize = 2 << 20;
        sigbus::install();
        let bytes = memfd.pages().bytes().and_then(|bytes| usize::try_from(bytes).ok());
        let map = Call::new("mmap");
        let length = bytes.ok_or(map.error(Errno::NOMEM))?;
        let room = length.checked_add(ALIGNMENT).ok_or(map.error(Errno::NOMEM))?;
        let (any, none) = (core::ptr::null_mut(), MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice touches no other.
        let reserve = || unsafe { rustix::mm::mmap_anonymous(any, room, ProtFlags::empty(), none) };
        let start = map.make(reserve)?;
        let skip = start.addr().next_multiple_of(ALIGNMENT) - start.addr();
        let base = start.wrapping_byte_add(skip);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the addresses lie in the mapping made above, to which nothing refers.
        let place = || unsafe { rustix::mm::mmap(base, length, protection, flags, memfd, 0) };
        let placed = map.make(place);
        let edges = [(start, skip), (base.wrapping_byte_add(length), ALIGNMENT - skip)];
        for (edge, length) in edges.into_iter().filter(|&(_, length)| length > 0) {
            // SAFETY: what is around the view is of the mapping made above.
            let unmap = || unsafe { rustix::mm::munmap(edge, length) };
            // For want of memory it can fail. Then addresses are lost that nobody uses.
            let _ = Call::new("munmap").make(unmap);
        }
        let base = NonNull::new(placed?).ok_or(map.error(Errno::NOMEM))?;
        let view = Self { base, length, memfd: Arc::clone(memfd) };
        view.keep_from_children()?;
        // SAFETY: the mapping is ours; the advice changes no contents.
        let advise =
            || unsafe { rustix::mm::madvise(view.base.as_ptr(), length, Advice::LinuxHugepage) };
        Call::new("madvise(MADV_HUGEPAGE)").make(advise)?;
        Ok(view)
    }

    /// Has the kernel make one huge page of each 2M of the range, and map it here as one.
    ///
    /// # Errors
    /// Those of `madvise(MADV_COLLAPSE)`: `ENOMEM`, `EAGAIN`, `EBUSY`, `EINVAL` for what can't be
    /// one.
    pub fn collapse(&self, range: PageRange) -> Result<(), Error> {
        let bytes = range.bytes();
        let call = Call::on("madvise(MADV_COLLAPSE)", bytes);
        let (start, length) = self.within(bytes).ok_or(call.error(Errno::INVAL))?;
        let address = self.as_ptr().wrapping_add(start).cast();
        call.make(|| {
            // SAFETY: the bytes lie in this mapping; their contents stay, at other frames perhaps.
            let done = unsafe { libc::madvise(address, length, libc::MADV_COLLAPSE) };
            if done == 0 { Ok(()) } else { Err(call::last()) }
        })
    }

    /// The runs of its pages that the page tables of this mapping have.
    ///
    /// # Errors
    /// Those of `mincore`.
    pub fn present(&self) -> Result<Vec<PageRange>, Error> {
        const AT_ONCE: usize = 1 << 30;
        let mut runs: Vec<PageRange> = Vec::new();
        let mut flags = vec![0u8; AT_ONCE.min(self.length) >> PAGE_SHIFT];
        for start in (0..self.length).step_by(AT_ONCE) {
            let length = AT_ONCE.min(self.length - start);
            let address = self.as_ptr().wrapping_add(start).cast();
            Call::new("mincore").make(|| {
                // SAFETY: the addresses are this mapping's, and there is a flag for each page.
                let done = unsafe { libc::mincore(address, length, flags.as_mut_ptr()) };
                if done == 0 { Ok(()) } else { Err(call::last()) }
            })?;
            let first = (start >> PAGE_SHIFT) as u64;
            for (page, _) in
                (first..).zip(&flags[..length >> PAGE_SHIFT]).filter(|it| it.1 & 1 == 1)
            {
                let Some(one) = PageRange::between(page, page + 1) else { continue };
                match runs.last_mut().and_then(|last| Some((last.append(one)?, last))) {
                    Some((longer, last)) => *last = longer,
                    None => runs.push(one),
                }
            }
        }
        Ok(runs)
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
    /// Those of `mmap`: `ENODEV` for a guest_memfd that can't be mapped, `EINVAL` for one of
    /// another size; then the view shows what it did. Those of `madvise`.
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
    /// Those of `madvise(MADV_DONTNEED)`.
    pub fn zap(&self, range: PageRange) -> Result<(), Error> {
        self.advise(range, Advice::LinuxDontNeed, "madvise(MADV_DONTNEED)")
    }

    /// Makes the pages exist and maps them here for writing, without changing their contents.
    ///
    /// # Errors
    /// Those of `madvise(MADV_POPULATE_WRITE)`: `ENOMEM`, `EHWPOISON`.
    pub fn populate(&self, range: PageRange) -> Result<(), Error> {
        self.advise(range, Advice::LinuxPopulateWrite, "madvise(MADV_POPULATE_WRITE)")
    }

    /// Makes the pages exist and maps them here as reads would.
    ///
    /// # Errors
    /// Those of `madvise(MADV_POPULATE_READ)`: `ENOMEM`, `EHWPOISON`.
    pub fn populate_read(&self, range: PageRange) -> Result<(), Error> {
        self.advise(range, Advice::LinuxPopulateRead, "madvise(MADV_POPULATE_READ)")
    }

    /// Makes all pages exist, maps them here, and keeps them from being reclaimed.
    ///
    /// # Errors
    /// Those of `mlock`: `ENOMEM`, `EPERM` beyond the limit of locked memory.
    pub fn lock(&self) -> Result<(), Error> {
        let call = Call::new("mlock");
        // SAFETY: the mapping is ours and lives as long as `self`; locking it changes no byte.
        call.make(|| unsafe { rustix::mm::mlock(self.as_ptr().cast(), self.length()) })
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
    /// Those of `read`: `EFAULT` where the first page is poisoned.
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
    pub(crate) fn bytes(&self, offset: u64, count: usize) -> *mut u8 {
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
    pub(crate) fn within(&self, bytes: ByteRange) -> Option<(usize, usize)> {
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
