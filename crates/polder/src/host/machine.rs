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
mod migrate;
mod pkvm;
mod rmp;
mod stage2;
mod touches;
mod userfault;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use polder_engine::pool::PoolCounts;
use polder_engine::{FolioCounts, GuestAccess, Holder, Platform, Refusal, Slot, Step, View, VmId};
use polder_linux::Errno;
use polder_machine::{
    Backing, Config, LockOwner, Machine, ObjectId, ProcessId, View as Vma, VpnRange,
};
use polder_units::{
    AddressSpace, Gfn, GfnRange, Level, PageCount, PageIndex, PageRange, Pfn, PfnRange,
};

pub(crate) use self::device::MachineDevice;
use self::pkvm::Pkvm;
use self::rmp::Rmp;
use super::views::Views;
use super::{Faulted, Host, Shown, Smashed, Translated, Vm, failed};
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
    machine: Mutex<Machine>,
    object: ObjectId,
    process: ProcessId,
    pages: PageCount,
    vms: Mutex<BTreeMap<VmId, Attached>>,
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

/// A VM, and where its slots are.
struct Attached {
    vm: polder_machine::VmId,
    slots: BTreeMap<Slot, GfnRange>,
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

/// Who refers to a folio, and which page of `range` that keeps: the page that is pinned, if it is
/// one of them.
fn holder(
    machine: &Machine,
    (first, backing): (PageIndex, Backing),
    range: PageRange,
) -> (PageIndex, Holder) {
    let count = machine.geometry().pages(backing.level);
    let frames = PfnRange::new(backing.pfn, count).expect("a folio's frames");
    let page_of = |pfn: Pfn| {
        let into = pfn.checked_sub(backing.pfn).expect("one of those frames");
        first.checked_add(into).expect("a page of the object")
    };
    let pinned = machine.holders_of(frames).map(|holder| (page_of(holder.pfn), holder));
    let in_range = first.max(range.start());
    match pinned.min_by_key(|&(page, _)| (!range.contains(page), page)) {
        Some((page, holder)) if range.contains(page) => {
            (page, Holder::new(format!("{} of {}", holder.pin, holder.process)))
        }
        Some((page, holder)) => {
            let (pin, process) = (holder.pin, holder.process);
            let other = format!("{pin} of {process}, which is of page {page} of the same folio");
            (in_range, Holder::new(other))
        }
        None => (in_range, Holder::new("somebody unknown")),
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
            machine: Mutex::new(machine),
            object,
            process,
            pages,
            vms: Mutex::default(),
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

    /// The machine's name for a VM.
    pub(crate) fn vm(&self, id: VmId) -> Option<polder_machine::VmId> {
        self.vms.lock().get(&id).map(|attached| attached.vm)
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

    /// Gives memory to the pages of a range that have none.
    fn allocate(&self, machine: &mut Machine, range: PageRange) -> Result<(), Error> {
        for page in range.frames() {
            if machine.backing(self.object, page).map_err(refused)?.is_some() {
                continue;
            }
            if self.huge.is_some() {
                self.allocate_huge(machine, page)?;
            } else {
                machine.allocate(self.object, page, Level::Size4K).map_err(refused)?;
            }
        }
        Ok(())
    }

    /// Takes the pages out of the host view, with its markers, and out of other processes'
    /// mappings.
    fn unmap_host(&self, range: PageRange) -> Result<(), Error> {
        self.lock().host_unmap(self.process, Self::vpns(range)).map_err(refused)?;
        self.unmap_processes(range)
    }

    /// Takes the pages out of every process's mappings; markers stay.
    fn unmap_processes(&self, range: PageRange) -> Result<(), Error> {
        let mut machine = self.lock();
        machine.zap_object(self.object, range).map_err(refused)?;
        machine.flush_object(self.object, range).map_err(refused)
    }

    /// Takes the pages out of stage 2 of every VM.
    /// There is nothing that the host could take out where a hypervisor keeps it.
    fn unmap_guest(&self, range: PageRange) -> Result<(), Error> {
        if self.is_pkvm() {
            return Ok(());
        }
        let mut machine = self.lock();
        let gfns: Vec<_> = machine.gfns_of(self.object, range).collect();
        gfns.into_iter()
            .try_for_each(|(vm, gfns)| machine.tdp_zap(vm, gfns).map(|_| ()).map_err(refused))
    }

    /// Finds the first page of a range that somebody refers to, under its folio's lock.
    fn check_references(&self, range: PageRange) -> Result<(), Error> {
        let mut retries = REFERENCE_RETRIES;
        loop {
            match self.referenced(range)? {
                Some(_) if retries > 0 => {
                    retries -= 1;
                    crate::sync::yield_now();
                }
                Some(refusal) => return Err(refusal.into()),
                None => return Ok(()),
            }
        }
    }

    /// Looks for references folio by folio: a folio's count is of all of its pages, also of those
    /// that are not in the range.
    fn referenced(&self, range: PageRange) -> Result<Option<Refusal>, Error> {
        self.referenced_on(&mut self.lock(), range)
    }

    fn referenced_on(
        &self,
        machine: &mut Machine,
        range: PageRange,
    ) -> Result<Option<Refusal>, Error> {
        let folios = machine.folios(self.object, range).map_err(refused)?;
        let folios: Vec<(PageIndex, Backing)> = folios.collect();
        for (first, backing) in folios {
            let pfn = backing.pfn;
            match machine.lock_folio(pfn, DRIVER) {
                Ok(()) => {}
                // Whoever holds the lock may be about to refer to it.
                Err(polder_machine::Error::Locked { .. }) => {
                    let page = first.max(range.start());
                    let holder = Holder::new("somebody with the folio locked");
                    return Ok(Some(Refusal::Referenced { page, references: 0, holder }));
                }
                Err(error) => return Err(refused(error)),
            }
            let counts = machine.locked_counts(pfn, DRIVER);
            machine.unlock_folio(pfn, DRIVER).map_err(refused)?;
            let references = counts.map_err(refused)?.foreign();
            if references > 0 {
                let (page, holder) = holder(machine, (first, backing), range);
                return Ok(Some(Refusal::Referenced { page, references, holder }));
            }
        }
        Ok(None)
    }

    /// Drops the memory of pages. Nobody has them mapped after that, and no marker is left.
    fn free(&self, range: PageRange) -> Result<(), Error> {
        self.take_relinquished(range)?;
        self.unmap_guest(range)?;
        self.unmap_host(range)?;
        let folios: Vec<_> = {
            let machine = self.lock();
            let geometry = machine.geometry();
            let folios = machine.folios(self.object, range).map_err(refused)?;
            folios
                .map(|(page, backing)| PageRange::enclosing(page, backing.level, geometry))
                .collect()
        };
        let freed = self.free_huge(range)?;
        let left = |part: &PageRange| !freed.iter().any(|whole| whole.contains_range(*part));
        let parts = folios.into_iter().filter_map(|folio| folio.intersection(range));
        let mut parts = parts.filter(left);
        if self.huge.is_some() {
            // A part of a huge page goes with the whole of it.
            return parts.try_for_each(|part| self.zero(part));
        }
        parts.try_for_each(|part| self.punch(part))
    }

    /// Frees a folio, or makes a part of one zeros, which can't be freed. Who has it locked, or
    /// has mapped it again, may be done with it soon.
    fn punch(&self, part: PageRange) -> Result<(), Error> {
        use polder_machine::Error::{Locked, Mapped, Part};
        let mut retries = REFERENCE_RETRIES;
        loop {
            let punch = |machine: &mut Machine| machine.punch(self.object, part, None);
            let punched = self.by_direct_map(&mut self.lock(), part, punch)?;
            match punched {
                Err(Locked { .. } | Mapped { .. }) if retries > 0 => {}
                Err(Part { .. }) => return self.zero(part),
                punched => return punched.map(drop).map_err(refused),
            }
            retries -= 1;
            crate::sync::sleep(FREE_PAUSE);
            self.unmap_host(part)?;
        }
    }

    fn zero(&self, part: PageRange) -> Result<(), Error> {
        let zero = |machine: &mut Machine| machine.zero(self.object, part);
        self.by_direct_map(&mut self.lock(), part, zero)?.map_err(refused)
    }

    fn map_host(&self, range: PageRange) -> Result<(), Error> {
        let mut machine = self.lock();
        self.allocate(&mut machine, range)?;
        self.hide(&mut machine, range)?;
        machine.host_map_range(self.process, Self::vpns(range)).map(|_| ()).map_err(refused)
    }

    fn poison(&self, range: PageRange) -> Result<(), Error> {
        match self.lock().host_poison(self.process, Self::vpns(range)) {
            // Somebody else's answer mapped it: not what is asked for, but an answer.
            Ok(()) | Err(polder_machine::Error::Exists { .. }) => Ok(()),
            Err(error) => Err(refused(error)),
        }
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
        let vm = match (&self.rmp, vm) {
            (_, Vm::Kvm(_)) => return Err(Error::WrongVm { host: super::HostKind::Machine }),
            (None, Vm::Machine) if self.is_pkvm() => self.lock().create_pkvm_vm(),
            (None, Vm::MachineWithoutTdp) if self.is_pkvm() => {
                return Err(Error::NotOffered {
                    what: "a protected VM needs a CPU with two stages of translation",
                    way_out: "attach an ordinary VM of the machine",
                });
            }
            (None, Vm::Machine) => self.lock().create_vm(),
            (None, Vm::MachineWithoutTdp) => self.lock().create_vm_without_tdp(),
            (Some(_), Vm::MachineWithoutTdp) => {
                return Err(Error::NotOffered {
                    what: "an SNP guest needs a CPU with two-dimensional paging",
                    way_out: "attach an ordinary VM of the machine",
                });
            }
            (Some(_), Vm::Machine) => {
                let asid = rmp::asid(id)?;
                self.lock().create_snp_vm(asid)
            }
        };
        let vm = vm.map_err(refused)?;
        self.vms.lock().insert(id, Attached { vm, slots: BTreeMap::new() });
        Ok(())
    }

    fn bind(&self, id: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error> {
        let mut vms = self.vms.lock();
        let attached = vms.get_mut(&id).ok_or(Error::NoSuchVm)?;
        if self.is_snp() {
            self.check_owner(id)?;
        }
        self.own_by_pkvm(id, attached.vm)?;
        self.lock().bind(attached.vm, gfn, self.object, pages).map_err(refused)?;
        self.own(id, attached.vm)?;
        let gfns = GfnRange::new(gfn, pages.count()).expect("the engine has checked");
        self.begin_exits(attached.vm, gfns)?;
        attached.slots.insert(slot, gfns);
        Ok(())
    }

    fn unbind(&self, id: VmId, slot: Slot) -> Result<(), Error> {
        let mut vms = self.vms.lock();
        let Some(attached) = vms.get_mut(&id) else { return Ok(()) };
        let Some(&gfns) = attached.slots.get(&slot) else { return Ok(()) };
        self.check_none_donated(attached.vm, gfns)?;
        attached.slots.remove(&slot);
        let mut machine = self.lock();
        let gone = machine.unbind(attached.vm, gfns.start());
        let zapped = if self.is_pkvm() { Ok(false) } else { machine.tdp_zap(attached.vm, gfns) };
        assert!(gone.is_ok() && zapped.is_ok(), "the slot was there: {gone:?}, {zapped:?}");
        Ok(())
    }

    fn map_guest(
        &self,
        id: VmId,
        access: GuestAccess,
        faulted: Option<Faulted>,
        range: PageRange,
    ) -> Result<(), Error> {
        let at = stage2::At::of(faulted, access.gfn);
        if !matches!(self.map(id, access, at, range)?, stage2::Tried::Mapped(_)) {
            // The guest faults again; let go on whom it would only meet once more.
            crate::sync::yield_now();
        }
        Ok(())
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
        let vms: Vec<(VmId, polder_machine::VmId)> =
            self.vms.lock().iter().map(|(id, attached)| (*id, attached.vm)).collect();
        let machine = self.lock();
        let one = PageRange::one(page);
        let mut stage2 = Vec::new();
        for (vm, gfns) in machine.gfns_of(self.object, one) {
            let Some((id, _)) = vms.iter().find(|(_, known)| *known == vm) else { continue };
            let spte = machine.spte(vm, gfns.start()).map_err(refused)?;
            stage2.extend(spte.map(|spte| (*id, spte.level)));
        }
        let Some(backing) = machine.backing(self.object, page).map_err(refused)? else {
            return Ok(HostFacts { stage2, ..HostFacts::default() });
        };
        let holders = machine.holders_of(PfnRange::one(backing.pfn));
        let references = holders.map(|holder| format!("{} of {}", holder.pin, holder.process));
        Ok(HostFacts {
            memory: true,
            folio: Some(backing.level),
            rmp: machine.rmp_entry(backing.pfn).filter(|_| self.is_snp()),
            stage2,
            references: references.collect(),
        })
    }

    fn existing(&self) -> Result<Vec<PageRange>, Error> {
        let all = PageRange::between(0, self.pages.get()).expect("an object has pages");
        let machine = self.lock();
        let mut runs: Vec<PageRange> = Vec::new();
        for (page, backing) in machine.folios(self.object, all).map_err(refused)? {
            let pages = machine.config().geometry.pages(backing.level);
            let run = PageRange::new(page, pages).expect("a folio lies in its object");
            match runs.last_mut().and_then(|last| Some((last.append(run)?, last))) {
                Some((longer, last)) => *last = longer,
                None => runs.push(run),
            }
        }
        Ok(runs)
    }

    fn levels(&self) -> Option<FolioCounts> {
        // The engine knows what it has had split.
        if self.huge.is_some() {
            return None;
        }
        let all = PageRange::between(0, self.pages.get()).expect("an object has pages");
        let machine = self.lock();
        let mut counts = FolioCounts::default();
        for (_, backing) in machine.folios(self.object, all).ok()? {
            match backing.level {
                Level::Size4K => {}
                Level::Size2M => counts.size_2m += 1,
                Level::Size1G => counts.size_1g += 1,
            }
        }
        let pages = |level| machine.geometry().pages(level).get();
        let large = counts.size_2m * pages(Level::Size2M) + counts.size_1g * pages(Level::Size1G);
        counts.size_4k = self.pages.get() - large;
        Some(counts)
    }

    fn pool(&self) -> Option<PoolCounts> {
        Some(self.huge.as_ref()?.counts(&self.lock()))
    }

    fn machine(&self) -> Option<&MachineHost> {
        Some(self)
    }
}
