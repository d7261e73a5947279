//! The hardware stage of SEV-SNP: which RMP entries an operation changes, and in which order.
//!
//! ```text
//! to private   Assign, a 2M page at a time
//! to shared    Smash what is shared in part; Unassign, a 2M page at a time
//! merge        Merge, a 2M page at a time
//! ```
//! Entries that a conversion makes are not merged with their neighbours: a page that was just
//! assigned is not validated, and so nearly never agrees with those that are.
//!
//! A step is about one 2M page at most: so much is put in quarantine if it can't be undone. Which
//! level the entries have is looked up when the step is taken, not when the list is made: a guest's
//! fault on a neighbour may smash an entry at any time.
//!
//! The RMP has one size bit, so a 1G folio is assigned as 512 large entries, and entries of no
//! other level exist (AMD APM volume 2, table 15-34).

use alloc::vec::Vec;

use polder_units::{Geometry, Gfn, Level, PageIndex, PageRange, Pfn};

use crate::plant::Bug;
use crate::{Engine, GuestAnswer, MemoryFault, Response, Step, View, Visibility, VmId};

/// What [`can_install_large_rmp_entry`] looks at: a 2M page of the object, and what is behind it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LargeRmpEntry {
    /// The level of the folio that the page is part of.
    pub folio: Level,
    /// Its first page of the object.
    pub page: PageIndex,
    /// The frame of that.
    pub frame: Pfn,
    /// The guest frame of that.
    pub gfn: Gfn,
    /// Whether one binding shows all of it.
    pub bound: bool,
    /// The pages that the operation is about.
    pub within: PageRange,
    /// Whether no entry of its frames is assigned.
    pub unassigned: bool,
}

/// Why a 2M page gets 4K entries.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, thiserror::Error)]
pub enum NotLarge {
    /// A large entry swallows what else lies in its frames: all of them are to be one folio's.
    #[error("its folio is smaller")]
    Folio,
    /// A folio sits at a multiple of its size, so the page is to start at one.
    #[error("its first page is not aligned")]
    Page,
    /// RMPUPDATE takes no other.
    #[error("its first frame is not aligned")]
    Frame,
    /// No access passes a large entry of an unaligned guest frame.
    #[error("its first guest frame is not aligned")]
    Gfn,
    /// Stage 2 maps no larger than a binding; and what another one shows of it is at other guest
    /// frames.
    #[error("no binding shows all of it")]
    Binding,
    /// The rest of it is not the operation's to change.
    #[error("the operation is about a part of it only")]
    Range,
    /// RMPUPDATE takes no 4K entry for a part of a large one (`FAIL_OVERLAP`).
    #[error("a part of it is assigned already")]
    Assigned,
}

/// Whether a 2M page can be one large RMP entry: the check that thread 1 asks for, by its name
/// there, with the clauses that were found since. Page, frame and guest frame that are all aligned
/// are congruent, too.
///
/// # Errors
/// The first clause that does not hold.
pub fn can_install_large_rmp_entry(
    entry: &LargeRmpEntry,
    geometry: Geometry,
) -> Result<(), NotLarge> {
    let pages = geometry.pages(Level::Size2M);
    let clauses = [
        (entry.folio >= Level::Size2M, NotLarge::Folio),
        (entry.page.is_multiple_of(pages), NotLarge::Page),
        (entry.frame.is_multiple_of(pages), NotLarge::Frame),
        (entry.gfn.is_multiple_of(pages), NotLarge::Gfn),
        (entry.bound, NotLarge::Binding),
        (entry.within.contains_range(around(entry.page, geometry)), NotLarge::Range),
        (entry.unassigned, NotLarge::Assigned),
    ];
    clauses.into_iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, clause)| Err(clause))
}

/// The 2M page around a page.
fn around(page: PageIndex, geometry: Geometry) -> PageRange {
    PageRange::enclosing(page, Level::Size2M, geometry)
}

/// The parts of a range in each 2M page that it touches.
fn by_large_page(range: PageRange, geometry: Geometry) -> impl Iterator<Item = PageRange> {
    let mut rest = Some(range);
    core::iter::from_fn(move || {
        let left = rest?;
        let part = left.intersection(around(left.start(), geometry))?;
        rest = PageRange::between(part.end(), left.end());
        Some(part)
    })
}

