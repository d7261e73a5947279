//! A model at work: a guest, a host thread, a pinner and a converter, on one huge page.

use std::hash::{Hash, Hasher};

use polder_machine::{
    Config, Exit, GupFast, GupStep, HostExit, HostPte, Hva, LockOwner, Machine, ObjectId, PinId,
    PinKind, ProcessId, Resolved, Side, Thread, VcpuId, View, VmId, Vpn, VpnRange,
};
use polder_units::{
    Geometry, Gfn, Gpa, Level, PAGE_SIZE, PageCount, PageIndex, PageRange, PfnRange,
};

use super::{Do, Fault, Model};
use crate::fold::Fold;
use crate::system::{Point, System, Violation};

/// Where the object is in the process: the second 1G page.
const VIEW: u32 = 4;
const CONVERTER: LockOwner = LockOwner(1);

const VCPU: usize = 0;
const THREAD: usize = 1;
const PINNER: usize = 2;
const CONVERTER_ACTOR: usize = 3;
const NAMES: [&str; 4] = ["vcpu", "thread", "pinner", "converter"];

/// What the guest, the thread and the host write.
const BY_GUEST: u8 = 1;
const BY_HOST: u8 = 2;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Stage {
    Idle,
    /// A step of a fault.
    Fault(u8),
    GuestMap(Resolved),
    Gup(GupFast),
    Pinned(PinId),
    Slow,
    /// A step of a conversion; of the one that it goes back from.
    Convert(u8),
    Back(u8),
}

#[derive(Clone, Copy, Hash)]
struct Actor {
    at: u8,
    stage: Stage,
}

/// A state of a model.
#[derive(Clone)]
pub struct ModelWorld {
    model: Model,
    /// The one invariant that is looked at.
    only: &'static str,
    machine: Machine,
    shared: ObjectId,
    /// The memory of what is private: the same, or another.
    private: ObjectId,
    process: ProcessId,
    vm: VmId,
    vcpu: VcpuId,
    actors: [Actor; 4],
    is_private: bool,
    denied: bool,
    /// Faults that hold the invalidate lock shared, and whether a conversion holds it.
    sharing: u8,
    locked: bool,
    /// Somebody was denied in a conversion that has not ended.
    turned_away: bool,
    value: u8,
    told: Option<String>,
}

fn page() -> PageIndex {
    PageIndex::from(0)
}

fn range() -> PageRange {
    PageRange::one(page())
}

fn gfn() -> Gfn {
    Gfn::from(0)
}

fn vpn() -> Vpn {
    Vpn::from(VIEW)
}

impl ModelWorld {
    /// The beginning; only `invariant` is looked at.
    ///
    /// # Panics
    /// If the machine is too small for it.
    pub fn new(model: &Model, invariant: &'static str) -> Self {
        Self::try_new(model, invariant).expect("a machine of sensible size")
    }

    fn try_new(model: &Model, only: &'static str) -> Result<Self, polder_machine::Error> {
        let geometry = Geometry::new(2, 2).ok_or(polder_machine::Error::Config)?;
        let mut machine = Machine::new(Config::symbolic(PageCount::from(8), geometry))?;
        let pages = PageCount::from(2);
        let shared = machine.create_object(pages)?;
        let private = if model.two_pools { machine.create_object(pages)? } else { shared };
        for object in [shared, private] {
            if machine.backing(object, page())?.is_none() {
                machine.allocate(object, page(), Level::Size2M)?;
            }
        }
        let process = machine.create_process()?;
        let at = VpnRange::new(vpn(), pages).map_err(|_| polder_machine::Error::Config)?;
        machine.mmap(process, at, shared, page(), View::HOST)?;
        let vm = machine.create_vm()?;
        let vcpu = machine.add_vcpu(vm)?;
        let first = if model.private_first { private } else { shared };
        machine.bind(vm, gfn(), first, range())?;
        Ok(Self {
            model: *model,
            only,
            machine,
            shared,
            private,
            process,
            vm,
            vcpu,
            actors: [Actor { at: 0, stage: Stage::Idle }; 4],
            is_private: model.private_first,
            denied: model.private_first,
            sharing: 0,
            locked: false,
            turned_away: false,
            value: 0,
            told: None,
        })
    }

