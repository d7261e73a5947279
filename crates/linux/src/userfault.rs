//! Userfaultfd: touches of a view, told to us and answered by us.
//!
//! No `EVENT_*` feature is asked for: with `EVENT_REMOVE` a zap would wait until its event is read
//! (Linux `Documentation/admin-guide/mm/userfaultfd.rst`).

mod offer;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use polder_units::{ByteRange, Level, PAGE_BYTES, PAGE_SIZE, PageIndex, PageRange};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl};
use rustix::mm::UserfaultfdFlags;

use crate::call::Call;
use crate::uapi::userfaultfd as uapi;
use crate::{Error, View};

pub use offer::UserfaultOffer;

/// How a userfaultfd may be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// By `/dev/userfaultfd`: the file's permissions decide.
    Device,
    /// By the system call: privilege decides, or `vm.unprivileged_userfaultfd`.
    SystemCall,
}

/// How [`Userfault::resume`] went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Continued {
    /// All pages are mapped, and whoever waited goes on.
    Mapped,
    /// This page does not exist, and those from it on were not mapped.
    Missing(PageIndex),
}

/// A userfaultfd that watches one view.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    view: Arc<View>,
}

impl Userfault {
    /// The most touches that one call of [`Userfault::touches`] returns.
    pub const BATCH: usize = 64;

    /// What is asked for, of memory in pages of this level.
    const fn needed(granule: Level) -> u32 {
        let of_memory = match granule {
            Level::Size4K => uapi::UFFD_FEATURE_MISSING_SHMEM | uapi::UFFD_FEATURE_MINOR_SHMEM,
            Level::Size2M | Level::Size1G => {
                uapi::UFFD_FEATURE_MISSING_HUGETLBFS | uapi::UFFD_FEATURE_MINOR_HUGETLBFS
            }
        };
        of_memory | uapi::UFFD_FEATURE_POISON
    }

    /// A userfaultfd for a view, which is not watched before [`Userfault::watch`].
    ///
    /// # Errors
    /// `EPERM` where neither `/dev/userfaultfd` may be opened nor the system call made (the
    /// kernel's own touches are to be told of too, which takes `CAP_SYS_PTRACE` or
    /// `vm.unprivileged_userfaultfd`); `EINVAL` from `UFFDIO_API` on a kernel without poison
    /// (before 6.6).
    pub fn new(view: Arc<View>) -> Result<Self, Error> {
        let (fd, _) = open()?;
        handshake(&fd, Self::needed(view.memfd().granule()).into())?;
        Ok(Self { fd, view })
    }

    /// The view.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// Watches these pages of the view from now on, for touches of pages that don't exist and of
    /// those that are not mapped in the view. What is mapped there now stays mapped, untold of.
    ///
    /// # Errors
    /// Those of `UFFDIO_REGISTER`: `EINVAL` where the kernel can't watch such memory.
    pub fn watch(&self, pages: PageRange) -> Result<(), Error> {
        const MODES: u32 = uapi::UFFDIO_REGISTER_MODE_MISSING | uapi::UFFDIO_REGISTER_MODE_MINOR;
        let range = self.range(pages.bytes());
        let mut register = uapi::uffdio_register { range, mode: MODES.into(), ioctls: 0 };
        let call = Call::on("UFFDIO_REGISTER", pages.bytes());
        call.make(|| self.ask::<{ uapi::UFFDIO_REGISTER }, _>(&mut register))
    }

    /// Watches these pages no more; whoever waits there goes on, and touches again. Markers stay.
    ///
    /// # Errors
    /// Those of `UFFDIO_UNREGISTER`.
    pub fn unwatch(&self, pages: PageRange) -> Result<(), Error> {
        let mut range = self.range(pages.bytes());
        let call = Call::on("UFFDIO_UNREGISTER", pages.bytes());
        call.make(|| self.ask::<{ uapi::UFFDIO_UNREGISTER }, _>(&mut range))
    }

