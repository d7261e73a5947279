//! An actor: a thread that does his steps.

mod access;
mod kernel;
mod kvm;
mod process;
mod vcpu;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use polder::machine::{GupFast, ProcessId, VpnRange};
use polder::units::{GfnRange, PageRange};
use polder::{Contents, Holder, OnBusy, Pin, PinKind, Platform, Slot, Visibility, VmId};

use self::process::Reference;
use self::vcpu::Vcpu;
use crate::names::{Is, Kind};
use crate::outcome::{Outcome, Stop};
use crate::scenario::{Actor, Hold, Place, SlotSpec, Verb};
use crate::watcher::{self, Event, Here};
use crate::world::World;

/// A step to do.
pub(crate) struct Job {
    pub(crate) verb: Verb,
    pub(crate) hold: Option<Hold>,
}

/// What an actor's thread is started with.
pub(crate) struct Start {
    pub(crate) number: usize,
    pub(crate) name: String,
    pub(crate) actor: Actor,
    pub(crate) world: Arc<World>,
    pub(crate) events: Sender<Event>,
    pub(crate) jobs: Receiver<Job>,
    pub(crate) resume: Receiver<Option<Hold>>,
}

/// Does steps until there are no more.
pub(crate) fn run(start: Start) {
    let Start { number, name, actor, world, events, jobs, resume } = start;
    watcher::become_actor(Here {
        actor: number,
        events: events.clone(),
        resume,
        hold: None.into(),
        steps: 0.into(),
    });
    let mut worker = Worker {
        number,
        name,
        actor,
        world: &world,
        vcpu: None,
        process: None,
        pins: BTreeMap::new(),
        references: BTreeMap::new(),
        gups: BTreeMap::new(),
    };
    while let Ok(Job { verb, hold }) = jobs.recv() {
        watcher::begin(hold);
        let outcome = worker.act(&verb).map_or_else(|Stop(outcome)| outcome, Box::new);
        if events.send(Event::Done(number, outcome)).is_err() {
            return;
        }
    }
}

struct Worker<'w> {
    number: usize,
    name: String,
    actor: Actor,
    world: &'w World,
    vcpu: Option<Rc<Vcpu>>,
    /// His mapping, if he is a process of his own.
    process: Option<(ProcessId, VpnRange)>,
    pins: BTreeMap<String, Pin<'w>>,
    references: BTreeMap<String, Reference>,
    gups: BTreeMap<String, GupFast>,
}

type Acted<T = Outcome> = Result<T, Stop>;