    fn say(&mut self, line: impl Into<String>) {
        if let Some(told) = &mut self.told {
            *told = line.into();
        }
    }

    fn thread(&self) -> Thread {
        Thread { process: self.process, index: 0 }
    }

    fn tasks(&self, actor: usize) -> u8 {
        match actor {
            VCPU | THREAD => 2,
            PINNER => 1,
            _ => 3,
        }
    }

    /// Which conversion the converter is at: they alternate.
    fn converts_to_private(&self) -> bool {
        self.actors[CONVERTER_ACTOR].at.is_multiple_of(2) != self.model.private_first
    }

    fn steps(&self) -> (&'static [Do], &'static [Do]) {
        let model = &self.model;
        if self.converts_to_private() {
            (model.to_private, model.to_private_failed)
        } else {
            (model.to_shared, model.to_shared_failed)
        }
    }

    fn done(&mut self, actor: usize) {
        self.actors[actor].at += 1;
        self.actors[actor].stage = Stage::Idle;
    }

    fn guest(&mut self) -> Result<(), Violation> {
        let writes = self.actors[VCPU].at == 0;
        if let Stage::GuestMap(resolved) = self.actors[VCPU].stage {
            let level = Level::Size4K;
            let mapped = self.machine.tdp_map(&resolved, level, true).is_ok();
            self.say(if mapped { "has the page mapped" } else { "finds that it was invalidated" });
            self.actors[VCPU].stage = Stage::Idle;
            return Ok(());
        }
        let mut vcpu = self.machine.vcpu(self.vcpu).expect("it was added");
        let gpa = Gpa::new(0);
        let outcome = if writes {
            let word = u64::from_le_bytes([BY_GUEST; 8]);
            vcpu.write_u64(gpa, Side::Shared, word).map(|()| None)
        } else {
            vcpu.read_u64(gpa, Side::Shared).map(Some)
        };
        match outcome {
            Ok(None) => {
                self.value = BY_GUEST;
                self.say(format!("writes {BY_GUEST}"));
                self.done(VCPU);
                Ok(())
            }
            Ok(Some(word)) => {
                let [byte, ..] = word.to_le_bytes();
                self.say(format!("reads {byte}"));
                self.done(VCPU);
                self.check_read("the guest", byte)
            }
            Err(Exit::Fault(_)) => {
                self.say("is stopped, and its memory found");
                match self.machine.tdp_resolve(self.vm, gfn()) {
                    Ok(resolved) => self.actors[VCPU].stage = Stage::GuestMap(resolved),
                    Err(_) => self.done(VCPU),
                }
                Ok(())
            }
            Err(exit) => unreachable!("a plain guest: {exit}"),
        }
    }

    fn check_read(&self, who: &str, byte: u8) -> Result<(), Violation> {
        if byte == self.value {
            return Ok(());
        }
        let invariant = if self.value == 0 { "INV-10" } else { "INV-2" };
        Err(Violation::new(invariant, format!("{who} reads {byte}, not {}", self.value)))
    }

    fn touch(&mut self) -> Result<(), Violation> {
        let writes = self.actors[THREAD].at == 0;
        let (thread, hva) = (self.thread(), Hva::new(u64::from(VIEW) * PAGE_SIZE));
        let mut word = [0; 8];
        let outcome = if writes {
            self.machine.host_write(thread, hva, &[BY_HOST; 8])
        } else {
            self.machine.host_read(thread, hva, &mut word)
        };
        match outcome {
            Ok(()) => {
                self.done(THREAD);
                if writes {
                    self.say(format!("writes {BY_HOST}"));
                    if !self.model.two_pools || !self.is_private {
                        self.value = BY_HOST;
                    }
                    return Ok(());
                }
                self.say(format!("reads {}", word[0]));
                if self.model.two_pools && self.is_private {
                    return Ok(());
                }
                self.check_read("the host", word[0])
            }
            Err(HostExit::Fault(_)) => {
                self.say("is stopped");
                self.actors[THREAD].stage = Stage::Fault(0);
                Ok(())
            }
            Err(exit) => unreachable!("an unmapped page: {exit}"),
        }
    }

