//! A vCPU of the simulated machine, to run a guest's accesses on.

mod access;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use polder_engine::{Engine, MemoryFault, Visibility, VmId};
use polder_machine::{Ask, Intercept, PageFault, PkvmFail, RmpFail, RmpSize, Root, VcpuId};
use polder_units::{Gfn, GfnRange, Gpa, Level, PageCount};

use self::access::gfns;
use crate::driver::Driver;
use crate::host::machine::MachineHost;
use crate::{Error, OnBusy};

/// Why a guest's access was not made. No byte of it was.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GuestExit {
    /// It is for the VMM to handle.
    #[error("the guest's access is refused: {0}")]
    MemoryFault(MemoryFault),
    /// The page may be owed, and touches come as exits
    /// ([`Delivery::Exits`](crate::source::Delivery)): the VMM has it brought on this vCPU's thread
    /// ([`Memory::fetch_for`](crate::Memory::fetch_for)), and the guest tries again.
    #[error("the guest touched gfn {0}, which may have to be brought")]
    Userfault(Gfn),
    /// The guest's own affair (`#VC`, `PAGE_NOT_VALIDATED`): it has not accepted the page, which
    /// is assigned to it, by [`MachineVcpu::pvalidate`].
    #[error("the guest has not validated its page at gfn {0}")]
    NotValidated(Gfn),
    /// The guest's own affair (`#PF`; of nested tables, an exit to the guest that made them): its
    /// tables do not let the access through.
    #[error("the guest's own tables do not translate page {:#x}: {}", .0.page, .0.why)]
    PageFault(PageFault),
    /// It waited for something, and was kicked.
    #[error("the vCPU was kicked")]
    Kicked,
    /// The machine could not map the page, or hardware went on refusing the access.
    #[error(transparent)]
    Failed(Error),
}

impl From<Error> for GuestExit {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// A vCPU of the simulated machine ([`Memory::machine_vcpu`](crate::Memory::machine_vcpu)). Its
/// accesses go through a TLB and stage 2; what they don't let through is answered by the engine, as
/// a fault on any host.
pub struct MachineVcpu {
    driver: Arc<Driver>,
    vm: VmId,
    id: VcpuId,
    kicked: Arc<AtomicBool>,
}

impl MachineVcpu {
    pub(crate) fn new(driver: &Arc<Driver>, vm: VmId) -> Result<Self, Error> {
        let host = driver.host.machine().ok_or(Error::NotSimulated)?;
        let machine_vm = host.vm(vm).ok_or(Error::NoSuchVm)?;
        let id = host.lock().add_vcpu(machine_vm).map_err(Error::Machine)?;
        Ok(Self { driver: Arc::clone(driver), vm, id, kicked: Arc::default() })
    }

    /// What its translations begin at. Addresses of [`MachineVcpu::read`] and
    /// [`MachineVcpu::write`] are of the space that it translates.
    pub fn root(&self) -> Root {
        self.host().lock().root(self.id).expect("a vCPU stays as long as its memory")
    }

    /// Carries out what the guest does to its paging: a load of CR3, INVLPG, VMRUN and the exit
    /// from it. The root that follows is the vCPU's from then on.
    ///
    /// # Errors
    /// [`Error::Machine`] of an SNP guest, whose page tables nobody else can read.
    pub fn carry_out(&self, intercept: Intercept) -> Result<(), Error> {
        self.host().lock().carry_out(self.id, intercept).map_err(Error::Machine)
    }

    fn host(&self) -> &MachineHost {
        self.driver.host.machine().expect("made on the simulated machine")
    }

    /// The machine's name for it.
    pub(crate) const fn id(&self) -> VcpuId {
        self.id
    }

    /// What makes an access that is not let through at once return [`GuestExit::Kicked`], and a
    /// prefault [`Error::Interrupted`], once set. Who waits for an operation sees it within 20 ms.
    ///
    /// ```
    /// # use polder::{GuestExit, HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().owed().build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// use std::sync::atomic::Ordering;
    ///
    /// let vcpu = memory.machine_vcpu(vm)?;
    /// vcpu.kicker().store(true, Ordering::Release);
    /// let owed = vcpu.read(Gpa::new(0x10_0000), Visibility::Shared, &mut [0]);
    /// assert_eq!(owed, Err(GuestExit::Kicked), "it would have waited for the contents");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn kicker(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.kicked)
    }

    /// Whether it is of this VM of this memory.
    pub(crate) fn is_of(&self, driver: &Arc<Driver>, vm: VmId) -> bool {
        Arc::ptr_eq(&self.driver, driver) && self.vm == vm
    }