impl Worker<'_> {
    fn act(&mut self, verb: &Verb) -> Acted {
        let memory = &self.world.memory;
        match verb {
            Verb::Convert { place, to, contents, wait } => {
                let on_busy = if *wait { OnBusy::Wait } else { OnBusy::Refuse };
                self.convert(*place, *to, *contents, on_busy)
            }
            Verb::Want { place, vm, to } => {
                memory.want(self.id(*vm)?, self.gfns(*place, *vm)?, *to)?;
                Ok(Outcome::done())
            }
            Verb::Move { place } => {
                self.each(*place, |range| Ok(memory.move_pages(range, OnBusy::Wait)?))
            }
            Verb::Preload { place, bytes } => {
                self.each(*place, |range| Ok(memory.preload(range, bytes.as_bytes())?))
            }
            Verb::Relinquish { place } => {
                let gfns = self.gfns(*place, self.actor.vm)?;
                match &*self.vcpu()? {
                    Vcpu::Polder(vcpu) => vcpu.relinquish(gfns)?,
                    _ => return Err(nobodys()),
                }
                Ok(Outcome::done())
            }
            Verb::Discard { place } => {
                self.each(*place, |range| Ok(memory.discard(range, OnBusy::Wait)?))
            }
            Verb::Populate { place, bytes } => {
                self.each(*place, |range| Ok(memory.populate(range, bytes.as_bytes())?))
            }
            Verb::Fail { place } => self.each(*place, |range| Ok(memory.fail(range)?)),
            Verb::Settle => {
                memory.settle()?;
                Ok(Outcome::done())
            }
            Verb::Create { huge_pages, name } => self.world.create(*huge_pages, name),
            Verb::Drop { name } => self.world.drop_other(name),
            Verb::Bind { vm, slot } => self.bind(*vm, slot),
            Verb::Unbind { vm, slot } => {
                memory.unbind(self.id(*vm)?, Slot(*slot))?;
                Ok(Outcome::done())
            }
            Verb::Prefault { place, vm, by } => self.prefault(*place, *vm, *by),
            Verb::Pin { place, kind, name } => self.pin(*place, *kind, name),
            Verb::Unpin { name } => self.unpin(name),
            Verb::Resume { .. }
            | Verb::Look(_)
            | Verb::Explain { .. }
            | Verb::Pool
            | Verb::Audit => Err(Stop::new(Is::Failed, "the player does this, not an actor")),
            other => self.access(other),
        }
    }

    fn convert(
        &mut self,
        place: Place,
        to: Visibility,
        contents: Contents,
        on_busy: OnBusy,
    ) -> Acted {
        let memory = &self.world.memory;
        let vm = self.actor.vm;
        // A guest asks for its own frames; the VMM names pages, or frames of its VM.
        let converted = match (place, self.actor.kind) {
            (Place::Pages(range), Kind::Vmm) => memory.convert(range, to, contents, on_busy)?,
            // Where the guest alone decides, it asks by a hypercall of its own.
            (place, Kind::Guest) if memory.platform() == Platform::Pkvm => {
                let gfns = self.gfns(place, vm)?;
                match &*self.vcpu()? {
                    Vcpu::Polder(vcpu) => vcpu.convert(gfns, to)?,
                    _ => return Err(nobodys()),
                }
            }
            (place, _) => {
                let (id, gfns) = (self.id(vm)?, self.gfns(place, vm)?);
                memory.convert_gfns(id, gfns, to, contents, on_busy)?
            }
        };
        Ok(Outcome { converted: Some(converted.get()), ..Outcome::done() })
    }

    /// A VM's name at Polder.
    fn id(&self, vm: usize) -> Acted<VmId> {
        self.world.vms[vm].id.ok_or_else(nobodys)
    }

    /// A place's guest frames: so many from its first on.
    fn gfns(&self, place: Place, vm: usize) -> Acted<GfnRange> {
        let count = match place {
            Place::Pages(range) => range.count(),
            Place::Gpa(_, count) => count,
        };
        GfnRange::new(self.world.gfn(place, vm)?, count)
            .map_err(|error| Stop::new(Is::Range, error.to_string()))
    }

    /// A place's pages, which are to be one run.
    fn run(&self, place: Place) -> Acted<PageRange> {
        match self.world.pages(place, self.actor.vm)?.as_slice() {
            &[range] => Ok(range),
            runs => Err(Stop::new(Is::Range, format!("{} runs of pages, and not one", runs.len()))),
        }
    }

    /// Does something to each run of a place's pages.
    fn each(&self, place: Place, mut each: impl FnMut(PageRange) -> Acted<()>) -> Acted {
        for range in self.world.pages(place, self.actor.vm)? {
            each(range)?;
        }
        Ok(Outcome::done())
    }

    fn bind(&self, vm: usize, slot: &SlotSpec) -> Acted {
        let vm = &self.world.vms[vm];
        match (vm.id, vm.machine) {
            (Some(id), _) => {
                self.world.memory.bind(id, Slot(slot.slot), slot.gpa.gfn(), slot.pages)?;
            }
            (None, Some(machine_vm)) => self.world.inside(|machine, object, _| {
                Ok(machine.bind(machine_vm, slot.gpa.gfn(), object, slot.pages)?)
            })?,
            (None, None) => return Err(nobodys()),
        }
        Ok(Outcome::done())
    }

    fn pin(&mut self, place: Place, kind: PinKind, name: &str) -> Acted {
        if self.pins.contains_key(name) {
            return Err(Stop::new(Is::Exists, format!("{} has a pin \"{name}\"", self.name)));
        }
        let range = self.run(place)?;
        let pin = self.world.memory.pin(range, kind, Holder::new(name.to_owned()))?;
        self.pins.insert(name.to_owned(), pin);
        Ok(Outcome::done())
    }

    fn unpin(&mut self, name: &str) -> Acted {
        let none = || Stop::new(Is::NotPinned, format!("{} has no pin \"{name}\"", self.name));
        let pin = self.pins.remove(name).ok_or_else(none)?;
        drop(pin);
        Ok(Outcome::done())
    }
}

fn nobodys() -> Stop {
    Stop::new(Is::NotOffered, "this VM is not known to Polder, or not to this host")
}