    /// A step of a fault of the thread, or of the pinner's slow path.
    fn fault(&mut self, actor: usize, at: u8) -> Result<(), Violation> {
        let by = LockOwner(u32::try_from(actor).unwrap_or(0) + 2);
        let pfn = self.machine.backing(self.shared, page()).ok().flatten().map(|it| it.pfn);
        let pfn = pfn.expect("it was allocated");
        let step = self.model.fault[usize::from(at)];
        match step {
            Fault::TakeLock => self.sharing += 1,
            Fault::DropLock => self.sharing -= 1,
            Fault::Look if self.denied => {
                self.say("looks, and has a SIGBUS");
                self.turned_away |= !self.is_private;
                if self.model.fault[..usize::from(at)].contains(&Fault::TakeLock) {
                    self.sharing -= 1;
                }
                // It may not have it.
                let _ = self.machine.unlock_folio(pfn, by);
                self.done(actor);
                return Ok(());
            }
            Fault::Look => {}
            Fault::LockFolio => self.machine.lock_folio(pfn, by).expect("it waited for it"),
            Fault::UnlockFolio => self.machine.unlock_folio(pfn, by).expect("it is its own"),
            Fault::Map => {
                // The lock is its own: it maps under it.
                let locked = self.machine.unlock_folio(pfn, by).is_ok();
                let _ = self.machine.host_map(self.process, vpn(), Level::Size4K);
                if locked {
                    self.machine.lock_folio(pfn, by).expect("it was its own");
                }
            }
        }
        self.say(format!("faults: {step:?}"));
        let over = usize::from(at) + 1 == self.model.fault.len();
        let pins = actor == PINNER;
        self.actors[actor].stage = match (over, pins) {
            (false, _) => Stage::Fault(at + 1),
            (true, true) => Stage::Slow,
            (true, false) => Stage::Idle,
        };
        Ok(())
    }

    fn pin(&mut self) -> Result<(), Violation> {
        let gup = match self.actors[PINNER].stage {
            Stage::Pinned(pin) => {
                self.machine.unpin(pin).expect("it holds the pin");
                self.say("releases the pin");
                self.done(PINNER);
                return Ok(());
            }
            Stage::Slow => {
                let pinned = self.machine.pin_user_pages(
                    self.process,
                    VpnRange::one(vpn()),
                    true,
                    PinKind::LongTerm,
                );
                self.actors[PINNER].stage = match pinned {
                    Ok(pin) => Stage::Pinned(pin),
                    Err(_) => Stage::Fault(0),
                };
                self.say(if pinned.is_ok() {
                    "the slow path pins"
                } else {
                    "the slow path faults"
                });
                return Ok(());
            }
            Stage::Gup(gup) => gup,
            _ => GupFast::new(self.process, vpn(), true, PinKind::LongTerm),
        };
        let stepped = gup.step(&mut self.machine).expect("nobody else releases its pin");
        let (stage, line) = match stepped {
            GupStep::Again(gup) => (Stage::Gup(gup), "GUP-fast goes a step on"),
            GupStep::Pinned(pin) => (Stage::Pinned(pin), "GUP-fast pins"),
            GupStep::Fallback => (Stage::Slow, "GUP-fast gives up"),
        };
        self.actors[PINNER].stage = stage;
        self.say(line);
        Ok(())
    }

    fn convert(&mut self, at: u8, back: bool) -> Result<(), Violation> {
        let (steps, failed) = self.steps();
        let steps = if back { failed } else { steps };
        let to_private = self.converts_to_private();
        if usize::from(at) == steps.len() {
            self.say(if back { "has failed" } else { "has converted" });
            let denied = std::mem::take(&mut self.turned_away);
            self.done(3);
            if back && to_private && denied {
                let what = "somebody was denied because of a conversion that failed";
                return Err(Violation::new("INV-4", what));
            }
            return Ok(());
        }
        let step = steps[usize::from(at)];
        self.say(format!("{step:?}"));
        let done = self.take_step(step)?;
        if !done {
            self.say(format!("{step:?}: fails"));
        }
        self.actors[3].stage = match (done, back) {
            (true, false) => Stage::Convert(at + 1),
            (_, true) => Stage::Back(at + 1),
            (false, false) => Stage::Back(0),
        };
        Ok(())
    }

