//! An actor: a thread that does his steps.

mod kernel;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use polder::machine::{
    GupFast, GupStep, Hva, PinId, PinKind as GupKind, ProcessId, RmpSize, Side, Thread, VcpuId,
    View as Vma, VpnRange,
};
use polder::units::{GfnRange, PAGE_SIZE, PageIndex, PageRange};
use polder::{Holder, MachineVcpu, OnBusy, Pin, Platform, Slot, Visibility};
use polder_vmm::scenario::Op;
use polder_vmm::{End, Failure, Progress, Supervision};

use crate::names::{Is, Kind};
use crate::outcome::{Outcome, Stop};
use crate::scenario::{Actor, Bytes, Hold, Place, Verb};
use crate::world::{self, Event, Here, World};

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
    world::become_actor(Here {
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
        world::begin(hold);
        let outcome = worker.act(&verb).map_or_else(|Stop(outcome)| outcome, Box::new);
        if events.send(Event::Done(number, outcome)).is_err() {
            return;
        }
    }
}

/// A vCPU of the actor's own.
enum Vcpu {
    /// Whose faults Polder answers.
    Polder(MachineVcpu),
    /// Whose faults nobody answers.
    Bare(VcpuId),
    /// Of KVM's: a guest runs for each access.
    Kvm,
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
    references: BTreeMap<String, PinId>,
    gups: BTreeMap<String, GupFast>,
}

type Acted<T = Outcome> = Result<T, Stop>;

/// Where another process maps the memory: aligned to every level.
const PROCESS_VIEW: u64 = 1 << 18;

