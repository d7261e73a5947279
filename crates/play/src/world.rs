//! What a scenario is played on: memory of a host, the VMs, and who watches.

mod place;
mod vms;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polder::machine::{Asid, LockOwner, Machine, ObjectId, ProcessId, VmId as MachineVm};
use polder::units::{Geometry, PageCount, PageRange};
use polder::{
    Error, HostKind, HugePool, KernelPin, MachineVcpu, Memory, Population, Visibility, VmId,
};
use polder_vmm::GuestRoot;

pub(crate) use self::place::first_page;
use crate::guest_tables::Placed;
use crate::limits::VMS_MAX;
use crate::names::Is;
use crate::outcome::{Outcome, Stop};
use crate::scenario::{MemorySpec, Scenario};
use crate::state::VmNames;
use crate::watcher::{Event, Watcher};

/// A VM on its host.
pub(crate) struct Vm {
    /// Its name at Polder, if Polder knows it.
    pub(crate) id: Option<VmId>,
    /// The machine's name for it.
    pub(crate) machine: Option<MachineVm>,
    /// Its ASID.
    pub(crate) asid: Option<Asid>,
    /// A VM of KVM's.
    pub(crate) kvm: Option<polder_vmm::Vm>,
    /// The page tables that its guest has.
    pub(crate) tables: Option<GuestTables>,
}

/// Page tables of a guest.
pub(crate) struct GuestTables {
    pub(crate) root: GuestRoot,
    pub(crate) placed: Placed,
    /// The VM's first vCPU, which runs no guest, on these tables: what is mapped ahead, is for it.
    pub(crate) vcpu: MachineVcpu,
}

/// What all actors share.
pub(crate) struct World {
    pub(crate) memory: Memory,
    pub(crate) vms: Vec<Vm>,
    /// The story is over: whoever waits is to give up.
    over: AtomicBool,
    /// What makes vCPUs that wait give up.
    kickers: Mutex<Vec<Arc<AtomicBool>>>,
    /// Who has locked folios.
    lockers: Mutex<Vec<LockOwner>>,
    /// The pool of the memory, and other memories of it, by name.
    pool: Option<HugePool>,
    others: Mutex<BTreeMap<String, Memory>>,
}

/// Why a scenario can't be played here.
pub(crate) enum Unplayable {
    /// The machine lacks what the host needs.
    Skipped(String),
    /// The scenario asks for what can't be.
    Failed(String),
}

impl From<Error> for Unplayable {
    fn from(error: Error) -> Self {
        let way_out = error.way_out().map_or(String::new(), |way_out| format!("; {way_out}"));
        match error {
            Error::Missing { ref source, .. } => {
                Self::Skipped(format!("{error}: {source}{way_out}"))
            }
            Error::NotOffered { .. } | Error::HugePages { .. } => {
                Self::Skipped(format!("{error}{way_out}"))
            }
            error => Self::Failed(Outcome::from(error).text),
        }
    }
}

