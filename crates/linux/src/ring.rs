//! io_uring(7): transfers between files and pages of a view, many at a time.
//!
//! # Whose the bytes are meanwhile
//! The kernel writes to the addresses of a transfer at any time between [`Ring::submit`] and its
//! completion, and to those of a *fixed buffer* by pages that it has pinned when it was registered
//! (`FOLL_LONGTERM`), whatever the view shows there by then. So
//! - a ring holds its view, and does not go before the last transfer is over ([`Ring::quiesce`]);
//! - pages of a fixed buffer must not be taken out of the memfd, nor given to somebody else, from
//!   [`Ring::register`] to [`Ring::unregister`]. That is the caller's to see to: no call here would
//!   touch other memory than the memfd's, but bytes would be lost, or seen by whom they are not
//!   for.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use io_uring::squeue::Flags;
use io_uring::types::{CancelBuilder, Fd};
use io_uring::{IoUring, opcode, squeue};
use polder_units::PageRange;
use rustix::io::Errno;

use crate::call::Call;
use crate::{Error, View};

/// How many files the kernel keeps at hand for a ring.
const FILES: u32 = 16;

/// A ring. Files are borrowed for as long as it lives: the kernel takes hold of them only when
/// their transfers are submitted, or keeps them at hand until the ring goes, by their number.
pub struct Ring<'f> {
    ring: IoUring,
    view: Arc<View>,
    /// What the kernel keeps at hand, by its place there: a transfer costs a few percent less.
    files: Vec<RawFd>,
    /// How many that may be: none where the kernel does not (before Linux 5.19).
    files_most: usize,
    /// Transfers that were queued, and whose completion was not taken yet.
    in_flight: u32,
    /// The most that may be, for every completion to have its place.
    most: u32,
    borrowed: std::marker::PhantomData<BorrowedFd<'f>>,
}

/// Bytes of a view and of a file, and which way they go.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Whether they go into the view, or out of it.
    pub into_memory: bool,
    /// Where they are in the file.
    pub at: u64,
    /// Where they are in the object.
    pub offset: u64,
    /// How many there are at most.
    pub count: u32,
    /// The fixed buffer that they lie in, by its place among those that were registered.
    pub buffer: Option<u16>,
}

/// A transfer that is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// Which.
    pub tag: u64,
    /// How many bytes came or went, or why none did. `EFAULT`: a page could not be touched.
    pub result: Result<u32, Errno>,
}

/// There is no place for another transfer before a completion is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

impl<'f> Ring<'f> {
    /// A ring for `entries` transfers at a time (rounded up to a power of two) with bytes of
    /// `view`.
    ///
    /// # Errors
    /// Of `io_uring_setup`: `ENOSYS` and `EPERM` where it is not to be had (a kernel without it,
    /// the sysctl `kernel.io_uring_disabled`, a filter of system calls); `EINVAL` for no entries or
    /// more than 32768; `ENOMEM`.
    pub fn new(view: &Arc<View>, entries: u32) -> Result<Self, Error> {
        let make = || IoUring::builder().dontfork().build(entries).map_err(of_io);
        let ring = Call::new("io_uring_setup").make(make)?;
        let most = ring.params().cq_entries();
        let sparse = || ring.submitter().register_files_sparse(FILES).map_err(of_io);
        let files_most = match Call::new("io_uring_register(IORING_REGISTER_FILES2)").make(sparse) {
            Ok(()) => FILES as usize,
            Err(_) => 0,
        };
        Ok(Self {
            ring,
            view: Arc::clone(view),
            files: Vec::new(),
            files_most,
            in_flight: 0,
            most,
            borrowed: std::marker::PhantomData,
        })
    }

    /// The view.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// How many transfers have not been told of as over.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Registers pages of the view as fixed buffers, which the kernel pins until they are
    /// unregistered. None may be registered.
    ///
    /// # Errors
    /// Of `IORING_REGISTER_BUFFERS`: `EBUSY` where some are registered, `EINVAL` for more than
    /// 16384 or one beyond the view, `EFAULT` for a page that can't be touched, `ENOMEM` also
    /// beyond the limit of locked memory. None is registered then.
    pub fn register(&self, buffers: &[PageRange]) -> Result<(), Error> {
        let call = Call::new("io_uring_register(IORING_REGISTER_BUFFERS)");
        let iovec = |range: &PageRange| {
            let (start, length) = self.view.within(range.bytes())?;
            let address = self.view.as_ptr().wrapping_add(start);
            Some(libc::iovec { iov_base: address.cast(), iov_len: length })
        };
        let iovecs: Option<Vec<_>> = buffers.iter().map(iovec).collect();
        let iovecs = iovecs.ok_or(call.error(Errno::INVAL))?;
        call.make(|| {
            let submitter = self.ring.submitter();
            // SAFETY: the addresses lie in the view, which lives as long as the ring. Its pages may
            // change at any time: all access to them allows for that.
            unsafe { submitter.register_buffers(&iovecs) }.map_err(of_io)
        })
    }

