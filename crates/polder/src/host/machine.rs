//! Host `machine`: the simulated machine behind the same driver.
//!
//! ```text
//!              guest view           host view              trusted view
//! what         stage 2 of a VM      a watched VMA of       the object's bytes
//!                                   a process
//! shared page  mapped by answers    mapped by answers      always
//! private page mapped by answers    poisoned when touched  always
//! ```
//! The machine is data behind one lock; each call on it is one step of one of its actors, so a
//! toucher, a vCPU and a conversion interleave at every step. Nothing in it waits: a touch that
//! has to wait queues itself for the fault threads and is made again once something was answered.
//!
//! Unlike on a memfd, every reference to a page can be counted here: a conversion to private finds
//! pins that the engine has not given, and names their holder.

mod device;
mod direct_map;
mod huge;
mod inspect;
mod migrate;
mod pages;
mod pkvm;
mod references;
mod rmp;
mod slots;
mod stage2;
mod teardown;
mod touches;
mod userfault;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use polder_engine::pool::PoolCounts;
use polder_engine::{FolioCounts, GuestAccess, Platform, Slot, Step, View, VmId};
use polder_linux::Errno;
use polder_machine::{Config, LockOwner, Machine, ObjectId, ProcessId, View as Vma, VpnRange};
use polder_units::{AddressSpace, Gfn, GfnRange, Level, PageCount, PageIndex, PageRange};

pub(crate) use self::device::MachineDevice;
use self::pkvm::Pkvm;
use self::rmp::Rmp;
use self::slots::Attached;
pub use self::teardown::KernelPin;
use super::views::Views;
use super::{Faulted, Host, Shown, Smashed, Translated, Vm, failed};
use crate::dirty::Marks;
use crate::explain::HostFacts;
use crate::huge_pool::HugePool;
use crate::prefault::Span;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::{Error, Vcpu};

/// How often a page is looked at again because of references that are soon gone, as GUP-fast's.
const REFERENCE_RETRIES: u32 = 32;

/// How long is waited before it is tried again to free a folio.
const FREE_PAUSE: Duration = Duration::from_millis(1);

/// CPUs that the host's threads run on; each has a TLB.
const CPUS: u16 = 16;

/// Where the host view starts: aligned to every level.
const HOST_VIEW: u64 = 1 << 18;

/// The driver, as far as folio locks are concerned.
const DRIVER: LockOwner = LockOwner(0);

pub(crate) struct MachineHost {
    /// Pins of the kernel's have it, too.
    machine: Arc<Mutex<Machine>>,
    object: ObjectId,
    process: ProcessId,
    pages: PageCount,
    vms: Mutex<BTreeMap<VmId, Attached>>,
    /// Whether slots log what guests write.
    logs: AtomicBool,
    /// Of memory of huge pages.
    huge: Option<huge::Huge>,
    /// Whether what is published leaves the kernel's direct map.
    hides: bool,
    /// Whether a guest's touches of what may be owed end in the VMM.
    exits: bool,
    /// Of an SNP guest's memory.
    rmp: Option<Rmp>,
    /// Of a protected VM's memory under pKVM.
    pkvm: Option<Pkvm>,
    events: Mutex<Events>,
    /// A touch was queued, or the fault threads are nudged.
    queued: Condvar,
    /// Something was answered or released: touch again.
    answered: Condvar,
}

#[derive(Default)]
struct Events {
    touches: BTreeSet<(View, PageIndex)>,
    nudged: bool,
    /// How often something was answered.
    answers: u64,
}

/// What the simulated machine refuses of its driver is the driver's mistake, but for memory.
fn refused(error: polder_machine::Error) -> Error {
    match error {
        polder_machine::Error::NoMemory { .. } => failed("a folio's allocation", Errno::NOMEM),
        polder_machine::Error::Space { .. } => {
            failed("an address space's reservation", Errno::NOMEM)
        }
        other => Error::Machine(other),
    }
}

impl MachineHost {
    /// A machine with an object of `pages` pages, and room for what its driver needs.
    pub(crate) fn new(pages: PageCount, platform: Platform) -> Result<Self, Error> {
        // Two frames a page: a page that is discarded while somebody pins it goes on taking one.
        let frames = pages.checked_add(pages).unwrap_or(pages);
        Self::on(Config::x86_64(frames), pages, platform, None)
    }

    /// The same, of huge pages, which are reserved of a pool, or of one that is just enough.
    pub(crate) fn of_huge_pages(
        pages: PageCount,
        platform: Platform,
        level: Level,
        pool: Option<&HugePool>,
    ) -> Result<Self, Error> {
        let frames = huge::frames(pages).ok_or_else(|| failed("mmap", Errno::NOMEM))?;
        Self::on(Config::x86_64(frames), pages, platform, Some((level, pool)))
    }

    fn on(
        config: Config,
        pages: PageCount,
        platform: Platform,
        huge: Option<(Level, Option<&HugePool>)>,
    ) -> Result<Self, Error> {
        let mut machine = Machine::new(config).map_err(refused)?;
        let rmp = platform.has_rmp().then(Rmp::default);
        if rmp.is_some() {
            machine.enable_snp();
        }
        let pkvm = platform.hypervisor_keeps_stage2().then(Pkvm::default);
        if pkvm.is_some() {
            machine.enable_pkvm();
        }
        let object = machine.create_object(pages).map_err(refused)?;
        let process = machine.create_process().map_err(refused)?;
        for _ in 1..CPUS {
            machine.add_thread(process).map_err(refused)?;
        }
        let all = VpnRange::between(HOST_VIEW, HOST_VIEW + pages.get())
            .ok_or_else(|| failed("mmap", Errno::NOMEM))?;
        let first = PageIndex::from(0);
        let largest = huge.map_or(Level::Size4K, |(level, _)| level);
        let view = Vma { largest, ..Vma::HOST };
        machine.mmap(process, all, object, first, view).map_err(refused)?;
        let huge = huge
            .map(|(level, pool)| huge::Huge::new(&mut machine, (pages, level), pool))
            .transpose()?;
        Ok(Self {
            machine: Arc::new(Mutex::new(machine)),
            object,
            process,
            pages,
            vms: Mutex::default(),
            logs: AtomicBool::new(false),
            huge,
            hides: false,
            exits: false,
            rmp,
            pkvm,
            events: Mutex::default(),
            queued: Condvar::new(),
            answered: Condvar::new(),
        })
    }

