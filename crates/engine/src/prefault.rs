//! Prefault: pages mapped for a guest before it touches them.
//!
//! What is given is an answer as to a fault ([`crate::fault`]), but for a run of pages: operations
//! on them wait until it is given back, and it stops before what a guest's touch would wait for or
//! be denied. So nothing is mapped late, and nothing before it is whole (INV-3).

use polder_units::{GfnRange, Level, PageCount, PageIndex, PageRange};

use crate::fault::{Answer, Response};
use crate::plant::Bug;
use crate::{Binding, Blocked, Engine, PageFacts, Population, Refusal, View, Visibility, VmId};

impl Engine {
    /// Allows the first of `gfns` to be mapped, and those after it as far as they are like it: of
    /// one kind, in one binding, whole, free of operations, `most` in all at most. Returns the
    /// answer for the pages behind them, the frames, and of which kind they are.
    ///
    /// # Errors
    /// What stands before the first of them: [`Refusal::NoSlot`]; busy where an operation holds
    /// the page; [`Refusal::Quarantined`], [`Refusal::SourceFailed`], [`Refusal::Owed`].
    pub fn prefault(
        &mut self,
        vm: VmId,
        gfns: GfnRange,
        most: PageCount,
    ) -> Result<(Answer, GfnRange, Visibility), Blocked> {
        let gfn = gfns.start();
        let found = self.bindings.of(vm).find_map(|(_, it)| Some((it.page(gfn)?, *it)));
        let (page, binding) = found.ok_or(Refusal::NoSlot { gfn })?;
        let bound = binding.gfns();
        let (start, first) = (gfn.get(), page.get());
        let end = gfns.end().min(bound.end()).min(start.saturating_add(most.get()));
        let range = PageRange::between(first, first + end.saturating_sub(start));
        let range = range.unwrap_or(PageRange::one(page));

        // Where the views map larger pages, one is mapped as a whole or not at all.
        let around = self.granules(PageRange::one(page));
        self.check_claims(around)?;
        let visibility = self.pages.get(page).visibility;
        let past = self.plants.has(Bug::PrefaultPastTheLike);
        let stops = self.prefault_stops(range, visibility);
        let stop = stops.filter(|stop| *stop == page || !past);
        let pages = stop.map_or(Some(range), |stop| PageRange::between(first, stop.get()));
        let Some(pages) = pages else {
            let owed = |facts: PageFacts| facts.population == Population::Owed;
            return Err(Blocked::Refused(if let Some(page) = self.quarantine.first_in(around) {
                Refusal::Quarantined { page }
            } else if let Some(page) = self.failed.first_in(around) {
                Refusal::SourceFailed { page }
            } else {
                Refusal::Owed { page: self.first_page(around, owed).unwrap_or(page) }
            }));
        };
        let gfns = GfnRange::new(gfn, pages.count()).expect("a part of the binding's frames");
        let pages = self.granules(self.whole_large_pages(pages, &binding, visibility));
        Ok((self.answer(View::Guest, pages, Response::Map), gfns, visibility))
    }

    /// The first page of a range that can't be mapped ahead with others that are of this kind. What
    /// a touch would wait for, or be denied, keeps the whole granule that it lies in.
    fn prefault_stops(&self, range: PageRange, visibility: Visibility) -> Option<PageIndex> {
        let other = |facts: PageFacts| facts.visibility != visibility;
        let around = self.granules(range);
        let stops = [
            self.quarantine.first_in(around),
            self.failed.first_in(around),
            self.first_page(around, |facts| facts.population == Population::Owed),
            self.first_claimed(around),
        ];
        let granule = |page| self.granules(PageRange::one(page)).start().max(range.start());
        let stops = stops.into_iter().flatten().map(granule);
        stops.chain(self.first_page(range, other)).min()
    }

    /// Pages, with the rest of the 2M pages that the first and the last lie in, where there is an
    /// RMP and all could be mapped: a part of a large entry's page would be smashed when touched.
    fn whole_large_pages(
        &self,
        pages: PageRange,
        binding: &Binding,
        visibility: Visibility,
    ) -> PageRange {
        let geometry = self.config.geometry;
        let whole = |page: PageIndex| {
            let around = PageRange::enclosing(page, Level::Size2M, geometry);
            let can = self.config.platform.has_rmp()
                && binding.level(page, geometry) >= Level::Size2M
                && self.prefault_stops(around, visibility).is_none();
            can.then_some(around)
        };
        let last = pages.frames().next_back().unwrap_or(pages.start());
        let start = whole(pages.start()).map_or(pages.start(), PageRange::start);
        let end = whole(last).map_or(pages.end(), PageRange::end);
        PageRange::between(start.get(), end).unwrap_or(pages)
    }
}