    /// Lets go of the fixed buffers, once no transfer is in flight.
    ///
    /// # Errors
    /// Of [`Ring::quiesce`], and of `IORING_UNREGISTER_BUFFERS`: `ENXIO` where none is registered.
    pub fn unregister(&mut self, mut each: impl FnMut(Completion)) -> Result<(), Error> {
        self.quiesce(&mut each)?;
        let unregister = || self.ring.submitter().unregister_buffers().map_err(of_io);
        Call::new("io_uring_register(IORING_UNREGISTER_BUFFERS)").make(unregister)
    }

    /// Queues a transfer, to begin at the next [`Ring::submit`]. Its completion has this tag.
    ///
    /// # Errors
    /// [`Full`]: submit, and take completions.
    ///
    /// # Panics
    /// If the bytes reach beyond the view.
    pub fn queue(
        &mut self,
        file: BorrowedFd<'f>,
        transfer: Transfer,
        tag: u64,
    ) -> Result<(), Full> {
        if self.in_flight == self.most {
            return Err(Full);
        }
        let (file, flags) = match self.at_hand(file) {
            Some(place) => (place, Flags::FIXED_FILE),
            None => (file.as_raw_fd(), Flags::empty()),
        };
        let entry = self.entry(Fd(file), transfer).flags(flags).user_data(tag);
        // SAFETY: the bytes lie in the view, which lives until the transfer is over, and are
        // changed by others at any time; the file is open until it is submitted.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| Full)?;
        self.in_flight += 1;
        Ok(())
    }

    /// The place at which the kernel has a file at hand; it is given one if there is room.
    fn at_hand(&mut self, file: BorrowedFd<'f>) -> Option<i32> {
        // While the ring lives its number is that file's, and no other's.
        let file = file.as_raw_fd();
        let known = self.files.iter().position(|known| *known == file);
        let place = known.or_else(|| self.keep_at_hand(file))?;
        i32::try_from(place).ok()
    }

    #[cold]
    fn keep_at_hand(&mut self, file: RawFd) -> Option<usize> {
        let place = self.files.len();
        let offset = u32::try_from(place).ok().filter(|_| place < self.files_most)?;
        let update = || self.ring.submitter().register_files_update(offset, &[file]).map_err(of_io);
        match Call::new("io_uring_register(IORING_REGISTER_FILES_UPDATE)").make(update) {
            Ok(_) => self.files.push(file),
            // It is not asked again: each such transfer has the kernel look the file up.
            Err(_) => self.files_most = place,
        }
        (place < self.files_most).then_some(place)
    }

    fn entry(&self, file: Fd, transfer: Transfer) -> squeue::Entry {
        let Transfer { into_memory, at, offset, count, buffer } = transfer;
        let length = usize::try_from(count).expect("a u32 is an index");
        let memory = self.view.bytes(offset, length);
        match (into_memory, buffer) {
            (true, None) => opcode::Read::new(file, memory, count).offset(at).build(),
            (false, None) => opcode::Write::new(file, memory, count).offset(at).build(),
            (true, Some(index)) => {
                opcode::ReadFixed::new(file, memory, count, index).offset(at).build()
            }
            (false, Some(index)) => {
                opcode::WriteFixed::new(file, memory, count, index).offset(at).build()
            }
        }
    }

    /// Begins what was queued, and waits until at least so many transfers are over, taken or not.
    ///
    /// # Errors
    /// Of `io_uring_enter`.
    pub fn submit(&self, wait_for: u32) -> Result<(), Error> {
        let wait_for = usize::try_from(wait_for).expect("a u32 is an index");
        let submit = || self.ring.submitter().submit_and_wait(wait_for).map_err(of_io);
        Call::new("io_uring_enter").make(submit).map(drop)
    }

    /// A transfer that is over, if one is.
    pub fn completion(&mut self) -> Option<Completion> {
        let completed = self.ring.completion().next()?;
        self.in_flight -= 1;
        let result = u32::try_from(completed.result())
            .map_err(|_| Errno::from_raw_os_error(-completed.result()));
        Some(Completion { tag: completed.user_data(), result })
    }

    /// Cancels what can be, and waits until no transfer is in flight.
    ///
    /// # Errors
    /// Of `io_uring_enter`.
    pub fn quiesce(&mut self, mut each: impl FnMut(Completion)) -> Result<(), Error> {
        while self.in_flight > 0 {
            self.submit(0)?;
            // Where there is nothing to cancel any more, or no such call (before Linux 6.0), what
            // is in flight comes to its end by itself.
            let _ = self.ring.submitter().register_sync_cancel(None, CancelBuilder::any());
            match self.completion() {
                Some(completed) => each(completed),
                None => self.submit(1)?,
            }
        }
        Ok(())
    }
}

/// The errno in an error of `io-uring`, which makes it of one.
fn of_io(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

impl Drop for Ring<'_> {
    fn drop(&mut self) {
        if self.quiesce(|_| {}).is_err() {
            // The kernel may write there still: it is never to be other memory.
            std::mem::forget(Arc::clone(&self.view));
            return;
        }
        // A ring goes in its own time: whoever waits for the end of a pipe need not wait for it.
        let _ = self.ring.submitter().unregister_files();
    }
}

impl std::fmt::Debug for Ring<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}
