//! Merge: the 4K RMP entries of 2M pages that are private as a whole become large ones again.
//!
//! No conversion does it: a page that it has just assigned is not validated, and so does not agree
//! with neighbours that are. Once the guest has validated all, this merges them. The host looks
//! whether they agree, and takes a 2M page out of stage 2 only then.

use alloc::vec::Vec;

use polder_units::{Level, PageRange};

use crate::operation::Program;
use crate::{Activity, Blocked, Engine, Operation, Stage, Step, Visibility};

/// A merge in flight: waiting for answers in flight; then merging.
#[derive(Debug)]
pub enum Merging {}
/// All is done; [`Engine::finish_merge`] ends it.
#[derive(Debug)]
pub enum Merged {}

impl Stage for Merging {
    type Next = Merged;
    const INDEX: usize = 0;
}

impl Engine {
    /// Claims the [2M pages of a range that can be merged](Self::mergeable), to merge them.
    ///
    /// # Errors
    /// Refused beyond the object; busy where an operation holds such a page.
    pub fn merge(&mut self, range: PageRange) -> Result<Operation<Merging>, Blocked> {
        self.check_bounds(range)?;
        let pages = self.mergeable(range);
        for &page in &pages {
            self.check_turn(page)?;
        }
        let program = Program::default().stage(pages.iter().copied().map(Step::Merge));
        Ok(self.begin(Activity::Merge, pages.clone(), pages, program))
    }

    /// Ends a merge.
    pub fn finish_merge(&mut self, merge: Operation<Merged>) {
        self.finish(&merge);
    }

    /// The 2M pages in a range that are private as a whole and not in quarantine, where there is an
    /// RMP.
    pub fn mergeable(&self, range: PageRange) -> Vec<PageRange> {
        let geometry = self.config.geometry;
        let pages = geometry.pages(Level::Size2M).get();
        let first = range.start().get().next_multiple_of(pages);
        let end = if self.config.platform.has_rmp() { range.end() } else { 0 };
        let pages = (first..end).step_by(usize::try_from(pages).unwrap_or(usize::MAX));
        pages
            .filter_map(move |start| {
                PageRange::between(start, start + geometry.pages(Level::Size2M).get())
            })
            .filter(move |page| range.contains_range(*page))
            .filter(|page| {
                self.pages.runs(*page).all(|(_, facts)| facts.visibility == Visibility::Private)
                    && self.quarantine.first_in(*page).is_none()
            })
            .collect()
    }
}
