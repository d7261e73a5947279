//! [`Ring`]: io_uring's transfers between files and shared pages, which are pinned meanwhile.
//!
//! What is in a *fixed buffer* the kernel has pinned itself, from registration on: it writes to
//! those very pages, wherever they are mapped by then. So registration is the long-term pin, and
//! not each transfer. Elsewhere a transfer is a short pin, from before it is submitted until its
//! completion was taken. Both are by the ring's holder, and a conversion that meets them names it.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::BorrowedFd;

use polder_engine::{Holder, PinKind, Refusal};
use polder_linux::{Completion, Errno, Transfer};
use polder_units::{PAGE_SHIFT, PageRange, RangeError};

use crate::{Error, Memory, OnBusy, Pin, Pinner};

/// Transfers between files and memory by io_uring(7), straight into and out of shared pages.
///
/// ```no_run
/// # use std::fs::File;
/// # use std::os::fd::AsFd;
/// # use polder::{Error, Holder, Memory, OnBusy, units::PageRange};
/// # fn disk(memory: &Memory, image: &File, buffers: PageRange) -> Result<(), Error> {
/// let mut ring = memory.ring(Holder::new("virtio-blk"), 64, OnBusy::Refuse)?;
/// ring.register(&[buffers])?; // pinned from here on, for long
/// ring.read(image.as_fd(), 0, buffers.start().offset(), 64 << 10, 7)?;
/// ring.submit(1)?; // and waits for one
/// while let Some(done) = ring.complete() {
///     assert_eq!((done.tag, done.result), (7, Ok(64 << 10)));
/// }
/// # Ok(())
/// # }
/// ```
/// Dropping it cancels what can be, waits for the rest, and unpins all. If that is because its
/// thread panics, the pins are among [`Memory::dead_pins`].
pub struct Ring<'a> {
    memory: &'a Memory,
    ring: polder_linux::Ring<'a>,
    /// For transfers outside the fixed buffers.
    pinner: Pinner<'a>,
    on_busy: OnBusy,
    fixed: Vec<Pin<'a>>,
    /// By the number that the kernel has for each.
    transfers: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// What was over when fixed buffers went, and is to be told of.
    over: VecDeque<Completed>,
}

/// A transfer that is not over.
#[derive(Clone, Copy)]
struct InFlight {
    /// The caller's number for it.
    tag: u64,
    /// What it has pinned.
    pinned: Option<PageRange>,
    /// What it writes to.
    written: Option<PageRange>,
}

/// A transfer that is over: its pages are unpinned, but for those of a fixed buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completed {
    /// The number that it was given.
    pub tag: u64,
    /// How many bytes came or went: fewer than asked for at the end of the file, or where there
    /// were no more at once. Or why none did.
    pub result: Result<u32, Errno>,
}

impl Memory {
    /// A ring for `entries` transfers at a time, all of whose pins are `holder`'s. `on_busy` is
    /// what to do where an operation is in the way of one: who waits must not be the one whose
    /// completions that operation waits for.
    ///
    /// # Errors
    /// [`Error::Missing`] where io_uring is not to be had, with what to do about it;
    /// [`Error::NotOffered`] on the simulated machine, whose memory is none of the kernel's;
    /// [`Error::Host`] with `EINVAL` for no entries, or more than the kernel's 32768.
    pub fn ring(&self, holder: Holder, entries: u32, on_busy: OnBusy) -> Result<Ring<'_>, Error> {
        let view = self.driver.host.views().pinned_view().ok_or(Error::NotOffered {
            what: "the kernel can't read files into the simulated machine's memory",
            way_out: "use HostKind::Memfd, or copy by Memory::write",
        })?;
        Ok(Ring {
            memory: self,
            ring: polder_linux::Ring::new(view, entries).map_err(missing)?,
            pinner: self.pinner(PinKind::Short, holder)?,
            on_busy,
            fixed: Vec::new(),
            transfers: Vec::new(),
            free: Vec::new(),
            over: VecDeque::new(),
        })
    }
}

