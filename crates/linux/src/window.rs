//! A window: a mapping of a guest_memfd that nobody can touch, to ask which pages exist.
//!
//! A guest_memfd knows no `lseek(SEEK_DATA)`, and `cachestat(2)` is an option of the kernel's.
//! `mincore(2)` of a mapping tells of the pages that its guest has touched.

use core::ffi::c_void;
use core::ptr::NonNull;
use std::os::fd::BorrowedFd;

use polder_units::{PAGE_BYTES, PageRange};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::Error;

#[derive(Debug)]
pub(crate) struct Window {
    base: NonNull<c_void>,
    length: usize,
}

// SAFETY: it is an address and a length, of memory that is never touched.
unsafe impl Send for Window {}
// SAFETY: as for Send.
unsafe impl Sync for Window {}

impl Window {
    /// Maps `length` bytes of a guest_memfd that was made with `GUEST_MEMFD_FLAG_MMAP`.
    pub(crate) fn new(fd: BorrowedFd<'_>, length: u64) -> Result<Self, Error> {
        let length = usize::try_from(length).map_err(|_| Error::new("mmap", Errno::NOMEM))?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other.
        let base = unsafe {
            rustix::mm::mmap(core::ptr::null_mut(), length, ProtFlags::empty(), flags, fd, 0)
        }
        .map_err(|errno| Error::new("mmap", errno))?;
        let window =
            Self { base: NonNull::new(base).ok_or(Error::new("mmap", Errno::NOMEM))?, length };
        // SAFETY: the mapping is ours; the advice changes no contents.
        unsafe { rustix::mm::madvise(window.base.as_ptr(), length, Advice::LinuxDontFork) }
            .map_err(|errno| Error::new("madvise", errno))?;
        Ok(window)
    }

    /// How many pages of a range exist.
    pub(crate) fn count(&self, range: PageRange) -> Result<u64, Error> {
        const MOST: usize = 1 << 16;
        let bytes = range.bytes();
        let invalid = Error::on("mincore", bytes, Errno::INVAL);
        let start = usize::try_from(bytes.start()).map_err(|_| invalid)?;
        let end = start
            .checked_add(bytes.len().and_then(|len| usize::try_from(len).ok()).ok_or(invalid)?)
            .filter(|end| *end <= self.length)
            .ok_or(invalid)?;
        let mut exist = vec![0u8; MOST.min((end - start) / PAGE_BYTES)];
        let mut count = 0;
        for at in (start..end).step_by(MOST * PAGE_BYTES) {
            let length = (end - at).min(MOST * PAGE_BYTES);
            let address = self.base.as_ptr().wrapping_byte_add(at);
            // SAFETY: the range lies in this mapping, and `exist` has a byte for each page of it.
            let asked = unsafe { libc::mincore(address, length, exist.as_mut_ptr()) };
            if asked != 0 {
                let errno = Errno::from_io_error(&std::io::Error::last_os_error());
                return Err(Error::on("mincore", bytes, errno.unwrap_or(Errno::IO)));
            }
            let pages = &exist[..length / PAGE_BYTES];
            count += pages.iter().filter(|page| **page & 1 != 0).count() as u64;
        }
        Ok(count)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr(), self.length) };
        debug_assert_eq!(unmapped, Ok(()), "munmap of our own mapping");
    }
}
