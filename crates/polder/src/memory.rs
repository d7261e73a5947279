//! [`Memory`]: what a VMM holds.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use polder_engine::pool::PoolCounts;
use polder_engine::{
    Binding, Config, Contents, Engine, FolioCounts, GuestAccess, Holder, LevelLimits, MemoryFault,
    PageFacts, PinKind, Platform, Population, Refusal, ReshapedCounts, Slot, View, Visibility,
    VmId, Wish,
};
use polder_machine::{ObjectId, ProcessId};
use polder_units::{
    Geometry, Gfn, GfnRange, Gpa, Level, PAGE_SIZE, PageCount, PageIndex, PageRange, RangeError,
};

use crate::Error;
use crate::driver::Driver;
use crate::faults::FaultThreads;
use crate::host::guest_memfd::GuestMemfdHost;
use crate::host::machine::MachineHost;
use crate::host::memfd::MemfdHost;
use crate::host::views::Views;
use crate::host::{Host, HostKind, Vm};
use crate::pager::{Pager, Paging, SourceStatistics};
use crate::read_ahead::ReadAhead;
use crate::source::{Source, SourceFailure};
use crate::statistics::Statistics;
use crate::sync::{RwLock, RwLockWriteGuard};
use crate::vcpu::MachineVcpu;
use crate::watch::Watch;
use crate::{DeadPin, HostView, HugePool, PageSize, Pin, Pinner};

/// What to do when another operation holds a part of the range.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OnBusy {
    /// Wait until it has ended.
    Wait,
    /// Fail with [`Refusal::Busy`].
    Refuse,
    /// Wait until it has ended; and where pins are in the way, until they are gone, which no new
    /// ones come between. [`Refusal::Pinned`] names who has not let go of his in time.
    ///
    /// Whoever holds a pin and waits for another one of the same range waits for himself: in the
    /// end both fail.
    WaitForPins {
        /// How long to wait for pins, at most.
        at_most: Duration,
    },
}

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
}

/// How long is waited for contents, unless [`Builder::fault_deadline`] says.
const DEADLINE: Duration = Duration::from_secs(10);

/// The fault threads of memory that has a source, unless [`Builder::fault_threads`] says: one
/// answers while the others read.
const FAULT_THREADS: usize = 4;

impl Builder {
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
    /// gives if it can, and if this machine's settings don't let it, the memory is made of 4K pages:
    /// [`Memory::page_size`] says so. On hugetlb pages of a memfd the raw [host view](HostView) shows
    /// a huge page only while all of it is shared, and else denies it as a whole: single pages are
    /// reached by [`Memory::read`] and [`Memory::write`]. See `docs/huge-pages.md`.
    pub fn page_size(self, page_size: PageSize) -> Self {
        Self { page_size, ..self }
    }

    /// Of this pool's huge pages, on the simulated machine; else a pool is made that is just enough.
    pub fn pool(self, pool: &HugePool) -> Self {
        Self { pool: Some(pool.clone()), ..self }
    }

    /// Every page's contents are owed until [`Memory::populate`] brings them, or
    /// [`Memory::settle`] says that nothing more will come. Whoever touches such a page waits. Of an
    /// SNP guest's memory shared pages only can be owed.
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
    pub fn source(self, source: Arc<dyn Source>) -> Self {
        Self { source: Some(source), ..self.owed() }
    }

    /// How much is brought with a page that somebody waits for.
    pub fn read_ahead(self, read_ahead: ReadAhead) -> Self {
        Self { read_ahead, ..self }
    }

