//! A guest's own accesses: faults, and having its pages ready before it touches them.

use std::sync::atomic::Ordering;

use polder_engine::{
    Answer, Engine, GuestAccess, GuestAnswer, MemoryFault, Refusal, Visibility, VmId,
};
use polder_units::{Gfn, GfnRange, PageCount, PageRange};

use super::{Driver, InTurn, Land, Landing};
use crate::host::{Faulted, Shown, Smashed, Translated};
use crate::prefault::{Came, Span};
use crate::{Error, OnBusy, Vcpu};

/// What becomes of a guest's access that was not let through.
pub(crate) enum GuestFault<'a> {
    /// The guest may try again. Nobody takes the page from it before this is dropped.
    Mapped(Land<'a>),
    /// The guest may try again, and may come back: nothing was mapped, or it was not waited for.
    Again,
    /// It is for the VMM to handle.
    Exit(MemoryFault),
}

impl GuestFault<'_> {
    /// The fault for the VMM, if it is one.
    pub(crate) fn exit(self) -> Option<MemoryFault> {
        match self {
            Self::Exit(fault) => Some(fault),
            Self::Mapped(_) | Self::Again => None,
        }
    }
}

impl Driver {
    /// Answers a guest's access that was not let through. Waits while an operation holds the page,
    /// unless told to stop.
    pub(crate) fn guest_fault(
        &self,
        vm: VmId,
        access: GuestAccess,
        faulted: Option<Faulted>,
        stop: impl Fn() -> bool,
    ) -> Result<GuestFault<'_>, Error> {
        self.counters.guest_fault();
        if !self.begun.swap(true, Ordering::Relaxed) {
            self.engine().launch();
        }
        let ask = |engine: &mut Engine| engine.guest_fault(vm, access);
        self.answer_guest(ask, stop, |range| self.host.map_guest(vm, access, faulted, range))
    }

    /// Asks until there is an answer, and carries it out under its claim. Carrying it out says
    /// whether the guest is better off by it.
    fn answer_guest(
        &self,
        ask: impl Fn(&mut Engine) -> GuestAnswer,
        stop: impl Fn() -> bool,
        carry_out: impl FnOnce(PageRange) -> Result<bool, Error>,
    ) -> Result<GuestFault<'_>, Error> {
        let mut turn = InTurn::new(self);
        let mut engine = self.engine();
        loop {
            match turn.ask(&mut engine, &ask) {
                GuestAnswer::Exit(fault) => return Ok(GuestFault::Exit(fault)),
                GuestAnswer::Now(answer) => {
                    drop(engine);
                    let range = answer.range();
                    let mut given =
                        Land { driver: self, landing: Some(Landing::Answer(answer, None)) };
                    let done = carry_out(range);
                    given.done(done.is_ok());
                    return Ok(if done? { GuestFault::Mapped(given) } else { GuestFault::Again });
                }
                GuestAnswer::Wait | GuestAnswer::Owed(_) if stop() => return Ok(GuestFault::Again),
                GuestAnswer::Wait => self.wait(&mut engine),
                GuestAnswer::Owed(page) => engine = self.wait_for_contents(engine, page),
                GuestAnswer::Undo(operation) => {
                    drop(engine);
                    self.undo(operation);
                    engine = self.engine();
                }
            }
        }
    }

    /// Has the first pages of a span and those like it ready for a guest's touches, `most` at most.
    /// With an error it says whether several were tried, some of which may be done. No slot may
    /// change meanwhile. Waits while an operation holds the first page, until the vCPU is kicked.
    pub(crate) fn prefault(
        &self,
        of: (VmId, Vcpu<'_>),
        span: Span,
        most: u64,
    ) -> Result<Came, (Error, bool)> {
        let none = |error| (error, false);
        match self.host.translate(of.1, span, most).map_err(none)? {
            Translated::At(gfns) => self.prefault_frames(of, span.start, gfns),
            Translated::Nowhere(pages) => Ok(Came { end: span.start + pages, skipped: pages }),
            Translated::Table(gfn) => match self.ready(of, gfn) {
                Ok(()) => Ok(Came { end: span.start, skipped: 0 }),
                // A table where no memory is maps nothing.
                Err(Error::Refused(Refusal::NoSlot { .. })) => {
                    Ok(Came { end: span.start + 1, skipped: 1 })
                }
                Err(error) => Err(none(error)),
            },
        }
    }

    /// The same for pages that are in these frames.
    fn prefault_frames(
        &self,
        (vm, vcpu): (VmId, Vcpu<'_>),
        page: u64,
        gfns: GfnRange,
    ) -> Result<Came, (Error, bool)> {
        let claimed = self.claim_frames((vm, vcpu), gfns);
        let (answer, run, visibility) = claimed.map_err(|error| (error, false))?;
        let range = answer.range();
        let mut given = Land { driver: self, landing: Some(Landing::Answer(answer, None)) };
        let shown = self.host.show(vm, vcpu, Shown { page, gfns: run, visibility }, range);
        given.done(shown.is_ok());
        drop(given);
        let several = run.count() > PageCount::ONE;
        // The machine fails of the first frame only.
        let tried = several && self.host.machine().is_none();
        let (mut end, skipped) = shown.map_err(|error| (error, tried))?;
        if let Some(shown) = GfnRange::between(run.start().get(), end) {
            end = self.host.shown(vm, vcpu, shown).map_err(|error| (error, several))?;
        }
        Ok(Came { end: page + (end - run.start().get()), skipped })
    }

    /// Has the page with a guest's table ready to be read.
    fn ready(&self, of: (VmId, Vcpu<'_>), gfn: Gfn) -> Result<(), Error> {
        let (answer, ..) = self.claim_frames(of, GfnRange::one(gfn))?;
        let range = answer.range();
        let mut given = Land { driver: self, landing: Some(Landing::Answer(answer, None)) };
        let ready = self.host.ready(range);
        given.done(ready.is_ok());
        ready
    }

    fn claim_frames(
        &self,
        (vm, vcpu): (VmId, Vcpu<'_>),
        gfns: GfnRange,
    ) -> Result<(Answer, GfnRange, Visibility), Error> {
        let claim = |engine: &mut Engine| engine.prefault(vm, gfns, gfns.count());
        let kicked = || matches!(vcpu, Vcpu::Machine(vcpu) if vcpu.is_kicked());
        self.claim_unless(kicked, OnBusy::Wait, claim)
    }

    /// Answers an access or PVALIDATE that the RMP refused for its size, as
    /// `sev_handle_rmp_fault()` (arch/x86/kvm/svm/sev.c) does. What is to be done is looked up: the
    /// fault says SIZEM for PVALIDATE and RMPADJUST only (AMD APM volume 2, 15.36.10). What was
    /// done is told by `smashed`.
    pub(crate) fn size_fault(
        &self,
        vm: VmId,
        gfn: Gfn,
        stop: impl Fn() -> bool,
        smashed: &mut Option<Smashed>,
    ) -> Result<GuestFault<'_>, Error> {
        let ask = |engine: &mut Engine| engine.size_fault(vm, gfn);
        self.answer_guest(ask, stop, |within| {
            let done = self.host.smash(vm, gfn, within)?;
            self.counters.smashed(done);
            *smashed = Some(done);
            Ok(done == Smashed::Done)
        })
    }
}
