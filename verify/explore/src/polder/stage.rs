//! In the middle of what an actor is.

use std::hash::{Hash, Hasher};

use polder_explored_engine::{Answer, InFlight, OpId, PinId, Response, Step, Waiting};
use polder_machine::{GupFast, Resolved, RmpSize};
use polder_units::{Level, Pfn};

use super::kept::OTHER;
use super::{Role, State, World};
use crate::fold::Fold;

/// An answer, and what was done of it.
pub(super) type Given = (Answer, Option<Response>);

/// In the middle of what an actor is.
#[derive(Clone, Copy)]
pub(super) enum Stage {
    /// Before the next task.
    Idle,
    /// Its thread has died.
    Dead,

    /// A guest's fault was taken.
    GuestAsk,
    GuestAllocate(Answer, Level),
    GuestResolve(Answer, Level),
    /// With whether nothing was invalidated since.
    GuestMap(Answer, Level, Resolved, bool),
    /// With whether the page was mapped.
    GuestGive(Answer, bool),

    /// An SNP guest's page is about to be mapped, and assigned before.
    Give(Answer, Level),
    /// A page is about to be donated to a protected guest.
    Donate(Answer),

    /// The RMP refused an access for its size.
    SizeAsk,
    /// Its entry is looked up.
    SizeLook(Answer),
    /// It was found to be large, from this frame on.
    SizeSmash(Answer, Pfn),
    /// Its 2M page is taken out of stage 2.
    SizeZap(Answer),
    SizeGive(Answer),

    /// A touch of the host view waits to be answered.
    Waits,

    /// The fault thread carries out answers from the first that has not been.
    CarryOut([Option<Given>; 2], u8, Option<OpId>),
    GiveBack([Option<Given>; 2], Option<OpId>),
    /// It carries an answer out that it has given back: a bug.
    CarryOutLate(Answer),

    Drain(OpId),
    /// The bytes of a population, in two pieces.
    Write(OpId, u8),
    /// The same after the pages were shown: a bug.
    WriteLate(u8),
    /// The pages, which were shown, are about to be taken off the direct map: a bug.
    DirectMapLate,
    /// A step of an operation's stage, in its part.
    Take(OpId, u8, Step, u8),
    Taken(OpId, u8),
    /// An operation of somebody who died is undone, or one's own: a step, in its part.
    TakeBack(OpId, Step, u8, bool),
    /// Whether that was done; whether the operation was one's own.
    TakenBack(OpId, bool, bool),
    /// The answer that a population ends with.
    Show(Answer),

    Copy(Option<InFlight>),
    Copied(Option<InFlight>),
    Held(PinId),
    /// A pin was counted without the lock, and nobody has looked yet.
    Counted(PinId),
    /// Somebody has looked, and counts afterwards: a bug.
    Looked,
    /// He who could not pin without the lock asks the engine.
    AskPin,
    /// A page is closed for an exclusive pin.
    Alone(Waiting),

    Gup(GupFast),
    GupSlow,
    GupWaits,
    GupHeld(polder_machine::PinId),

    /// The slot has gone from the engine, and not from the host.
    Unbinding,
    Unbound,
    /// The slot is back in the engine, and not in the host.
    Binding,

    /// The kernel has a folio locked, at this frame.
    FolioLocked(Pfn),
    /// Stage 2 does not have it, and may not get it.
    FolioZapped(Pfn),
    /// It is what it was to become; whether stage 2 may get it again.
    FolioDone(Pfn, bool),
    /// Another CPU has the RMP entry of a frame in use.
    Holding(Pfn, RmpSize),
}

impl World {
    /// The hash of what an actor is at, and of the CPU that it runs on.
    pub(super) fn hash_of(&self, actor: usize) -> u64 {
        let mut hash = Fold::new();
        let state = &mut hash;
        let State { at, refusals, stage } = self.actors[actor];
        (at, refusals).hash(state);
        std::mem::discriminant(&stage).hash(state);
        let engine = &self.engine.engine;
        let place = |op: OpId| engine.place_of(op);
        let answer = |answer: Answer| {
            (engine.place_in_flight(answer.in_flight()), answer.view(), answer.response())
        };
        match stage {
            Stage::Idle | Stage::Dead | Stage::GuestAsk | Stage::Waits | Stage::GupSlow => {}
            Stage::GupWaits | Stage::Unbinding | Stage::Unbound | Stage::Binding => {}
            Stage::SizeAsk | Stage::Looked | Stage::AskPin | Stage::DirectMapLate => {}
            Stage::GuestAllocate(it, level)
            | Stage::GuestResolve(it, level)
            | Stage::Give(it, level) => {
                (answer(it), level).hash(state);
            }
            Stage::GuestMap(it, level, resolved, current) => {
                (answer(it), level, resolved, current).hash(state);
            }
            Stage::GuestGive(it, mapped) => (answer(it), mapped).hash(state),
            Stage::Donate(it) => answer(it).hash(state),
            Stage::SizeLook(it) | Stage::SizeZap(it) | Stage::SizeGive(it) => {
                answer(it).hash(state);
            }
            Stage::SizeSmash(it, head) => (answer(it), head).hash(state),
            Stage::FolioLocked(pfn) | Stage::FolioZapped(pfn) => pfn.hash(state),
            Stage::FolioDone(pfn, zapped) => (pfn, zapped).hash(state),
            Stage::Holding(pfn, size) => (pfn, size).hash(state),
            Stage::CarryOut(given, at, undo) => {
                let given = given.map(|given| given.map(|(it, done)| (answer(it), done)));
                (given, at, undo.map(place)).hash(state);
            }
            Stage::GiveBack(given, undo) => {
                let given = given.map(|given| given.map(|(it, done)| (answer(it), done)));
                (given, undo.map(place)).hash(state);
            }
            Stage::CarryOutLate(it) => (it.range(), it.response()).hash(state),
            Stage::Drain(op) => place(op).hash(state),
            Stage::Write(op, half) => (place(op), half).hash(state),
            Stage::WriteLate(half) => half.hash(state),
            Stage::Take(op, stage, step, part) => (place(op), stage, step, part).hash(state),
            Stage::Taken(op, stage) => (place(op), stage).hash(state),
            Stage::TakeBack(op, step, part, own) => (place(op), step, part, own).hash(state),
            Stage::TakenBack(op, done, own) => (place(op), done, own).hash(state),
            Stage::Show(it) => answer(it).hash(state),
            Stage::Copy(it) | Stage::Copied(it) => {
                it.map(|it| engine.place_in_flight(it)).hash(state);
            }
            Stage::Held(pin) | Stage::Counted(pin) => engine.place_of_pin(pin).hash(state),
            Stage::Alone(waiting) => engine.place_of_wait(waiting).hash(state),
            Stage::Gup(gup) => gup.hash(state),
            Stage::GupHeld(pin) => pin.hash(state),
        }
        match self.role(actor) {
            Role::Vcpu(cpu) => self.machine.vcpu_hashes[usize::from(cpu)].hash(state),
            Role::Thread(cpu) => self.machine.thread_hashes[usize::from(cpu)].hash(state),
            Role::Process => self.machine.thread_hashes[OTHER].hash(state),
            Role::Faults | Role::Caller | Role::Pinner | Role::Kernel | Role::OtherCpu => {}
            Role::Device => {}
        }
        hash.finish()
    }
}
