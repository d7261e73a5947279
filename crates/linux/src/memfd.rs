//! A memfd: where the bytes live.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use polder_units::{PageCount, PageRange};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;

use crate::Error;
use crate::call::Call;

/// A memfd whose size is fixed for life, by seals: nobody who gets hold of the descriptor can
/// make a mapped page disappear by truncating it.
#[derive(Debug)]
pub struct Memfd {
    fd: OwnedFd,
    pages: PageCount,
}

impl Memfd {
    /// A memfd of `pages` 4 KiB pages, none of which exists yet.
    ///
    /// # Errors
    /// Of `memfd_create`, `ftruncate` (`EFBIG` for a size that no file can have) and `F_ADD_SEALS`.
    pub fn new(name: &str, pages: PageCount) -> Result<Self, Error> {
        let truncate = Call::new("ftruncate");
        // It takes a signed size.
        let bytes = pages.bytes().filter(|&bytes| i64::try_from(bytes).is_ok());
        let bytes = bytes.ok_or(truncate.error(Errno::FBIG))?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = Call::new("memfd_create").make(|| rustix::fs::memfd_create(name, flags))?;
        truncate.make(|| rustix::fs::ftruncate(&fd, bytes))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        Call::new("F_ADD_SEALS").make(|| rustix::fs::fcntl_add_seals(&fd, seals))?;
        Ok(Self { fd, pages })
    }

    /// Its size.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// Frees the pages, under every mapping; they read as zeros afterwards.
    ///
    /// # Errors
    /// Of `fallocate`.
    pub fn punch_hole(&self, range: PageRange) -> Result<(), Error> {
        punch_hole(&self.fd, range)
    }

    /// Writes bytes at `offset`, by `pwrite(2)`: no mapping is touched, and nobody who watches one
    /// is told.
    ///
    /// # Errors
    /// Of `pwrite`: `ENOSPC` and `ENOMEM` where there is no memory.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        let (mut left, mut at) = (from, offset);
        while !left.is_empty() {
            let call = Call::new("pwrite");
            match call.make(|| rustix::io::pwrite(&self.fd, left, at))? {
                0 => return Err(call.error(Errno::NOSPC)),
                count => {
                    left = &left[count..];
                    at += count as u64;
                }
            }
        }
        Ok(())
    }

    /// The runs of pages that exist, in order: those that somebody touched. For reports; whether a
    /// page's contents are good is not asked here.
    ///
    /// # Errors
    /// Of `lseek`.
    pub fn existing(&self) -> Result<Vec<PageRange>, Error> {
        let call = Call::new("lseek");
        let seek = |to| match call.attempt(|| rustix::fs::seek(&self.fd, to)) {
            Ok(offset) => Ok(Some(offset)),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(call.error(errno)),
        };
        let mut runs = Vec::new();
        let mut from = 0;
        while let Some(start) = seek(SeekFrom::Data(from))? {
            let Some(end) = seek(SeekFrom::Hole(start))? else { break };
            runs.extend(PageRange::from_bytes(start, end - start).ok());
            from = end;
        }
        Ok(runs)
    }
}

/// Frees pages of a file, or of a guest_memfd.
pub(crate) fn punch_hole(fd: &OwnedFd, range: PageRange) -> Result<(), Error> {
    let bytes = range.bytes();
    let call = Call::on("fallocate", bytes);
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let length = bytes.len().ok_or(call.error(Errno::INVAL))?;
    call.make(|| rustix::fs::fallocate(fd, flags, bytes.start(), length))
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