impl<'a> Ring<'a> {
    /// Who holds its pins: the name that a refused conversion says.
    pub fn holder(&self) -> &Holder {
        self.pinner.holder()
    }

    /// Makes pages fixed buffers, instead of those that there are: pinned for long by Polder, and
    /// by the kernel, until [`Ring::unregister`]. A transfer within one of them costs no pin.
    ///
    /// # Errors
    /// As [`Memory::pin_with`] for a page that can't be pinned; [`Error::Missing`] beyond the limit
    /// of locked memory; [`Error::Host`], with `EINVAL` for more than 16384 buffers. Then there is
    /// none.
    pub fn register(&mut self, buffers: &[PageRange]) -> Result<(), Error> {
        self.unregister()?;
        let pins = buffers.iter().map(|&range| {
            let holder = self.holder().clone();
            self.memory.pin_with(range, PinKind::LongTerm, holder, self.on_busy)
        });
        let pins = pins.collect::<Result<Vec<_>, Error>>()?;
        if !buffers.is_empty() {
            self.ring.register(buffers).map_err(locked)?;
            self.fixed = pins;
        }
        Ok(())
    }

    /// Lets go of the fixed buffers, once no transfer is in flight: what can be cancelled is.
    ///
    /// # Errors
    /// [`Error::Host`]: they are as they were.
    pub fn unregister(&mut self) -> Result<(), Error> {
        if self.fixed.is_empty() {
            return Ok(());
        }
        let mut over = Vec::new();
        let unregistered = self.ring.unregister(|completion| over.push(completion));
        for completion in over {
            let completed = self.settle(completion);
            self.over.extend(completed);
        }
        unregistered?;
        self.fixed.clear();
        Ok(())
    }

    /// Queues a read of `count` bytes at `at` of a file, into those at `offset` of the object,
    /// which have to be shared. `tag` is the caller's number for it, which [`Completed`] has. The
    /// kernel begins with [`Ring::submit`]; where its queue is full, with this call.
    ///
    /// # Errors
    /// As [`Memory::pin_with`], naming the page; [`Error::RingFull`]. Nothing is queued then.
    pub fn read(
        &mut self,
        file: BorrowedFd<'a>,
        at: u64,
        offset: u64,
        count: u32,
        tag: u64,
    ) -> Result<(), Error> {
        let transfer = Transfer { into_memory: true, at, offset, count, buffer: None };
        self.queue(file, transfer, tag)
    }

    /// Queues a write to a file, of bytes of the object: as [`Ring::read`].
    ///
    /// # Errors
    /// As there.
    pub fn write(
        &mut self,
        file: BorrowedFd<'a>,
        at: u64,
        offset: u64,
        count: u32,
        tag: u64,
    ) -> Result<(), Error> {
        let transfer = Transfer { into_memory: false, at, offset, count, buffer: None };
        self.queue(file, transfer, tag)
    }

    fn queue(&mut self, file: BorrowedFd<'a>, of: Transfer, tag: u64) -> Result<(), Error> {
        let pages = pages(of.offset, of.count)?;
        let within = |pin: &Pin<'_>| {
            pin.range().start() <= pages.start() && pages.end() <= pin.range().end()
        };
        let buffer = self.fixed.iter().position(within).and_then(|at| u16::try_from(at).ok());
        if buffer.is_none() {
            self.pinner.pin_pages(pages, self.on_busy)?;
        }
        let pinned = buffer.is_none().then_some(pages);
        let place = self.free.pop().unwrap_or(self.transfers.len());
        self.transfers.resize(self.transfers.len().max(place + 1), None);
        let written = of.into_memory.then_some(pages);
        self.transfers[place] = Some(InFlight { tag, pinned, written });

