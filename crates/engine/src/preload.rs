//! Preload: bytes go onto private pages that the guest has not begun with (thread 3: "pre-load data
//! onto guest-private pages").
//!
//! ```text
//! preload -> Preparing --publish--> Filling --write, launch--> Preloaded
//! ```
//! By the claim of a population, so that whoever touches the pages meanwhile waits and sees them
//! whole. Once the guest has begun nobody but the guest puts anything there. How hardware takes the
//! pages: pKVM's hypervisor is donated them with what is in them, at the guest's first touch; an
//! SNP guest's are encrypted in place and validated by the firmware, here.
//!
//! A preload that fails leaves zeros: what was there before is gone, and what was half written too.

use alloc::vec;

use polder_units::PageRange;

use crate::operation::Program;
use crate::{
    Activity, Blocked, Engine, Operation, PageFacts, Population, Refusal, Stage, Step, Visibility,
};

/// Waiting for what is in flight; then making the pages ready.
#[derive(Debug)]
pub enum Preparing {}
/// The bytes are being written through the trusted view; then hardware takes the pages.
#[derive(Debug)]
pub enum Filling {}
/// All is done; [`Engine::finish_preload`] lets everybody on.
#[derive(Debug)]
pub enum Preloaded {}

impl Stage for Preparing {
    type Next = Filling;
    const INDEX: usize = 0;
}
impl Stage for Filling {
    type Next = Preloaded;
    const INDEX: usize = 1;
}

impl Engine {
    /// Claims private pages, to put bytes onto them.
    ///
    /// # Errors
    /// Refused beyond the object, for a page in quarantine, for a shared page, for one that is owed
    /// (populate it), and once the guest has begun; busy where an operation holds a page.
    pub fn preload(&mut self, range: PageRange) -> Result<Operation<Preparing>, Blocked> {
        self.check_bounds(range)?;
        self.check_quarantine(range)?;
        self.check_turn(range)?;
        let shared = |facts: PageFacts| facts.visibility == Visibility::Shared;
        if let Some(page) = self.first_page(range, shared) {
            return Err(Refusal::NotPrivate { page }.into());
        }
        if self.launched {
            return Err(Refusal::Launched { page: range.start() }.into());
        }
        let owed = |facts: PageFacts| facts.population == Population::Owed;
        if let Some(page) = self.first_page(range, owed) {
            return Err(Refusal::Owed { page }.into());
        }
        let launch = self.config.platform.has_rmp().then_some(Step::Launch(range));
        let program =
            Program::default().stage([Step::Publish(range)].into_iter()).stage(launch.into_iter());
        Ok(self.begin(Activity::Population, vec![range], vec![range], program))
    }

    /// Ends a preload.
    pub fn finish_preload(&mut self, preload: Operation<Preloaded>) {
        self.finish(&preload);
    }

    /// Says that the guest begins, or has begun (`SNP_LAUNCH_FINISH`): nobody but the guest puts
    /// anything onto its private pages any more.
    pub fn launch(&mut self) {
        self.launched = true;
    }

    /// Whether the guest has begun.
    pub fn is_launched(&self) -> bool {
        self.launched
    }
}