impl Engine {
    /// The steps that make the RMP agree with `parts` becoming `to`. None where there is no RMP.
    pub(crate) fn rmp_steps(&self, parts: &[PageRange], to: Visibility) -> Vec<Step> {
        if !self.config.platform.has_rmp() {
            return Vec::new();
        }
        let geometry = self.config.geometry;
        let chunks = parts.iter().flat_map(|&part| by_large_page(part, geometry));
        let mut steps = Vec::new();
        let mut smashed = None;
        for part in chunks {
            let large = around(part.start(), geometry);
            match to {
                Visibility::Private => steps.push(Step::Assign(part)),
                Visibility::Shared => {
                    if part != large && smashed != Some(large) {
                        steps.push(Step::Smash(large));
                        smashed = Some(large);
                    }
                    steps.push(Step::Unassign(part));
                }
            }
        }
        if self.plants.has(Bug::ForgottenSmash) {
            steps.retain(|step| !matches!(step, Step::Smash(_)));
        }
        steps
    }

    /// Answers a guest's access or PVALIDATE that the RMP refuses for its size (`#NPF` with the RMP
    /// bit): the large page around it is to be smashed, and taken out of stage 2. Nothing is
    /// claimed of it by an operation meanwhile, which might be about to do the same.
    pub fn size_fault(&mut self, vm: VmId, gfn: Gfn) -> GuestAnswer {
        let geometry = self.config.geometry;
        let Some((page, _)) = self.bindings.page_of(vm, gfn, geometry) else {
            return GuestAnswer::Exit(MemoryFault::Unbound(polder_units::GfnRange::one(gfn)));
        };
        let all = PageRange::between(0, self.config.pages.get()).expect("an object has pages");
        let range = around(page, geometry).intersection(all).expect("the page lies in both");
        match self.check_claims(range) {
            Ok(()) => {}
            Err(crate::Blocked::Abandoned(operation)) => return GuestAnswer::Undo(operation),
            Err(_) => return GuestAnswer::Wait,
        }
        let answer = self.answer(View::Guest, range, Response::Map);
        GuestAnswer::Now { answer, level: Level::Size2M }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2M pages of four.
    fn geometry() -> Geometry {
        Geometry::new(4, 4).unwrap()
    }

    /// An entry for which every clause holds.
    fn entry() -> LargeRmpEntry {
        LargeRmpEntry {
            folio: Level::Size2M,
            page: 8u32.into(),
            frame: 20u32.into(),
            gfn: 12u32.into(),
            bound: true,
            within: PageRange::between(8, 12).unwrap(),
            unassigned: true,
        }
    }

    fn can(change: impl FnOnce(&mut LargeRmpEntry)) -> Result<(), NotLarge> {
        let mut entry = entry();
        change(&mut entry);
        can_install_large_rmp_entry(&entry, geometry())
    }

    #[test]
    fn a_2m_folio_that_is_aligned_everywhere_and_all_unassigned_gets_a_large_entry() {
        assert_eq!(can(|_| ()), Ok(()));
    }

    #[test]
    fn a_1g_folio_gets_large_entries_and_a_4k_folio_none() {
        assert_eq!(can(|entry| entry.folio = Level::Size1G), Ok(()));
        assert_eq!(can(|entry| entry.folio = Level::Size4K), Err(NotLarge::Folio));
    }

    #[test]
    fn the_offset_in_the_object_is_aligned() {
        assert_eq!(can(|entry| entry.page = 9u32.into()), Err(NotLarge::Page));
    }

    #[test]
    fn the_frame_is_aligned() {
        assert_eq!(can(|entry| entry.frame = 22u32.into()), Err(NotLarge::Frame));
    }

    #[test]
    fn the_guest_frame_is_aligned() {
        assert_eq!(can(|entry| entry.gfn = 13u32.into()), Err(NotLarge::Gfn));
    }

    #[test]
    fn one_binding_shows_all_of_it() {
        assert_eq!(can(|entry| entry.bound = false), Err(NotLarge::Binding));
    }

    #[test]
    fn all_of_it_is_within_what_the_operation_is_about() {
        let within = |start, end| PageRange::between(start, end).unwrap();
        assert_eq!(can(|entry| entry.within = within(8, 11)), Err(NotLarge::Range));
        assert_eq!(can(|entry| entry.within = within(9, 12)), Err(NotLarge::Range));
        assert_eq!(can(|entry| entry.within = within(0, 64)), Ok(()));
    }

    #[test]
    fn no_part_of_it_is_assigned() {
        assert_eq!(can(|entry| entry.unassigned = false), Err(NotLarge::Assigned));
    }
}
