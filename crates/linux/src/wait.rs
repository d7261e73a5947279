//! Threads, and what they wait for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::Error;
use crate::call::Call;

/// Wakes who [`wait()`]s for it, now or when he comes next.
#[derive(Debug)]
pub struct Nudge(OwnedFd);

impl Nudge {
    /// One that nobody has given yet.
    ///
    /// # Errors
    /// Those of `eventfd`: `EMFILE`, `ENOMEM`.
    pub fn new() -> Result<Self, Error> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(Call::new("eventfd").make(|| eventfd(0, flags))?))
    }

    /// Wakes.
    pub fn give(&self) {
        // It fails only when the counter is about to overflow: then the reader is awake.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes it back: it wakes no more until it is given again.
    pub fn take(&self) {
        // That it is not given is no error.
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Nudge {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of the descriptors can be read, or `at_most` has passed. Returns which can be.
///
/// # Errors
/// Those of `poll`.
pub fn wait<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    at_most: Option<Duration>,
) -> Result<[bool; N], Error> {
    let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    let at_most = at_most.and_then(|time| Timespec::try_from(time).ok());
    Call::new("poll").make(|| poll(&mut fds, at_most.as_ref()))?;
    // An error of a descriptor is for who reads it.
    Ok(fds.map(|fd| !fd.revents().is_empty()))
}

/// A moment until which somebody waits. The clock is the monotonic one.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// So long from now; never, where that is past what the clock can say.
    pub fn after(time: Duration) -> Self {
        Self(now().checked_add(time))
    }

    /// How long it is until then; `None` from then on.
    pub fn left(self) -> Option<Duration> {
        let Some(moment) = self.0 else { return Some(Duration::MAX) };
        moment.checked_duration_since(now()).filter(|left| !left.is_zero())
    }
}

/// The time, by a clock that never goes back.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the clock for the library")]
pub fn now() -> Instant {
    Instant::now()
}

/// Starts a thread.
///
/// # Errors
/// Those of `clone`: `EAGAIN` at a limit of threads, or for want of memory.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    let mut body = Some(body);
    Call::new("clone").make(|| {
        let body = body.take().ok_or(Errno::AGAIN)?;
        let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(body);
        spawned.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
    })
}
