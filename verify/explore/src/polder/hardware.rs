//! The invariants of an SNP guest's memory: the RMP against what was promised.

use polder_explored_engine::Visibility;

use super::check::{broken, first};
use super::kept::{Pages, Reach, SECRETS};
use super::{Task, World};
use crate::system::Violation;

impl World {
    /// A token was written to a page.
    pub(super) fn wrote(&mut self, page: u8, token: u8) {
        self.promised.values[usize::from(page)] = token;
        self.promised.unknown &= !(1 << page);
    }

    /// What of the RMP has to be so in every state.
    pub(super) fn check_rmp(&self, reach: &Reach) -> Result<(), Violation> {
        if !self.setup.is_snp() {
            return Ok(());
        }
        let (private, out) = (self.promised.private, self.promised.quarantine);
        let exposed = (reach.host | reach.pinned) & reach.assigned & !out;
        if exposed != 0 {
            let page = first(exposed);
            return broken("INV-1", format!("{page} is the guest's, and the host reaches it"));
        }
        let apart = reach.guest & !out & (reach.assigned ^ private);
        if apart != 0 {
            let page = first(apart);
            return broken("INV-9", format!("the guest reaches {page}, and its entry is not so"));
        }
        let strange = reach.guest & private & !reach.given & !out;
        if strange != 0 {
            let page = first(strange);
            return broken("INV-9", format!("the guest reaches {page}, assigned to another"));
        }
        let lost = self.promised.accepted & !reach.validated & !self.engine.held & !out;
        if lost != 0 {
            return broken("INV-2", format!("{} is no longer validated", first(lost)));
        }
        Ok(())
    }

    /// What of it has to be so while nothing is in flight.
    pub(super) fn check_rmp_at_rest(&self, reach: &Reach) -> Result<(), Violation> {
        let Reach { assigned, given, .. } = *reach;
        let (private, out) = (self.promised.private, self.promised.quarantine);
        let kept = assigned & !private & !out;
        if kept != 0 {
            return broken("INV-9", format!("{} is shared, and assigned", first(kept)));
        }
        let strange = assigned & !given & !out;
        if strange != 0 {
            return broken("INV-9", format!("{} is assigned to another", first(strange)));
        }
        let lost = self.promised.given & private & !given & !out;
        if lost != 0 {
            return broken("INV-9", format!("{} is private, and not assigned", first(lost)));
        }
        Ok(())
    }

    /// Bytes of a private page that somebody else has read.
    pub(super) fn check_secret(&self, who: &str, page: u8, word: u64) -> Result<(), Violation> {
        let bytes = word.to_le_bytes();
        let keeps = self.setup.is_snp() || self.setup.is_pkvm();
        if keeps && bytes[0] >= SECRETS && bytes.iter().all(|it| *it == bytes[0]) {
            let what = format!("{who} reads {} from page {page}, written as private", bytes[0]);
            return broken("INV-1", what);
        }
        Ok(())
    }

    /// A conversion has ended: what the guest accepted, and what it may expect to read, has gone.
    pub(super) fn converted(&mut self, pages: Pages, to: Visibility) {
        if !self.setup.is_snp() {
            return;
        }
        // What another process has touched meanwhile is given when its guest touches it.
        let backed = if self.parts.other.is_none() { self.reach().backed } else { 0 };
        let promised = &mut self.promised;
        promised.unknown |= pages;
        promised.accepted &= !pages;
        match to {
            Visibility::Private => promised.given |= pages & backed,
            Visibility::Shared => promised.given &= !pages,
        }
    }

    /// An operation may have taken the pages from their guest, and given them back.
    pub(super) fn unaccept(&mut self, task: Task, pages: Pages) {
        if let Task::Convert { to: Visibility::Shared, .. } | Task::Discard { .. } = task {
            self.promised.accepted &= !pages;
        }
    }
}
