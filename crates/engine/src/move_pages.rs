//! Move: pages go to other memory (compaction, NUMA), and nobody notices but by the time it takes.
//!
//! ```text
//! move_pages -> Moving --unmap--> MoveUnmapped --check references--> MoveUnpinned --move--> Moved
//! ```
//! Everybody is cut off first, so that nobody sees a copy half made; faults wait for the claim, and
//! find the new place. What is pinned stays: a device goes by the frames that it has. Where a
//! hypervisor keeps the guest's stage 2, it alone can cut the guest off: it freezes, copies and
//! switches in the one step.
//!
//! A step that failed has moved some of its pages or none, each as a whole. There is nothing to
//! undo: where a page is, is told to nobody.

use alloc::vec;

use polder_units::PageRange;

use crate::operation::Program;
use crate::plant::Bug;
use crate::{Activity, Blocked, Engine, Operation, PageFacts, Refusal, Stage, Step, Visibility};

/// Waiting for answers and copies in flight; then unmapping everywhere.
#[derive(Debug)]
pub enum Moving {}
/// Nobody can reach the pages; looking for references.
#[derive(Debug)]
pub enum MoveUnmapped {}
/// Nobody refers to the pages; moving them.
#[derive(Debug)]
pub enum MoveUnpinned {}
/// They are where they were to go; [`Engine::finish_move`] lets everybody on.
#[derive(Debug)]
pub enum Moved {}

impl Stage for Moving {
    type Next = MoveUnmapped;
    const INDEX: usize = 0;
}
impl Stage for MoveUnmapped {
    type Next = MoveUnpinned;
    const INDEX: usize = 1;
}
impl Stage for MoveUnpinned {
    type Next = Moved;
    const INDEX: usize = 2;
}

impl Engine {
    /// Claims the pages for a move.
    ///
    /// # Errors
    /// Refused beyond the object, for a page in quarantine, for a pinned page or one that a device
    /// has mapped, and for a private page that neither host nor hypervisor can move; busy where an
    /// operation holds a page.
    pub fn move_pages(&mut self, range: PageRange) -> Result<Operation<Moving>, Blocked> {
        self.check_bounds(range)?;
        self.check_quarantine(range)?;
        self.check_turn(range)?;
        self.check_pins(range)?;
        self.check_dma(range)?;
        let platform = self.config.platform;
        let private = |facts: PageFacts| facts.visibility == Visibility::Private;
        if !platform.moves_private()
            && let Some(page) = self.first_page(range, private)
        {
            return Err(Refusal::Unmovable { page, platform }.into());
        }
        let guest = (!platform.hypervisor_keeps_stage2()).then_some(Step::UnmapGuest(range));
        let unmap = [Step::UnmapHost(range)].into_iter().chain(guest);
        let unmap = unmap.filter(|_| !self.plants.has(Bug::MovedMapped));
        let program = Program::default()
            .stage(unmap)
            .stage([Step::CheckReferences(range)].into_iter())
            .stage([Step::Move(range)].into_iter());
        Ok(self.begin(Activity::Move, vec![range], vec![range], program))
    }

    /// Ends a move.
    pub fn finish_move(&mut self, moved: Operation<Moved>) {
        let record = self.finish(&moved);
        // The host view was emptied, its markers too: the next touch is answered anew.
        self.forget_markers(crate::View::Host, &record.parts);
    }
}
