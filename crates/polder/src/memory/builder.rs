//! [`Builder`]: how a [`Memory`] is made.

mod offered;

use std::sync::Arc;
use std::time::Duration;

use polder_engine::{Config, PageFacts, Platform, Population, Refusal, Visibility};
use polder_units::{Geometry, Level, PageCount, RangeError};

#[cfg(doc)]
use crate::HostView;
use crate::driver::Driver;
use crate::host::guest_memfd::GuestMemfdHost;
use crate::host::machine::MachineHost;
use crate::host::memfd::MemfdHost;
use crate::host::{Host, HostKind};
use crate::pager::{Pager, Paging};
use crate::read_ahead::ReadAhead;
use crate::source::{Delivery, Source};
use crate::{Error, HugePool, Memory, PageSize};

/// How to make a [`Memory`].
#[derive(Clone, Debug)]
pub struct Builder {
    pages: PageCount,
    host: HostKind,
    platform: Platform,
    initial: PageFacts,
    page_size: PageSize,
    pool: Option<HugePool>,
    source: Option<Arc<dyn Source>>,
    read_ahead: ReadAhead,
    deadline: Duration,
    fault_threads: Option<usize>,
    off_direct_map: bool,
    delivery: Delivery,
}

/// How long is waited for contents, unless [`Builder::fault_deadline`] says.
const DEADLINE: Duration = Duration::from_secs(10);

/// The fault threads of memory that has a source, unless [`Builder::fault_threads`] says: one
/// answers while the others read.
const FAULT_THREADS: usize = 4;

impl Builder {
    pub(super) fn new(pages: PageCount) -> Self {
        Self {
            pages,
            host: HostKind::Memfd,
            platform: Platform::Plain,
            page_size: PageSize::Small,
            pool: None,
            initial: PageFacts { visibility: Visibility::Private, population: Population::Whole },
            source: None,
            read_ahead: ReadAhead::Adaptive,
            deadline: DEADLINE,
            fault_threads: None,
            off_direct_map: false,
            delivery: Delivery::Events,
        }
    }

