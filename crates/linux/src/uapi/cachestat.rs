//! `cachestat(2)`, Linux 6.5: `libc` and `rustix` have no call of it.

use std::os::fd::{AsRawFd, BorrowedFd};

use linux_raw_sys::general::{__NR_cachestat, cachestat as Counts, cachestat_range};
use rustix::io::Errno;

use crate::call::last;

/// How many pages of a file's bytes are in memory.
pub(crate) fn cachestat(file: BorrowedFd<'_>, off: u64, len: u64) -> Result<u64, Errno> {
    let range = cachestat_range { off, len };
    let mut counts =
        Counts { nr_cache: 0, nr_dirty: 0, nr_writeback: 0, nr_evicted: 0, nr_recently_evicted: 0 };
    // SAFETY: both structures are as the kernel has them and live across the call, which reads
    // the one and writes the other.
    let result = unsafe {
        libc::syscall(__NR_cachestat.into(), file.as_raw_fd(), &raw const range, &raw mut counts, 0)
    };
    match result {
        0 => Ok(counts.nr_cache),
        _ => Err(last()),
    }
}
