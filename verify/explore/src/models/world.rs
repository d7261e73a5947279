//! A model at work: a guest, a host thread, a pinner and a converter, on one huge page.

mod actors;

use std::hash::{Hash, Hasher};

use polder_machine::{
    Config, GupFast, HostPte, LockOwner, Machine, ObjectId, PinId, ProcessId, Resolved, Thread,
    VcpuId, View, VmId, Vpn, VpnRange,
};
use polder_units::{Geometry, Gfn, Level, PageCount, PageIndex, PageRange, PfnRange};

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
