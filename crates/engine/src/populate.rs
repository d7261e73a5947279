//! Population: contents arrive on pages that are owed.
//!
//! The bytes are written under the claim, then published, then shown: whoever faults on the pages
//! from the claim on waits, by whichever view he comes, and sees them whole (thread 4: "I don't
//! see what protects a thread fault concurrently during write() happening, seeing partial data").

use alloc::vec;

use polder_units::PageRange;

use crate::operation::Program;
use crate::{Activity, Blocked, Engine, Operation, PageFacts, Population, Refusal, Stage, Step};

/// The pages are claimed, and their bytes are being written through the trusted view.
#[derive(Debug)]
pub enum Writing {}
/// The pages are published, and whoever waits for them is let go on.
#[derive(Debug)]
pub enum Publishing {}
/// All is done; [`Engine::finish_population`] makes it true.
#[derive(Debug)]
pub enum Populated {}

impl Stage for Writing {
    type Next = Publishing;
    const INDEX: usize = 0;
}

impl Stage for Publishing {
    type Next = Populated;
    const INDEX: usize = 1;
}

impl Engine {
    /// Claims the pages for a population; the caller then writes their bytes.
    ///
    /// # Errors
    /// Refused beyond the object, for a page in quarantine, and for one that is whole
    /// (`EEXIST`); busy where an operation holds a page.
    pub fn populate(&mut self, range: PageRange) -> Result<Operation<Writing>, Blocked> {
        self.check_bounds(range)?;
        self.check_quarantine(range)?;
        self.check_claims(range)?;
        let whole = |facts: PageFacts| facts.population == Population::Whole;
        if let Some(page) = self.first_page(range, whole) {
            return Err(Refusal::Whole { page }.into());
        }
        let program = Program::default()
            .stage([Step::Publish(range)].into_iter())
            .stage([Step::Continue(range)].into_iter());
        Ok(self.begin(Activity::Population, vec![range], vec![range], program))
    }

    /// Makes the population true.
    pub fn finish_population(&mut self, population: Operation<Populated>) {
        for part in self.finish(&population).parts {
            self.pages.set_population(part, Population::Whole);
        }
    }

    /// Says that nothing more will come: what is still owed is zeros.
    ///
    /// # Errors
    /// Busy while an operation runs.
    pub fn settle(&mut self) -> Result<(), Blocked> {
        let all = PageRange::between(0, self.config.pages.get()).expect("an object has pages");
        self.check_claims(all)?;
        self.pages.set_population(all, Population::Whole);
        Ok(())
    }
}
