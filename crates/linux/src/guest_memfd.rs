//! A guest_memfd: memory of one VM that no mapping of the host's shows.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use kvm_bindings::{
    KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    kvm_create_guest_memfd, kvm_memory_attributes,
};
use kvm_ioctls::VmFd;
use polder_units::{GfnRange, PAGE_SIZE, PageCount, PageRange};
use rustix::io::{Errno, FdFlags};

use crate::Error;
use crate::call::{self, Call};
use crate::memfd::punch_hole;
use crate::uapi::{cachestat, kvm};

/// What a VM of KVM's offers for private memory. Asked of the VM itself: `/dev/kvm` says of some
/// facilities that they are there which no VM of this type can use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PrivateMemory {
    /// Whether guest_memfds can be made (`KVM_CAP_GUEST_MEMFD`).
    pub guest_memfd: bool,
    /// Whether guest memory can be made private (`KVM_CAP_MEMORY_ATTRIBUTES`).
    pub attributes: bool,
    /// The flags that a guest_memfd can be made with (`KVM_CAP_GUEST_MEMFD_FLAGS`).
    pub flags: u64,
}

impl PrivateMemory {
    /// A guest_memfd can be mapped (`GUEST_MEMFD_FLAG_MMAP`).
    pub const MMAP: u64 = 1 << 0;
    /// All of a guest_memfd is shared, and a mapping of it can be touched
    /// (`GUEST_MEMFD_FLAG_INIT_SHARED`). Without it a touch of the mapping is a SIGBUS.
    pub const INIT_SHARED: u64 = 1 << 1;

    /// Whether all of a guest_memfd can be shared with the host, by mappings that can be touched.
    pub const fn can_be_shared(self) -> bool {
        const BOTH: u64 = PrivateMemory::MMAP | PrivateMemory::INIT_SHARED;
        self.guest_memfd && self.flags & BOTH == BOTH
    }

    /// What `vm` offers.
    pub fn of(vm: &VmFd) -> Self {
        let extension = |capability: u32| {
            // Negative where the VM can't be asked: then it offers nothing.
            u64::try_from(vm.check_extension_raw(u64::from(capability))).unwrap_or(0)
        };
        let private = u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE);
        Self {
            guest_memfd: extension(KVM_CAP_GUEST_MEMFD) != 0,
            attributes: extension(KVM_CAP_MEMORY_ATTRIBUTES) & private != 0,
            flags: extension(kvm::KVM_CAP_GUEST_MEMFD_FLAGS),
        }
    }
}

/// A guest_memfd. Unless it was made [shared](GuestMemfd::shared), its pages are seen by the guest
/// of its VM alone: the host can free and count them, neither read nor write.
#[derive(Debug)]
pub struct GuestMemfd {
    fd: OwnedFd,
    pages: PageCount,
}

impl GuestMemfd {
    /// A guest_memfd of `pages` pages for `vm`, none of which exists yet. No flag is asked for:
    /// one that can be mapped serves a frame that is shared as well, and its slot's view never.
    ///
    /// # Errors
    /// Those of `KVM_CREATE_GUEST_MEMFD`: `EINVAL` for a size that no file can have, `ENOTTY` on a
    /// kernel without it, `EMFILE`.
    pub fn new(vm: &VmFd, pages: PageCount) -> Result<Self, Error> {
        Self::with_flags(vm, pages, 0)
    }

    /// One all of whose pages are shared with the host, which can map it
    /// ([`View::show`](crate::View::show)), and which serves every frame of its slot.
    ///
    /// # Errors
    /// As [`GuestMemfd::new`], and `EINVAL` unless [`PrivateMemory::can_be_shared`].
    pub fn shared(vm: &VmFd, pages: PageCount) -> Result<Self, Error> {
        Self::with_flags(vm, pages, PrivateMemory::MMAP | PrivateMemory::INIT_SHARED)
    }

    fn with_flags(vm: &VmFd, pages: PageCount, flags: u64) -> Result<Self, Error> {
        let call = Call::new("KVM_CREATE_GUEST_MEMFD");
        let size = pages.bytes().ok_or(call.error(Errno::FBIG))?;
        let create = kvm_create_guest_memfd { size, flags, ..Default::default() };
        let fd = call.make(|| {
            let fd = vm.create_guest_memfd(create).map_err(call::of_kvm)?;
            // SAFETY: the ioctl succeeded, and so returned a new descriptor that nobody else has.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        })?;
        // KVM makes it one that an exec would leave open, to whoever is executed.
        Call::new("fcntl").make(|| rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC))?;
        Ok(Self { fd, pages })
    }

    /// Its size.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// Frees the pages and takes them from the guest; it finds zeros afterwards.
    ///
    /// # Errors
    /// Those of `fallocate`.
    pub fn punch_hole(&self, range: PageRange) -> Result<(), Error> {
        punch_hole(&self.fd, range)
    }

    /// The runs of pages that exist, in order. A guest_memfd knows no `lseek(SEEK_DATA)`, so the
    /// pages are counted (`cachestat`), and ranges that have some halved until they have all.
    ///
    /// # Errors
    /// Those of `cachestat`: `ENOSYS` before Linux 6.5 and without `CONFIG_CACHESTAT_SYSCALL`.
    pub fn existing(&self) -> Result<Vec<PageRange>, Error> {
        let mut runs: Vec<PageRange> = Vec::new();
        // Next is last: the lower half goes on top of the upper one.
        let mut left: Vec<PageRange> =
            PageRange::between(0, self.pages.get()).into_iter().collect();
        while let Some(range) = left.pop() {
            let (start, end) = (range.start().get(), range.end());
            let existing = self.count(range)?;
            if existing == 0 {
                continue;
            }
            // A page of a larger folio that the range cuts counts in full.
            if existing >= end - start {
                match runs.last_mut().and_then(|last| Some((last.append(range)?, last))) {
                    Some((longer, last)) => *last = longer,
                    None => runs.push(range),
                }
                continue;
            }
            let middle = start + (end - start) / 2;
            left.extend(PageRange::between(middle, end));
            left.extend(PageRange::between(start, middle));
        }
        Ok(runs)
    }

    fn count(&self, range: PageRange) -> Result<u64, Error> {
        let bytes = range.bytes();
        let call = Call::on("cachestat", bytes);
        let length = bytes.len().ok_or(call.error(Errno::INVAL))?;
        call.make(|| cachestat::cachestat(self.fd.as_fd(), bytes.start(), length))
    }
}

impl AsFd for GuestMemfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes guest frames of `vm` private or shared: all of them, or none.
///
/// # Errors
/// Those of `KVM_SET_MEMORY_ATTRIBUTES`: `EINVAL` for frames beyond what the VM can address,
/// `ENOMEM`, `ENOTTY` on a kernel without it. The error has no range: what is said is about guest
/// frames, not bytes of an object.
pub fn set_private(vm: &VmFd, gfns: GfnRange, private: bool) -> Result<(), Error> {
    let call = Call::new("KVM_SET_MEMORY_ATTRIBUTES");
    let size = gfns.count().get().checked_mul(PAGE_SIZE);
    let attributes = kvm_memory_attributes {
        address: gfns.start().gpa().get(),
        size: size.ok_or(call.error(Errno::INVAL))?,
        attributes: if private { KVM_MEMORY_ATTRIBUTE_PRIVATE.into() } else { 0 },
        flags: 0,
    };
    call.make(|| vm.set_memory_attributes(attributes).map_err(call::of_kvm))
}