    /// The machine, locked. Each of its calls is one step.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock()
    }

    /// The object and the process whose host view shows it.
    pub(crate) fn parts(&self) -> (ObjectId, ProcessId) {
        (self.object, self.process)
    }

    /// Where pages are in the host view.
    pub(crate) fn vpns(range: PageRange) -> VpnRange {
        VpnRange::between(HOST_VIEW + range.start().get(), HOST_VIEW + range.end())
            .expect("the whole view is a range")
    }
}

impl Host for MachineHost {
    fn take(&self, step: Step) -> Result<(), Error> {
        match step {
            Step::UnmapHost(range) => self.unmap_host(range),
            Step::UnmapGuest(range) => self.unmap_guest(range),
            Step::CheckReferences(range) => self.check_references(range),
            Step::Free(range) => {
                self.free(range)?;
                self.forget_taken(range);
                Ok(())
            }
            Step::Quarantine(range) => {
                self.unmap_guest(range)?;
                self.unmap_host(range)?;
                self.poison(range)
            }
            Step::Assign(range) => self.assign(range),
            Step::Unassign(range) => self.unassign(range),
            Step::Reassign(range) => self.reassign(range),
            Step::Smash(range) => self.smash_all(range),
            Step::Merge(range) => self.merge(range),
            Step::Thaw(range) => self.thaw(range),
            Step::Protect(range, to) => self.answer_guest(range, to),
            Step::Move(range) => self.move_folios(range),
            Step::Launch(range) => self.launch(range),
            Step::PrepareSplit(range) => self.prepare_split(range),
            Step::SplitFolio(range) => self.reshape(range, true),
            Step::MergeFolio(range) => self.reshape(range, false),
            Step::ReleaseTables(range) => {
                self.release_tables(range);
                Ok(())
            }
            Step::Publish(range) => self.hide(&mut self.lock(), range),
            Step::MapDma(..) | Step::UnmapDma(..) => unreachable!("the driver's: {step}"),
        }
    }

    fn views(&self) -> &dyn Views {
        self
    }

    fn attach(&self, id: VmId, vm: Vm) -> Result<(), Error> {
        self.attach_vm(id, vm)
    }

    fn bind(&self, id: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error> {
        self.bind_slot(id, slot, gfn, pages)
    }

    fn unbind(&self, id: VmId, slot: Slot) -> Result<(), Error> {
        self.unbind_slot(id, slot)
    }

    fn log_dirty(&self, on: bool) -> Result<(), Error> {
        self.log_slots(on)
    }

    fn take_dirty(&self, into: &Marks) -> Result<(), Error> {
        self.take_logs(into)
    }

    fn map_guest(
        &self,
        id: VmId,
        access: GuestAccess,
        faulted: Option<Faulted>,
        range: PageRange,
    ) -> Result<bool, Error> {
        let at = stage2::At::of(faulted, access.gfn);
        let mapped = matches!(self.map(id, access, at, range)?, stage2::Tried::Mapped(_));
        if !mapped {
            // The guest faults again; let go on whom it would only meet once more.
            crate::sync::yield_now();
        }
        Ok(mapped)
    }

    fn show(
        &self,
        id: VmId,
        vcpu: Vcpu<'_>,
        shown: Shown,
        range: PageRange,
    ) -> Result<(u64, u64), Error> {
        self.show_all((id, vcpu), shown, range)
    }

    fn translate(&self, vcpu: Vcpu<'_>, span: Span, most: u64) -> Result<Translated, Error> {
        self.translated(vcpu, span, most)
    }

    fn aliases(
        &self,
        vcpu: Vcpu<'_>,
        gfns: GfnRange,
    ) -> Result<(AddressSpace, Vec<(u64, GfnRange)>), Error> {
        self.shown_at(vcpu, gfns)
    }

    fn ready(&self, range: PageRange) -> Result<(), Error> {
        self.allocate(&mut self.lock(), range)
    }

    fn smash(&self, id: VmId, gfn: Gfn, within: PageRange) -> Result<Smashed, Error> {
        let smashed = self.smash_at(self.vm(id).ok_or(Error::NoSuchVm)?, gfn, within);
        if smashed == Ok(Smashed::Busy) {
            crate::sync::yield_now();
        }
        smashed
    }

    fn rmp_counts(&self) -> [u64; 3] {
        self.rmp.as_ref().map_or([0; 3], Rmp::counts)
    }

    fn settle(&self, _: &[PageRange]) -> Result<(), Error> {
        self.answered();
        Ok(())
    }

    fn explain(&self, page: PageIndex) -> Result<HostFacts, Error> {
        self.facts(page)
    }

    fn existing(&self) -> Result<Vec<PageRange>, Error> {
        self.runs_with_memory()
    }

    fn levels(&self) -> Option<FolioCounts> {
        self.folio_counts()
    }

    fn pool(&self) -> Option<PoolCounts> {
        Some(self.huge.as_ref()?.counts(&self.lock()))
    }

    fn machine(&self) -> Option<&MachineHost> {
        Some(self)
    }
}
