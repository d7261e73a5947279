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

use polder_units::{Level, PageCount, PageRange};

use crate::folio::Reshape;
use crate::operation::Program;
use crate::plant::Bug;
use crate::range_set::push_run;
use crate::{
    Activity, Blocked, Contents, Engine, Operation, PageFacts, Population, Refusal, Stage, Step,
    View, Visibility, VmId,
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
    /// Whether the guest itself asked, by a hypercall of its own.
    pub by_guest: bool,
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

/// What a conversion is to change, once nothing is in its way.
struct Change<'a> {
    /// The pages that change.
    parts: &'a [PageRange],
    /// Those, and what can be unmapped with them only.
    around: &'a [PageRange],
    to: Visibility,
    reshape: &'a Reshape,
}

/// A phase of a conversion, up to where hardware or kernel has been told.
#[derive(Clone, Copy)]
enum Phase {
    CutOff,
    CheckReferences,
    Reshape,
    Protect,
}

impl Engine {
    /// Claims the pages for a conversion.
    ///
    /// # Errors
    /// Refused beyond the object, for what only the guest decides
    /// ([`Platform::guest_decides`](crate::Platform::guest_decides)), for contents that platform
    /// and host can't offer, for a page in quarantine, and for a pinned page that would become
    /// private: nothing has been unmapped then. Busy where another operation holds a page.
    pub fn convert(&mut self, request: &ConversionRequest) -> Result<Start, Blocked> {
        let begun = self.claim_for_conversion(request);
        let &ConversionRequest { ref ranges, to, contents, by, .. } = request;
        self.note_refused(Activity::Conversion { to, contents, by }, ranges, &begun);
        begun
    }

    fn claim_for_conversion(&mut self, request: &ConversionRequest) -> Result<Start, Blocked> {
        let &ConversionRequest { ref ranges, to, contents, by, by_guest } = request;
        for &range in ranges {
            self.check_bounds(range)?;
        }
        let (platform, in_place) = (self.config.platform, self.config.in_place);
        if !platform.offers(contents, to, in_place) {
            return Err(Refusal::Contents { contents, to, platform }.into());
        }
        for &range in ranges {
            self.check_quarantine(range)?;
            self.check_turn(range)?;
        }
        let parts = self.parts_that_change(ranges, to);
        if parts.is_empty() {
            self.grant(by, ranges, &parts);
            return Ok(Start::AlreadySo);
        }
        if self.config.platform.guest_decides() && !by_guest {
            let (page, platform) = (parts[0].start(), self.config.platform);
            return Err(Refusal::GuestDecides { page, platform }.into());
        }
        self.check_granules(&parts)?;
        let reshape = self.reshape(&parts, to);
        let claims = self.with_neighbours(ranges, &reshape);
        for &claim in claims.iter().filter(|claim| !ranges.contains(claim)) {
            self.check_turn(claim)?;
        }
        for folio in reshape.folios() {
            self.check_quarantine(folio)?;
        }
        if to == Visibility::Private && !self.plants.has(Bug::PinsForgotten) {
            self.check_pins_around(&parts, &reshape)?;
        }
        let program = self.conversion_program(&parts, to, contents, &reshape);
        let activity = Activity::Conversion { to, contents, by };
        if self.plants.has(Bug::CommitBeforeHardware) || self.plants.one_table() {
            parts.iter().for_each(|&part| self.pages.set_visibility(part, to));
        }
        let unclaimed = self.plants.has(Bug::NeighboursUnclaimed);
        let claims = if unclaimed { ranges.clone() } else { claims.into_owned() };
        let conversion = self.begin(activity, claims, parts, program);
        let record = self.record_mut(conversion.id());
        (record.asked, record.reshape) = (ranges.clone(), reshape);
        Ok(Start::Claimed(conversion))
    }

