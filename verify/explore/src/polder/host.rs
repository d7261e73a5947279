//! Touches of the host view, and the kernel's pins of it.

use polder_machine::{GupFast, GupStep, HostExit, PinKind, Sigbus};
use polder_units::{PageIndex, PageRange};

use super::act::{Act, Done};
use super::guest::token;
use super::operation::pages_of;
use super::{Came, Role, Slip, Stage, Task, World};
use crate::system::Violation;

impl World {
    pub(super) fn touch(&mut self, actor: usize, task: Task, page: u8) -> Result<(), Violation> {
        let role = self.role(actor);
        let Role::Thread(index) = role else { unreachable!("no thread: {role:?}") };
        let there = PageRange::one(PageIndex::from(u32::from(page)));
        if self.setup.slips(Slip::MissingOnly) && self.faults(role, page) && !self.has_hole(there) {
            // The page is in the page cache: a view that is watched for missing pages only has the
            // kernel map it, and nobody is told.
            self.act(Act::MapHost(there)).is_well();
        }
        if self.faults(role, page) {
            self.touched |= 1 << page;
            self.say(|| format!("touches page {page}, and is stopped"));
            self.go(actor, Stage::Waits);
            return Ok(());
        }
        let (thread, vpn) = (self.parts.thread(index), self.parts.vpn(page));
        let outcome = self.act(match task {
            Task::HostWrite(_, value) => Act::HostWrite(thread, vpn, value),
            _ => Act::HostRead(thread, vpn),
        });
        match (outcome, task) {
            (Done::Well, Task::HostWrite(_, value)) => {
                self.say(|| format!("writes {value} to page {page}"));
                self.check_access("the host", page, true)?;
                self.wrote(page, value);
            }
            (Done::Read(word), _) => {
                self.say(|| format!("reads page {page}: {}", token(word)));
                self.came(actor, Came::Read(word));
                self.check_read("the host", page, word, true)?;
            }
            (Done::HostExit(HostExit::Sigbus { why: Sigbus::Poisoned, .. }), _) => {
                self.say(|| format!("touches page {page}, and has a SIGBUS"));
                self.came(actor, Came::Is("denied"));
                self.check_denied(page)?;
            }
            (Done::HostExit(HostExit::Refused(refused)), _)
                if refused.check == polder_machine::AccessCheck::InUse =>
            {
                // It would only meet the same again.
                self.say(|| format!("touches page {page}, whose entry is in use"));
                return Ok(());
            }
            (Done::HostExit(HostExit::Refused(refused)), _) => {
                self.say(|| format!("touches page {page}, and is refused"));
                let what = format!("the host writes page {page}, which is shared: {refused}");
                return Err(Violation::new("INV-9", what));
            }
            (outcome, _) => unreachable!("a touch of a mapped page: {outcome:?}"),
        }
        self.done(actor);
        Ok(())
    }

    /// Gives memory to the pages of a range that have none.
    ///
    /// # Errors
    /// Where the RMP still has it for somebody: it was freed too early.
    pub(super) fn allocate(&mut self, range: PageRange) -> Result<(), Violation> {
        if self.has_hole(range)
            && let Done::Refused(refused) = self.act(Act::Allocate(range))
        {
            let what = format!("no memory for pages {range}, which was free: {refused}");
            return Err(Violation::new("INV-9", what));
        }
        Ok(())
    }

    /// Takes pages that are about to be seen off the kernel's direct map, where that is asked for.
    pub(super) fn take_off_direct_map(&mut self, range: PageRange) -> bool {
        let asked = self.setup.off_direct_map && !self.setup.slips(Slip::DirectMapLate);
        !asked || self.act(Act::TakeOffDirectMap(range)).is_well()
    }

    /// The same once they can be seen: a bug.
    pub(super) fn direct_map_late(&mut self, actor: usize) -> Result<(), Violation> {
        if let Some(task) = self.task(actor) {
            self.act(Act::TakeOffDirectMap(pages_of(task))).well();
        }
        self.say(|| "takes the pages off the direct map".into());
        self.done(actor);
        Ok(())
    }

    /// Whether a page of a range has no memory.
    pub(super) fn has_hole(&self, range: PageRange) -> bool {
        let backing = |page| self.machine.machine.backing(self.parts.object, page);
        range.frames().any(|page| matches!(backing(page), Ok(None)))
    }

    pub(super) fn begin_gup(&mut self, actor: usize, page: u8) -> Result<(), Violation> {
        let gup = GupFast::new(self.parts.process, self.parts.vpn(page), true, PinKind::LongTerm);
        self.gup(actor, gup)
    }

