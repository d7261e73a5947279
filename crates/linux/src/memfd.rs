//! A memfd: where the bytes live.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use polder_units::{PageCount, PageRange};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;

use crate::Error;

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
        let bytes = pages.bytes().ok_or(Error::new("ftruncate", Errno::FBIG))?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create(name, flags)
            .map_err(|errno| Error::new("memfd_create", errno))?;
        // ftruncate takes a signed size.
        let errno = if i64::try_from(bytes).is_err() { Err(Errno::FBIG) } else { Ok(()) };
        errno
            .and_then(|()| rustix::fs::ftruncate(&fd, bytes))
            .map_err(|errno| Error::new("ftruncate", errno))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|errno| Error::new("F_ADD_SEALS", errno))?;
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
        let bytes = range.bytes();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let length = bytes.len().ok_or(Error::on("fallocate", bytes, Errno::INVAL))?;
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.fd, flags, bytes.start(), length))
            .map_err(|errno| Error::on("fallocate", bytes, errno))
    }

    /// The runs of pages that exist, in order: those that somebody touched. For reports; whether a
    /// page's contents are good is not asked here.
    ///
    /// # Errors
    /// Of `lseek`.
    pub fn existing(&self) -> Result<Vec<PageRange>, Error> {
        let seek = |to| match rustix::fs::seek(&self.fd, to) {
            Ok(offset) => Ok(Some(offset)),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(Error::new("lseek", errno)),
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

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
