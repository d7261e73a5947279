//! Sources: where the contents of pages come from that are owed.
//!
//! A [`Source`] knows nothing of claims, views or faults. It is asked for pages, by several threads
//! at once, with no lock held and nobody else's answer waiting for its; it may be slow, fail, panic
//! or never return. Whoever waits for a page that does not come is denied it once the
//! [deadline](crate::Builder::fault_deadline) is over.
//!
//! # Holes
//! A read that never returns keeps its thread, and the memory, until it does: there is no way to
//! call it off.

mod faulty;
mod file;

use std::fmt;
use std::time::Duration;

use polder_units::{PageCount, PageRange};

pub use faulty::{Fault, FaultySource};
pub use file::{FileSource, OpenError};

/// Where the contents of an object's pages come from.
///
/// ```
/// # use polder::{HostKind, Memory, source::{Source, SourceError}, units::{PageCount, PageRange}};
/// use std::sync::Arc;
///
/// /// Each page says which one it is.
/// struct Numbered;
///
/// impl Source for Numbered {
///     fn name(&self) -> String {
///         "numbers".into()
///     }
///     fn read(&self, pages: PageRange, into: &mut [u8]) -> Result<usize, SourceError> {
///         for (page, bytes) in pages.frames().zip(into.chunks_mut(4096)) {
///             bytes[..8].copy_from_slice(&page.get().to_le_bytes());
///         }
///         Ok(into.len())
///     }
/// }
///
/// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared();
/// let memory = memory.source(Arc::new(Numbered)).build()?;
/// let mut first = [0];
/// memory.host_view().touch_read(7 * 4096, &mut first)?;
/// assert_eq!(first, [7]);
/// # Ok::<_, polder::Error>(())
/// ```
pub trait Source: Send + Sync {
    /// Its name, for messages.
    fn name(&self) -> String;

    /// Brings the contents of `pages`, the first of them first, into `into`, which has room for
    /// all. Returns how many bytes came: whole pages; fewer than asked for if the rest is to be
    /// asked for again; 0 where there is nothing.
    ///
    /// # Errors
    /// Whatever keeps it from that; asked for less, it may be able to.
    fn read(&self, pages: PageRange, into: &mut [u8]) -> Result<usize, SourceError>;

    /// What is known, without reading, of the first of `pages` and those after it.
    fn extent(&self, pages: PageRange) -> Extent {
        Extent::Bytes(pages)
    }

    /// The least that is worth a read: what is read starts and ends at multiples of it, where the
    /// pages are owed. A power of two.
    fn granule(&self) -> PageCount {
        PageCount::ONE
    }

    /// These pages will be read soon, as far as can be told: a source that is slow may begin.
    fn will_need(&self, _pages: PageRange) {}

    /// Nothing is owed for these pages any more; they will not be asked for again.
    fn forget(&self, _pages: PageRange) {}
}

/// How a guest's touch of a page that is owed gets to who brings it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum Delivery {
    /// As an event to Polder's fault threads, while the vCPU waits.
    #[default]
    Events,
    /// As an exit of the vCPU that touched ([`GuestExit::Userfault`](crate::GuestExit::Userfault)):
    /// its own thread brings the page ([`Memory::fetch_for`](crate::Memory::fetch_for)), so that
    /// vCPUs don't wait for one queue. KVM userfault, which no released kernel has: on the
    /// simulated machine.
    Exits,
}

/// What a [`Source`] has at a place.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Extent {
    /// Contents, to be read.
    Bytes(PageRange),
    /// Zeros: nothing is read.
    Zeros(PageRange),
}

impl Extent {
    /// The pages.
    pub const fn range(self) -> PageRange {
        match self {
            Self::Bytes(range) | Self::Zeros(range) => range,
        }
    }
}

/// Why contents did not come.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SourceError {
    /// A read failed.
    #[error("it can't be read: {0}")]
    Read(polder_linux::Errno),
    /// It has fewer bytes than it should: it has been truncated, or never had them.
    #[error("it ends at byte {0:#x}")]
    Ended(u64),
    /// It has been changed since it was opened, so that its pages do not belong together.
    #[error("it has been changed since it was opened")]
    Changed,
    /// A read returned another number of bytes than it could.
    #[error("a read of {asked} bytes returned {came}")]
    WrongLength {
        /// What was asked for.
        asked: usize,
        /// What came.
        came: usize,
    },
    /// It panicked.
    #[error("it panicked")]
    Panicked,
    /// It has not come in time.
    #[error("it has not answered within {} ms", .0.as_millis())]
    Late(Duration),
    /// What a source of somebody else's has to say.
    #[error("{0}")]
    Other(String),
}

/// What a source's own reads said.
///
/// ```
/// # use polder::source::SourceError;
/// let error = std::io::Error::from_raw_os_error(5);
/// assert_eq!(SourceError::from(error).to_string(), "it can't be read: Input/output error (os error 5)");
/// ```
impl From<std::io::Error> for SourceError {
    fn from(error: std::io::Error) -> Self {
        match polder_linux::Errno::from_io_error(&error) {
            Some(errno) => Self::Read(errno),
            None => Self::Other(error.to_string()),
        }
    }
}

/// Pages whose contents did not come, and never will.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("pages {pages} could not be brought from {source_name}: {why}")]
pub struct SourceFailure {
    /// The pages.
    pub pages: PageRange,
    /// The source's name.
    pub source_name: String,
    /// What was the matter.
    pub why: SourceError,
}

/// A source of zeros.
#[derive(Clone, Copy, Default, Debug)]
pub struct ZeroSource;

impl Source for ZeroSource {
    fn name(&self) -> String {
        "zeros".into()
    }

    fn read(&self, _: PageRange, into: &mut [u8]) -> Result<usize, SourceError> {
        into.fill(0);
        Ok(into.len())
    }

    fn extent(&self, pages: PageRange) -> Extent {
        Extent::Zeros(pages)
    }
}

impl fmt::Debug for dyn Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Source").field(&self.name()).finish()
    }
}