    pub(crate) fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::Acquire)
    }

    /// Reads guest memory, as private or as shared.
    ///
    /// # Errors
    /// [`GuestExit`]; the buffer is unchanged.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, GfnRange, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let vcpu = memory.machine_vcpu(vm)?;
    /// let mut word = [1; 8];
    /// vcpu.read(Gpa::new(0x10_0000), Visibility::Private, &mut word).unwrap();
    /// assert_eq!(word, [0; 8]);
    /// let exit = vcpu.read(Gpa::new(0x9000), Visibility::Private, &mut word).unwrap_err();
    /// assert!(exit.to_string().contains("not bound"));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn read(&self, gpa: Gpa, side: Visibility, into: &mut [u8]) -> Result<(), GuestExit> {
        self.access((gfns(gpa, into.len()), side), |machine, id, side| {
            Ok(machine.vcpu(id)?.read(gpa, side, into)?)
        })
    }

    /// Writes guest memory, as private or as shared.
    ///
    /// # Errors
    /// [`GuestExit`]; nothing was written.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let vcpu = memory.machine_vcpu(vm)?;
    /// vcpu.write(Gpa::new(0x10_0000), Visibility::Private, b"its own").unwrap();
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn write(&self, gpa: Gpa, side: Visibility, from: &[u8]) -> Result<(), GuestExit> {
        self.access((gfns(gpa, from.len()), side), |machine, id, side| {
            Ok(machine.vcpu(id)?.write(gpa, side, from)?)
        })
    }

    /// PVALIDATE of the page of `level` at `gfn`: the guest accepts it, or no longer. Whether that
    /// changed anything; or what the instruction said, [`RmpFail::SizeMismatch`] of 2M that are of
    /// 4K pages among it.
    ///
    /// # Errors
    /// [`GuestExit`]; nothing was changed.
    pub fn pvalidate(
        &self,
        gfn: Gfn,
        level: Level,
        validate: bool,
    ) -> Result<Result<bool, RmpFail>, GuestExit> {
        let Some(size) = RmpSize::of(level) else { return Ok(Err(RmpFail::Input)) };
        let mut result = Err(RmpFail::Undefined);
        self.access((GfnRange::one(gfn), Visibility::Private), |machine, id, _| {
            result = machine.vcpu(id)?.pvalidate(gfn, size, validate)?;
            Ok(())
        })?;
        Ok(result)
    }

    /// The guest asks for its frames to be private or shared, by a hypercall of its own
    /// (`KVM_HC_MAP_GPA_RANGE`; under pKVM `MEM_SHARE` and `MEM_UNSHARE`, and there it is the only
    /// way). Frames that it has not touched yet it is given first. How many pages changed.
    ///
    /// # Errors
    /// [`GuestExit::Failed`] with what the VMM or the hypervisor refused: nothing has changed then.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, GfnRange, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let vcpu = memory.machine_vcpu(vm)?;
    /// let pages = vcpu.convert(GfnRange::between(0x100, 0x104).unwrap(), Visibility::Shared).unwrap();
    /// assert_eq!(pages.get(), 4);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn convert(&self, gfns: GfnRange, to: Visibility) -> Result<PageCount, GuestExit> {
        let (by, contents) = ((Some(self.vm), true), self.driver.keeps_most(to));
        let convert = || {
            let find = |engine: &Engine| engine.pages_of(self.vm, gfns);
            self.driver.convert_counted(find, (to, contents), by, OnBusy::Wait)
        };
        let ask = match to {
            Visibility::Private => Ask::Unshare,
            Visibility::Shared => Ask::Share,
        };
        self.ask_for(gfns, ask, convert)
    }

    /// The guest gives frames back (`MEM_RELINQUISH` under pKVM, a balloon elsewhere): they take up
    /// no memory, and are zeros if it touches them again. Under pKVM they are to be private.
    ///
    /// # Errors
    /// As [`Self::convert`]; of several runs of pages, those before the one that failed are given.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, GfnRange, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let vcpu = memory.machine_vcpu(vm)?;
    /// vcpu.write(Gpa::new(0x10_0000), Visibility::Private, b"its own").unwrap();
    /// vcpu.relinquish(GfnRange::one(Gfn::from(0x100))).unwrap();
    /// assert!(memory.resident()?.is_zero());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn relinquish(&self, gfns: GfnRange) -> Result<(), GuestExit> {
        self.ask_for(gfns, Ask::Relinquish, || {
            let runs = self.driver.ask(|engine| engine.pages_of(self.vm, gfns))?;
            runs.into_iter().try_for_each(|run| self.driver.discard(run, true, OnBusy::Wait))
        })
    }

    /// Has pKVM's hypervisor know that the guest asks, has it answered, and lets the guest go on.
    /// Without pKVM there is nobody to ask.
    fn ask_for<T>(
        &self,
        gfns: GfnRange,
        ask: Ask,
        answer: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, GuestExit> {
        let host = self.host();
        let Some(_alone) = host.requests() else {
            return answer().map_err(GuestExit::Failed);
        };
        self.driver.ask(|engine| engine.pages_of(self.vm, gfns))?;
        let asked = gfns.frames().try_for_each(|gfn| self.hypercall(gfn, ask));
        let answered = asked.and_then(|()| answer().map_err(GuestExit::Failed));
        for gfn in gfns.frames() {
            let resumed = host.lock().resume_guest(self.id.vm, gfn);
            assert!(resumed.is_ok(), "pKVM is enabled: {resumed:?}");
        }
        answered
    }

    /// One hypercall of the guest's. A page that it does not have it is given first, unless it is
    /// to be given back; one that is so already needs no asking.
    fn hypercall(&self, gfn: Gfn, ask: Ask) -> Result<(), GuestExit> {
        let host = self.driver.host.machine().expect("made on the simulated machine");
        loop {
            let asked = {
                let machine = &mut *host.lock();
                let mut vcpu = machine.vcpu(self.id).map_err(Error::Machine)?;
                match ask {
                    Ask::Share => vcpu.mem_share(gfn),
                    Ask::Unshare => vcpu.mem_unshare(gfn),
                    Ask::Relinquish => vcpu.mem_relinquish(gfn),
                }
            };
            match asked {
                Ok(Ok(()) | Err(PkvmFail::Permission)) => return Ok(()),
                Ok(Err(fail)) => unreachable!("a guest of pKVM's asks: {fail}"),
                Err(_) if ask == Ask::Relinquish => return Ok(()),
                Err(_) => drop(self.answer(gfn, None, Visibility::Private)?),
            }
        }
    }
}

impl fmt::Debug for MachineVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineVcpu").field("vm", &self.vm).finish_non_exhaustive()
    }
}