impl From<polder::machine::Error> for Unplayable {
    fn from(error: polder::machine::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl World {
    pub(crate) fn new(
        scenario: &Scenario,
        host: HostKind,
        prepare: Option<&dyn Fn(&Memory)>,
        events: Sender<Event>,
    ) -> Result<Self, Unplayable> {
        let (memory, pool) = build(scenario.memory, host)?;
        memory.watch(Arc::new(Watcher { events }));
        if let Some(prepare) = prepare {
            prepare(&memory);
        }
        let mut world = Self {
            memory,
            vms: Vec::new(),
            over: AtomicBool::new(false),
            kickers: Mutex::default(),
            lockers: Mutex::default(),
            pool,
            others: Mutex::default(),
        };
        for vm in &scenario.vms {
            let vm = world.add_vm(vm, host)?;
            world.vms.push(vm);
        }
        Ok(world)
    }

    /// Looks into the machine.
    pub(crate) fn inside<T>(
        &self,
        look: impl FnOnce(&mut Machine, ObjectId, ProcessId) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        self.memory.simulated(look).map_err(Stop::from)?
    }

    /// The names of the VMs, at Polder and on the machine.
    pub(crate) fn names(&self) -> Vec<VmNames> {
        self.vms.iter().map(|vm| (vm.id, vm.machine)).collect()
    }

    fn others(&self) -> MutexGuard<'_, BTreeMap<String, Memory>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes another memory, of huge pages of the same pool.
    pub(crate) fn create(&self, huge_pages: u64, name: &str) -> Result<Outcome, Stop> {
        let no_pool = || Stop::new(Is::NotOffered, "this memory is of no pool");
        let pool = self.pool.as_ref().ok_or_else(no_pool)?;
        if self.others().contains_key(name) {
            return Err(Stop::new(Is::Exists, format!("there is a memory \"{name}\" already")));
        }
        if self.others().len() >= VMS_MAX {
            return Err(Stop::new(Is::NotOffered, format!("{VMS_MAX} memories are the most")));
        }
        let pages = huge_pages.saturating_mul(Geometry::X86_64.pages(pool.level()).get());
        let pages = PageCount::new(pages).ok_or_else(|| Stop::new(Is::Range, "so many pages"))?;
        let builder = Memory::builder(pages).host(HostKind::Machine);
        let memory = builder.page_size(self.memory.page_size()).pool(pool).build()?;
        self.others().insert(name.to_owned(), memory);
        Ok(Outcome::done())
    }

    /// Has the kernel pin pages of one.
    pub(crate) fn pin_other(&self, name: &str, range: PageRange) -> Result<KernelPin, Stop> {
        let others = self.others();
        let none = || Stop::new(Is::Hole, format!("there is no memory \"{name}\""));
        Ok(others.get(name).ok_or_else(none)?.simulated_pin(range)?)
    }

    /// Lets go of one.
    pub(crate) fn drop_other(&self, name: &str) -> Result<Outcome, Stop> {
        match self.others().remove(name) {
            Some(_) => Ok(Outcome::done()),
            None => Err(Stop::new(Is::Hole, format!("there is no memory \"{name}\""))),
        }
    }

    pub(crate) fn add_kicker(&self, kicker: Arc<AtomicBool>) {
        self.kickers.lock().unwrap_or_else(PoisonError::into_inner).push(kicker);
    }

    /// Notes that somebody locks folios.
    pub(crate) fn add_locker(&self, by: LockOwner) {
        let mut lockers = self.lockers.lock().unwrap_or_else(PoisonError::into_inner);
        if !lockers.contains(&by) {
            lockers.push(by);
        }
    }

    /// Has everybody who waits give up: what is owed will not come, vCPUs are to stop, and no folio
    /// stays locked.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Release);
        for kicker in self.kickers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            kicker.store(true, Ordering::Release);
        }
        let all = PageRange::between(0, self.memory.pages().get());
        let lockers = self.lockers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(all) = all.filter(|_| !lockers.is_empty()) {
            let _ = self.memory.simulated(|machine, object, _| {
                let folios: Vec<_> = machine.folios(object, all).into_iter().flatten().collect();
                for (_, folio) in folios {
                    for &by in &lockers {
                        // By whom it is not locked he can't unlock it.
                        let _ = machine.unlock_folio(folio.pfn, by);
                    }
                }
            });
        }
        let facts = all.and_then(|all| self.memory.facts(all).ok()).unwrap_or_default();
        for (run, facts) in facts {
            if facts.population == Population::Owed {
                // Whoever holds a part of it denies it when he ends; who brings a part of it
                // meanwhile has the whole run refused.
                if self.memory.fail(run).is_err() {
                    for page in run.frames() {
                        let _ = self.memory.fail(PageRange::one(page));
                    }
                }
            }
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

/// The memory of a scenario, and the pool of its own that it draws from.
fn build(spec: MemorySpec, host: HostKind) -> Result<(Memory, Option<HugePool>), Unplayable> {
    let builder = Memory::builder(spec.pages).host(host).platform(spec.platform);
    let builder = if spec.owed { builder.owed() } else { builder };
    let builder = builder.page_size(spec.page_size);
    let pool = match (host, spec.page_size.reserved()) {
        (HostKind::Machine, Some(level)) => {
            let enough = spec.pages.get() / Geometry::X86_64.pages(level).get();
            Some(HugePool::new(level, spec.pool.unwrap_or(enough)))
        }
        _ => None,
    };
    let builder = pool.iter().fold(builder, |builder, pool| builder.pool(pool));
    let builder = match spec.starts {
        Visibility::Private => builder,
        Visibility::Shared => builder.shared(),
    };
    let memory = match builder.build() {
        // Of the kernel's pool others have taken, of the story's own nobody.
        Err(error @ Error::HugePages { .. }) if pool.is_some() => {
            return Err(Unplayable::Failed(Outcome::from(error).text));
        }
        built => built?,
    };
    if memory.page_size() != spec.page_size {
        let size = spec.page_size;
        return Err(Unplayable::Skipped(format!("this machine has no {size} pages to give")));
    }
    Ok((memory, pool))
}
