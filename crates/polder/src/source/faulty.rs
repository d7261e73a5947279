//! A source that is not to be relied on: for tests, and to see what happens.

use std::panic::resume_unwind;
use std::time::Duration;

use polder_linux::Errno;
use polder_units::{PAGE_BYTES, PAGE_SIZE, PageCount, PageIndex, PageRange};

use super::{Extent, Source, SourceError};
use crate::sync::sleep;

/// What is the matter with pages of a [`FaultySource`] source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fault {
    /// Every read of one takes this long.
    Slow(Duration),
    /// A read returns one page at a time.
    Short,
    /// A read fails with `EIO`.
    Fails,
    /// A read returns a number of bytes that is no number of pages.
    Ragged,
    /// A read says that more came than was asked for.
    TooLong,
    /// A read finds nothing.
    Ends,
    /// A read panics.
    Panics,
}

/// Another source, with something the matter with some of its pages.
pub struct FaultySource<S> {
    source: S,
    fault: Fault,
    /// Every so many pages, from the first of them on.
    every: u64,
    first: PageIndex,
}

impl<S: Source> FaultySource<S> {
    /// `source`, with `fault` at every `every`-th page from `first` on; 0 for that page alone.
    ///
    /// ```
    /// # use polder::{source::{Fault, FaultySource, Source, ZeroSource}, units::PageRange};
    /// let source = FaultySource::new(ZeroSource, Fault::Fails, 4u32.into(), 8); // pages 4, 12, 20, ...
    /// let mut bytes = [1; 4096];
    /// assert!(source.read(PageRange::between(5, 6).unwrap(), &mut bytes).is_ok());
    /// assert!(source.read(PageRange::between(12, 13).unwrap(), &mut bytes).is_err());
    /// ```
    pub fn new(source: S, fault: Fault, first: PageIndex, every: u64) -> Self {
        Self { source, fault, every, first }
    }

    /// The first page of `pages` with the fault.
    fn at(&self, pages: PageRange) -> Option<PageIndex> {
        let is = |page: &PageIndex| match page.get().checked_sub(self.first.get()) {
            Some(0) => true,
            Some(past) => self.every > 0 && past.is_multiple_of(self.every),
            None => false,
        };
        pages.frames().find(is)
    }
}

impl<S: Source> Source for FaultySource<S> {
    fn name(&self) -> String {
        self.source.name()
    }

    fn read(&self, pages: PageRange, into: &mut [u8]) -> Result<usize, SourceError> {
        let Some(page) = self.at(pages) else { return self.source.read(pages, into) };
        match self.fault {
            Fault::Slow(time) => sleep(time),
            Fault::Short => {
                return self.source.read(PageRange::one(pages.start()), &mut into[..PAGE_BYTES]);
            }
            Fault::Fails => return Err(SourceError::Read(Errno::IO)),
            Fault::Ragged => return self.source.read(pages, into).map(|came| came - 1),
            Fault::TooLong => return self.source.read(pages, into).map(|came| came + PAGE_BYTES),
            Fault::Ends => return Err(SourceError::Ended(page.get() * PAGE_SIZE)),
            // Past the panic hook: nobody has to read of it who made it so.
            Fault::Panics => resume_unwind(Box::new("the source panics, as it was told to")),
        }
        self.source.read(pages, into)
    }

    fn extent(&self, pages: PageRange) -> Extent {
        let extent = self.source.extent(pages);
        match (extent, self.at(extent.range())) {
            // What is the matter with a page is seen by reading it.
            (Extent::Zeros(zeros), Some(page)) => {
                let before = PageRange::between(zeros.start().get(), page.get());
                before.map_or(Extent::Bytes(PageRange::one(page)), Extent::Zeros)
            }
            (extent, _) => extent,
        }
    }

    fn granule(&self) -> PageCount {
        self.source.granule()
    }

    fn will_need(&self, pages: PageRange) {
        self.source.will_need(pages);
    }

    fn forget(&self, pages: PageRange) {
        self.source.forget(pages);
    }
}
