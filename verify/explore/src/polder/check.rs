//! The invariants, looked at after every step.
//!
//! What is right is worked out from the requests that were granted ([`super::Promised`]), never
//! from the engine's own notes.

use polder_explored_engine::{OpId, Refusal, Step};
use polder_machine::Discrepancy;
use polder_units::PageRange;

use super::guest::token;
use super::host::References;
use super::kept::{Pages, Reach, set};
use super::operation::pages_of;
use super::{Stage, World};
use crate::system::{System, Violation};

pub(super) fn broken(invariant: &'static str, what: impl Into<String>) -> Result<(), Violation> {
    Err(Violation::new(invariant, what))
}

/// The first of some pages, as text.
pub(super) fn first(pages: Pages) -> String {
    format!("page {}", pages.trailing_zeros())
}

impl World {
    /// Every invariant that can be told from a state.
    pub(super) fn check_state(&self) -> Result<(), Violation> {
        let (engine, reach, promised) = (&*self.engine, self.reach(), &self.promised);
        let private = promised.private;
        let out = promised.quarantine;
        // With one table for what is wished and what is granted, it says what a claim is about to
        // make true; nobody may take its word for it before the claim has ended.
        let claimed = if self.setup.one_table() { engine.held } else { 0 };
        let early = (engine.private ^ private) & !claimed;
        if early != 0 {
            let page = first(early);
            return broken("INV-4", format!("{page} changed sides, and no conversion has ended"));
        }
        if engine.owed != promised.owed {
            let page = first(engine.owed ^ promised.owed);
            return broken("INV-3", format!("{page} is owed, or not, and nobody said so"));
        }
        // A way back that has not ended has told nobody yet.
        let apart = (engine.quarantine ^ out) & !engine.held;
        if apart != 0 {
            let page = first(apart);
            return broken("INV-9", format!("{page} is in quarantine, or not, and has no reason"));
        }
        if engine.failed != 0 {
            let page = first(engine.failed);
            return broken("INV-3", format!("{page} has failed, and no source has said so"));
        }
        let host = reach.host & private;
        if host != 0 {
            return broken("INV-1", format!("{} is private, and the host reaches it", first(host)));
        }
        let pinned = reach.pinned & private;
        if pinned != 0 {
            return broken("INV-1", format!("{} is private, and pinned", first(pinned)));
        }
        let copied = self.copied_pages() & private;
        if copied != 0 {
            return broken("INV-1", format!("{} is private, and being copied", first(copied)));
        }
        let early = (reach.host | reach.guest) & promised.owed;
        if early != 0 {
            return broken("INV-3", format!("{} is mapped before it is whole", first(early)));
        }
        let seen = reach.host | reach.guest;
        if let Some(page) = (0..self.setup.pages).find(|&page| {
            self.setup.off_direct_map && seen & 1 << page != 0 && self.is_in_direct_map(page)
        }) {
            let what = format!("page {page} is mapped, and still in the kernel's direct map");
            return broken("INV-3", what);
        }
        let denied = reach.poisoned & !private & !out;
        if denied != 0 {
            return broken("INV-4", format!("{} is shared, and denied", first(denied)));
        }
        self.check_alone()?;
        self.check_rmp(&reach)?;
        self.check_pkvm(&reach)?;
        if engine.idle {
            return self.check_at_rest(private, out);
        }
        let actors = || 0..self.setup.actors.len();
        let died = |actor: usize| matches!(self.actors[actor].stage, Stage::Dead);
        // What the dead have left is undone by who meets it.
        if actors().all(|actor| self.is_done(actor)) && !actors().any(died) {
            return broken("INV-8", "everybody is done, and a claim was not given back");
        }
        Ok(())
    }

    pub(super) fn reach(&self) -> Reach {
        self.machine.reach(&self.parts, &self.setup)
    }

