//! Population: contents arrive on pages that are owed.
//!
//! The bytes are written under the claim, then published, then shown: whoever faults on the pages
//! from the claim on waits, by whichever view he comes, and sees them whole (thread 4: "I don't
//! see what protects a thread fault concurrently during write() happening, seeing partial data").

use alloc::vec;
use alloc::vec::Vec;

use polder_units::{Level, PageIndex, PageRange};

use crate::operation::Program;
use crate::plant::Bug;
use crate::{
    Activity, Answer, Blocked, Engine, Operation, PageFacts, Population, RangeSet, Refusal,
    Response, Stage, Step, View, Visibility,
};

/// The pages are claimed, and their bytes are being written through the trusted view.
#[derive(Debug)]
pub enum Writing {}
/// The pages are published; [`Engine::finish_population`] shows them.
#[derive(Debug)]
pub enum Published {}

impl Stage for Writing {
    type Next = Published;
    const INDEX: usize = 0;
}

impl Engine {
    /// Claims the pages for a population; the caller then writes their bytes.
    ///
    /// # Errors
    /// Refused beyond the object, for a page in quarantine, and for one that is whole
    /// (`EEXIST`), and for one that is private where the host can't write such
    /// ([`Platform::host_fills_private`](crate::Platform::host_fills_private)), which is named
    /// first, for such a page is never owed; busy where an
    /// operation holds a page.
    pub fn populate(&mut self, range: PageRange) -> Result<Operation<Writing>, Blocked> {
        let begun = self.claim_for_population(range);
        self.note_refused(Activity::Population, &[range], &begun);
        begun
    }

    fn claim_for_population(&mut self, range: PageRange) -> Result<Operation<Writing>, Blocked> {
        self.check_bounds(range)?;
        self.check_quarantine(range)?;
        if self.plants.has(Bug::ExistsWhileClaimed) && self.is_claimed(range) {
            return Err(Refusal::Whole { page: range.start() }.into());
        }
        // Nobody may map a part of a granule meanwhile.
        let granules = self.granules(range);
        self.check_claims(granules)?;
        let platform = self.config.platform;
        let private = |facts: PageFacts| facts.visibility == Visibility::Private;
        if !platform.host_fills_private()
            && let Some(page) = self.first_page(range, private)
        {
            return Err(Refusal::GuestFills { page, platform }.into());
        }
        let whole = |facts: PageFacts| facts.population == Population::Whole;
        if let Some(page) = self.first_page(range, whole)
            && !(self.plants.has(Bug::HolePopulatedTwice) && self.has_hole_around(page))
        {
            return Err(Refusal::Whole { page }.into());
        }
        if let Some(page) = self.failed.first_in(range) {
            return Err(Refusal::SourceFailed { page }.into());
        }
        let program = Program::default().stage([Step::Publish(range)].into_iter());
        Ok(self.begin(Activity::Population, vec![granules], vec![range], program))
    }

    /// Whether a page of the 2M page around `page` is owed: a bug's way of looking.
    fn has_hole_around(&self, page: PageIndex) -> bool {
        let folio = PageRange::enclosing(page, Level::Size2M, self.config.geometry);
        let owed = |facts: PageFacts| facts.population == Population::Owed;
        let all = PageRange::between(0, self.config.pages.get()).expect("an object has pages");
        folio.intersection(all).is_some_and(|folio| self.first_page(folio, owed).is_some())
    }

    /// Makes the population true: from here on the pages are seen, and nothing takes them back.
    /// Returns an answer that lets whoever waits in the guest view go on, all at once; should it
    /// fail, they are answered one by one. `None` if no granule is whole yet.
    pub fn finish_population(&mut self, population: Operation<Published>) -> Option<Answer> {
        let record = self.finish(&population);
        self.pages.set_population(record.parts[0], Population::Whole);
        if self.plants.has(Bug::FolioPopulated) {
            let all = PageRange::between(0, self.config.pages.get()).expect("an object has pages");
            self.pages.set_population(all, Population::Whole);
        }
        let shown = self.whole_granules(record.claims[0])?;
        Some(self.answer(View::Guest, shown, Response::Map))
    }

    /// What is left of a range of granules without the first and the last, if those are not whole.
    fn whole_granules(&self, range: PageRange) -> Option<PageRange> {
        let (granule, geometry) = (self.config.backing.granule, self.config.geometry);
        let last = range.frames().next_back().unwrap_or(range.start());
        [range.start(), last].into_iter().try_fold(range, |left, page| {
            let around = PageRange::enclosing(page, granule, geometry);
            let owed = |facts: PageFacts| facts.population == Population::Owed;
            match self.first_page(around, owed) {
                None => Some(left),
                Some(_) => left.without(around).into_iter().flatten().next(),
            }
        })
    }

    /// The same, showing a part of the pages only: the rest is mapped when it is touched.
    pub fn finish_population_showing(
        &mut self,
        population: Operation<Published>,
        shown: PageRange,
    ) -> Option<Answer> {
        let record = self.finish(&population);
        let range = record.parts[0];
        self.pages.set_population(range, Population::Whole);
        let shown = self.granules(range.intersection(shown)?);
        let shown = self.whole_granules(shown)?;
        Some(self.answer(View::Guest, shown, Response::Map))
    }