    /// Refuses pins of pages that become private, and of others that would be cut off with them:
    /// of a folio that is to be split, and of a granule that the host view may have mapped.
    pub(crate) fn check_pins_around(
        &self,
        parts: &[PageRange],
        reshape: &Reshape,
    ) -> Result<(), Refusal> {
        for &part in parts {
            self.check_pins(part)?;
            if self.config.backing.granule == Level::Size4K {
                continue;
            }
            let around = self.granules(part);
            let ends = [around.start(), around.frames().next_back().unwrap_or(around.start())];
            for end in ends {
                let granule =
                    PageRange::enclosing(end, self.config.backing.granule, self.config.geometry);
                let private = |facts: PageFacts| facts.visibility == Visibility::Private;
                if self.first_page(granule, private).is_none() {
                    self.check_pins(granule)?;
                }
            }
        }
        if self.plants.has(Bug::ReshapedWhilePinned) {
            return Ok(());
        }
        reshape.splits.iter().try_for_each(|&folio| self.check_pins(folio))
    }

    fn conversion_program(
        &self,
        parts: &[PageRange],
        to: Visibility,
        how: Contents,
        reshape: &Reshape,
    ) -> Program {
        let around = &*self.with_neighbours(parts, reshape);
        let change = Change { parts, around, to, reshape };
        let mut program = Program::default();
        for stage in self.stages_to_protected(to) {
            for phase in stage {
                match phase {
                    Phase::CutOff => self.cut_off(&mut program, &change),
                    Phase::CheckReferences if to == Visibility::Private => {
                        program.push(parts.iter().copied().map(Step::CheckReferences));
                    }
                    Phase::CheckReferences => {}
                    Phase::Reshape => program.push(reshape.steps()),
                    Phase::Protect if self.config.platform.has_rmp() => {
                        program.push(self.rmp_steps(parts, to));
                    }
                    Phase::Protect => {
                        program.push(parts.iter().map(|&part| Step::Protect(part, to)));
                    }
                }
            }
            program.end_stage();
        }
        if to == Visibility::Shared {
            let marked = around.iter().copied().filter(|&part| self.may_have_markers(part));
            program.push(marked.map(Step::UnmapHost));
        }
        if self.frees(how) {
            program.push(parts.iter().copied().map(Step::Free));
        }
        program.push(reshape.release());
        if to == Visibility::Shared || self.plants.has(Bug::DmaUnmappedLate) {
            program.push(self.dma_steps(parts, to));
        }
        program.end_stage();
        program
    }

    /// What each stage before [`Protected`] consists of.
    fn stages_to_protected(&self, to: Visibility) -> [&'static [Phase]; 4] {
        use Phase::{CheckReferences, CutOff, Protect, Reshape};
        let to_private = to == Visibility::Private;
        if self.plants.has(Bug::CheckBeforeCuttingOff) {
            [&[CheckReferences], &[CutOff], &[], &[Protect]]
        } else if self.plants.has(Bug::AssignedBeforeCutOff) && to_private {
            [&[Protect, CutOff], &[CheckReferences], &[], &[]]
        } else if self.plants.has(Bug::AssignedBeforeCheck) && to_private {
            [&[CutOff], &[Protect, CheckReferences], &[], &[]]
        } else {
            [&[CutOff], &[CheckReferences], &[Reshape], &[Protect]]
        }
    }

    /// Unmaps the pages wherever they may not be seen from here on. What is split or merged, and
    /// what a view can't map but as a whole, is cut off as a whole.
    fn cut_off(&self, program: &mut Program, change: &Change<'_>) {
        let &Change { parts, around, to, reshape } = change;
        let to_private = to == Visibility::Private;
        if to_private && !self.plants.has(Bug::DmaUnmappedLate) {
            program.push(self.dma_steps(parts, to));
        }
        program.push(reshape.prepare());
        if to_private {
            program.push(around.iter().copied().map(Step::UnmapHost));
        }
        // Where hardware has the last word, the guest keeps no mapping of what the pages were:
        // the RMP is asked when a TLB is filled, and not again (AMD APM volume 2, 15.36.10).
        // Under pKVM the guest keeps its mapping, which is right for both.
        let platform = self.config.platform;
        let reshaped = |range: PageRange| reshape.folios().any(|folio| folio.overlaps(range));
        let zapped = |part: PageRange| platform.has_rmp() || !to_private || reshaped(part);
        if !platform.hypervisor_keeps_stage2() {
            let from_guest = around.iter().copied().filter(|&part| zapped(part));
            program.push(from_guest.map(Step::UnmapGuest));
        }
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
        self.reshape_done(&record.reshape);
        let around = self.with_neighbours(&record.parts, &record.reshape);
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
        self.forget_markers(View::Host, &around);
        self.grant(by, &record.asked, &record.parts);
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
