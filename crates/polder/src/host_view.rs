//! [`HostView`]: what device models get.

use std::fmt;
use std::os::fd::AsFd;

use polder_units::PageCount;

use crate::Error;
use crate::dirty::Marks;
use crate::host::views::Views;

/// The mapping that device models get pointers into. A touch of a shared page works; one of a
/// private page raises SIGBUS (in a system call: fails with `EFAULT`); one of a page that is being
/// converted waits.
///
/// It can't outlive its memory:
///
/// ```compile_fail
/// # use polder::{HostKind, Memory, units::PageCount};
/// let memory = Memory::builder(PageCount::from(2u32)).host(HostKind::Machine).build()?;
/// let view = memory.host_view();
/// drop(memory); // error: cannot move out of `memory` because it is borrowed
/// view.touch_read(0, &mut [0])?;
/// # Ok::<_, polder::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct HostView<'a> {
    pub(crate) views: &'a dyn Views,
    pub(crate) pages: PageCount,
    pub(crate) dirty: &'a Marks,
}

impl HostView<'_> {
    /// Where the object's page 0 is, if the view is memory of this process (not on the simulated
    /// machine). Valid while the memory lives; what is there changes at any time. Whoever writes by
    /// it tells the dirty log ([`Memory::mark_dirty`](crate::Memory::mark_dirty)).
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// let memory = Memory::builder(PageCount::from(2u32)).host(HostKind::Machine).build()?;
    /// assert_eq!(memory.host_view().as_ptr(), None);
    /// assert_eq!(memory.host_view().length(), 0x2000);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn as_ptr(self) -> Option<*mut u8> {
        self.views.host_view().map(|view| view.as_ptr())
    }

    /// Its length in bytes: the object's.
    pub fn length(self) -> u64 {
        self.pages.bytes().unwrap_or(u64::MAX)
    }

    /// A raw touch that survives being denied: reads bytes at an offset of the object.
    ///
    /// # Errors
    /// [`Error::Copy`] at the first byte denied.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let builder = Memory::builder(PageCount::from(2u32)).host(HostKind::Machine);
    /// let memory = builder.clone().build()?;
    /// assert!(memory.host_view().touch_read(0, &mut [0]).is_err(), "private");
    /// let memory = builder.shared().build()?;
    /// memory.host_view().touch_write(0x1000, b"hello")?;
    /// let mut bytes = [0; 5];
    /// memory.host_view().touch_read(0x1000, &mut bytes)?;
    /// assert_eq!(&bytes, b"hello");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn touch_read(self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.check(offset, into.len())?;
        self.views.touch_read(offset, into)
    }

    /// A raw touch that survives being denied: writes bytes at an offset of the object.
    ///
    /// # Errors
    /// [`Error::Copy`] at the first byte denied; those before it are written.
    ///
    /// ```
    /// # use polder::{Error, HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(2u32)).host(HostKind::Machine).build()?;
    /// let denied = memory.host_view().touch_write(0x1000, b"hello").unwrap_err();
    /// assert!(matches!(denied, Error::Copy(_)), "the page is private: {denied}");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn touch_write(self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.check(offset, from.len())?;
        let touched = self.views.touch_write(offset, from);
        // Also of one that was denied in the middle.
        self.dirty.wrote(offset, from.len());
        touched
    }

    /// Reads up to `count` bytes of a file straight into memory, by one `read(2)`; returns how many
    /// came. To have many in flight, use a [`Ring`](crate::Ring).
    ///
    /// # Errors
    /// [`Error::Host`] with `EFAULT` where the first page is denied, and with what else the kernel
    /// says of the file; [`Error::Copy`] beyond the object.
    ///
    /// ```no_run
    /// # use polder::{HostView, Error};
    /// # fn load(view: HostView<'_>, initrd: &std::fs::File) -> Result<(), Error> {
    /// let mut at = 0x100_0000; // in bytes of the object; the pages there have to be shared
    /// loop {
    ///     match view.read_from(initrd, at, 1 << 20)? {
    ///         0 => return Ok(()), // the end of the file
    ///         came => at += came as u64,
    ///     }
    /// }
    /// # }
    /// ```
    pub fn read_from(self, file: impl AsFd, offset: u64, count: usize) -> Result<usize, Error> {
        self.check(offset, count)?;
        let read = self.views.touch_from(file.as_fd(), offset, count);
        self.dirty.wrote(offset, count);
        read
    }

    /// Refuses bytes beyond the object: there is nothing to touch.
    fn check(self, offset: u64, count: usize) -> Result<(), Error> {
        let end = offset.checked_add(count as u64);
        if end.is_some_and(|end| end <= self.length()) {
            return Ok(());
        }
        Err(polder_linux::Touched { offset: offset.max(self.length()) }.into())
    }
}

impl fmt::Debug for HostView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostView").field("pages", &self.pages).finish_non_exhaustive()
    }
}
