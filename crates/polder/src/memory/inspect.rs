//! What is known of the memory.

use polder_engine::pool::PoolCounts;
use polder_engine::{
    Contents, FolioCounts, LevelLimits, PageFacts, Platform, ReshapeCounts, View, Visibility, VmId,
};
use polder_units::{Level, PageCount, PageIndex, PageRange};

use crate::statistics::Statistics;
use crate::{Error, Memory, PageSize};
#[cfg(doc)]
use crate::{HostKind, Refusal};

impl Memory {
    /// What is known of the pages of a range: maximal runs of equal facts.
    ///
    /// # Errors
    /// [`Refusal::Beyond`].
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Population, Visibility, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// let all = PageRange::between(0, 16).unwrap();
    /// let [(run, facts)] = memory.facts(all)?[..] else { panic!("all are alike") };
    /// assert_eq!((run, facts.visibility, facts.population), (all, Visibility::Private, Population::Whole));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn facts(&self, range: PageRange) -> Result<Vec<(PageRange, PageFacts)>, Error> {
        self.driver.ask(|engine| {
            engine.check_bounds(range)?;
            Ok(engine.pages().runs(range).collect())
        })
    }

    /// The pages that are out of use because an operation on them could not be undone.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// assert!(memory.quarantined().is_empty());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn quarantined(&self) -> Vec<PageRange> {
        self.driver.engine().quarantine().runs().collect()
    }

    /// The runs of pages that take up memory: those that somebody touched.
    ///
    /// # Errors
    /// [`Error::Host`].
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// assert!(memory.existing()?.is_empty());
    /// memory.host_view().touch_write(0x5000, b"hello")?;
    /// assert_eq!(memory.existing()?, [PageRange::between(5, 6).unwrap()]);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn existing(&self) -> Result<Vec<PageRange>, Error> {
        self.driver.host.existing()
    }

    /// How many pages of memory the object takes up: of both sides, where they are two pools.
    ///
    /// # Errors
    /// [`Error::Host`]; on host `guest_memfd` with `ENOSYS` where the kernel can't count the
    /// pages of one (it lacks `cachestat`). [`Memory::existing`] then has the shared ones alone.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// memory.host_view().touch_write(0x5000, &[1])?;
    /// assert_eq!(memory.resident()?.get(), 1);
    /// assert_eq!(memory.existing()?[0].start().get(), 5);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn resident(&self) -> Result<PageCount, Error> {
        self.driver.host.resident()
    }

    /// Whether private and shared pages are the same memory: [`HostKind::is_in_place`]. Whether
    /// contents outlive a conversion is another question: [`Memory::keeps_most`].
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// assert!(memory.is_in_place());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn is_in_place(&self) -> bool {
        self.driver.engine().config().in_place
    }

    /// The most that a conversion to `to` can promise for what is in the pages:
    /// [`Contents::Preserve`] where this host and platform can keep it, else [`Contents::Zero`],
    /// else [`Contents::Unspecified`].
    ///
    /// ```
    /// # use polder::{Contents, HostKind, Memory, Platform, Visibility, units::PageCount};
    /// let builder = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine);
    /// let keeps = |memory: Memory| memory.keeps_most(Visibility::Shared);
    /// assert_eq!(keeps(builder.clone().build()?), Contents::Preserve);
    /// assert_eq!(keeps(builder.platform(Platform::Snp).build()?), Contents::Zero);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn keeps_most(&self, to: Visibility) -> Contents {
        self.driver.keeps_most(to)
    }

    /// For which kind of VM it is.
    pub fn platform(&self) -> Platform {
        self.driver.engine().config().platform
    }

    /// The pages that it is made of. [`PageSize::Small`] also where transparent huge pages were
    /// asked for that this machine's settings don't allow.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, PageSize, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// assert_eq!(memory.page_size(), PageSize::Small);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// How many folios of each level it consists of; of transparent huge pages, how the kernel has
    /// the guest's view mapped (`ShmemPmdMapped`).
    ///
    /// ```
    /// # use polder::{Contents, HostKind, Memory, OnBusy, PageSize, Visibility, units::{Level, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(1024u32)).host(HostKind::Machine);
    /// # let memory = memory.page_size(PageSize::Huge2M).build()?;
    /// let page = PageRange::between(3, 4).unwrap();
    /// memory.convert(page, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
    /// let levels = memory.levels();
    /// assert_eq!((levels.size_2m, levels.size_4k), (1, 512));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn levels(&self) -> FolioCounts {
        let of_host = self.driver.host.levels();
        of_host.unwrap_or_else(|| self.driver.engine().folio_counts())
    }

    /// The runs of pages whose folios are of one level; none of memory whose folios the kernel
    /// splits and collapses by itself.
    ///
    /// ```
    /// # use polder::{Contents, HostKind, Memory, OnBusy, PageSize, Visibility, units::{Level, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(1024u32)).host(HostKind::Machine);
    /// # let memory = memory.page_size(PageSize::Huge2M).build()?;
    /// let page = PageRange::between(3, 4).unwrap();
    /// memory.convert(page, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
    /// let halves = [PageRange::between(0, 512).unwrap(), PageRange::between(512, 1024).unwrap()];
    /// assert_eq!(memory.folios(), [(halves[0], Level::Size4K), (halves[1], Level::Size2M)]);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn folios(&self) -> Vec<(PageRange, Level)> {
        match self.driver.host.levels() {
            Some(_) => Vec::new(),
            None => self.driver.engine().folio_runs(),
        }
    }

    /// How often folios were split, and merged.
    ///
    /// ```
    /// # use polder::{Contents, HostKind, Memory, OnBusy, PageSize, Visibility, units::{Level, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(1024u32)).host(HostKind::Machine);
    /// # let memory = memory.page_size(PageSize::Huge2M).build()?;
    /// let page = PageRange::between(3, 4).unwrap();
    /// memory.convert(page, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
    /// memory.convert(page, Visibility::Private, Contents::Preserve, OnBusy::Wait)?;
    /// let counts = memory.reshape_counts();
    /// assert_eq!((counts.splits, counts.merges), (1, 1));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn reshape_counts(&self) -> ReshapeCounts {
        self.driver.engine().reshape_counts()
    }

    /// The counts of the pool that its huge pages are from: the kernel's, or the simulated
    /// machine's. `None` for memory that is from no pool.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, PageSize, units::{Level, PageCount}};
    /// # let memory = Memory::builder(PageCount::from(1024u32)).host(HostKind::Machine);
    /// # let memory = memory.page_size(PageSize::Huge2M).build()?;
    /// let pool = memory.pool().expect("2M pages are of one");
    /// assert_eq!((pool.total, pool.available()), (2, 0));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn pool(&self) -> Option<PoolCounts> {
        self.driver.host.pool()
    }

    /// What limits the level at which a page is mapped: in the host view, or for a VM to which it
    /// is bound. The limit by an SNP guest's RMP entry is not among them.
    ///
    /// # Errors
    /// [`Refusal::Beyond`].
    ///
    /// ```
    /// # use polder::{Contents, HostKind, Memory, OnBusy, PageSize, View, Visibility, units::{Level, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(1024u32)).host(HostKind::Machine);
    /// # let memory = memory.page_size(PageSize::Huge2M).build()?;
    /// let page = PageRange::between(3, 4).unwrap();
    /// memory.convert(page, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
    /// let limits = memory.level_limits(View::Host, 4u32.into(), None)?;
    /// assert_eq!(limits.level(), Level::Size4K);
    /// println!("because of {:?}", limits.limiting());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn level_limits(
        &self,
        view: View,
        page: PageIndex,
        vm: Option<VmId>,
    ) -> Result<LevelLimits, Error> {
        self.driver.ask(|engine| {
            engine.check_bounds(PageRange::one(page))?;
            let shown =
                engine.bindings().find(|(of, _, it)| Some(*of) == vm && it.pages().contains(page));
            Ok(engine.level_limits(view, page, shown.map(|(.., binding)| binding)))
        })
    }

    /// Whether a page can be touched in the [host view](Self::host_view) now: it is shared, and so
    /// is all that the view maps together with it. It may have changed when this returns.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// assert!(!memory.is_shown(3u32.into()), "it is private");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn is_shown(&self, page: PageIndex) -> bool {
        self.driver.engine().is_shown(page)
    }

    /// What has happened so far.
    ///
    /// ```
    /// # use polder::{Contents, HostKind, Memory, OnBusy, Visibility, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// let all = PageRange::between(0, 16).unwrap();
    /// memory.convert(all, Visibility::Shared, Contents::Unspecified, OnBusy::Wait)?;
    /// assert_eq!(memory.statistics().converted_pages, 16);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn statistics(&self) -> Statistics {
        self.driver.counters.read(self.driver.host.rmp_counts())
    }
}
