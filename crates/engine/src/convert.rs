//! Conversion: private to shared and back.
//!
//! ```text
//! convert -> Draining --unmap--> Unmapped --check references--> Unpinned --reshape--> Reshaped
//!                --protect--> Protected --contents--> finish_conversion
//! ```
//! Everybody is cut off before anybody is looked for: the other order is the race that was found
//! in the kernel's patches (thread 0: "prevent any future faults before checking that there are
//! no mappings"). Faults and copies in the range wait from the claim to the end.

use alloc::vec::Vec;

use polder_units::{PageCount, PageRange};

use crate::operation::Program;
use crate::plant::Bug;
use crate::range_set::push_run;
use crate::{
    Activity, Blocked, Contents, Engine, Operation, Population, Refusal, Stage, Step, View,
    Visibility, VmId,
};

/// A conversion in flight.
pub type Conversion<S> = Operation<S>;

/// Waiting for answers and copies in flight; then unmapping from the side that loses the pages.
#[derive(Debug)]
pub enum Draining {}
/// Nobody can reach the pages; looking for references from before.
#[derive(Debug)]
pub enum Unmapped {}
/// Nobody refers to the pages; splitting or merging huge pages.
#[derive(Debug)]
pub enum Unpinned {}
/// The huge pages have the shape they need; telling hardware or kernel.
#[derive(Debug)]
pub enum Reshaped {}
/// Hardware or kernel treats the pages as what they become; seeing to the contents.
#[derive(Debug)]
pub enum Protected {}
/// All is done; [`Engine::finish_conversion`] makes it true.
#[derive(Debug)]
pub enum Settled {}

macro_rules! stages {
    ($($stage:ident => $next:ident),*) => {
        stages!(@ 0; $($stage => $next),*);
    };
    (@ $index:expr; $stage:ident => $next:ident $(, $rest:ident => $after:ident)*) => {
        impl Stage for $stage {
            type Next = $next;
            const INDEX: usize = $index;
        }
        stages!(@ $index + 1; $($rest => $after),*);
    };
    (@ $index:expr;) => {};
}
stages!(Draining => Unmapped, Unmapped => Unpinned, Unpinned => Reshaped, Reshaped => Protected,
    Protected => Settled);

/// A request to convert pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConversionRequest {
    /// The pages, in runs that do not overlap; all become so, or none.
    pub ranges: Vec<PageRange>,
    /// What they become.
    pub to: Visibility,
    /// What becomes of their bytes.
    pub contents: Contents,
    /// The VM whose wish it is; all, where the VMM decides for them.
    pub by: Option<VmId>,
}

/// How a conversion began.
#[derive(Debug)]
pub enum Start {
    /// All pages are so already; nothing is to be done, and nothing was claimed.
    AlreadySo,
    /// The range is claimed.
    Claimed(Conversion<Draining>),
}

/// What a conversion did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Converted {
    /// How many pages changed; those that were so already do not count.
    pub pages: PageCount,
}

impl Engine {
    /// Claims the pages for a conversion.
    ///
    /// # Errors
    /// Refused beyond the object, for contents that platform and host can't offer, for a page in
    /// quarantine, and for a pinned page that would become private: nothing has been unmapped
    /// then. Busy where another operation holds a page.
    pub fn convert(&mut self, request: &ConversionRequest) -> Result<Start, Blocked> {
        let begun = self.claim_for_conversion(request);
        let &ConversionRequest { ref ranges, to, contents, by } = request;
        self.note_refused(Activity::Conversion { to, contents, by }, ranges, &begun);
        begun
    }

    fn claim_for_conversion(&mut self, request: &ConversionRequest) -> Result<Start, Blocked> {
        let &ConversionRequest { ref ranges, to, contents, by } = request;
        for &range in ranges {
            self.check_bounds(range)?;
        }
        let (platform, in_place) = (self.config.platform, self.config.in_place);
        if !platform.offers(contents, to, in_place) {
            return Err(Refusal::Contents { contents, to, platform }.into());
        }
        for &range in ranges {
            self.check_quarantine(range)?;
            self.check_claims(range)?;
        }
        let parts = self.parts_that_change(ranges, to);
        if parts.is_empty() {
            self.grant(by, ranges, &parts);
            return Ok(Start::AlreadySo);
        }
        if to == Visibility::Private && !self.plants.has(Bug::PinsForgotten) {
            for &part in &parts {
                self.check_pins(part)?;
            }
        }
        let program = self.conversion_program(&parts, to, contents);
        let activity = Activity::Conversion { to, contents, by };
        if self.plants.has(Bug::CommitBeforeHardware) || self.plants.one_table() {
            parts.iter().for_each(|&part| self.pages.set_visibility(part, to));
        }
        Ok(Start::Claimed(self.begin(activity, ranges.clone(), parts, program)))
    }