    fn take_step(&mut self, step: Do) -> Result<bool, Violation> {
        let backing = self.machine.backing(self.shared, page()).ok().flatten();
        let pfn = backing.expect("it was allocated").pfn;
        match step {
            Do::TakeLock => self.locked = true,
            Do::DropLock => self.locked = false,
            Do::Deny => self.denied = true,
            Do::Allow => self.denied = false,
            Do::SetPrivate | Do::SetShared => self.set_private(step == Do::SetPrivate),
            Do::UnmapHost => {
                let object = self.shared;
                let zapped = self.machine.zap_object(object, range()).is_ok();
                assert!(zapped && self.machine.flush_object(object, range()).is_ok());
            }
            Do::ZapGuest => {
                let zapped = self.machine.tdp_zap(self.vm, polder_units::GfnRange::one(gfn()));
                assert!(zapped.is_ok(), "the VM is there");
            }
            Do::BeginZap => {
                let gfns = polder_units::GfnRange::one(gfn());
                let begun = self.machine.invalidate_begin(self.vm, gfns);
                let gone = self.machine.tdp_unmap(self.vm, gfns);
                let flushed = self.machine.flush_vm(self.vm, gfns);
                assert!(begun.is_ok() && gone.is_ok() && flushed.is_ok(), "the VM is there");
            }
            Do::EndZap => self.machine.invalidate_end(self.vm).expect("it was begun"),
            Do::LockFolio => self.machine.lock_folio(pfn, CONVERTER).expect("it waited for it"),
            Do::UnlockFolio => self.machine.unlock_folio(pfn, CONVERTER).expect("it is its own"),
            Do::CheckCounts => {
                let counts = self.machine.counts(pfn).expect("it was allocated");
                let frames = PfnRange::new(counts.pfn, self.machine.geometry().pages(counts.level));
                let frames = frames.expect("a folio's frames");
                let mut holders = self.machine.holders_of(frames);
                let transient = holders.next().is_some_and(|it| it.speculative)
                    && holders.all(|it| it.speculative);
                if counts.mapcount == 0 && counts.foreign() > 0 && transient {
                    let what = "a conversion fails because of a reference that nobody keeps";
                    if self.only == "INV-4" {
                        return Err(Violation::new("INV-4", what));
                    }
                }
                return Ok(counts.mapcount == 0 && counts.foreign() == 0);
            }
            Do::Split => {
                if self.machine.lock_folio(pfn, CONVERTER).is_err() {
                    return Ok(false);
                }
                let split = self.machine.split_folio(self.shared, page(), CONVERTER);
                assert!(self.machine.unlock_folio(pfn, CONVERTER).is_ok(), "it is its own");
                return Ok(matches!(split, Ok(_) | Err(polder_machine::Error::TooLarge { .. })));
            }
            Do::Merge => {
                let merged =
                    self.machine.merge_folios(self.shared, page(), Level::Size2M, CONVERTER);
                let _ = merged;
            }
        }
        Ok(true)
    }

    fn set_private(&mut self, private: bool) {
        self.is_private = private;
        if self.model.two_pools {
            // The other memory's bytes are not the page's any more: it is to be zeros.
            self.value = 0;
            let object = if private { self.private } else { self.shared };
            let gone = self.machine.unbind(self.vm, gfn());
            let there = self.machine.bind(self.vm, gfn(), object, range());
            assert!(gone.is_ok() && there.is_ok(), "the slot was there");
        }
    }

    /// What is broken, if it is what this search is about.
    fn if_asked(&self, outcome: Result<(), Violation>) -> Result<(), Violation> {
        outcome.or_else(|broken| if broken.invariant == self.only { Err(broken) } else { Ok(()) })
    }

    fn check_state(&self) -> Result<(), Violation> {
        // While a conversion is at it, what it has not finished does not count.
        let at_rest = self.actors[3].stage == Stage::Idle;
        if !at_rest || !self.is_private || self.model.two_pools {
            return Ok(());
        }
        let mapped =
            matches!(self.machine.host_pte(self.process, vpn()), Ok(HostPte::Mapped { .. }));
        if mapped || self.machine.remembered(self.thread(), vpn()).is_some() {
            return Err(Violation::new("INV-1", "the page is private, and the host reaches it"));
        }
        let backing = self.machine.backing(self.private, page()).ok().flatten();
        let pfn = backing.expect("it was allocated").pfn;
        if self.machine.holders_of(PfnRange::one(pfn)).any(|holder| !holder.speculative) {
            return Err(Violation::new("INV-1", "the page is private, and pinned"));
        }
        Ok(())
    }
}