    pub(super) fn gup(&mut self, actor: usize, gup: GupFast) -> Result<(), Violation> {
        let Some(Task::Gup(page)) = self.task(actor) else { return Ok(()) };
        if matches!(self.actors[actor].stage, Stage::Idle) && self.is_unmapped(page) {
            self.say(|| "finds nothing".into());
            self.came(actor, Came::Is("not-pinned"));
            self.go(actor, Stage::GupSlow);
            return Ok(());
        }
        let first = matches!(self.actors[actor].stage, Stage::Idle);
        let stepped = if first {
            Done::Gup(gup.read(&self.machine.machine))
        } else {
            self.act(Act::Gup(gup))
        };
        let Done::Gup(stepped) = stepped else { unreachable!("nobody else releases its pin") };
        match stepped {
            GupStep::Again(gup) => {
                if !first {
                    self.say(|| format!("GUP-fast takes a reference of page {page}"));
                }
                self.go(actor, Stage::Gup(gup));
            }
            GupStep::Pinned(pin) => {
                self.say(|| format!("GUP-fast looks again: page {page} is pinned"));
                self.go(actor, Stage::GupHeld(pin));
            }
            GupStep::Fallback => {
                self.say(|| "GUP-fast gives up".into());
                self.came(actor, Came::Is("not-pinned"));
                self.go(actor, Stage::GupSlow);
            }
        }
        Ok(())
    }

    fn is_unmapped(&self, page: u8) -> bool {
        let pte = self.machine.machine.host_pte(self.parts.process, self.parts.vpn(page));
        !matches!(pte, Ok(polder_machine::HostPte::Mapped { .. }))
    }

    pub(super) fn gup_slow(&mut self, actor: usize) -> Result<(), Violation> {
        let (page, exclusive) = match self.task(actor) {
            Some(Task::Gup(page)) => (page, false),
            Some(Task::PinExclusive(page)) => (page, true),
            _ => return Ok(()),
        };
        if self.faults(self.role(actor), page) {
            self.touched |= 1 << page;
            self.say(|| format!("the slow path touches page {page}, and is stopped"));
            self.go(actor, Stage::GupWaits);
            return Ok(());
        }
        let vpn = self.parts.vpn(page);
        match self.act(if exclusive { Act::PinExclusive(vpn) } else { Act::Pin(vpn) }) {
            Done::HostExit(HostExit::Pinned { by, .. }) => {
                self.say(|| format!("the slow path finds page {page} pinned by {}", by.pin));
                self.done(actor);
            }
            Done::Pinned(pin) => {
                self.say(|| format!("the slow path pins page {page}"));
                self.go(actor, Stage::GupHeld(pin));
            }
            Done::HostExit(HostExit::Sigbus { .. }) => {
                self.say(|| format!("the slow path is refused page {page}"));
                self.came(actor, Came::Is("denied"));
                self.check_denied(page)?;
                self.done(actor);
            }
            other => unreachable!("a pin of a mapped page: {other:?}"),
        }
        Ok(())
    }

    pub(super) fn gup_release(
        &mut self,
        actor: usize,
        pin: polder_machine::PinId,
    ) -> Result<(), Violation> {
        self.act(Act::Unpin(pin)).well();
        self.say(|| "releases the pin".into());
        self.done(actor);
        Ok(())
    }

    /// What the kernel's references to pages are.
    pub(super) fn references(&self, range: PageRange) -> References {
        let machine = &self.machine.machine;
        let Ok(folios) = machine.folios(self.parts.object, range) else { return References::None };
        let mut found = References::None;
        for (_, backing) in folios {
            if self.locked(backing.pfn) {
                found = References::Transient;
            }
            let Ok(counts) = machine.counts(backing.pfn) else { continue };
            if counts.foreign() == 0 {
                continue;
            }
            if self.setup.overlooks_dma() && self.only_the_device(backing.pfn) {
                continue;
            }
            let pages = self.setup.geometry.pages(backing.level);
            let frames = polder_units::PfnRange::new(backing.pfn, pages).expect("a folio's frames");
            if machine.holders_of(frames).all(|holder| holder.speculative) {
                found = References::Transient;
            } else {
                return References::Held;
            }
        }
        found
    }
}

/// What references beyond page cache and page tables there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum References {
    None,
    /// GUP-fast's, before its second look; or a lock of the folio, whose owner may take one.
    Transient,
    Held,
}
