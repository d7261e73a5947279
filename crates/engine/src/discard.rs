//! Discard (punch hole): the contents go, visibility stays.

use alloc::vec;
use alloc::vec::Vec;

use polder_units::PageRange;

use crate::Visibility::{Private, Shared};
use crate::operation::Program;
use crate::plant::Bug;
use crate::{Activity, Blocked, Engine, Operation, Population, Refusal, Stage, Step, View};

/// A discard in flight.
pub type Discard = Operation<Clearing>;

/// Waiting for answers and copies in flight; then unmapping and freeing.
#[derive(Debug)]
pub enum Clearing {}
/// All is done; [`Engine::finish_discard`] makes it true.
#[derive(Debug)]
pub enum Cleared {}

impl Stage for Clearing {
    type Next = Cleared;
    const INDEX: usize = 0;
}

impl Engine {
    /// Claims the pages for a discard.
    ///
    /// # Errors
    /// Refused beyond the object, for a page in quarantine, for one that is pinned or mapped for a
    /// device, and where only the guest gives pages away; busy where an operation holds a page.
    pub fn discard(&mut self, range: PageRange) -> Result<Discard, Blocked> {
        let begun = self.claim_for_discard(range);
        self.note_refused(Activity::Discard, &[range], &begun);
        begun
    }

    fn claim_for_discard(&mut self, range: PageRange) -> Result<Discard, Blocked> {
        self.check_bounds(range)?;
        if self.config.platform.guest_decides() {
            let (page, platform) = (range.start(), self.config.platform);
            return Err(Refusal::GuestDecides { page, platform }.into());
        }
        self.discard_for_guest(range)
    }

    /// The same because the guest itself asked, and whoever decides.
    ///
    /// # Errors
    /// As [`Engine::discard`], but for that.
    pub fn discard_for_guest(&mut self, range: PageRange) -> Result<Discard, Blocked> {
        self.check_bounds(range)?;
        self.check_quarantine(range)?;
        // What a view maps as a whole it unmaps as a whole.
        let whole = self.granules(range);
        self.check_turn(whole)?;
        self.check_pins(range)?;
        self.check_dma(range)?;
        let private = self.pages.runs(range).filter(|(_, facts)| facts.visibility == Private);
        let private: Vec<PageRange> = private.map(|(run, _)| run).collect();
        let guest =
            (!self.config.platform.hypervisor_keeps_stage2()).then_some(Step::UnmapGuest(whole));
        let unmap = [Step::UnmapHost(whole)].into_iter().chain(guest);
        // Memory that is freed while assigned can be given to nobody.
        let steps = unmap.chain(self.rmp_steps(&private, Shared));
        let program = Program::default().stage(steps.chain([Step::Free(range)]));
        Ok(self.begin(Activity::Discard, vec![whole], vec![range], program))
    }

    /// Makes the discard true. Nothing is owed for the pages any more: they are zeros.
    pub fn finish_discard(&mut self, discard: Operation<Cleared>) {
        let record = self.finish(&discard);
        for &part in &record.parts {
            if !self.plants.has(Bug::DiscardKeepsSource) {
                self.pages.set_population(part, Population::Whole);
            }
            self.failed.remove(part);
        }
        for view in [View::Host, View::Guest] {
            self.forget_markers(view, &record.claims);
        }
    }
}