    /// Adds the pages whose touches wait to be told of, at most [`Userfault::BATCH`]; none if there
    /// are none. Does not wait; poll the descriptor for that.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn touches(&self, into: &mut Vec<PageIndex>) -> Result<(), Error> {
        let mut buffer = [0u8; Self::BATCH * uapi::UFFD_MSG_SIZE];
        let call = Call::new("read of userfaultfd");
        let count = match call.attempt(|| rustix::io::read(&self.fd, &mut buffer[..])) {
            Ok(count) => count,
            Err(Errno::AGAIN) => 0,
            Err(errno) => return Err(call.error(errno)),
        };
        let messages = buffer[..count].chunks_exact(uapi::UFFD_MSG_SIZE);
        into.extend(messages.filter_map(|message| self.touch(message)));
        Ok(())
    }

    /// The page touched, of a `struct uffd_msg`.
    fn touch(&self, message: &[u8]) -> Option<PageIndex> {
        if u32::from(message[uapi::UFFD_MSG_EVENT]) != uapi::UFFD_EVENT_PAGEFAULT {
            return None;
        }
        let word = |index: usize| {
            let at = uapi::UFFD_MSG_ARG + 8 * index;
            Some(u64::from_ne_bytes(message.get(at..at + 8)?.try_into().ok()?))
        };
        let offset = self.view.offset_of(usize::try_from(word(1)?).ok()?)?;
        PageIndex::new(offset / PAGE_SIZE)
    }

    /// Maps pages that exist into the view, and lets whoever waits for them go on. A page that is
    /// mapped already is left as it is, a poison marker gives way to the page.
    ///
    /// # Errors
    /// Those of `UFFDIO_CONTINUE`.
    pub fn resume(&self, range: PageRange) -> Result<Continued, Error> {
        self.each(range, "UFFDIO_CONTINUE", |range| {
            let mut resume = uapi::uffdio_continue { range, mode: 0, mapped: 0 };
            let result = self.ask::<{ uapi::UFFDIO_CONTINUE }, _>(&mut resume);
            (result, resume.mapped)
        })
    }

    /// Makes a page of these bytes, maps it, and lets whoever waits for it go on: what a handler
    /// does that has no memfd of its own. Polder does not. A page that exists already is left as it
    /// is.
    ///
    /// # Errors
    /// Those of `UFFDIO_COPY`.
    pub fn copy(&self, page: PageIndex, from: &[u8; PAGE_BYTES]) -> Result<(), Error> {
        let range = PageRange::one(page);
        let uapi::uffdio_range { start: dst, len } = self.range(range.bytes());
        let src = from.as_ptr().addr() as u64;
        let mut copy = uapi::uffdio_copy { dst, src, len, mode: 0, copy: 0 };
        let call = Call::on("UFFDIO_COPY", range.bytes());
        match call.attempt(|| self.ask::<{ uapi::UFFDIO_COPY }, _>(&mut copy)) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => self.wake(range),
            Err(errno) => Err(call.error(errno)),
        }
    }

    /// Puts a poison marker in the place of pages that are not mapped in the view: whoever touches
    /// one gets SIGBUS, or `EFAULT` from a system call.
    ///
    /// # Errors
    /// Those of `UFFDIO_POISON`.
    pub fn poison(&self, range: PageRange) -> Result<(), Error> {
        let done = self.each(range, "UFFDIO_POISON", |range| {
            let mut poison = uapi::uffdio_poison { range, mode: 0, updated: 0 };
            let result = self.ask::<{ uapi::UFFDIO_POISON }, _>(&mut poison);
            (result, poison.updated)
        })?;
        debug_assert_eq!(done, Continued::Mapped, "poison needs no page");
        Ok(())
    }

    /// Lets whoever waits for the pages go on, and touch again.
    ///
    /// # Errors
    /// Those of `UFFDIO_WAKE`.
    pub fn wake(&self, range: PageRange) -> Result<(), Error> {
        let mut bytes = self.range(range.bytes());
        Call::on("UFFDIO_WAKE", range.bytes())
            .make(|| self.ask::<{ uapi::UFFDIO_WAKE }, _>(&mut bytes))
    }

    /// Does an ioctl over a range that may stop in the middle: it reports how many bytes it did,
    /// or `-errno` if none. `EEXIST` is a page that has an entry already: it is passed over and
    /// its waiters are woken.
    fn each(
        &self,
        range: PageRange,
        call: &'static str,
        mut ask: impl FnMut(uapi::uffdio_range) -> (Result<(), Errno>, i64),
    ) -> Result<Continued, Error> {
        let mut left = Some(range);
        while let Some(rest) = left {
            let mut reported = 0;
            let result = Call::new(call).attempt(|| {
                let (result, now) = ask(self.range(rest.bytes()));
                reported = now;
                result
            });
            let Err(errno) = result else { break };
            let done = u64::try_from(reported).unwrap_or(0) / PAGE_SIZE;
            let at = rest.start().get() + done;
            let page = PageIndex::new(at).unwrap_or(rest.start());
            match errno {
                Errno::AGAIN => left = PageRange::between(at, rest.end()),
                Errno::EXIST => {
                    let end = at + self.view.memfd().granule_pages();
                    self.wake(PageRange::between(at, end).unwrap_or(rest))?;
                    left = PageRange::between(end, rest.end());
                }
                Errno::FAULT => return Ok(Continued::Missing(page)),
                errno => {
                    let page = PageRange::one(page).bytes();
                    return Err(Call::on(call, page).error(errno));
                }
            }
        }
        Ok(Continued::Mapped)
    }

    fn range(&self, bytes: ByteRange) -> uapi::uffdio_range {
        let start = self.view.address() as u64 + bytes.start();
        uapi::uffdio_range { start, len: bytes.len().unwrap_or(0) }
    }

    fn ask<const CODE: Opcode, T>(&self, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: each opcode of `uapi` is used with the structure it was computed from. The range
        // in it lies in a view that this userfaultfd keeps mapped; what the ioctls do there is
        // change translations, of memory to which there is no Rust reference.
        let request = unsafe { Updater::<CODE, T>::new(argument) };
        // SAFETY: as above.
        unsafe { ioctl(&self.fd, request) }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A new userfaultfd, by the device (its file permissions decide) or by the system call
/// (privilege decides).
fn open() -> Result<(OwnedFd, Way), Error> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    let open = || rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, 0.into());
    if let Ok(device) = Call::new("open of /dev/userfaultfd").make(open) {
        // SAFETY: USERFAULTFD_IOC_NEW takes flags by value and returns a descriptor.
        let made = || unsafe { ioctl(&device, NewUserfault(flags.bits())) };
        if let Ok(fd) = Call::new("USERFAULTFD_IOC_NEW").make(made) {
            return Ok((fd, Way::Device));
        }
    }
    // SAFETY: it is used on a view of ours alone.
    let made = || unsafe { rustix::mm::userfaultfd(flags) };
    Ok((Call::new("userfaultfd").make(made)?, Way::SystemCall))
}