        let of = Transfer { buffer, ..of };
        let mut queued = self.ring.queue(file, of, place as u64);
        if queued.is_err() && self.ring.submit(0).is_ok() {
            queued = self.ring.queue(file, of, place as u64);
        }
        queued.map_err(|_| {
            self.end(place);
            Error::RingFull { in_flight: self.ring.in_flight() }
        })
    }

    /// Begins what was queued, and waits until at least `wait_for` transfers are over, or all that
    /// there are. With 0 it does not wait.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn submit(&mut self, wait_for: u32) -> Result<(), Error> {
        let told = u32::try_from(self.over.len()).unwrap_or(u32::MAX);
        let wait_for = wait_for.saturating_sub(told).min(self.ring.in_flight());
        Ok(self.ring.submit(wait_for)?)
    }

    /// How many transfers have not been told of by [`Ring::complete`].
    pub fn in_flight(&self) -> usize {
        self.transfers.len() - self.free.len() + self.over.len()
    }

    /// A transfer that is over, if one is. Its pages can be converted from here on.
    pub fn complete(&mut self) -> Option<Completed> {
        if let Some(over) = self.over.pop_front() {
            return Some(over);
        }
        let completion = self.ring.completion()?;
        self.settle(completion)
    }

    fn settle(&mut self, Completion { tag, result }: Completion) -> Option<Completed> {
        let tag = self.end(usize::try_from(tag).ok()?)?;
        Some(Completed { tag, result })
    }

    /// Forgets a transfer, and unpins its pages. Its number.
    fn end(&mut self, place: usize) -> Option<u64> {
        let InFlight { tag, pinned, written } = self.transfers.get_mut(place)?.take()?;
        self.free.push(place);
        if let Some(pages) = written {
            // While they are pinned: nobody has taken them back.
            self.memory.driver.dirty.wrote_pages(pages);
        }
        if let Some(pages) = pinned {
            self.pinner.unpin(pages);
        }
        Some(tag)
    }
}

/// The pages with these bytes.
fn pages(offset: u64, count: u32) -> Result<PageRange, Refusal> {
    let last = count.checked_sub(1).ok_or(RangeError::Empty)?;
    let overflow = RangeError::Overflow { start: offset };
    let last = offset.checked_add(last.into()).ok_or(overflow)?;
    Ok(PageRange::between(offset >> PAGE_SHIFT, (last >> PAGE_SHIFT) + 1).ok_or(overflow)?)
}

impl Drop for Ring<'_> {
    fn drop(&mut self) {
        let gone = match self.fixed.is_empty() {
            true => self.ring.quiesce(|_| {}),
            false => self.ring.unregister(|_| {}),
        };
        if gone.is_err() {
            // The kernel may write to them still: nobody else ever gets them. What it has written
            // is logged, what it writes later nobody can know.
            std::mem::forget(std::mem::take(&mut self.fixed));
            let written = self.transfers.iter().flatten().filter_map(|it| it.written);
            written.for_each(|pages| self.memory.driver.dirty.wrote_pages(pages));
            return;
        }
        for place in 0..self.transfers.len() {
            let pinned = self.transfers[place].and_then(|it| it.pinned);
            let _ = self.end(place);
            if let Some(pages) = pinned.filter(|_| std::thread::panicking()) {
                self.pinner.note_dead(pages);
            }
        }
    }
}

impl fmt::Debug for Ring<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("holder", self.holder())
            .field("fixed", &self.fixed.len())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

/// Says what to do where io_uring can't be used.
fn missing(source: polder_linux::Error) -> Error {
    match source.errno {
        Errno::PERM | Errno::ACCESS => Error::Missing {
            what: "this process may not use io_uring",
            way_out: "set the sysctl kernel.io_uring_disabled to 0, allow io_uring_setup in the \
                      filter of system calls (seccomp), or read by HostView::read_from",
            source,
        },
        Errno::NOSYS => Error::Missing {
            what: "this kernel has no io_uring, or a filter of system calls hides it",
            way_out: "use a kernel with CONFIG_IO_URING, or read by HostView::read_from",
            source,
        },
        _ => source.into(),
    }
}

/// Says what to do where too much would be locked.
fn locked(source: polder_linux::Error) -> Error {
    match source.errno {
        Errno::NOMEM => Error::Missing {
            what: "buffers that the kernel keeps pinned count as locked memory, of which no more is \
                   allowed",
            way_out: "raise the limit (ulimit -l), register less, or run as root",
            source,
        },
        _ => source.into(),
    }
}