    fn conversion_program(&self, parts: &[PageRange], to: Visibility, how: Contents) -> Program {
        let each = || parts.iter().copied();
        let to_private = to == Visibility::Private;
        let rmp = self.config.platform.has_rmp();
        // Where hardware has the last word, the guest keeps no mapping of what the pages were:
        // the RMP is asked when a TLB is filled, and not again (AMD APM volume 2, 15.36.10).
        let from_guest = each().filter(|_| rmp || !to_private).map(Step::UnmapGuest);
        let from_host = each().filter(|_| to_private).map(Step::UnmapHost);
        let cut_off = from_host.chain(from_guest);
        let check = each().filter(|_| to_private).map(Step::CheckReferences);
        let protect = each().filter(|_| !rmp).map(|part| Step::Protect(part, to));
        let protect = protect.chain(self.rmp_steps(parts, to));
        let none = core::iter::empty;
        let program = Program::default();
        let program = if self.plants.has(Bug::CheckBeforeCuttingOff) {
            program.stage(check).stage(cut_off).stage(none()).stage(protect)
        } else if self.plants.has(Bug::AssignedBeforeCutOff) && to_private {
            program.stage(protect.chain(cut_off)).stage(check).stage(none()).stage(none())
        } else if self.plants.has(Bug::AssignedBeforeCheck) && to_private {
            program.stage(cut_off).stage(protect.chain(check)).stage(none()).stage(none())
        } else {
            program.stage(cut_off).stage(check).stage(none()).stage(protect)
        };
        program.stage(
            each()
                .filter(|&part| !to_private && self.may_have_markers(part))
                .map(Step::UnmapHost)
                .chain(each().filter(|_| self.frees(how)).map(Step::Free)),
        )
    }

    /// Whether a conversion frees the pages: asked for zeros; or to have no memory left on the
    /// side that loses them, where the sides are two pools. Only when both sides are told what
    /// the pages are does a page go, so that what fails before can be undone.
    fn frees(&self, how: Contents) -> bool {
        how == Contents::Zero || !self.config.in_place
    }

    /// Makes the conversion true: from here on faults see the pages as what they became.
    pub fn finish_conversion(&mut self, conversion: Conversion<Settled>) -> Converted {
        let record = self.finish(&conversion);
        let Activity::Conversion { to, contents, by } = record.activity else {
            unreachable!("only a conversion is ever settled")
        };
        // Nobody but the guest can bring what was owed there: it is the guest's to write, or else
        // whoever touches the pages waits for ever.
        let guest_fills = to == Visibility::Private && !self.config.platform.host_fills_private();
        let mut pages = PageCount::ZERO;
        for &part in &record.parts {
            self.pages.set_visibility(part, to);
            if self.frees(contents) || guest_fills {
                // They are zeros now, or the guest's: what was owed must not come any more.
                self.pages.set_population(part, Population::Whole);
                self.failed.remove(part);
                self.forget_markers(View::Guest, &[part]);
            }
            pages = pages.checked_add(part.count()).expect("parts lie in one object");
        }
        self.forget_markers(View::Host, &record.parts);
        self.grant(by, &record.claims, &record.parts);
        Converted { pages }
    }

    /// The runs in `ranges` that are not `to` yet.
    fn parts_that_change(&self, ranges: &[PageRange], to: Visibility) -> Vec<PageRange> {
        let mut parts: Vec<PageRange> = Vec::new();
        for &range in ranges {
            for (run, facts) in self.pages.runs(range) {
                if facts.visibility == to {
                    continue;
                }
                push_run(&mut parts, run);
            }
        }
        parts
    }
}
