//! An access of a vCPU: made, refused, answered, and made again.

use std::time::Duration;

use polder_engine::{GuestAccess, Visibility};
use polder_machine::{AccessCheck, Exit, GuestFault, Machine, PageFault, Refused, Side, VcpuId};
use polder_units::{Gfn, GfnRange, Gpa};

use super::{GuestExit, MachineVcpu};
use crate::Error;
use crate::driver::{GuestFault as Fault, Land};
use crate::host::Smashed;
use crate::watch::Moment;

/// How often in a row the RMP may refuse an access after an answer that changed nothing: what is
/// answered rightly passes after two or three, and what never passes is no reason to hang. Waiting
/// for who has the entry in use does not count, however long it takes.
const REFUSALS: u32 = 1000;

/// How often somebody else's work on an entry is waited for by turns, before it is by pauses.
const TURNS: u32 = 100;
const PAUSE: Duration = Duration::from_millis(1);

impl MachineVcpu {
    /// Makes an access until it passes, or ends in an exit.
    pub(super) fn access(
        &self,
        (gfns, visibility): (GfnRange, Visibility),
        mut access: impl FnMut(&mut Machine, VcpuId, Side) -> Result<(), Stop>,
    ) -> Result<(), GuestExit> {
        let host = self.host();
        let side = match visibility {
            Visibility::Private => Side::Private,
            Visibility::Shared => Side::Shared,
        };
        let (mut refusals, mut turns) = (0, 0);
        // What was mapped for it stays until it is made: no operation comes between, however many
        // come.
        let mut mapped = None;
        loop {
            let exit = {
                let mut machine = host.lock();
                let exit = access(&mut machine, self.id, side);
                exit.map_err(|stop| self.told(stop, &machine, gfns))
            };
            drop(mapped.take());
            match exit {
                Ok(()) => return Ok(()),
                Err(Told::Fault(fault)) => {
                    let gfn = fault.gfn;
                    if host.exits_at(self.id.vm, gfn) {
                        return Err(GuestExit::Userfault(gfn));
                    }
                    mapped = self.answer(gfn, Some(fault), visibility)?;
                    if mapped.is_none() {
                        // Somebody else has its entry in use, or its folio locked.
                        self.pause(&mut turns);
                    }
                }
                Err(Told::Refused(refused, gfn)) => match self.refused(gfn, visibility, refused)? {
                    Answered::Changed => refusals = 0,
                    Answered::InUse => {
                        refusals = 0;
                        self.pause(&mut turns);
                    }
                    Answered::Same(by) if refusals < REFUSALS => {
                        mapped = by;
                        refusals += 1;
                    }
                    Answered::Same(_) => {
                        let refused = polder_machine::Error::Refused(refused);
                        return Err(GuestExit::Failed(Error::Machine(refused)));
                    }
                },
                Err(Told::PageFault(fault)) => return Err(GuestExit::PageFault(fault)),
                Err(Told::Machine(error)) => return Err(GuestExit::Failed(Error::Machine(error))),
            }
        }
    }

    /// Leaves the processor to whoever is at work on an entry. It is told once that takes long.
    fn pause(&self, turns: &mut u32) {
        if *turns < TURNS {
            *turns += 1;
            crate::sync::yield_now();
        } else {
            self.driver.tell(Moment::Waits);
            crate::sync::sleep(PAUSE);
        }
    }

    /// What the exit tells the hypervisor: the guest frame is looked up while the access holds the
    /// machine, for it may show another page as soon as that is let go.
    fn told(&self, stop: Stop, machine: &Machine, gfns: GfnRange) -> Told {
        match stop {
            Stop::Exit(Exit::Fault(fault)) => Told::Fault(fault),
            Stop::Exit(Exit::PageFault(fault)) => Told::PageFault(fault),
            Stop::Exit(Exit::Refused(refused)) => {
                let shows = |gfn: &Gfn| {
                    let spte = machine.spte(self.id.vm, *gfn);
                    matches!(spte, Ok(Some(spte)) if spte.pfn == refused.pfn)
                };
                let gfn = gfns.frames().find(shows);
                Told::Refused(refused, gfn.expect("stage 2 led the access to the frame"))
            }
            Stop::Exit(other) => unreachable!("an access does not end in: {other}"),
            Stop::Machine(error) => Told::Machine(error),
        }
    }