    /// What has to be so while nothing is in flight.
    fn check_at_rest(&self, private: Pages, out: Pages) -> Result<(), Violation> {
        // What a hypervisor has given the guest nobody takes from it.
        let kept = if self.setup.is_pkvm() { 0 } else { self.reach().guest };
        let reachable = (self.reach().host | kept) & out;
        if reachable != 0 {
            let page = first(reachable);
            return broken("INV-1", format!("{page} is in quarantine, and reachable"));
        }
        if self.setup.is_snp() {
            self.check_rmp_at_rest(&self.reach())?;
        }
        self.check_pkvm_at_rest(&self.reach(), out)?;
        let apart = (self.promised.hardware ^ private) & !out;
        if apart != 0 && !self.setup.is_snp() {
            let page = first(apart);
            return broken("INV-9", format!("hardware takes {page} for what it is not"));
        }
        self.check_folios(out)?;
        let Err(wrong) = self.machine.audit() else { return Ok(()) };
        let invariant = match wrong {
            Discrepancy::RmpLevel { .. } | Discrepancy::RmpAlignment { .. } => "INV-5",
            Discrepancy::Frames { .. } => "INV-6",
            Discrepancy::RmpOwner { .. } | Discrepancy::FreeAssigned { .. } => "INV-9",
            Discrepancy::Ownership { .. } | Discrepancy::StaleOwner { .. } => "INV-9",
            Discrepancy::NotExclusive { .. } => "INV-7",
            _ => "INV-2",
        };
        broken(invariant, format!("nothing is in flight, and {wrong}"))
    }

    /// Pages whose bytes somebody is copying by the library.
    fn copied_pages(&self) -> Pages {
        let actors = 0..self.setup.actors.len();
        let copies = |&actor: &usize| matches!(self.actors[actor].stage, Stage::Copy(Some(_)));
        let pages = actors.filter(copies).filter_map(|actor| self.task(actor));
        pages.fold(0, |all, task| all | set(pages_of(task)))
    }

    /// An access that was let through.
    pub(super) fn check_access(&self, who: &str, page: u8, host: bool) -> Result<(), Violation> {
        let bit = 1 << page;
        if host && self.promised.private & bit != 0 {
            return broken("INV-1", format!("page {page} is private, and {who} has reached it"));
        }
        if self.promised.owed & bit != 0 {
            return broken("INV-3", format!("page {page} is not whole, and {who} has reached it"));
        }
        Ok(())
    }

    /// Whether the kernel has a page in its direct map.
    fn is_in_direct_map(&self, page: u8) -> bool {
        let machine = &self.machine.machine;
        let backing = machine.backing(self.parts.object, u32::from(page).into());
        matches!(backing, Ok(Some(backing)) if machine.is_in_direct_map(backing.pfn))
    }

    /// Bytes that were read.
    pub(super) fn check_read(
        &self,
        who: &str,
        page: u8,
        word: u64,
        host: bool,
    ) -> Result<(), Violation> {
        self.check_access(who, page, host)?;
        if host {
            self.check_secret(who, page, word)?;
        }
        if self.promised.unknown & 1 << page != 0 {
            return Ok(());
        }
        let should = self.promised.values[usize::from(page)];
        if word == u64::from_le_bytes([should; 8]) {
            return Ok(());
        }
        let bytes = word.to_le_bytes();
        let whole = bytes.iter().all(|&byte| byte == bytes[0]);
        let invariant = match should {
            _ if !whole => "INV-3",
            0 => "INV-10",
            _ => "INV-2",
        };
        broken(invariant, format!("{who} reads {} from page {page}, not {should}", token(word)))
    }

    /// A touch of the host view that was denied.
    pub(super) fn check_denied(&self, page: u8) -> Result<(), Violation> {
        let may = self.promised.private | self.promised.quarantine;
        if may & 1 << page != 0 {
            return Ok(());
        }
        broken("INV-4", format!("page {page} is shared, and the host was denied it"))
    }

