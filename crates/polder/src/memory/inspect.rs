//! What is known of the memory.

use polder_engine::pool::PoolCounts;
use polder_engine::{
    Contents, FolioCounts, LevelLimits, PageFacts, Platform, ReshapedCounts, View, Visibility, VmId,
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
    pub fn quarantined(&self) -> Vec<PageRange> {
        self.driver.engine().quarantine().runs().collect()
    }

    /// The runs of pages that take up memory: those that somebody touched.
    ///
    /// # Errors
    /// [`Error::Host`].
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
    /// their contents outlive a conversion is [`Memory::keeps_most`]'s to say.
    pub fn is_in_place(&self) -> bool {
        self.driver.engine().config().in_place
    }

    /// What a conversion to `to` can do at best for what is in the pages: [`Contents::Preserve`]
    /// where that is on offer, else [`Contents::Zero`], else [`Contents::Unspecified`].
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
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// How many folios of each level it consists of; of transparent huge pages, how the kernel has
    /// the guest's view mapped (`ShmemPmdMapped`).
    pub fn levels(&self) -> FolioCounts {
        let of_host = self.driver.host.levels();
        of_host.unwrap_or_else(|| self.driver.engine().folio_counts())
    }

    /// The runs of pages whose folios are of one level; none of memory whose folios the kernel
    /// splits and collapses by itself.
    pub fn folios(&self) -> Vec<(PageRange, Level)> {
        match self.driver.host.levels() {
            Some(_) => Vec::new(),
            None => self.driver.engine().folio_runs(),
        }
    }

    /// How often folios were split, and merged.
    pub fn reshaped(&self) -> ReshapedCounts {
        self.driver.engine().reshaped()
    }

    /// What the pool has that its huge pages are of: the kernel's, or the simulated machine's.
    /// `None` for memory of no pool.
    pub fn pool(&self) -> Option<PoolCounts> {
        self.driver.host.pool()
    }

    /// What bounds the level at which a page is mapped: in the host view, or for a VM, if a binding
    /// of it shows the page. What an SNP guest's RMP has of it is not in it.
    ///
    /// # Errors
    /// [`Refusal::Beyond`].
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

    /// Whether the [host view](Self::host_view) shows a page as things are: shared, and with it all
    /// that the view maps together with it. It may have changed when this returns.
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
