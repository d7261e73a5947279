//! The host's RMP: `polder/src/host/machine/rmp.rs`, one hold of the machine's lock after another.
//!
//! What the host looks at and does in one hold is one step here: a look, and the instruction that
//! it calls for. An instruction that meets another CPU at work is not taken before that has let go:
//! the host tries again a bounded number of times, and that it gives up is a failure, which is
//! searched where steps may fail.

use polder_explored_engine::{LargeRmpEntry, NotLarge, Step, can_install_large_rmp_entry};
use polder_machine::{Resolved, RmpEntry, RmpFail, RmpSize, RmpUpdate};
use polder_units::{Gfn, GfnRange, Level, PageIndex, PageRange, Pfn};

use super::act::{Act, Done};
use super::host::References;
use super::kept::{ASID, Pages, set};
use super::{Slip, Stage, World};
use crate::system::Violation;

/// A page with memory, and its entry.
#[derive(Clone, Copy)]
pub(super) struct Found {
    pub(super) pfn: Pfn,
    pub(super) folio: Level,
    pub(super) entry: RmpEntry,
    /// Pages of 2M.
    pub(super) pages: u64,
}

impl Found {
    pub(super) fn is_large(&self) -> bool {
        self.entry.assigned && self.entry.size == RmpSize::Size2M
    }

    /// How far into its 2M frames it is.
    pub(super) fn offset(&self) -> u64 {
        self.pfn.get() % self.pages
    }

    /// The first of its 2M frames.
    pub(super) fn head(&self) -> Pfn {
        Pfn::new(self.pfn.get() - self.offset()).expect("below a frame")
    }

    /// The pages from this one to the end of its entry.
    fn left(&self) -> u64 {
        if self.is_large() { self.pages - self.offset() } else { 1 }
    }
}

/// What was unassigned, and may be given back: `polder/src/host/machine/rmp/taken.rs`. Where its
/// guest saw the pages is where it sees them now: no slot of an SNP guest moves here.
#[derive(Clone, Copy, Default)]
pub(super) struct Taken {
    pages: Pages,
    /// By large entries.
    large: Pages,
}

impl Taken {
    /// That of pages that an operation holds, which alone is ever given back.
    pub(super) fn of(self, held: Pages) -> (Pages, Pages) {
        (self.pages & held, self.large & held)
    }

    pub(super) fn forget(&mut self, pages: Pages) {
        self.pages &= !pages;
        self.large &= !pages;
    }

    fn note(&mut self, pages: Pages, size: RmpSize) {
        self.pages |= pages;
        if size == RmpSize::Size2M {
            self.large |= pages;
        }
    }
}

/// What a look at a page calls for.
#[derive(Clone, Copy)]
pub(super) enum Called {
    /// Nothing, for so many pages.
    Nothing(u64),
    /// PSMASH of the 2M page at a frame; then go on so many pages further.
    Smash(Pfn, u64),
    /// RMPUPDATE of these pages; then go on so many pages further.
    Update(Pfn, RmpUpdate, u64, PageRange),
    /// No instruction can help.
    Never(RmpFail),
}

/// Why what was called for was not done.
#[derive(Clone, Copy)]
pub(super) enum Refused {
    Rmp(RmpFail),
    /// Somebody refers to the pages.
    Referenced,
}

/// How a part of a step went.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// It was the last.
    Last,
    /// This one is next.
    Then(u8),
    /// The host gives up.
    Failed,
}

impl World {
    /// What there is behind a page.
    pub(super) fn found(&self, page: PageIndex) -> Option<Found> {
        let machine = &self.machine.machine;
        let backing = machine.backing(self.parts.object, page).ok()??;
        let entry = machine.rmp_entry(backing.pfn)?;
        let pages = self.setup.geometry.pages(Level::Size2M).get();
        Some(Found { pfn: backing.pfn, folio: backing.level, entry, pages })
    }