    /// A request that was refused.
    pub(super) fn check_refusal(&self, actor: usize, refusal: &Refusal) -> Result<(), Violation> {
        let Some(task) = self.task(actor) else { return Ok(()) };
        let (pages, promised) = (set(pages_of(task)), &self.promised);
        let right = match refusal {
            Refusal::Whole { .. } if pages & !promised.owed == 0 => {
                return broken("INV-3", "told that pages are whole which are not");
            }
            Refusal::Whole { .. } => true,
            Refusal::Pinned { .. } if self.device_keeps(task) => true,
            Refusal::Pinned { .. } => {
                // A neighbour's counts where its folio would have to be split. Who has counted, and
                // finds the page open, has it pinned.
                let pages = if self.setup.pooled { Pages::MAX } else { pages };
                self.pinned_for_long(pages) | self.counted(pages) != 0
            }
            Refusal::Private { .. } => pages & promised.private != 0,
            Refusal::Owed { .. } => pages & promised.owed != 0,
            Refusal::Quarantined { .. } => pages & promised.quarantine != 0,
            _ => false,
        };
        if right { Ok(()) } else { broken("INV-8", format!("refused without reason: {refusal}")) }
    }

    /// A conversion that was refused because of a reference: it must be somebody's.
    pub(super) fn check_referenced(&self, range: PageRange) -> Result<(), Violation> {
        match self.references(range) {
            References::Transient => {
                broken("INV-4", "a conversion failed because of a reference that nobody keeps")
            }
            References::None | References::Held => Ok(()),
        }
    }

    /// Pages that were discarded, or moved.
    pub(super) fn check_unpinned(&self, pages: Pages, what: &str) -> Result<(), Violation> {
        match self.pinned_for_long(pages) {
            0 => Ok(()),
            pinned => broken("INV-7", format!("{} is {what}, and pinned", first(pinned))),
        }
    }

    /// Notes that hardware is, or may be, told something by an operation, or memory is gone.
    pub(super) fn note(&mut self, op: OpId, step: Step) {
        if let Step::Protect(range, _) | Step::Free(range) = step
            && let Some(place) = self.journal.iter_mut().find(|place| place.is_none())
        {
            *place = Some((op, matches!(step, Step::Free(_)), set(range)));
        }
    }

    /// Forgets what an operation did, once it is over.
    pub(super) fn forget(&mut self, op: OpId) {
        let mut kept = [None; 6];
        let rest = self.journal.iter().flatten().filter(|(other, ..)| *other != op);
        kept.iter_mut().zip(rest).for_each(|(place, it)| *place = Some(*it));
        self.journal = kept;
    }

    /// Undoing goes last to first. What has failed on the way back is put in quarantine, and what
    /// has no way back: memory that is gone, or may be. Nothing else is.
    pub(super) fn check_undo(&mut self, op: OpId, step: Step) -> Result<(), Violation> {
        let (frees, range) = match step {
            Step::Protect(range, _) => (false, range),
            Step::Quarantine(range) if set(range) & !self.promised.quarantine != 0 => (true, range),
            _ => return Ok(()),
        };
        match self.last_done(op) {
            Some(at) if self.journal[at] == Some((op, frees, set(range))) => {
                if frees {
                    self.promised.quarantine |= set(range);
                }
                Ok(())
            }
            _ if frees => broken("INV-9", format!("to {step} is for what can be undone, or was")),
            _ => broken("INV-4", format!("to {step} undoes what was not done last")),
        }
    }
    /// Strikes out what a step has undone, now that the engine knows. Who dies before leaves the
    /// step to be taken once more.
    pub(super) fn undone(&mut self, op: OpId, step: Step) {
        let (frees, range) = match step {
            Step::Protect(range, _) => (false, range),
            Step::Quarantine(range) => (true, range),
            _ => return,
        };
        let last = self.last_done(op);
        if let Some(at) = last.filter(|&at| self.journal[at] == Some((op, frees, set(range)))) {
            self.journal[at..].rotate_left(1);
            self.journal[5] = None;
        }
    }

    fn last_done(&self, op: OpId) -> Option<usize> {
        self.journal.iter().rposition(|it| it.is_some_and(|(other, ..)| other == op))
    }
}
