//! What is in the pages: contents that are owed, bytes read and written.

use polder_engine::{Population, Refusal, VmId};
use polder_units::{Gfn, GfnRange, Gpa, PAGE_SIZE, PageCount, PageRange, RangeError};

use crate::host::views::Views;
use crate::pager::{Pager, SourceStatistics};
use crate::source::SourceFailure;
use crate::{Error, Memory, OnBusy};

impl Memory {
    /// Fills pages that are owed with `bytes`, and zeros after them, whatever their visibility.
    /// Nobody sees the pages before they are whole.
    ///
    /// # Errors
    /// [`Refusal::Whole`] for a page whose contents are not owed, [`Error::TooManyBytes`], and as
    /// [`Memory::convert`].
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::{PageCount, PageRange}};
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().owed().build()?;
    /// let first = PageRange::between(0, 1).unwrap();
    /// memory.populate(first, b"hello")?;
    /// assert!(memory.populate(first, b"again").is_err(), "it is whole");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn populate(&self, range: PageRange, bytes: &[u8]) -> Result<(), Error> {
        if range.count().bytes().is_none_or(|size| size < bytes.len() as u64) {
            return Err(Error::TooManyBytes { range, bytes: bytes.len() });
        }
        self.driver.populate(range, bytes)
    }

    /// Says that the contents of pages that are owed will not come: whoever touches or waits for
    /// one is denied from now on. Discarding the pages makes them zeros.
    ///
    /// # Errors
    /// [`Refusal::Whole`] for a page whose contents are not owed, [`Refusal::Beyond`].
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::{PageCount, PageRange}};
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().owed().build()?;
    /// memory.fail(PageRange::between(0, 1).unwrap())?;
    /// assert!(memory.host_view().touch_read(0, &mut [0]).is_err());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn fail(&self, range: PageRange) -> Result<(), Error> {
        self.driver.fail_source(range)
    }

    /// Says that nothing more will come: what is still owed is zeros, but for what failed.
    ///
    /// # Errors
    /// [`Error::Host`]: it is so nevertheless, but the host goes on watching the guest's touches,
    /// which costs time. To stop that, say it again.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().owed().build()?;
    /// memory.settle()?;
    /// memory.host_view().touch_read(0, &mut [0])?; // would have waited
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn settle(&self) -> Result<(), Error> {
        self.driver.settle()
    }

    /// Waits until the contents of pages are there. They are asked for from the source, if there is
    /// one.
    ///
    /// # Errors
    /// [`Refusal::SourceFailed`] naming the first page that can't be had, [`Refusal::Owed`] without
    /// a source, [`Refusal::Beyond`].
    ///
    /// ```
    /// # use polder::{HostKind, Memory, source::ZeroSource, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().source(std::sync::Arc::new(ZeroSource)).build()?;
    /// memory.fetch(PageRange::between(3, 4).unwrap())?;
    /// memory.host_view().touch_read(3 * 4096, &mut [0])?; // waits for nobody
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn fetch(&self, range: PageRange) -> Result<(), Error> {
        self.driver.claim(OnBusy::Wait, |engine| Ok(engine.check_whole(range)?))
    }

    /// Brings the page that a vCPU's exit names
    /// ([`GuestExit::Userfault`](crate::GuestExit::Userfault)), on the calling thread: what comes
    /// with it by read-ahead comes from this thread, too. If somebody else is bringing it, the
    /// guest waits when it tries again. Its touches are plain faults from then on.
    ///
    /// There is an example at [`Builder::delivery`](crate::Builder::delivery).
    ///
    /// # Errors
    /// [`Refusal::Unbound`]; [`Error::NotSimulated`] on a host that has no such exits.
    pub fn fetch_for(&self, vm: VmId, gfn: Gfn) -> Result<(), Error> {
        let host = self.driver.host.machine().ok_or(Error::NotSimulated)?;
        let pages = self.driver.ask(|engine| engine.pages_of(vm, GfnRange::one(gfn)))?;
        let page = pages[0].start();
        let owed = self.driver.engine().is_owed_page(page);
        let brought = match &self.driver.pager {
            Some(pager) if owed => pager.bring_here(&self.driver, page),
            _ => PageRange::one(page),
        };
        host.end_exits(vm, brought)
    }

    /// Has the source asked for all that is still owed, behind whatever somebody waits for. Does
    /// not wait; [`Memory::owed`] tells how much is left. Nothing is done without a source.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, source::ZeroSource, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().source(std::sync::Arc::new(ZeroSource)).build()?;
    /// memory.fill();
    /// while memory.owed() > PageCount::ZERO {
    ///     std::thread::yield_now();
    /// }
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn fill(&self) {
        if let Some(pager) = &self.driver.pager {
            pager.fill();
            self.driver.host.views().nudge();
        }
    }

    /// How many pages are owed: their contents are to come, and have not failed to.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().owed().build()?;
    /// assert_eq!(memory.owed().get(), 16);
    /// memory.populate(PageRange::between(0, 4).unwrap(), b"four pages")?;
    /// memory.fail(PageRange::between(4, 5).unwrap())?;
    /// assert_eq!(memory.owed().get(), 11);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn owed(&self) -> PageCount {
        let engine = self.driver.engine();
        let all = PageRange::between(0, engine.config().pages.get()).expect("memory has pages");
        let owed = engine.pages().runs(all).filter(|(_, it)| it.population == Population::Owed);
        let to_come = owed.map(|(run, _)| {
            let failed = engine.failed().within(run).map(|run| run.count().get());
            run.count().get() - failed.sum::<u64>()
        });
        PageCount::new(to_come.sum()).expect("part of the object")
    }

    /// What the source was asked for, and what came of it; all zero without one.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, source::ZeroSource, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().source(std::sync::Arc::new(ZeroSource)).build()?;
    /// memory.fetch(PageRange::between(3, 4).unwrap())?;
    /// println!("{:?}", memory.source_statistics());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn source_statistics(&self) -> SourceStatistics {
        self.driver.pager.as_ref().map(Pager::statistics).unwrap_or_default()
    }

    /// The pages that the source could not bring, and why: the first thousand runs of them.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, source::{Fault, FaultySource, SourceError, ZeroSource}, units::{PageCount, PageRange}};
    /// # use std::sync::Arc;
    /// let source = FaultySource::new(ZeroSource, Fault::Fails, 3u32.into(), 0);
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared();
    /// let memory = memory.source(Arc::new(source)).build()?;
    /// assert!(memory.fetch(PageRange::between(3, 4).unwrap()).is_err());
    /// let failure = &memory.source_failures()[0];
    /// assert!(matches!(failure.why, SourceError::Read(_)));
    /// assert_eq!(failure.pages, PageRange::between(3, 4).unwrap(), "and no other page");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn source_failures(&self) -> Vec<SourceFailure> {
        self.driver.pager.as_ref().map(Pager::failures).unwrap_or_default()
    }

    /// Reads bytes at a guest-physical address, all of them on shared pages.
    ///
    /// # Errors
    /// [`Refusal::Private`] and the other refusals, naming the page, before anything is read;
    /// [`Error::Copy`] in the middle.
    ///
    /// ```
    /// # use polder::{Error, HostKind, Memory, Refusal, Slot, Vm, units::{Gfn, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let refused = memory.read(vm, Gpa::new(0x10_0000), &mut [0; 64]);
    /// assert_eq!(refused, Err(Error::Refused(Refusal::Private { page: 0u32.into() })));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn read(&self, vm: VmId, gpa: Gpa, into: &mut [u8]) -> Result<(), Error> {
        let mut left = into;
        self.copy(vm, gpa, left.len(), |views, offset, count| {
            let (now, rest) = std::mem::take(&mut left).split_at_mut(count);
            left = rest;
            views.read(offset, now)
        })
    }

    /// Writes bytes at a guest-physical address, all of them on shared pages.
    ///
    /// # Errors
    /// As [`Memory::read`].
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Vm, units::{Gfn, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// memory.write(vm, Gpa::new(0x10_0ffe), b"across two pages")?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn write(&self, vm: VmId, gpa: Gpa, from: &[u8]) -> Result<(), Error> {
        let mut left = from;
        self.copy(vm, gpa, left.len(), |views, offset, count| {
            let (now, rest) = left.split_at(count);
            left = rest;
            let written = views.write(offset, now);
            self.driver.dirty.wrote(offset, count);
            written
        })
    }

    /// Splits `count` bytes at `gpa` into the runs of pages behind them and moves each.
    fn copy(
        &self,
        vm: VmId,
        gpa: Gpa,
        count: usize,
        mut each: impl FnMut(&dyn Views, u64, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(last) = count.checked_sub(1) else { return Ok(()) };
        let overflow = RangeError::Overflow { start: gpa.get() };
        let end = gpa.checked_add(last as u64).ok_or(Refusal::Range(overflow))?;
        let gfns = GfnRange::between(gpa.gfn().get(), end.gfn().get() + 1)
            .ok_or(Refusal::Range(overflow))?;
        let (mut skip, mut left) = (gpa.page_offset(), count as u64);
        let copied = self.driver.copy(
            |engine| engine.pages_of(vm, gfns),
            |views, run| {
                let in_run = run.count().get().saturating_mul(PAGE_SIZE) - skip;
                let now = in_run.min(left);
                let offset = run.start().offset() + skip;
                (skip, left) = (0, left - now);
                each(views, offset, usize::try_from(now).expect("part of a slice's length"))
            },
        );
        if let Err(Error::Refused(Refusal::Private { .. } | Refusal::Quarantined { .. })) = copied {
            self.driver.counters.denied();
        }
        copied
    }
}