    /// Where the guest sees pages, if one binding shows all of them.
    pub(super) fn shown(&self, range: PageRange) -> Option<GfnRange> {
        let mut shown = self.machine.machine.gfns_of(self.parts.object, range);
        shown.next().map(|(_, gfns)| gfns).filter(|gfns| gfns.count() == range.count())
    }

    pub(super) fn around(&self, page: PageIndex) -> PageRange {
        PageRange::enclosing(page, Level::Size2M, self.setup.geometry)
    }

    /// What assigning a page calls for, with others of its folio if they are `within`.
    pub(super) fn to_assign(&self, page: PageIndex, within: PageRange) -> Called {
        let Some(found) = self.found(page) else { return Called::Nothing(1) };
        let Some(gfns) = self.shown(PageRange::one(page)) else { return Called::Nothing(1) };
        let (gfn, entry) = (gfns.start(), found.entry);
        if entry.asid == Some(ASID) && entry.gfn == gfn {
            return Called::Nothing(found.left());
        }
        if found.is_large() {
            return Called::Smash(found.head(), 0);
        }
        if let Some((head, at)) = self.large(&found, (page, gfn), within) {
            let large = RmpUpdate::private(ASID, at, RmpSize::Size2M);
            let left = found.pages - found.offset();
            return Called::Update(head, large, left, self.around(page));
        }
        let small = RmpUpdate::private(ASID, gfn, RmpSize::Size4K);
        Called::Update(found.pfn, small, 1, PageRange::one(page))
    }

    /// The first frame and guest frame of the 2M page around a page, if it gets a large entry.
    pub(super) fn large(
        &self,
        found: &Found,
        (page, gfn): (PageIndex, Gfn),
        within: PageRange,
    ) -> Option<(Pfn, Gfn)> {
        let around = self.around(page);
        let offset = page.get() - around.start().get();
        let frame = Pfn::new(found.pfn.get().checked_sub(offset)?)?;
        let gfn = Gfn::new(gfn.get().checked_sub(offset)?)?;
        let machine = &self.machine.machine;
        let is_assigned = |pfn| machine.rmp_entry(pfn).is_none_or(|entry| entry.assigned);
        let mut entry = LargeRmpEntry {
            folio: found.folio,
            page: around.start(),
            frame,
            gfn,
            bound: self.shown(around).is_some(),
            within,
            unassigned: found.folio > Level::Size4K
                && !frames(frame, around.count().get()).any(is_assigned),
        };
        if let Some(super::Bug::Driver(Slip::Clause(clause))) = self.setup.bug {
            match clause {
                NotLarge::Folio => {
                    entry.folio = Level::Size2M;
                    entry.unassigned = !frames(frame, around.count().get()).any(is_assigned);
                }
                NotLarge::Gfn => entry.gfn = Gfn::from(0),
                NotLarge::Binding => entry.bound = true,
                NotLarge::Range => entry.within = around,
                NotLarge::Assigned => entry.unassigned = true,
                NotLarge::Page | NotLarge::Frame => {}
            }
        }
        can_install_large_rmp_entry(&entry, self.setup.geometry).ok().map(|()| (frame, gfn))
    }

    fn to_unassign(&self, page: PageIndex, range: PageRange) -> Called {
        let found = self.found(page).filter(|found| found.entry.assigned);
        let Some(found) = found else { return Called::Nothing(1) };
        if !found.is_large() || self.setup.slips(Slip::UnassignedSmall) {
            let small = RmpUpdate::shared(RmpSize::Size4K);
            return Called::Update(found.pfn, small, 1, PageRange::one(page));
        }
        let whole = found.offset() == 0 && range.end() - page.get() >= found.pages;
        if whole {
            let large = RmpUpdate::shared(RmpSize::Size2M);
            return Called::Update(found.head(), large, found.pages, self.around(page));
        }
        // A step before was to smash it.
        Called::Never(RmpFail::Overlap)
    }

