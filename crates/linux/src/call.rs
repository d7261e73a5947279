//! The one way into the kernel. A call that was interrupted is made again; one that failed is an
//! [`Error`] with its name and range; and here alone can a test have one fail (`crate::inject`).
//!
//! # Holes
//! What does not come this way, because nothing can be done about its failure or it has none:
//! touches of guest memory (`copy`), `KVM_RUN` (its `EINTR` is a result), `sigaction` and `tgkill`
//! with arguments of ours, and reads and writes of an eventfd, which fail only if it is empty or
//! full.

use polder_units::ByteRange;
use rustix::io::Errno;

use crate::Error;

/// A system call or an ioctl: its name, and the bytes of the object that it is for.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    name: &'static str,
    range: Option<ByteRange>,
}

impl Call {
    /// One that is for no bytes in particular.
    pub(crate) const fn new(name: &'static str) -> Self {
        Self { name, range: None }
    }

    /// One that is for these bytes.
    pub(crate) const fn on(name: &'static str, range: ByteRange) -> Self {
        Self { name, range: Some(range) }
    }

    /// Makes the call, as often as it is interrupted.
    pub(crate) fn make<T>(self, ask: impl FnMut() -> Result<T, Errno>) -> Result<T, Error> {
        self.attempt(ask).map_err(|errno| self.error(errno))
    }

    /// The same, for who does not take every errno for a failure.
    pub(crate) fn attempt<T>(self, ask: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
        #[cfg(feature = "inject")]
        let ask = crate::inject::watch(self.name, ask);
        rustix::io::retry_on_intr(ask)
    }

    /// Makes the call once: that it was interrupted is a result.
    pub(crate) fn once<T>(self, ask: impl FnMut() -> Result<T, Errno>) -> Result<T, Error> {
        #[cfg(feature = "inject")]
        let mut ask = crate::inject::watch(self.name, ask);
        #[cfg(not(feature = "inject"))]
        let mut ask = ask;
        ask().map_err(|errno| self.error(errno))
    }

    /// The error of this call.
    pub(crate) const fn error(self, errno: Errno) -> Error {
        Error { call: self.name, range: self.range, errno }
    }
}

/// The errno in an error of `kvm-ioctls`.
pub(crate) fn of_kvm(error: kvm_ioctls::Error) -> Errno {
    Errno::from_raw_os_error(error.errno())
}

/// The errno that a call of `libc` has left.
pub(crate) fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