    /// Has a stage-2 fault answered. What was mapped for it is its own until what is returned is
    /// dropped.
    pub(super) fn answer(
        &self,
        gfn: Gfn,
        fault: Option<GuestFault>,
        visibility: Visibility,
    ) -> Result<Option<Land<'_>>, GuestExit> {
        let kicked = || self.is_kicked();
        let access = GuestAccess { gfn, visibility };
        let faulted = fault.map(|fault| (self.id, fault));
        self.go_on(self.driver.guest_fault(self.vm, access, faulted, kicked))
    }

    /// Has an access answered that the RMP refused (AMD APM volume 2, table 15-39).
    fn refused(
        &self,
        gfn: Gfn,
        visibility: Visibility,
        refused: Refused,
    ) -> Result<Answered<'_>, GuestExit> {
        match refused.check {
            AccessCheck::Validated => Err(GuestExit::NotValidated(gfn)),
            AccessCheck::PageSize | AccessCheck::InstructionSize => {
                let mut smashed = None;
                let kicked = || self.is_kicked();
                let fault = self.driver.size_fault(self.vm, gfn, kicked, &mut smashed);
                drop(self.go_on(fault)?);
                Ok(match smashed {
                    Some(Smashed::Done | Smashed::Raced) => Answered::Changed,
                    Some(Smashed::Busy) => Answered::InUse,
                    Some(Smashed::Spurious) | None => Answered::Same(None),
                })
            }
            // Another processor is at work on the entry: soon it is not.
            AccessCheck::InUse if self.is_kicked() => Err(GuestExit::Kicked),
            AccessCheck::InUse => Ok(Answered::InUse),
            // Of the other kind than granted, or not assigned as it is bound now.
            _ => self.answer(gfn, None, visibility).map(Answered::Same),
        }
    }

    fn go_on<'a>(&self, answered: Result<Fault<'a>, Error>) -> Result<Option<Land<'a>>, GuestExit> {
        match answered {
            Ok(Fault::Exit(fault)) => Err(GuestExit::MemoryFault(fault)),
            Ok(_) if self.is_kicked() => Err(GuestExit::Kicked),
            Ok(Fault::Mapped(held)) => Ok(Some(held)),
            Ok(Fault::Again) => Ok(None),
            Err(error) => Err(GuestExit::Failed(error)),
        }
    }
}

/// The guest frames of an access.
pub(super) fn gfns(gpa: Gpa, len: usize) -> GfnRange {
    let last = gpa.checked_add(len.saturating_sub(1) as u64).unwrap_or(gpa);
    GfnRange::between(gpa.gfn().get(), last.gfn().get() + 1).unwrap_or(GfnRange::one(gpa.gfn()))
}

/// What was done about an access that the RMP refused.
enum Answered<'a> {
    /// The entry is another one than the access met.
    Changed,
    /// Nothing could be done: somebody else has the entry in use.
    InUse,
    /// Nothing had to be done to the entry, by all that is known; but perhaps the page was mapped.
    Same(Option<Land<'a>>),
}

/// What an access stops with, as far as the hypervisor is told.
enum Told {
    Fault(GuestFault),
    PageFault(PageFault),
    Refused(Refused, Gfn),
    Machine(polder_machine::Error),
}

/// What an access of the machine's stops with.
#[derive(Debug)]
pub(super) enum Stop {
    Exit(Exit),
    Machine(polder_machine::Error),
}

impl From<Exit> for Stop {
    fn from(exit: Exit) -> Self {
        Self::Exit(exit)
    }
}

impl From<polder_machine::Error> for Stop {
    fn from(error: polder_machine::Error) -> Self {
        Self::Machine(error)
    }
}