impl Worker<'_> {
    fn act(&mut self, verb: &Verb) -> Acted {
        let memory = &self.world.memory;
        match verb {
            Verb::Convert { place, to, contents, wait } => {
                let on_busy = if *wait { OnBusy::Wait } else { OnBusy::Refuse };
                // A guest asks for its own frames; the VMM names pages, or frames of its VM.
                let converted = match (*place, self.actor.kind) {
                    (Place::Pages(range), Kind::Vmm) => {
                        memory.convert(range, *to, *contents, on_busy)?
                    }
                    // Where the guest alone decides, it asks by a hypercall of its own.
                    (place, Kind::Guest) if memory.platform() == Platform::Pkvm => {
                        let gfns = self.gfns(place, self.actor.vm)?;
                        match &*self.vcpu()? {
                            Vcpu::Polder(vcpu) => vcpu.convert(gfns, *to)?,
                            _ => return Err(nobodys()),
                        }
                    }
                    (place, _) => {
                        let id = self.world.vms[self.actor.vm].id.ok_or_else(nobodys)?;
                        let gfns = self.gfns(place, self.actor.vm)?;
                        memory.convert_gfns(id, gfns, *to, *contents, on_busy)?
                    }
                };
                Ok(Outcome { converted: Some(converted.get()), ..Outcome::done() })
            }
            Verb::Want { place, vm, to } => {
                let id = self.world.vms[*vm].id.ok_or_else(nobodys)?;
                memory.want(id, self.gfns(*place, *vm)?, *to)?;
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
                let id = self.world.vms[*vm].id.ok_or_else(nobodys)?;
                memory.unbind(id, Slot(*slot))?;
                Ok(Outcome::done())
            }
            Verb::Read { from, length } => {
                let length = usize::try_from(*length).unwrap_or_default();
                let mut bytes = vec![0; length];
                self.read(from, &mut bytes)?;
                Ok(Outcome::read(bytes))
            }
            Verb::Write { to, bytes } => {
                self.write(to, bytes.as_bytes())?;
                Ok(Outcome::done())
            }
            Verb::Pin { place, kind, name } => self.pin(*place, *kind, name),
            Verb::Unpin { name } => match self.pins.remove(name) {
                Some(pin) => {
                    drop(pin);
                    Ok(Outcome::done())
                }
                None => {
                    let what = format!("{} has no pin \"{name}\"", self.name);
                    Err(Stop::new(Is::NotPinned, what))
                }
            },
            Verb::Refer { place, kind, name } => self.refer(*place, *kind, name),
            Verb::Release { name } => self.release(name),
            Verb::GupFast { place, name } => self.gup_fast(*place, name),
            Verb::Pvalidate { place, size, validate } => self.pvalidate(*place, *size, *validate),
            Verb::Resume { .. }
            | Verb::Look(_)
            | Verb::Explain { .. }
            | Verb::Pool
            | Verb::Audit => Err(Stop::new(Is::Failed, "the player does this, not an actor")),
            other => self.kernel(other),
        }
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

    fn bind(&self, vm: usize, slot: &crate::scenario::SlotSpec) -> Acted {
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

    fn read(&mut self, from: &Bytes, bytes: &mut [u8]) -> Acted<()> {
        let (world, vm) = (self.world, self.actor.vm);
        match self.actor.kind {
            Kind::Vmm => {
                let id = world.vms[vm].id.ok_or_else(nobodys)?;
                Ok(world.memory.read(id, world.gpa(from.place, from.at, vm)?, bytes)?)
            }
            Kind::Device => {
                let offset = world.offset(from.place, from.at, vm)?;
                Ok(world.memory.host_view().touch_read(offset, bytes)?)
            }
            Kind::Process => {
                let (thread, hva) = self.process_at(from)?;
                world.inside(|machine, _, _| Ok(machine.host_read(thread, hva, bytes)?))
            }
            Kind::Guest => {
                let gpa = world.gpa(from.place, from.at, vm)?;
                match &*self.vcpu()? {
                    Vcpu::Polder(vcpu) => Ok(vcpu.read(gpa, from.side, bytes)?),
                    Vcpu::Bare(id) => {
                        let id = *id;
                        world.inside(|machine, _, _| {
                            Ok(machine.vcpu(id)?.read(gpa, side(from.side), bytes)?)
                        })
                    }
                    Vcpu::Kvm => self.run_kvm(gpa, bytes, None),
                }
            }
            Kind::Kernel => Err(Stop::new(Is::Failed, "the kernel reads nothing")),
        }
    }

    fn write(&mut self, to: &Bytes, bytes: &[u8]) -> Acted<()> {
        let (world, vm) = (self.world, self.actor.vm);
        match self.actor.kind {
            Kind::Vmm => {
                let id = world.vms[vm].id.ok_or_else(nobodys)?;
                Ok(world.memory.write(id, world.gpa(to.place, to.at, vm)?, bytes)?)
            }
            Kind::Device => {
                let offset = world.offset(to.place, to.at, vm)?;
                Ok(world.memory.host_view().touch_write(offset, bytes)?)
            }
            Kind::Process => {
                let (thread, hva) = self.process_at(to)?;
                world.inside(|machine, _, _| Ok(machine.host_write(thread, hva, bytes)?))
            }
            Kind::Guest => {
                let gpa = world.gpa(to.place, to.at, vm)?;
                match &*self.vcpu()? {
                    Vcpu::Polder(vcpu) => Ok(vcpu.write(gpa, to.side, bytes)?),
                    Vcpu::Bare(id) => {
                        let id = *id;
                        world.inside(|machine, _, _| {
                            Ok(machine.vcpu(id)?.write(gpa, side(to.side), bytes)?)
                        })
                    }
                    Vcpu::Kvm => {
                        let mut unused = Vec::new();
                        self.run_kvm(gpa, &mut unused, Some(bytes))
                    }
                }
            }
            Kind::Kernel => Err(Stop::new(Is::Failed, "the kernel writes nothing")),
        }
    }

    /// The actor's vCPU, made when he first needs it.
    fn vcpu(&mut self) -> Acted<Rc<Vcpu>> {
        if let Some(vcpu) = &self.vcpu {
            return Ok(Rc::clone(vcpu));
        }
        let vm = &self.world.vms[self.actor.vm];
        let vcpu = Rc::new(match (vm.id, vm.machine, &vm.kvm) {
            (_, _, Some(_)) => Vcpu::Kvm,
            (Some(id), ..) => {
                let vcpu = self.world.memory.machine_vcpu(id)?;
                self.world.add_kicker(vcpu.kicker());
                Vcpu::Polder(vcpu)
            }
            (None, Some(vm), _) => {
                Vcpu::Bare(self.world.inside(|machine, _, _| Ok(machine.add_vcpu(vm)?))?)
            }
            (None, None, None) => return Err(nobodys()),
        });
        self.vcpu = Some(Rc::clone(&vcpu));
        Ok(vcpu)
    }

    /// Has a guest on KVM write bytes, or read them, by whole words.
    fn run_kvm(&self, gpa: polder::units::Gpa, into: &mut [u8], from: Option<&[u8]>) -> Acted<()> {
        const WORD: u64 = 8;
        let vm = &self.world.vms[self.actor.vm];
        let (Some(kvm), Some(id)) = (&vm.kvm, vm.id) else { return Err(nobodys()) };
        if !gpa.get().is_multiple_of(WORD) {
            return Err(Stop::new(
                Is::NotOffered,
                "on KVM a guest accesses whole words: `at` is a multiple of 8",
            ));
        }
        let run = |op: Op| -> Acted<End> {
            let supervise = |_: Progress<'_>| match self.world.is_over() {
                true => Supervision::TimeOut,
                false => Supervision::GoOn,
            };
            let ended = kvm.run((&self.world.memory, id), &[vec![op, Op::Done]], supervise);
            let ended = ended.map_err(|error| Stop::new(Is::Failed, error.to_string()))?;
            match ended.faults.first() {
                Some(&fault) => Err(fault.into()),
                None => Ok(ended.end),
            }
        };
        let at = |word: usize| gpa.checked_add(word as u64 * WORD).unwrap_or(gpa);
        let ended = |end: End| match end {
            End::Ok => Ok(()),
            End::Failed(Failure::MemoryFault { fault, .. }) => Err(fault.into()),
            // By the guest view's page table the two are one: a page that is denied to the guest.
            End::Failed(failure @ Failure::MemoryFailure { page: Some(page), .. }) => {
                let quarantined = self.world.memory.quarantined();
                let is = match quarantined.iter().any(|run| run.contains(page)) {
                    true => Is::Quarantined,
                    false => Is::SourceFailed,
                };
                Err(Stop::new(is, failure.to_string()))
            }
            End::Failed(failure) => Err(Stop::new(Is::Failed, failure.to_string())),
            End::TimedOut | End::Interrupted => Err(Stop::new(Is::Kicked, "the guest was stopped")),
        };
        for (word, bytes) in from.into_iter().flat_map(|from| from.chunks(8)).enumerate() {
            ended(run(Op::Store { gpa: at(word), value: to_word(bytes) })?)?;
        }
        for (word, bytes) in into.chunks_mut(8).enumerate() {
            let value = match run(Op::Load { gpa: at(word), expect: 0 })? {
                End::Failed(Failure::Check { found, .. }) => found,
                other => ended(other).map(|()| 0)?,
            };
            bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
        }
        Ok(())
    }

    /// The actor's own mapping, made when he first needs it.
    fn mapping(&mut self) -> Acted<(ProcessId, VpnRange)> {
        if let Some(mapping) = self.process {
            return Ok(mapping);
        }
        let pages = self.world.memory.pages();
        let mapping = match self.actor.kind {
            Kind::Process => self.world.inside(|machine, object, _| {
                let process = machine.create_process()?;
                let all = VpnRange::between(PROCESS_VIEW, PROCESS_VIEW + pages.get());
                let all = all.ok_or_else(|| Stop::new(Is::Range, "too large to be mapped"))?;
                machine.mmap(process, all, object, PageIndex::from(0), Vma::PLAIN)?;
                Ok((process, all))
            })?,
            _ => self.world.inside(|machine, object, process| {
                let all = PageRange::between(0, pages.get());
                let mut views = machine.views_of(object, all.ok_or_else(nobodys)?);
                let view = views.find(|(id, _)| *id == process);
                view.ok_or_else(|| Stop::new(Is::Failed, "there is no host view"))
            })?,
        };
        self.process = Some(mapping);
        Ok(mapping)
    }

    /// Where a byte is in the actor's mapping.
    fn process_at(&mut self, bytes: &Bytes) -> Acted<(Thread, Hva)> {
        let (process, all) = self.mapping()?;
        let offset = self.world.offset(bytes.place, bytes.at, self.actor.vm)?;
        Ok((Thread { process, index: 0 }, Hva::new(all.start().get() * PAGE_SIZE + offset)))
    }

    /// Where a page is in the actor's mapping.
    fn vpns(&mut self, place: Place) -> Acted<(ProcessId, VpnRange)> {
        let (process, all) = self.mapping()?;
        let range = self.run(place)?;
        let vpns = VpnRange::between(
            all.start().get() + range.start().get(),
            all.start().get() + range.end(),
        );
        let vpns = vpns.filter(|vpns| all.contains_range(*vpns));
        let beyond = || Stop::new(Is::Beyond, format!("pages {range} are beyond the memory"));
        Ok((process, vpns.ok_or_else(beyond)?))
    }

    fn pin(&mut self, place: Place, kind: polder::PinKind, name: &str) -> Acted {
        if self.pins.contains_key(name) {
            return Err(Stop::new(Is::Exists, format!("{} has a pin \"{name}\"", self.name)));
        }
        let range = self.run(place)?;
        let pin = self.world.memory.pin(range, kind, Holder::new(name.to_owned()))?;
        self.pins.insert(name.to_owned(), pin);
        Ok(Outcome::done())
    }

    fn refer(&mut self, place: Place, kind: polder::PinKind, name: &str) -> Acted {
        self.check_free(name)?;
        let (process, vpns) = self.vpns(place)?;
        let kind = match kind {
            polder::PinKind::Short => GupKind::Short,
            polder::PinKind::LongTerm => GupKind::LongTerm,
            polder::PinKind::Exclusive => GupKind::Exclusive,
        };
        let pin = self
            .world
            .inside(|machine, _, _| Ok(machine.pin_user_pages(process, vpns, true, kind)?))?;
        self.references.insert(name.to_owned(), pin);
        Ok(Outcome::done())
    }

    fn check_free(&self, name: &str) -> Acted<()> {
        match self.references.contains_key(name) {
            false => Ok(()),
            true => {
                Err(Stop::new(Is::Exists, format!("{} refers as \"{name}\" already", self.name)))
            }
        }
    }

    fn release(&mut self, name: &str) -> Acted {
        let pin = self.references.remove(name);
        let pin = pin.ok_or_else(|| {
            Stop::new(Is::NotPinned, format!("{} refers to nothing as \"{name}\"", self.name))
        })?;
        self.world.inside(|machine, _, _| Ok(machine.unpin(pin)?))?;
        Ok(Outcome::done())
    }

    fn gup_fast(&mut self, place: Place, name: &str) -> Acted {
        let (step, what) = match self.gups.remove(name) {
            Some(gup) => (gup, "it has looked again"),
            None => {
                self.check_free(name)?;
                let (process, vpns) = self.vpns(place)?;
                let gup = GupFast::new(process, vpns.start(), true, GupKind::Short);
                (gup, "it has read the entry")
            }
        };
        match self.world.inside(|machine, _, _| Ok(step.step(machine)?))? {
            GupStep::Again(gup) => {
                let again = what == "it has looked again";
                self.gups.insert(name.to_owned(), gup);
                let what = if again { "it has a reference, and will look again" } else { what };
                Ok(Outcome::new(Is::Ok, what))
            }
            GupStep::Pinned(pin) => {
                self.references.insert(name.to_owned(), pin);
                Ok(Outcome::new(Is::Ok, "the page is pinned"))
            }
            GupStep::Fallback => {
                Err(Stop::new(Is::NotPinned, "the entry is gone; nothing is held"))
            }
        }
    }

    fn pvalidate(&mut self, place: Place, size: RmpSize, validate: bool) -> Acted {
        let (world, vm) = (self.world, self.actor.vm);
        let gfns = self.gfns(place, vm)?;
        let pages = polder::units::Geometry::X86_64.pages(size.level()).get();
        let step = usize::try_from(pages).unwrap_or(usize::MAX);
        let mut changed = false;
        for gfn in gfns.frames().step_by(step) {
            changed |= match &*self.vcpu()? {
                Vcpu::Polder(vcpu) => vcpu.pvalidate(gfn, size.level(), validate)??,
                Vcpu::Bare(id) => {
                    let id = *id;
                    world.inside(|machine, _, _| {
                        Ok(machine.vcpu(id)?.pvalidate(gfn, size, validate)??)
                    })?
                }
                Vcpu::Kvm => return Err(Stop::new(Is::NotOffered, "this is no SNP guest")),
            };
        }
        Ok(Outcome::new(Is::Ok, if changed { "" } else { "nothing changed" }))
    }
}

fn nobodys() -> Stop {
    Stop::new(Is::NotOffered, "this VM is not known to Polder, or not to this host")
}

const fn side(visibility: Visibility) -> Side {
    match visibility {
        Visibility::Private => Side::Private,
        Visibility::Shared => Side::Shared,
    }
}

/// Up to 8 bytes as a word, zeros behind them.
fn to_word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}