    /// How long is waited for the source, at most: who waits longer for a page is denied it, as if
    /// the source had failed. 10 s unless said.
    pub fn fault_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// How many threads answer faults and read the source: 4 with a source (one of which never
    /// reads), 1 without, unless said. With a source there are at least 2.
    pub fn fault_threads(self, count: usize) -> Self {
        Self { fault_threads: Some(count), ..self }
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
        let what = match self.platform {
            Platform::Snp => Some("SEV-SNP is offered on the simulated machine only"),
            Platform::Pkvm => Some("pKVM is offered on the simulated machine only"),
            Platform::Plain | Platform::SwProtected => None,
        };
        if let (Some(what), HostKind::Memfd | HostKind::GuestMemfd) = (what, self.host) {
            let way_out = "use --host machine, or another platform";
            return Err(Error::NotOffered { what, way_out });
        }
        if self.platform.guest_decides() && self.initial.visibility == Visibility::Shared {
            return Err(Error::NotOffered {
                what: "a protected VM's memory is its own at first: only the guest shares it",
                way_out: "leave the memory private (no Builder::shared), and have the guest share",
            });
        }
        let PageFacts { visibility, population } = self.initial;
        if !self.platform.host_fills_private()
            && visibility == Visibility::Private
            && population == Population::Owed
        {
            return Err(Error::NotOffered {
                what: "private pages that the guest alone can fill can't be owed: who touches \
                    one would wait for ever",
                way_out: "make the memory shared at first (Builder::shared), and have the guest \
                    take what it needs",
            });
        }
        let page_size = self.offered_page_size()?;
        let host = match self.host {
            HostKind::Memfd => {
                let owed = self.initial.population == Population::Owed;
                Box::new(MemfdHost::new(self.pages, owed, page_size)?) as Box<dyn Host>
            }
            HostKind::GuestMemfd => Box::new(GuestMemfdHost::new(self.pages, self.initial)?),
            HostKind::Machine => Box::new(match page_size.reserved() {
                None => MachineHost::new(self.pages, self.platform)?,
                Some(level) => {
                    let pool = self.pool.as_ref();
                    MachineHost::of_huge_pages(self.pages, self.platform, level, pool)?
                }
            }),
        };
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

    /// The page size that can be had, or why none can.
    fn offered_page_size(&self) -> Result<PageSize, Error> {
        let (host, page_size) = (self.host, self.page_size);
        if host == HostKind::GuestMemfd && page_size != PageSize::Small {
            return Err(Error::NotOffered {
                what: "the kernel's guest_memfd has pages of 4K only",
                way_out: "use --page-size 4k, or --host memfd",
            });
        }
        if self.platform.hypervisor_keeps_stage2() && page_size != PageSize::Small {
            return Err(Error::NotOffered {
                what: "the simulated pKVM gives a guest pages of 4K",
                way_out: "use --page-size 4k, or another platform",
            });
        }
        if host == HostKind::Machine && page_size == PageSize::Thp {
            return Err(Error::NotOffered {
                what: "the simulated machine's huge pages are of a pool; it has no transparent ones",
                way_out: "use --page-size 2m or 1g, or --host memfd",
            });
        }
        if let Some(level) = page_size.reserved()
            && !self.pages.get().is_multiple_of(Geometry::X86_64.pages(level).get())
        {
            return Err(Error::Unaligned { pages: self.pages, level });
        }
        let thp = page_size == PageSize::Thp;
        Ok(if thp && !polder_linux::shmem_huge_pages() { PageSize::Small } else { page_size })
    }
}

/// A VM's memory: one object of private and shared pages, bound to one or more VMs.
///
/// All methods may be called from any thread. Dropping it unbinds it from every VM.
pub struct Memory {
    pub(crate) driver: Arc<Driver>,
    faults: FaultThreads,
    vms: AtomicU32,
    page_size: PageSize,
    /// Held by one while a slot is bound or unbound, in the engine and on the host, and shared by
    /// those to whom no slot may change.
    pub(crate) slots: RwLock<()>,
}

impl Memory {
    #[cfg(test)]
    pub(crate) fn over(driver: Driver) -> Result<Self, Error> {
        Self::of(driver, PageSize::Small, 1)
    }

    fn of(driver: Driver, page_size: PageSize, fault_threads: usize) -> Result<Self, Error> {
        let driver = Arc::new(driver);
        let faults = FaultThreads::start(&driver, fault_threads)?;
        Ok(Self { driver, faults, vms: AtomicU32::new(0), page_size, slots: RwLock::default() })
    }

    /// Memory of `pages` pages of 4 KiB.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::ByteSize};
    /// let size: ByteSize = "64M".parse()?;
    /// let memory = Memory::builder(size.pages()?).host(HostKind::Machine).build()?;
    /// assert_eq!(memory.pages().get(), 0x4000);
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn builder(pages: PageCount) -> Builder {
        Builder {
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
        }
    }

