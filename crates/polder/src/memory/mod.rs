//! [`Memory`]: what a VMM holds.

mod bindings;
mod builder;
mod contents;
mod conversion;
mod dirty_log;
mod inspect;
mod slots;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use polder_engine::{GuestAccess, Holder, MemoryFault, PinKind, Visibility, VmId};
use polder_machine::{ObjectId, ProcessId};
use polder_units::{GfnRange, Gpa, PageCount, PageIndex, PageRange};

pub use self::builder::Builder;
use self::slots::Slots;
#[cfg(doc)]
use crate::Refusal;
use crate::driver::Driver;
use crate::faults::FaultThreads;
use crate::host::Vm;
use crate::vcpu::MachineVcpu;
use crate::watch::Watch;
use crate::{DeadPin, Error, HostView, PageSize, Pin, Pinner};

/// What to do when another operation holds a part of the range.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OnBusy {
    /// Wait until it has ended. Who waits is not overtaken: an operation that comes later is not
    /// begun on these pages before. Pins are not waited for, but for short ones a millisecond or
    /// two: who copies a few bytes has let go by then.
    Wait,
    /// Fail at once with [`Refusal::Busy`] or [`Refusal::Pinned`]; or with [`Refusal::Awaited`],
    /// where somebody waits who came first.
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

/// A VM's memory: one object of private and shared pages, bound to one or more VMs.
///
/// All methods may be called from any thread. Dropping it unbinds it from every VM.
pub struct Memory {
    pub(crate) driver: Arc<Driver>,
    faults: FaultThreads,
    vms: AtomicU32,
    page_size: PageSize,
    /// Held while a slot is bound or unbound, in the engine and on the host, and by those to whom
    /// none may change.
    pub(crate) slots: Slots,
}

impl Memory {
    #[cfg(test)]
    pub(crate) fn over(driver: Driver) -> Result<Self, Error> {
        Self::of(driver, PageSize::Small, 1)
    }

    fn of(driver: Driver, page_size: PageSize, fault_threads: usize) -> Result<Self, Error> {
        let driver = Arc::new(driver);
        let faults = FaultThreads::start(&driver, fault_threads)?;
        Ok(Self { driver, faults, vms: AtomicU32::new(0), page_size, slots: Slots::default() })
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
        Builder::new(pages)
    }