    /// What giving a page back calls for, if it was taken.
    fn to_reassign(&self, page: PageIndex, range: PageRange) -> Called {
        let one = PageRange::one(page);
        let (taken, large) = self.taken.of(set(one));
        let found = self.found(page).filter(|_| taken != 0);
        let (Some(found), Some(gfns)) = (found, self.shown(one)) else { return Called::Nothing(1) };
        if found.entry.assigned {
            return Called::Nothing(found.left());
        }
        let around = self.around(page);
        let (size, pages) = match large != 0 && range.contains_range(around) {
            true => (RmpSize::Size2M, around),
            false => (RmpSize::Size4K, one),
        };
        let private = RmpUpdate::private(ASID, gfns.start(), size);
        Called::Update(found.pfn, private, pages.count().get(), pages)
    }

    fn to_smash(&self, page: PageIndex) -> Called {
        match self.found(page).filter(Found::is_large) {
            Some(found) => Called::Smash(found.head(), found.left()),
            None => Called::Nothing(1),
        }
    }

    /// What a step calls for at its page of this number. Looks that call for nothing go with it.
    fn called(&self, step: Step, part: u8) -> (u8, Called) {
        let range = step.range();
        let mut at = range.start().get() + u64::from(part);
        loop {
            let next = u8::try_from(at - range.start().get()).unwrap_or(u8::MAX);
            let Some(rest) = PageRange::between(at, range.end()) else {
                return (next, Called::Nothing(0));
            };
            let page = rest.start();
            let called = match step {
                Step::Assign(_) => self.to_assign(page, range),
                Step::Unassign(_) => self.to_unassign(page, range),
                Step::Reassign(_) => self.to_reassign(page, range),
                Step::Smash(_) => self.to_smash(page),
                _ => unreachable!("no step for the RMP: {step}"),
            };
            match called {
                Called::Nothing(pages) => at += pages.max(1),
                called => return (next, called),
            }
        }
    }

    /// Whether another CPU has an entry in use that an instruction is about, or somebody the folio
    /// locked of what is to be assigned.
    pub(super) fn meets_another(&self, called: Called) -> bool {
        let (pfn, size) = match called {
            Called::Nothing(_) | Called::Never(_) => return false,
            Called::Smash(head, _) => (head, RmpSize::Size2M),
            Called::Update(_, update, _, pages)
                if update.assigned && self.references(pages) == References::Transient =>
            {
                return true;
            }
            Called::Update(pfn, update, ..) => (pfn, update.size),
        };
        self.in_use(pfn, size)
    }

    /// Whether a part of a step would meet another CPU at work, or a locked folio.
    pub(super) fn is_blocked(&self, step: Step, part: u8) -> bool {
        match step {
            Step::Assign(_) | Step::Unassign(_) | Step::Reassign(_) | Step::Smash(_) => {
                self.meets_another(self.called(step, part).1)
            }
            Step::Merge(range) => self.merge_is_blocked(range, part),
            Step::SplitFolio(range) | Step::MergeFolio(range) => {
                self.references(range) == References::Transient
            }
            Step::Free(range) => part == 2 && self.any_locked(range),
            _ => false,
        }
    }

    /// Does what was called for, which is under the folio's lock where pages are assigned. How far
    /// it went.
    pub(super) fn instruct(&mut self, called: Called) -> Result<u64, Refused> {
        if let Called::Update(_, update, _, pages) = called
            && update.assigned
            && !self.setup.slips(Slip::AssignedUncut)
        {
            self.act(Act::UnmapProcesses(pages)).well();
            self.act(Act::FlushHost(pages)).well();
            if self.references(pages) == References::Held {
                return Err(Refused::Referenced);
            }
        }
        let (act, pages) = match called {
            Called::Nothing(pages) => return Ok(pages),
            Called::Never(fail) => return Err(Refused::Rmp(fail)),
            Called::Smash(head, pages) => (Act::Psmash(head), pages),
            Called::Update(pfn, update, pages, _) => (Act::Rmpupdate(pfn, update), pages),
        };
        match self.act(act) {
            Done::Well => Ok(pages),
            Done::Rmp(fail) => Err(Refused::Rmp(fail)),
            other => unreachable!("an instruction of the RMP: {other:?}"),
        }
    }