    /// Its size.
    pub fn pages(&self) -> PageCount {
        self.driver.engine().config().pages
    }

    /// Makes a VM known, to [`Memory::bind`] pages to: one of KVM's on a host of real memory,
    /// [`Vm::Machine`] on the simulated machine. On host `guest_memfd` a VM that has no private
    /// memory gets a guest_memfd all of whose pages are shared, if the memory was made
    /// [shared](Builder::shared) and nothing has been written to it.
    ///
    /// # Errors
    /// [`Error::WrongVm`] for the other kind; [`Error::NotOffered`] on host `guest_memfd` where
    /// this VM can't have the memory.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Vm, units::{Gfn, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// let vm = memory.attach(Vm::Machine)?;
    /// memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn attach(&self, vm: impl Into<Vm>) -> Result<VmId, Error> {
        let id = VmId(self.vms.fetch_add(1, Ordering::Relaxed));
        self.driver.host.attach(id, vm.into())?;
        Ok(id)
    }

    /// A vCPU for a VM of the simulated machine.
    ///
    /// # Errors
    /// [`Error::NotSimulated`] on another host.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let vcpu = memory.machine_vcpu(vm)?;
    /// vcpu.write(Gpa::new(0x10_0000), Visibility::Private, b"the guest's own").unwrap();
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn machine_vcpu(&self, vm: VmId) -> Result<MachineVcpu, Error> {
        MachineVcpu::new(&self.driver, vm)
    }