impl System for ModelWorld {
    const WORKS: &'static [&'static str] = &["guest access", "host touch", "gup", "conversion"];
    const STAGES: &'static [&'static str] =
        &["", "fault", "map", "fast", "hold", "slow", "convert", "undo"];

    fn actors(&self) -> usize {
        self.actors.len()
    }

    fn ways(&self, actor: usize) -> u8 {
        let stage = self.actors[actor].stage;
        if self.is_done(actor) {
            return 0;
        }
        let waits = match stage {
            Stage::Fault(step) => match self.model.fault[usize::from(step)] {
                Fault::TakeLock => self.locked,
                Fault::LockFolio => self.is_locked(),
                _ => false,
            },
            Stage::Convert(step) => self.conversion_waits(step),
            Stage::Idle if actor == CONVERTER_ACTOR => self.conversion_waits(0),
            _ => false,
        };
        u8::from(!waits)
    }

    fn is_done(&self, actor: usize) -> bool {
        let Actor { at, stage } = self.actors[actor];
        stage == Stage::Idle && at >= self.tasks(actor)
    }

    fn take(&mut self, actor: usize, _: u8) -> Result<(), Violation> {
        let stage = self.actors[actor].stage;
        let outcome = match (actor, stage) {
            (_, Stage::Fault(at)) => self.fault(actor, at),
            (VCPU, _) => self.guest(),
            (THREAD, _) => self.touch(),
            (PINNER, _) => self.pin(),
            (_, Stage::Back(at)) => self.convert(at, true),
            (_, Stage::Convert(at)) => self.convert(at, false),
            _ => self.convert(0, false),
        };
        self.if_asked(outcome)
    }

    fn check(&self) -> Result<(), Violation> {
        self.if_asked(self.check_state())
    }

    fn fingerprint(&self) -> u64 {
        let mut hash = Fold::new();
        self.machine.hash(&mut hash);
        for Actor { at, stage } in &self.actors {
            (at, stage).hash(&mut hash);
            if let Stage::GuestMap(resolved) = stage {
                resolved.is_current(&self.machine).hash(&mut hash);
            }
        }
        (self.is_private, self.denied, self.sharing, self.locked).hash(&mut hash);
        (self.turned_away, self.value).hash(&mut hash);
        hash.finish()
    }

    fn point(&self, actor: usize) -> Point {
        let stage = match self.actors[actor].stage {
            Stage::Idle => 0,
            Stage::Fault(_) => 1,
            Stage::GuestMap(_) => 2,
            Stage::Gup(_) => 3,
            Stage::Pinned(_) => 4,
            Stage::Slow => 5,
            Stage::Convert(_) => 6,
            Stage::Back(_) => 7,
        };
        Point { work: u8::try_from(actor).unwrap_or(0), stage }
    }

    fn points(&self, actor: usize) -> Vec<Point> {
        let stages: &[u8] = match actor {
            VCPU => &[2],
            THREAD => &[1],
            PINNER => &[1, 3, 4, 5],
            _ => &[6, 7],
        };
        let work = u8::try_from(actor).unwrap_or(0);
        stages.iter().map(|&stage| Point { work, stage }).collect()
    }

    fn name(&self, actor: usize) -> String {
        NAMES[actor].to_owned()
    }

    fn tell(&mut self) {
        self.told = Some(String::new());
    }

    fn told(&mut self) -> String {
        self.told.clone().unwrap_or_default()
    }
}

impl ModelWorld {
    /// Whether a step of a conversion waits for a lock.
    fn conversion_waits(&self, step: u8) -> bool {
        match self.steps().0.get(usize::from(step)) {
            Some(Do::TakeLock) => self.locked || self.sharing > 0,
            Some(Do::LockFolio) => self.is_locked(),
            _ => false,
        }
    }

    fn is_locked(&self) -> bool {
        let backing = self.machine.backing(self.shared, page()).ok().flatten();
        backing.is_some_and(|it| {
            let owners = (0..8).map(LockOwner);
            owners.into_iter().any(|by| self.machine.locked_counts(it.pfn, by).is_ok())
        })
    }
}