    /// Assigns, unassigns, gives back or smashes one page of a step.
    pub(super) fn perform_rmp(&mut self, step: Step, part: u8) -> Result<Part, Violation> {
        if let (Step::Assign(range) | Step::Unassign(range), 0) = (step, part) {
            self.taken.forget(set(range));
        }
        let (at, called) = self.called(step, part);
        match called {
            Called::Nothing(_) => return Ok(Part::Last),
            Called::Smash(head, _) => self.say(|| format!("psmash of pfn {head}")),
            Called::Update(pfn, update, ..) => {
                let what = if update.assigned { "to the guest" } else { "to nobody" };
                self.say(|| format!("rmpupdate of pfn {pfn}, {:?}, {what}", update.size));
            }
            Called::Never(_) => {}
        }
        let pages = match self.instruct(called) {
            Ok(pages) => pages,
            Err(Refused::Referenced) => return Ok(Part::Failed),
            Err(Refused::Rmp(fail)) => {
                let what = "and nobody is at work there";
                let what = format!("the hardware refuses to {step}, {what}: {fail}");
                return Err(Violation::new("INV-9", what));
            }
        };
        if let (Step::Unassign(_), Called::Update(_, update, _, pages)) = (step, called) {
            self.taken.note(set(pages), update.size);
        }
        let next = at + u8::try_from(pages).unwrap_or(u8::MAX);
        // What is left may call for nothing.
        match self.called(step, next) {
            (_, Called::Nothing(_)) => Ok(Part::Last),
            (next, _) => Ok(Part::Then(next)),
        }
    }

    /// Whether what was resolved can be mapped privately at a level.
    fn rmp_allows(&self, resolved: &Resolved, level: Level) -> bool {
        if level == Level::Size4K || self.setup.slips(Slip::MappedAboveRmp) {
            return true;
        }
        let geometry = self.setup.geometry;
        let (all, large) = (geometry.pages(level).get(), geometry.pages(Level::Size2M).get());
        let (gfn, pfn) = (resolved.gfn().get(), resolved.pfn().get());
        let Some(gfn) = gfn.checked_sub(pfn % all) else { return false };
        let head = pfn - pfn % all;
        (0..all / large).map(|at| at * large).all(|offset| {
            let entry = Pfn::new(head + offset).and_then(|it| self.machine.machine.rmp_entry(it));
            entry.is_some_and(|entry| {
                entry.assigned
                    && entry.size == RmpSize::Size2M
                    && entry.gfn.get() == gfn + offset
                    && entry.asid == Some(ASID)
            })
        })
    }

    /// The level at which what was resolved for a guest is mapped, as large as its answer is.
    pub(super) fn level_of(&self, actor: usize, resolved: &Resolved, most: Level) -> Level {
        let level = most.min(resolved.largest());
        let private = self.task(actor).map(super::guest::wants);
        if !self.setup.is_snp() || private == Some(super::Visibility::Shared) {
            return level;
        }
        let levels = Level::ALL.into_iter().filter(|&other| other <= level);
        levels.rev().find(|&level| self.rmp_allows(resolved, level)).unwrap_or(Level::Size4K)
    }

    /// Whether another CPU has the entries of frames in use.
    pub(super) fn in_use(&self, pfn: Pfn, size: RmpSize) -> bool {
        let pages = |size: RmpSize| self.setup.geometry.pages(size.level()).get();
        self.actors[..self.setup.actors.len()].iter().any(|state| match state.stage {
            Stage::Holding(held, of) => {
                held.get() < pfn.get() + pages(size) && pfn.get() < held.get() + pages(of)
            }
            _ => false,
        })
    }
}

pub(super) fn frames(head: Pfn, count: u64) -> impl Iterator<Item = Pfn> {
    (head.get()..head.get() + count).map_while(Pfn::new)
}