    /// Looks into the simulated machine, or has something happen there that no device model does:
    /// another process, a pin by the kernel, a planted bug. Also told: the object that the memory
    /// is, and the process whose host view shows it. The machine is locked meanwhile: a call of
    /// this memory from within would wait for itself.
    ///
    /// # Errors
    /// [`Error::NotSimulated`] on another host.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// memory.simulated(|machine, _, _| machine.audit())?.expect("everything adds up");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn simulated<T>(
        &self,
        look: impl FnOnce(&mut polder_machine::Machine, ObjectId, ProcessId) -> T,
    ) -> Result<T, Error> {
        let host = self.driver.host.machine().ok_or(Error::NotSimulated)?;
        let (object, process) = host.parts();
        Ok(look(&mut host.lock(), object, process))
    }

    /// The simulated machine's name for a VM, for who looks into it by [`Memory::simulated`].
    ///
    /// # Errors
    /// [`Error::NotSimulated`] on another host, [`Error::NoSuchVm`].
    pub fn simulated_vm(&self, vm: VmId) -> Result<polder_machine::VmId, Error> {
        self.driver.host.machine().ok_or(Error::NotSimulated)?.vm(vm).ok_or(Error::NoSuchVm)
    }

    /// Tells somebody what happens to this memory, from now on and between its steps: a scenario,
    /// or whoever wants to see an operation from inside. Whether nobody was told before; there can
    /// be one only.
    ///
    /// ```
    /// # use polder::{Delays, HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// use std::{sync::Arc, time::Duration};
    ///
    /// assert!(memory.watch(Arc::new(Delays::new(1, Duration::from_micros(50)))));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn watch(&self, watch: Arc<dyn Watch>) -> bool {
        self.driver.watch.set(watch).is_ok()
    }

    /// Plants a bug, on the simulated machine.
    ///
    /// # Panics
    /// On another host.
    #[cfg(feature = "plant")]
    pub fn plant(&self, bug: polder_engine::Bug) {
        self.driver.engine().plant(bug);
        self.driver.host.machine().expect("memory on the simulated machine").plant(bug);
    }

    /// Shows `pages` to a VM at guest frame `gfn`, by slot `slot`. A slot is immutable: to move
    /// it, unbind and bind.
    ///
    /// # Errors
    /// [`Refusal::Beyond`], [`Refusal::SlotTaken`], [`Refusal::GfnsTaken`],
    /// [`Refusal::PagesTaken`]; [`Error::NoSuchVm`] for a VM that is not of this memory's
    /// [`Memory::attach`]; [`Error::Host`] where KVM refuses the slot.
    ///
    /// ```
    /// # use polder::{Error, HostKind, Memory, Refusal, Slot, Vm, VmId, units::{Gfn, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// let vm = memory.attach(Vm::Machine)?;
    /// let all = PageRange::between(0, 16).unwrap();
    /// memory.bind(vm, Slot(0), Gfn::from(0x100), all)?;
    /// let again = memory.bind(vm, Slot(0), Gfn::from(0x200), all);
    /// assert_eq!(again, Err(Error::Refused(Refusal::SlotTaken { slot: Slot(0) })));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn bind(&self, vm: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error> {
        let _one_at_a_time = self.change_slots();
        self.driver.ask(|engine| engine.bind(vm, slot, gfn, pages))?;
        self.driver.host.bind(vm, slot, gfn, pages).inspect_err(|_| {
            let unbound = self.driver.engine().unbind(vm, slot);
            assert!(unbound.is_ok(), "it was bound a moment ago: {unbound:?}");
        })
    }

    /// Takes a slot away. No page is freed. Waits for a [`Memory::prefault`] that is under way, as
    /// [`Memory::bind`] does. KVM waits until no vCPU is amid an access to the slot:
    /// one that waits for contents that are owed has to get them, or [`Memory::fail`], first.
    ///
    /// # Errors
    /// [`Refusal::NoSuchSlot`]; [`Error::Host`] where KVM can't delete the slot, which is then
    /// still bound, and wishes what it did.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Vm, units::{Gfn, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// memory.unbind(vm, Slot(0))?;
    /// assert!(memory.bindings().is_empty());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn unbind(&self, vm: VmId, slot: Slot) -> Result<(), Error> {
        let _one_at_a_time = self.change_slots();
        self.driver.unbind(vm, slot)
    }

    /// Keeps slots from changing otherwise, and prefaults from beginning. That it waits is told again
    /// and again, as of whoever waits for an operation.
    fn change_slots(&self) -> RwLockWriteGuard<'_, ()> {
        let mut changing = self.slots.try_write();
        loop {
            if let Some(changing) = changing {
                return changing;
            }
            self.driver.tell(crate::Moment::Waits);
            changing = self.slots.try_write_for(self.driver.ask_again);
        }
    }

    /// Keeps the guest's view of the memory from being reclaimed or swapped (`mlock`), and has all of
    /// it there. The memory of a guest_memfd and of the simulated machine never is.
    ///
    /// # Errors
    /// [`Error::Host`]: `ENOMEM` and `EPERM` beyond the limit of locked memory (`ulimit -l`).
    pub fn lock(&self) -> Result<(), Error> {
        self.driver.host.lock_memory()
    }

    /// Every binding.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Vm, units::{Gfn, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let (of, slot, binding) = memory.bindings()[0];
    /// assert_eq!((of, slot), (vm, Slot(0)));
    /// assert_eq!(binding.gfns().start(), Gfn::from(0x100));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn bindings(&self) -> Vec<(VmId, Slot, Binding)> {
        let engine = self.driver.engine();
        engine.bindings().map(|(vm, slot, binding)| (vm, slot, *binding)).collect()
    }

    /// The pages of the object behind guest frames, in runs.
    ///
    /// # Errors
    /// [`Refusal::Unbound`] unless every frame is bound.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Vm, units::{Gfn, GfnRange, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let pages = memory.pages_of(vm, GfnRange::one(Gfn::from(0x103)))?;
    /// assert_eq!(pages, [PageRange::between(3, 4).unwrap()]);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn pages_of(&self, vm: VmId, gfns: GfnRange) -> Result<Vec<PageRange>, Error> {
        self.driver.ask(|engine| engine.pages_of(vm, gfns))
    }

    /// Makes pages private or shared: all of them, or none. Returns how many changed.
    ///
    /// # Errors
    /// A [`Refusal`] naming the first page in the way and its holder, or [`Error::Host`]; nothing
    /// has changed then. [`Error::Quarantined`] if something had and could not be undone.
    ///
    /// ```
    /// # use polder::{Contents, Error, Holder, HostKind, Memory, OnBusy, PinKind, Refusal, Visibility, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// let all = PageRange::between(0, 16).unwrap();
    /// let private = || memory.convert(all, Visibility::Private, Contents::Preserve, OnBusy::Wait);
    /// let pin = memory.pin(PageRange::between(3, 4).unwrap(), PinKind::Short, Holder::new("disk"))?;
    /// let Err(Error::Refused(Refusal::Pinned { page, holder, .. })) = private() else { panic!() };
    /// assert_eq!((page.get(), holder.to_string()), (3, "disk".into()));
    /// drop(pin);
    /// assert_eq!(private()?.get(), 16);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn convert(
        &self,
        range: PageRange,
        to: Visibility,
        contents: Contents,
        on_busy: OnBusy,
    ) -> Result<PageCount, Error> {
        self.convert_found(|_| Ok(vec![range]), (to, contents), None, on_busy)
    }

    /// [`Memory::convert`] by guest frames, as this VM wishes: what other VMs wish of the same
    /// pages stays what it is.
    ///
    /// # Errors
    /// As [`Memory::convert`], and [`Refusal::Unbound`].
    ///
    /// ```
    /// # use polder::{Contents, HostKind, Memory, OnBusy, Slot, Visibility, Vm, units::{Gfn, GfnRange, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let frame = GfnRange::one(Gfn::from(0x102));
    /// memory.convert_gfns(vm, frame, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
    /// memory.write(vm, frame.start().gpa(), b"hello")?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn convert_gfns(
        &self,
        vm: VmId,
        gfns: GfnRange,
        to: Visibility,
        contents: Contents,
        on_busy: OnBusy,
    ) -> Result<PageCount, Error> {
        let find = |engine: &Engine| engine.pages_of(vm, gfns);
        self.convert_found(find, (to, contents), Some(vm), on_busy)
    }

    fn convert_found(
        &self,
        find: impl Fn(&Engine) -> Result<Vec<PageRange>, Refusal>,
        (to, contents): (Visibility, Contents),
        by: Option<VmId>,
        on_busy: OnBusy,
    ) -> Result<PageCount, Error> {
        self.driver.convert_counted(find, (to, contents), (by, false), on_busy)
    }

    /// Notes what a VM wishes its pages to be (`MEMORY_ATTRIBUTE_PRIVATE`): nothing changes by it.
    /// A conversion grants it. Waits for operations on these pages: of a wish and a conversion, the
    /// later one counts.
    ///
    /// # Errors
    /// [`Refusal::Unbound`] unless every frame is bound.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, GfnRange, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let frame = GfnRange::one(Gfn::from(0x102));
    /// memory.want(vm, frame, Visibility::Shared)?;
    /// let wish = memory.wanted(vm, frame)?[0];
    /// assert_eq!((wish.wanted, wish.granted), (Visibility::Shared, Visibility::Private));
    /// assert_eq!(memory.unmet().len(), 1);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn want(&self, vm: VmId, gfns: GfnRange, to: Visibility) -> Result<(), Error> {
        self.driver.claim(OnBusy::Wait, |engine| engine.want(vm, gfns, to))
    }

    /// What a VM wishes its pages to be, and what they are, in runs.
    ///
    /// # Errors
    /// [`Refusal::Unbound`] unless every frame is bound.
    pub fn wanted(&self, vm: VmId, gfns: GfnRange) -> Result<Vec<Wish>, Error> {
        self.driver.ask(|engine| engine.wanted(vm, gfns))
    }

    /// Every wish that is not what is granted, by the binding whose it is: VMs that disagree about
    /// a page are seen here.
    pub fn unmet(&self) -> Vec<(VmId, Slot, Wish)> {
        self.driver.engine().unmet().collect()
    }

    /// Drops the contents of pages: they read as zeros, and take up no memory. Visibility stays. An
    /// SNP guest has to validate its private pages anew, and finds garbage in them (zeros,
    /// deciphered): it clears what it validates. None finds what was there.
    ///
    /// # Errors
    /// As [`Memory::convert`].
    ///
    /// ```
    /// # use polder::{HostKind, Memory, OnBusy, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// memory.host_view().touch_write(0, b"hello")?;
    /// memory.discard(PageRange::between(0, 1).unwrap(), OnBusy::Wait)?;
    /// let mut bytes = [1; 5];
    /// memory.host_view().touch_read(0, &mut bytes)?;
    /// assert_eq!(bytes, [0; 5]);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn discard(&self, range: PageRange, on_busy: OnBusy) -> Result<(), Error> {
        self.driver.discard(range, false, on_busy)
    }

    /// Merges the 4K RMP entries of each 2M page in `range` that is private as a whole, where they
    /// agree: an SNP guest's memory is mapped at 2M again. Conversions do not do it.
    /// [`Statistics::rmp`] says how many were merged, and how many left as they are, and mapped.
    /// Nothing is done for another platform. One 2M page is held at a time; those in quarantine are
    /// left out.
    ///
    /// # Errors
    /// [`Refusal::Beyond`]; for a 2M page as [`Memory::convert`]: those before it are merged then,
    /// which nobody sees but by its speed.
    pub fn merge(&self, range: PageRange, on_busy: OnBusy) -> Result<(), Error> {
        self.driver.merge(range, on_busy)
    }

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

    /// Waits until the contents of pages are there, which the source is asked for where there is
    /// one.
    ///
    /// # Errors
    /// [`Refusal::SourceFailed`] naming the first page that can't be had, [`Refusal::Owed`] without
    /// a source, [`Refusal::Beyond`].
    pub fn bring(&self, range: PageRange) -> Result<(), Error> {
        self.driver.claim(OnBusy::Wait, |engine| Ok(engine.check_whole(range)?))
    }

    /// Has the source asked for all that is still owed, behind whatever somebody waits for. Does
    /// not wait; [`Memory::owed`] tells how much is left. Nothing is done without a source.
    pub fn fill(&self) {
        if let Some(pager) = &self.driver.pager {
            pager.fill();
            self.driver.host.views().nudge();
        }
    }

    /// How many pages are owed: their contents are to come, and have not failed to.
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
    pub fn source_statistics(&self) -> SourceStatistics {
        self.driver.pager.as_ref().map(Pager::statistics).unwrap_or_default()
    }

    /// The pages that the source could not bring, and why: the first thousand runs of them.
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
            views.write(offset, now)
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

    /// Pins pages of the object, which must be shared: they stay shared until the pin is dropped.
    /// Waits for operations. Who pins often takes a [`Memory::pinner`].
    ///
    /// # Errors
    /// [`Refusal::Private`] and the other refusals, naming the page; [`Refusal::Pinned`] by an
    /// exclusive pin, and for one by any other.
    ///
    /// ```
    /// # use polder::{Contents, Holder, HostKind, Memory, OnBusy, PinKind, Visibility, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// let page = PageRange::between(3, 4).unwrap();
    /// let pin = memory.pin(page, PinKind::LongTerm, Holder::new("vhost-net"))?;
    /// let private = || memory.convert(page, Visibility::Private, Contents::Preserve, OnBusy::Wait);
    /// assert!(private().unwrap_err().to_string().contains("vhost-net"));
    /// drop(pin);
    /// private()?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn pin(&self, range: PageRange, kind: PinKind, holder: Holder) -> Result<Pin<'_>, Error> {
        self.pin_or(range, kind, holder, OnBusy::Wait)
    }

    /// [`Memory::pin`] that does `on_busy` where an operation is in the way; or, of an exclusive
    /// pin, another pin.
    ///
    /// # Errors
    /// As [`Memory::pin`], and [`Refusal::Busy`].
    pub fn pin_or(
        &self,
        range: PageRange,
        kind: PinKind,
        holder: Holder,
        on_busy: OnBusy,
    ) -> Result<Pin<'_>, Error> {
        let id = match kind {
            PinKind::Exclusive => self.driver.pin_exclusive(range, &holder, on_busy)?,
            PinKind::Short | PinKind::LongTerm => {
                self.driver.claim(on_busy, |engine| engine.pin(range, kind, holder.clone()))?
            }
        };
        Ok(Pin::by_id(&self.driver, id, (kind, holder)))
    }

    /// A holder that pins often: without the engine's lock, where nothing is in the way.
    ///
    /// # Errors
    /// [`Error::NotOffered`] for [`PinKind::Exclusive`].
    pub fn pinner(&self, kind: PinKind, holder: Holder) -> Result<Pinner<'_>, Error> {
        if kind == PinKind::Exclusive {
            return Err(Error::NotOffered {
                what: "an exclusive pin needs a look at all others",
                way_out: "take each by Memory::pin",
            });
        }
        let pinner = self.driver.engine().pinner(holder, kind);
        Ok(Pinner { driver: &self.driver, pinner })
    }

    /// The pins that were given back because their holder's thread panicked, the last few of them.
    pub fn pins_of_the_dead(&self) -> Vec<DeadPin> {
        self.driver.dead_pins.lock().clone()
    }

    /// Says what a guest's access that KVM gave up on means (`KVM_EXIT_MMIO` without a device,
    /// `KVM_EXIT_MEMORY_FAULT`): a fault for the VMM to handle, or `None` to run on. Before it says
    /// so it waits for a slot that is being bound or unbound: KVM gives up on an access to one that
    /// has just gone.
    ///
    /// # Errors
    /// [`Error::Machine`] where the simulated machine could not map the page.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, MemoryFault, Slot, Visibility, Vm, units::{Gfn, GfnRange, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let fault = memory.guest_fault(vm, Gpa::new(0x9000), Visibility::Shared)?;
    /// assert_eq!(fault, Some(MemoryFault::Unbound(GfnRange::one(Gfn::from(9)))));
    /// assert_eq!(memory.guest_fault(vm, Gpa::new(0x10_0000), Visibility::Private)?, None);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn guest_fault(
        &self,
        vm: VmId,
        gpa: Gpa,
        visibility: Visibility,
    ) -> Result<Option<MemoryFault>, Error> {
        let access = GuestAccess { gfn: gpa.gfn(), visibility };
        let fault = self.driver.guest_fault(vm, access, None, || true)?;
        if fault.is_some() {
            return Ok(fault);
        }
        let gfns = GfnRange::one(access.gfn);
        let _unchanged = self.slots.read();
        let bound = self.driver.engine().pages_of(vm, gfns);
        Ok(bound.is_err().then_some(MemoryFault::Unbound(gfns)))
    }

    /// Counts a conversion that a guest asked for in terms that are none, and that was refused
    /// before it came here.
    pub fn note_refused(&self) {
        self.driver.counters.refused();
    }

    /// The page at a host address in the guest view, of which
    /// [`Exit::MemoryFailure`](polder_linux::Exit::MemoryFailure) tells.
    pub fn page_of_failure(&self, address: usize) -> Option<PageIndex> {
        self.driver.host.views().guest_page(address)
    }

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

    /// Has the guest's view of transparent huge pages mapped by 2M again where it is not: after a
    /// page was brought in alone, or the kernel had no huge page at the time. Nothing is done while
    /// contents are owed; [`Memory::settle`] does it, then. Returns how many pages are mapped so.
    ///
    /// # Errors
    /// [`Error::Host`] where the kernel can't say what exists.
    pub fn regain_huge_pages(&self) -> Result<PageCount, Error> {
        self.driver.host.regain()
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

    /// The mapping for device models.
    pub fn host_view(&self) -> HostView<'_> {
        HostView { views: self.driver.host.views(), pages: self.pages() }
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

impl Drop for Memory {
    fn drop(&mut self) {
        let mut bindings = Vec::new();
        if let Some(mut engine) = self.driver.try_engine() {
            // Who waits for contents is denied: a vCPU amid such an access would keep its slot.
            engine.fail_all();
            bindings.extend(engine.bindings().map(|(vm, slot, _)| (vm, slot)));
            for &(vm, slot) in &bindings {
                let unbound = engine.unbind(vm, slot);
                assert!(unbound.is_ok(), "it was listed: {unbound:?}");
            }
        }
        self.driver.released();
        for (vm, slot) in bindings {
            // The host tries again at its own end, and then leaves to the guest what it sees.
            let _ = self.driver.host.unbind(vm, slot);
        }
        self.faults.stop(&self.driver);
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("pages", &self.pages()).finish_non_exhaustive()
    }
}
