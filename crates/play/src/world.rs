//! What a scenario is played on: memory of a host, the VMs, and who watches.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polder::machine::{Asid, LockOwner, Machine, ObjectId, ProcessId, VmId as MachineVm};
use polder::units::{Geometry, Gfn, GfnRange, Gpa, PAGE_SIZE, PageCount, PageIndex, PageRange};
use polder::{
    Error, HostKind, HugePool, Memory, Moment, Population, Slot, View, Visibility, VmId, Watch,
};
use polder_vmm::RunError;

use crate::limits::VMS_MAX;
use crate::names::Is;
use crate::outcome::{Outcome, Stop};
use crate::player::Options;
use crate::scenario::{Hold, Place, Scenario, VmSpec};
use crate::state::VmNames;

/// What came to the player's ears.
#[derive(Debug)]
pub(crate) enum Event {
    /// An actor's step has ended.
    Done(usize, Box<Outcome>),
    /// An actor's step has stopped where it was to be held.
    Held(usize, String),
    /// An actor has asked for what another holds.
    Waits(usize),
    /// A touch of a page waits.
    TouchWaits(View, PageRange),
    /// Something else has happened, in an actor's step or in a fault thread.
    Moment(Option<usize>, Moment),
}

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
        options: Options<'_>,
        events: Sender<Event>,
    ) -> Result<Self, Unplayable> {
        let spec = scenario.memory;
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
        memory.watch(Arc::new(Watcher { events }));
        if let Some(prepare) = options.prepare {
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

    fn add_vm(&self, spec: &VmSpec, host: HostKind) -> Result<Vm, Unplayable> {
        if let Some(asid) = spec.asid {
            return self.add_bare_vm(spec, asid);
        }
        let kvm = match host {
            HostKind::Machine => None,
            _ => Some(polder_vmm::Vm::new(host).map_err(unplayable)?),
        };
        let id = match &kvm {
            None => self.memory.attach(polder::Vm::Machine)?,
            Some(vm) => vm.attach(&self.memory)?,
        };
        for slot in &spec.slots {
            self.memory.bind(id, Slot(slot.slot), slot.gpa.gfn(), slot.pages)?;
        }
        let machine = self.memory.simulated_vm(id).ok();
        // The n-th VM of Polder's is given the n-th ASID (`polder::host::machine::rmp`).
        let asid =
            id.0.checked_add(1).and_then(|asid| u16::try_from(asid).ok()).and_then(Asid::new);
        Ok(Vm { id: Some(id), machine, asid, kvm })
    }

    /// A VM of the machine's own, that nobody looks after.
    fn add_bare_vm(&self, spec: &VmSpec, asid: u16) -> Result<Vm, Unplayable> {
        let asid = Asid::new(asid);
        let made = self.memory.simulated(|machine, object, _| {
            machine.enable_snp();
            let vm = match asid {
                Some(asid) => machine.create_snp_vm(asid)?,
                None => machine.create_vm()?,
            };
            for slot in &spec.slots {
                machine.bind(vm, slot.gpa.gfn(), object, slot.pages)?;
            }
            Ok::<_, polder::machine::Error>(vm)
        });
        Ok(Vm { id: None, machine: Some(made??), asid, kvm: None })
    }

    /// Looks into the machine.
    pub(crate) fn inside<T>(
        &self,
        look: impl FnOnce(&mut Machine, ObjectId, ProcessId) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        self.memory.simulated(look).map_err(Stop::from)?
    }

    /// The pages of a place, as a VM sees it.
    pub(crate) fn pages(&self, place: Place, vm: usize) -> Result<Vec<PageRange>, Stop> {
        match place {
            Place::Pages(range) => Ok(vec![range]),
            Place::Gpa(gpa, count) => {
                let gfns = GfnRange::new(gpa.gfn(), count)
                    .map_err(|error| Stop::new(Is::Range, error.to_string()))?;
                match self.vms.get(vm).map(|vm| (vm.id, vm.machine)) {
                    Some((Some(id), _)) => Ok(self.memory.pages_of(id, gfns)?),
                    Some((None, Some(machine_vm))) => self.inside(|machine, _, _| {
                        let page = |gfn| Ok(PageRange::one(machine.bound(machine_vm, gfn)?.page));
                        gfns.frames().map(page).collect()
                    }),
                    _ => Err(Stop::new(Is::Unbound, "there is no such VM")),
                }
            }
        }
    }

    /// Where a VM sees a place: its first guest frame.
    pub(crate) fn gfn(&self, place: Place, vm: usize) -> Result<Gfn, Stop> {
        let page = match place {
            Place::Gpa(gpa, _) => return Ok(gpa.gfn()),
            Place::Pages(range) => range.start(),
        };
        let unbound = || Stop::new(Is::Unbound, format!("the VM does not see page {page}"));
        let Vm { id, machine, .. } = self.vms.get(vm).ok_or_else(unbound)?;
        if let Some(id) = *id {
            let bindings = self.memory.bindings();
            let of_vm = bindings.iter().filter(|(vm, ..)| *vm == id);
            let found = of_vm.filter_map(|(_, _, binding)| {
                let into = page.checked_sub(binding.pages().start())?;
                binding.gfns().start().checked_add(into).filter(|gfn| binding.gfns().contains(*gfn))
            });
            return found.into_iter().next().ok_or_else(unbound);
        }
        let machine_vm = machine.ok_or_else(unbound)?;
        self.inside(|machine, object, _| {
            let mut shown = machine.gfns_of(object, PageRange::one(page));
            let found = shown.find(|(id, _)| *id == machine_vm);
            found.map(|(_, gfns)| gfns.start()).ok_or_else(unbound)
        })
    }

    /// The guest-physical address of a byte.
    pub(crate) fn gpa(&self, place: Place, at: u64, vm: usize) -> Result<Gpa, Stop> {
        let gpa = self.gfn(place, vm)?.gpa().checked_add(at);
        gpa.ok_or_else(|| Stop::new(Is::Range, "past the last guest-physical address"))
    }

    /// The offset of a byte in the object.
    pub(crate) fn offset(&self, place: Place, at: u64, vm: usize) -> Result<u64, Stop> {
        let pages = self.pages(place, vm)?;
        let first = pages.first().map_or(0, |range| range.start().get());
        Ok(first * PAGE_SIZE + at)
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
                // Whoever holds a part of it denies it when he ends; who brings a part of it meanwhile
                // has the whole run refused.
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

/// The first page of a place, if it names pages of the object.
pub(crate) fn first_page(pages: &[PageRange]) -> Result<PageIndex, Stop> {
    pages.first().map(|range| range.start()).ok_or_else(|| Stop::new(Is::Range, "no page"))
}

fn unplayable(error: RunError) -> Unplayable {
    match error {
        RunError::Memory(error) => error.into(),
        RunError::Kvm(source) => Unplayable::Skipped(format!("it needs KVM: {source}")),
        RunError::NoPrivateMemory => Unplayable::Skipped(error.to_string()),
        error => Unplayable::Failed(error.to_string()),
    }
}

/// An actor, known to his own thread.
pub(crate) struct Here {
    pub(crate) actor: usize,
    pub(crate) events: Sender<Event>,
    /// How to go on, once held; gone when the story is over.
    pub(crate) resume: Receiver<Option<Hold>>,
    pub(crate) hold: Cell<Option<Hold>>,
    pub(crate) steps: Cell<u64>,
}

thread_local! {
    static HERE: RefCell<Option<Here>> = const { RefCell::new(None) };
}

/// Makes the calling thread an actor's.
pub(crate) fn become_actor(here: Here) {
    HERE.with(|it| *it.borrow_mut() = Some(here));
}

/// Begins a step of the calling actor's.
pub(crate) fn begin(hold: Option<Hold>) {
    HERE.with(|here| {
        if let Some(here) = here.borrow().as_ref() {
            here.hold.set(hold);
            here.steps.set(0);
        }
    });
}

/// Tells the player what happens, and stops an actor's thread where his step is to be held.
struct Watcher {
    events: Sender<Event>,
}

impl Watch for Watcher {
    fn at(&self, moment: Moment) {
        // A player who has gone is told nothing.
        let is_actors = HERE.with(|here| match here.borrow().as_ref() {
            Some(here) => {
                here.at(moment);
                true
            }
            None => false,
        });
        if is_actors {
            return;
        }
        let _ = self.events.send(match moment {
            Moment::TouchWaits(view, range) => Event::TouchWaits(view, range),
            moment => Event::Moment(None, moment),
        });
    }
}

impl Here {
    fn at(&self, moment: Moment) {
        if moment == Moment::Waits {
            let _ = self.events.send(Event::Waits(self.actor));
            return;
        }
        let where_ = match (moment, self.hold.get()) {
            (Moment::Reached(stage), Some(Hold::At(hold))) if stage == hold => stage.to_string(),
            (Moment::Step(step), hold) => {
                self.steps.set(self.steps.get() + 1);
                match hold {
                    Some(Hold::BeforeStep(nth)) if nth == self.steps.get() => {
                        format!("before step {nth}: {step}")
                    }
                    _ => String::new(),
                }
            }
            _ => String::new(),
        };
        if where_.is_empty() {
            let _ = self.events.send(Event::Moment(Some(self.actor), moment));
            return;
        }
        if let Moment::Reached(_) = moment {
            let _ = self.events.send(Event::Moment(Some(self.actor), moment));
        }
        let _ = self.events.send(Event::Held(self.actor, where_));
        // Nobody to say so: it goes on to its end.
        self.hold.set(self.resume.recv().unwrap_or(None));
        if let Moment::Step(_) = moment {
            let _ = self.events.send(Event::Moment(Some(self.actor), moment));
        }
    }
}