    /// On which host; the memfd one unless said.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// assert!(memory.is_in_place());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn host(self, host: HostKind) -> Self {
        Self { host, ..self }
    }

    /// For which kind of VM; a plain one unless said.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Platform, units::PageCount};
    /// let builder = Memory::builder(PageCount::from(16u32)).platform(Platform::Snp);
    /// assert!(builder.clone().build().is_err(), "an SNP guest's memory is on the simulated machine");
    /// let memory = builder.host(HostKind::Machine).build()?;
    /// assert_eq!(memory.platform(), Platform::Snp);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn platform(self, platform: Platform) -> Self {
        Self { platform, ..self }
    }

    /// Made of which pages; of 4K unless said.
    ///
    /// Huge pages are reserved for the whole memory when it is made. Transparent ones the kernel
    /// gives if it can, and if this machine's settings don't let it, the memory is made of 4K
    /// pages: [`Memory::page_size`] says so. On hugetlb pages of a memfd the raw [host
    /// view](HostView) shows a huge page only while all of it is shared, and else denies it as a
    /// whole: single pages are reached by [`Memory::read`] and [`Memory::write`]. See
    /// `docs/huge-pages.md`.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, PageSize, units::{Level, PageCount}};
    /// let memory = Memory::builder(PageCount::from(1024u32)).host(HostKind::Machine);
    /// let memory = memory.page_size(PageSize::Huge2M).build()?;
    /// assert_eq!(memory.pool().map(|pool| pool.total), Some(2));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn page_size(self, page_size: PageSize) -> Self {
        Self { page_size, ..self }
    }

    /// Of this pool's huge pages, on the simulated machine; else a pool is made that is just
    /// enough.
    ///
    /// ```
    /// # use polder::{HostKind, HugePool, Memory, PageSize, units::{Level, PageCount}};
    /// let pool = HugePool::new(Level::Size2M, 3);
    /// let of_pool = Memory::builder(PageCount::from(1024u32))
    ///     .host(HostKind::Machine)
    ///     .page_size(PageSize::Huge2M)
    ///     .pool(&pool);
    /// let first = of_pool.clone().build()?;
    /// assert!(of_pool.build().is_err(), "one is left, and two are needed");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn pool(self, pool: &HugePool) -> Self {
        Self { pool: Some(pool.clone()), ..self }
    }

    /// Every page's contents are owed until [`Memory::populate`] brings them, or [`Memory::settle`]
    /// says that nothing more will come. Whoever touches such a page waits. Of an SNP guest's
    /// memory shared pages only can be owed.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::{PageCount, PageRange}};
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).owed().build()?;
    /// memory.populate(PageRange::between(0, 1).unwrap(), b"the kernel's first page")?;
    /// memory.settle()?; // the rest is zeros
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn owed(mut self) -> Self {
        self.initial.population = Population::Owed;
        self
    }

    /// Every page's contents are owed, and come from `source` when somebody touches them, or a
    /// little before. Once none is owed any more, touches are plain faults that nobody is told of.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, source::ZeroSource, units::{PageCount, PageRange}};
    /// use std::sync::Arc;
    ///
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared();
    /// let memory = memory.source(Arc::new(ZeroSource)).build()?;
    /// assert_eq!(memory.owed().get(), 16);
    /// memory.fetch(PageRange::between(3, 4).unwrap())?;
    /// assert!(memory.owed().get() < 16);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn source(self, source: Arc<dyn Source>) -> Self {
        Self { source: Some(source), ..self.owed() }
    }

    /// How much is brought with a page that somebody waits for.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, ReadAhead, source::ZeroSource, units::{PageCount, PageRange}};
    /// # use std::sync::Arc;
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared();
    /// let memory = memory.source(Arc::new(ZeroSource)).read_ahead(ReadAhead::Off).build()?;
    /// memory.fetch(PageRange::between(3, 4).unwrap())?;
    /// assert_eq!(memory.owed().get(), 15, "that page alone");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn read_ahead(self, read_ahead: ReadAhead) -> Self {
        Self { read_ahead, ..self }
    }

    /// How long is waited for the source, at most: who waits longer for a page is denied it, as if
    /// the source had failed. 10 s unless said.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, source::{Fault, FaultySource, ZeroSource}, units::{PageCount, PageRange}};
    /// use std::{sync::Arc, time::Duration};
    ///
    /// let slow = FaultySource::new(ZeroSource, Fault::Slow(Duration::from_secs(1)), 0u32.into(), 1);
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared();
    /// let memory = memory.source(Arc::new(slow)).fault_deadline(Duration::from_millis(50)).build()?;
    /// assert!(memory.fetch(PageRange::between(3, 4).unwrap()).is_err());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn fault_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// How many threads answer faults and read the source: 4 with a source (one of which never
    /// reads), 1 without, unless said. With a source there are at least 2.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, source::ZeroSource, units::PageCount};
    /// # use std::sync::Arc;
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared();
    /// let memory = memory.source(Arc::new(ZeroSource)).fault_threads(8).build()?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn fault_threads(self, count: usize) -> Self {
        Self { fault_threads: Some(count), ..self }
    }

    /// How a guest's touch of an owed page gets to who brings it: as an event for the fault threads,
    /// unless said, or as an exit of the vCPU. Exits are for plain VMs of the simulated machine;
    /// elsewhere [`Builder::build`] refuses them with [`Error::NotOffered`].
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use polder::{GuestExit, HostKind, Memory, Slot, Visibility, Vm, source::{Delivery, ZeroSource}, units::{Gfn, Gpa, PageCount}};
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared();
    /// let memory = memory.source(Arc::new(ZeroSource)).delivery(Delivery::Exits).build()?;
    /// let vm = memory.attach(Vm::Machine)?;
    /// memory.bind(vm, Slot(0), Gfn::from(0x100), memory.all_pages())?;
    ///
    /// let vcpu = memory.machine_vcpu(vm)?;
    /// let mut byte = [1];
    /// let mut read = || vcpu.read(Gpa::new(0x10_0000), Visibility::Shared, &mut byte);
    /// assert_eq!(read(), Err(GuestExit::Userfault(Gfn::from(0x100))));
    /// memory.fetch_for(vm, Gfn::from(0x100))?; // on this thread
    /// read().unwrap();
    /// assert_eq!(byte, [0]);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn delivery(self, delivery: Delivery) -> Self {
        Self { delivery, ..self }
    }

    /// Takes each page off the kernel's direct map before anybody sees it, until its memory is
    /// freed: the kernel does not reach it by mistake or by speculation then. On the simulated
    /// machine; no kernel up to 7.3 offers it for memory that KVM can map.
    pub fn off_direct_map(self) -> Self {
        Self { off_direct_map: true, ..self }
    }

    /// Every page is shared at first; private unless said.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// memory.host_view().touch_write(0, b"hello")?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn shared(mut self) -> Self {
        self.initial.visibility = Visibility::Shared;
        self
    }

    /// Makes the memory.
    ///
    /// # Errors
    /// [`RangeError::Empty`] for no page; [`Error::Missing`] where the host can't be used here,
    /// with what to do about it; [`Error::NotOffered`] for an SNP guest's memory on another host
    /// than the simulated machine, and where its pages would be owed and private, for the guest
    /// alone can fill such; [`Error::Host`] where the kernel refuses the size.
    ///
    /// ```
    /// # use polder::{Error, HostKind, Memory, Refusal, units::{PageCount, RangeError}};
    /// let none = Memory::builder(PageCount::ZERO).host(HostKind::Machine).build();
    /// assert_eq!(none.err(), Some(Error::Refused(Refusal::Range(RangeError::Empty))));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn build(self) -> Result<Memory, Error> {
        if self.pages.is_zero() {
            return Err(Refusal::Range(RangeError::Empty).into());
        }
        self.check_offered()?;
        let page_size = self.offered_page_size()?;
        let host = self.make_host(page_size)?;
        let config = Config {
            pages: self.pages,
            geometry: Geometry::X86_64,
            platform: self.platform,
            in_place: self.host.is_in_place(),
            // A view of 4K pages over a transparent huge page is what lets single ones be shared.
            host_view_level: page_size.reserved().unwrap_or(Level::Size4K),
            backing: page_size.backing(self.host),
            initial: self.initial,
        };
        let mut driver = Driver::new(config, host);
        driver.pager = self.source.map(|source| {
            let (read_ahead, deadline) = (self.read_ahead, self.deadline);
            let granule = Geometry::X86_64.pages(page_size.level());
            Pager::new(Paging { source, read_ahead, deadline, granule })
        });
        let (least, usual) = if driver.pager.is_some() { (2, FAULT_THREADS) } else { (1, 1) };
        Memory::of(driver, page_size, self.fault_threads.unwrap_or(usual).max(least))
    }

    fn make_host(&self, page_size: PageSize) -> Result<Box<dyn Host>, Error> {
        Ok(match self.host {
            HostKind::Memfd => {
                let owed = self.initial.population == Population::Owed;
                Box::new(MemfdHost::new(self.pages, owed, page_size)?) as Box<dyn Host>
            }
            HostKind::GuestMemfd => Box::new(GuestMemfdHost::new(self.pages, self.initial)?),
            HostKind::Machine => {
                let host = match page_size.reserved() {
                    None => MachineHost::new(self.pages, self.platform)?,
                    Some(level) => {
                        let pool = self.pool.as_ref();
                        MachineHost::of_huge_pages(self.pages, self.platform, level, pool)?
                    }
                };
                let host = if self.off_direct_map { host.off_direct_map() } else { host };
                Box::new(if self.delivery == Delivery::Exits { host.with_exits() } else { host })
            }
        })
    }
}
