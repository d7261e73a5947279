//! Prefault: pages mapped for a guest before it touches them.
//!
//! What is given is an answer as to a fault ([`crate::fault`]), but for a run of pages: operations
//! on them wait until it is given back, and it stops before what a guest's touch would wait for or
//! be denied. So nothing is mapped late, and nothing before it is whole (INV-3).

use polder_units::{GfnRange, PageCount, PageRange};

use crate::fault::{Answer, Response};
use crate::{Blocked, Engine, PageFacts, Population, Refusal, View, Visibility, VmId};

impl Engine {
    /// Allows the first of `gfns` to be mapped, and those after it as far as they are like it: in
    /// one binding, whole, free of operations, `most` in all at most; on a platform with an RMP, of
    /// one kind. Returns the answer for the pages behind them, the frames, and of which kind the
    /// first is.
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
        let found = self.bindings.of(vm).find_map(|(_, it)| Some((it.page(gfn)?, it.gfns())));
        let (page, bound) = found.ok_or(Refusal::NoSlot { gfn })?;
        let (start, first) = (gfn.get(), page.get());
        let end = gfns.end().min(bound.end()).min(start.saturating_add(most.get()));
        let range = PageRange::between(first, first + end.saturating_sub(start));
        let range = range.unwrap_or(PageRange::one(page));

        self.check_claims(PageRange::one(page))?;
        let owed = self.first_page(range, |facts| facts.population == Population::Owed);
        let visibility = self.pages.get(page).visibility;
        let other = |facts: PageFacts| facts.visibility != visibility;
        let has_rmp = self.config.platform.has_rmp();
        let stops = [
            has_rmp.then(|| self.first_page(range, other)).flatten(),
            self.quarantine.first_in(range),
            self.failed.first_in(range),
            owed,
            self.first_claimed(range),
        ];
        let stop = stops.into_iter().flatten().min();
        let pages = stop.map_or(Some(range), |stop| PageRange::between(first, stop.get()));
        let Some(pages) = pages else {
            return Err(Blocked::Refused(if self.quarantine.contains(page) {
                Refusal::Quarantined { page }
            } else if self.failed.contains(page) {
                Refusal::SourceFailed { page }
            } else {
                Refusal::Owed { page }
            }));
        };
        let gfns = GfnRange::new(gfn, pages.count()).expect("a part of the binding's frames");
        Ok((self.answer(View::Guest, pages, Response::Map), gfns, visibility))
    }
}