/// Enables features of a new userfaultfd; returns all that the kernel has.
fn handshake(fd: &OwnedFd, features: u64) -> Result<u64, Error> {
    let mut api = uapi::uffdio_api { api: uapi::UFFD_API.into(), features, ioctls: 0 };
    Call::new("UFFDIO_API").make(|| {
        // SAFETY: the opcode is computed from the structure, which the kernel fills in.
        let request = unsafe { Updater::<{ uapi::UFFDIO_API }, _>::new(&mut api) };
        // SAFETY: as above.
        unsafe { ioctl(fd, request) }
    })?;
    Ok(api.features)
}

/// `USERFAULTFD_IOC_NEW`: takes flags, returns a descriptor.
struct NewUserfault(u32);

// SAFETY: the opcode takes its argument by value, and its non-negative result is a descriptor
// that nobody else has.
unsafe impl rustix::ioctl::Ioctl for NewUserfault {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        uapi::USERFAULTFD_IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        core::ptr::without_provenance_mut(self.0 as usize)
    }

    unsafe fn output_from_ptr(
        result: rustix::ioctl::IoctlOutput,
        _: *mut core::ffi::c_void,
    ) -> rustix::io::Result<OwnedFd> {
        use std::os::fd::FromRawFd;
        // SAFETY: the ioctl succeeded, and so returned a new descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(result) })
    }
}
