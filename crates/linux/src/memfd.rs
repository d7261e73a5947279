//! A memfd: where the bytes live.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use polder_units::{Geometry, Level, PageCount, PageRange};
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
    /// The pages that it is made of, of which it is mapped and freed in no smaller parts.
    granule: Level,
}

impl Memfd {
    /// A memfd of `pages` 4 KiB pages, none of which exists yet.
    ///
    /// # Errors
    /// Those of `memfd_create`, `ftruncate` (`EFBIG` for a size that no file can have) and
    /// `F_ADD_SEALS`.
    pub fn new(name: &str, pages: PageCount) -> Result<Self, Error> {
        Self::of(name, pages, Level::Size4K)
    }

    /// A memfd of `pages` 4 KiB pages, in hugetlb pages of `level`: all of them are reserved for
    /// it, so that no touch finds the pool empty.
    ///
    /// # Errors
    /// As [`Memfd::new`]; `ENOMEM` of `mmap` where too few huge pages are free, `ENODEV` or
    /// `EINVAL` of `memfd_create` where the kernel has none of this size, `EINVAL` of `ftruncate`
    /// for a size that is no multiple of theirs.
    pub fn hugetlb(name: &str, pages: PageCount, level: Level) -> Result<Self, Error> {
        let memfd = Self::of(name, pages, level)?;
        let all = PageRange::between(0, pages.get());
        let all = all.ok_or(Call::new("ftruncate").error(Errno::INVAL))?;
        memfd.reserve(all)?;
        Ok(memfd)
    }

    fn of(name: &str, pages: PageCount, granule: Level) -> Result<Self, Error> {
        let truncate = Call::new("ftruncate");
        // It takes a signed size.
        let bytes = pages.bytes().filter(|&bytes| i64::try_from(bytes).is_ok());
        let bytes = bytes.ok_or(truncate.error(Errno::FBIG))?;
        let huge = match granule {
            Level::Size4K => MemfdFlags::empty(),
            Level::Size2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            Level::Size1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge;
        let fd = Call::new("memfd_create").make(|| rustix::fs::memfd_create(name, flags))?;
        truncate.make(|| rustix::fs::ftruncate(&fd, bytes))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        Call::new("F_ADD_SEALS").make(|| rustix::fs::fcntl_add_seals(&fd, seals))?;
        Ok(Self { fd, pages, granule })
    }

    /// Its size.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// The pages that it is made of.
    pub fn granule(&self) -> Level {
        self.granule
    }

    /// How many 4 KiB pages one of those has.
    pub(crate) fn granule_pages(&self) -> u64 {
        Geometry::X86_64.pages(self.granule).get()
    }

    /// Reserves the hugetlb pages of a range that are not reserved yet: they stay so until they are
    /// freed (Linux `Documentation/mm/hugetlbfs_reserv.rst`: reservations of a shared mapping are
    /// the file's, and outlive the mapping).
    ///
    /// # Errors
    /// `ENOMEM` of `mmap` where too few are free.
    pub fn reserve(&self, range: PageRange) -> Result<(), Error> {
        use rustix::mm::{MapFlags, ProtFlags};
        let bytes = range.bytes();
        let call = Call::on("mmap", bytes);
        let length = bytes.len().and_then(|length| usize::try_from(length).ok());
        let length = length.ok_or(call.error(Errno::NOMEM))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let any = core::ptr::null_mut();
        let map = || {
            // SAFETY: a new mapping at an address of the kernel's choice touches no other.
            unsafe {
                rustix::mm::mmap(any, length, protection, MapFlags::SHARED, &self.fd, bytes.start())
            }
        };
        let base = call.make(map)?;
        // SAFETY: the mapping was made here, and nobody was told of it.
        let unmap = || unsafe { rustix::mm::munmap(base, length) };
        Call::on("munmap", bytes).make(unmap)
    }

    /// Frees the pages, under every mapping; they read as zeros afterwards.
    ///
    /// # Errors
    /// Those of `fallocate`.
    pub fn punch_hole(&self, range: PageRange) -> Result<(), Error> {
        punch_hole(&self.fd, range)
    }

    /// Writes bytes at `offset`, by `pwrite(2)`: no mapping is touched, and nobody who watches one
    /// is told.
    ///
    /// # Errors
    /// Those of `pwrite`: `ENOSPC` and `ENOMEM` where there is no memory.
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
    /// Those of `lseek`.
    pub fn existing(&self) -> Result<Vec<PageRange>, Error> {
        PageRange::between(0, self.pages.get()).map_or(Ok(Vec::new()), |all| self.existing_in(all))
    }

    /// Those of a range.
    ///
    /// # Errors
    /// Those of `lseek`.
    pub fn existing_in(&self, range: PageRange) -> Result<Vec<PageRange>, Error> {
        let call = Call::new("lseek");
        let seek = |to| match call.attempt(|| rustix::fs::seek(&self.fd, to)) {
            Ok(offset) => Ok(Some(offset)),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(call.error(errno)),
        };
        let mut runs = Vec::new();
        let mut from = range.bytes().start();
        while let Some(start) = seek(SeekFrom::Data(from))? {
            let Some(end) = seek(SeekFrom::Hole(start))? else { break };
            let run = PageRange::from_bytes(start, end - start).ok();
            if run.is_some_and(|run| run.start().get() >= range.end()) {
                break;
            }
            runs.extend(run.and_then(|run| run.intersection(range)));
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