    /// The first run of pages in `range` that can be populated: they are owed, their source has not
    /// failed, and no operation holds them.
    pub fn first_owed(&self, range: PageRange) -> Option<PageRange> {
        let owed = self.pages.runs(range).filter(|(_, facts)| {
            facts.population == Population::Owed
                && (facts.visibility == Visibility::Shared
                    || self.config.platform.host_fills_private())
        });
        owed.into_iter().find_map(|(run, _)| {
            let mut left = Some(run);
            while let Some(rest) = left {
                let stop = [
                    self.failed.first_in(rest),
                    self.quarantine.first_in(rest),
                    self.first_claimed(rest),
                ];
                let Some(stop) = stop.into_iter().flatten().min() else { return Some(rest) };
                let free = PageRange::between(rest.start().get(), stop.get());
                if free.is_some() {
                    return free;
                }
                left = PageRange::between(stop.get() + 1, rest.end());
            }
            None
        })
    }

    /// Refuses a range of which a page is not whole.
    ///
    /// # Errors
    /// [`Refusal::SourceFailed`] and [`Refusal::Owed`], naming the first such page.
    pub fn check_whole(&self, range: PageRange) -> Result<(), Refusal> {
        self.check_bounds(range)?;
        let owed = |facts: PageFacts| facts.population == Population::Owed;
        match self.first_page(range, owed) {
            Some(page) if self.failed.contains(page) => Err(Refusal::SourceFailed { page }),
            Some(page) => Err(Refusal::Owed { page }),
            None => Ok(()),
        }
    }

    /// Whether the contents of `page` are still to come, or of another that views map only with it.
    pub fn is_owed_page(&self, page: PageIndex) -> bool {
        self.owed_with(page).is_some()
    }

    /// The pages that views map with `page`, itself among them.
    pub fn shown_with(&self, page: PageIndex) -> PageRange {
        self.granules(PageRange::one(page))
    }

    /// The first page that views map with `page` and whose contents are still to come.
    fn owed_with(&self, page: PageIndex) -> Option<PageIndex> {
        let mut runs = self.pages.runs(self.granules(PageRange::one(page)));
        runs.find_map(|(run, facts)| {
            let owed = facts.population == Population::Owed;
            owed.then(|| self.failed.first_not_in(run)).flatten()
        })
    }

    /// Whether contents of a page of the object are still to come, or being brought: nothing is
    /// once this is false, for ever. `from` is where to look first, and told where to look next.
    pub fn is_owed(&self, from: &mut PageIndex) -> bool {
        let Some(rest) = PageRange::between(from.get(), self.config.pages.get()) else {
            return false;
        };
        let next = self.pages.runs(rest).find_map(|(run, facts)| {
            let owed = facts.population == Population::Owed;
            owed.then(|| self.failed.first_not_in(run)).flatten()
        });
        *from = next.unwrap_or(*from);
        next.is_some()
    }

    /// Says that the contents of pages will not come: whoever touches one is denied from now on,
    /// until the pages are discarded.
    ///
    /// # Errors
    /// Refused beyond the object and for a page that is whole; busy where an operation holds one.
    pub fn fail(&mut self, range: PageRange) -> Result<(), Blocked> {
        self.check_bounds(range)?;
        self.check_claims(range)?;
        if let Some(page) = self.first_page(range, |facts| facts.population == Population::Whole) {
            return Err(Refusal::Whole { page }.into());
        }
        self.failed.insert(range);
        Ok(())
    }

    /// Says so of a page that a touch of `page` has waited for too long, unless its contents have
    /// come, or it was said before. Returns that page: `page`, or another that views map only with
    /// it.
    ///
    /// # Errors
    /// Busy where an operation holds it.
    pub fn fail_late(&mut self, page: PageIndex) -> Result<Option<PageIndex>, Blocked> {
        // The page itself, where it has not come; else one without which views don't show it.
        let itself = self.first_page(PageRange::one(page), |it| it.population == Population::Owed);
        let late = itself.filter(|page| !self.failed.contains(*page)).or(self.owed_with(page));
        let Some(late) = late else { return Ok(None) };
        self.fail(PageRange::one(late)).map(|()| Some(late))
    }

    /// Says so of everything that is still owed, whatever goes on: the object is about to go.
    pub fn fail_all(&mut self) {
        let all = PageRange::between(0, self.config.pages.get()).expect("an object has pages");
        let owed = self.pages.runs(all).filter(|(_, facts)| facts.population == Population::Owed);
        let owed: Vec<PageRange> = owed.map(|(run, _)| run).collect();
        owed.into_iter().for_each(|run| self.failed.insert(run));
    }

    /// The pages whose contents were to come and did not.
    pub fn failed(&self) -> &RangeSet {
        &self.failed
    }

    /// Says that nothing more will come: what is still owed is zeros, unless its source failed.
    ///
    /// # Errors
    /// Busy while an operation runs.
    pub fn settle(&mut self) -> Result<(), Blocked> {
        let all = PageRange::between(0, self.config.pages.get()).expect("an object has pages");
        self.check_claims(all)?;
        let mut next = 0;
        let failed: Vec<PageRange> = self.failed.runs().collect();
        for run in failed {
            if let Some(owed) = PageRange::between(next, run.start().get()) {
                self.pages.set_population(owed, Population::Whole);
            }
            next = run.end();
        }
        if let Some(owed) = PageRange::between(next, all.end()) {
            self.pages.set_population(owed, Population::Whole);
        }
        Ok(())
    }
}