    /// Its size.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// assert_eq!(memory.pages(), PageCount::from(16u32));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn pages(&self) -> PageCount {
        self.driver.engine().config().pages
    }

    /// All of its pages, for [`Memory::bind`] and other calls that take a range.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// assert_eq!(memory.all_pages(), PageRange::between(0, 16).unwrap());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn all_pages(&self) -> PageRange {
        PageRange::between(0, self.pages().get()).expect("memory has pages")
    }

    /// Registers a VM, so that [`Memory::bind`] can show it pages: a KVM VM on a host of real
    /// memory, [`Vm::Machine`] on the simulated machine. On host `guest_memfd` a VM without private
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

    /// Gives `look` the simulated machine: to inspect it, or to have something happen there that no
    /// device model does (another process, a pin by the kernel, a planted bug). `look` also gets
    /// the object that is this memory, and the process whose address space has its host view. The
    /// machine is locked while it runs: to call this memory from within is a deadlock.
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

    /// The simulated machine's own id of a VM, for use in [`Memory::simulated`].
    ///
    /// # Errors
    /// [`Error::NotSimulated`] on another host, [`Error::NoSuchVm`].
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Vm, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// let vm = memory.attach(Vm::Machine)?;
    /// let known = memory.simulated_vm(vm)?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn simulated_vm(&self, vm: VmId) -> Result<polder_machine::VmId, Error> {
        self.driver.host.machine().ok_or(Error::NotSimulated)?.vm(vm).ok_or(Error::NoSuchVm)
    }

    /// Has `watch` told of every step of this memory's operations from now on: by a scenario, or
    /// to see an operation from inside. There can be only one watcher: returns `false`, and changes
    /// nothing, if there is one already.
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

    /// Keeps the guest's view of the memory from being reclaimed or swapped, and populates all of
    /// it (`mlock`). Does nothing for a guest_memfd and on the simulated machine, whose memory is
    /// never reclaimed.
    ///
    /// # Errors
    /// [`Error::Host`]: `ENOMEM` and `EPERM` beyond the limit of locked memory (`ulimit -l`).
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// memory.lock()?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn lock(&self) -> Result<(), Error> {
        self.driver.host.lock_memory()
    }

    /// Pins pages of the object, which must be shared: they stay shared until the pin is dropped,
    /// and are mapped in the [host view](HostView) before this returns. Waits for operations on
    /// them. To pin often, use a [`Memory::pinner`].
    ///
    /// # Errors
    /// [`Refusal::Private`] and the other refusals, naming the page; [`Refusal::Pinned`] by an
    /// exclusive pin, and for one by any other, or by a device; [`Error::Host`] where there is no
    /// memory for the pages. None is pinned then.
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
        self.pin_with(range, kind, holder, OnBusy::Wait)
    }

    /// [`Memory::pin`], where `on_busy` says what to do if an operation is in the way or, for an
    /// exclusive pin, another pin.
    ///
    /// # Errors
    /// As [`Memory::pin`], and [`Refusal::Busy`].
    ///
    /// ```
    /// # use polder::{Error, Holder, HostKind, Memory, OnBusy, PinKind, Refusal, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// use std::time::Duration;
    ///
    /// let page = PageRange::between(3, 4).unwrap();
    /// let short = memory.pin(page, PinKind::Short, Holder::new("virtio-net"))?;
    /// let patience = OnBusy::WaitForPins { at_most: Duration::from_millis(10) };
    /// let alone = memory.pin_with(page, PinKind::Exclusive, Holder::new("a migration"), patience);
    /// assert!(matches!(alone, Err(Error::Refused(Refusal::Pinned { .. }))), "virtio-net has it");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn pin_with(
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
        let pin = Pin::by_id(&self.driver, id, (kind, holder));
        self.driver.map_pinned(range)?;
        Ok(pin)
    }

    /// A holder that pins often: its pins take no lock where nothing is in the way.
    ///
    /// # Errors
    /// [`Error::NotOffered`] for [`PinKind::Exclusive`].
    ///
    /// ```
    /// # use polder::{Holder, HostKind, Memory, OnBusy, PinKind, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// let disk = memory.pinner(PinKind::Short, Holder::new("virtio-blk"))?;
    /// let in_flight = disk.pin(PageRange::between(0, 4).unwrap(), OnBusy::Wait)?;
    /// // ... a transfer ...
    /// drop(in_flight);
    /// # Ok::<_, polder::Error>(())
    /// ```
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
    ///
    /// ```
    /// # use polder::{Holder, HostKind, Memory, PinKind, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// let page = PageRange::between(3, 4).unwrap();
    /// std::thread::scope(|scope| {
    ///     let device = scope.spawn(|| {
    ///         let _pin = memory.pin(page, PinKind::Short, Holder::new("a device")).unwrap();
    ///         panic!("a bug in it");
    ///     });
    ///     assert!(device.join().is_err());
    /// });
    /// assert_eq!(memory.dead_pins()[0].holder.to_string(), "a device");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn dead_pins(&self) -> Vec<DeadPin> {
        self.driver.dead_pins.lock().clone()
    }

    /// What to do about an access that KVM could not complete (`KVM_EXIT_MMIO` without a device,
    /// `KVM_EXIT_MEMORY_FAULT`): handle the fault that is returned, or run the vCPU again on
    /// `None`. Waits for a slot that is being bound or unbound, since KVM exits on an access to one
    /// that has just gone.
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
        let fault = self.driver.guest_fault(vm, access, None, || true)?.exit();
        if fault.is_some() {
            return Ok(fault);
        }
        let gfns = GfnRange::one(access.gfn);
        let _unchanged = self.slots.keep(&self.driver);
        let bound = self.driver.engine().pages_of(vm, gfns);
        Ok(bound.is_err().then_some(MemoryFault::Unbound(gfns)))
    }

    /// Counts a guest's request for a conversion that the VMM refused by itself because it was
    /// malformed.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// memory.count_refusal(); // a hypercall with a range that is none
    /// assert_eq!(memory.statistics().refused, 1);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn count_refusal(&self) {
        self.driver.counters.refused();
    }

    /// The page at a host address in the guest view, as a failed access reports it
    /// ([`Exit::MemoryFailure`](polder_linux::Exit::MemoryFailure)).
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// assert_eq!(memory.page_of_failure(0x1000), None, "the simulated machine has no addresses here");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn page_of_failure(&self, address: usize) -> Option<PageIndex> {
        self.driver.host.views().guest_page(address)
    }

    /// The mapping for device models.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::PageCount};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// memory.host_view().touch_write(0x1000, b"hello")?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn host_view(&self) -> HostView<'_> {
        let dirty = &self.driver.dirty;
        HostView { views: self.driver.host.views(), pages: self.pages(), dirty }
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
