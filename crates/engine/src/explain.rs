//! Why a page is as it is: all that the engine knows of one page, and which clause keeps it from
//! being mapped by a larger one.
//!
//! The levels are those of the answers to faults ([`Engine::level_limits`]); a test compares the
//! two.

use alloc::vec::Vec;
use core::fmt;

use polder_units::{Gfn, Level, PageIndex, PageRange};

use crate::history::Past;
use crate::{
    Activity, Binding, Engine, Holder, Limit, PageFacts, PinKind, Population, Slot, View,
    Visibility, VmId,
};

/// What limits the level at which a page can be mapped (INV-5): a [`Limit`], in full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Clause {
    /// The folio that the page lies in is of this level.
    Folio(Level),
    /// The hardware's entry for its frame is of this level.
    HardwareEntry(Level),
    /// Guest frames and page indices are not congruent modulo the level.
    Alignment,
    /// The larger page does not lie in the binding as a whole.
    Fit,
    /// The view maps no larger pages.
    View,
    /// What guests write is logged by 4K.
    DirtyLog,
    /// The larger page does not lie in the object as a whole.
    End,
    /// A page of the larger one is of the other kind: this is the first.
    Visibility {
        /// That page.
        page: PageIndex,
        /// What it is.
        is: Visibility,
    },
    /// Of a page of the larger one contents are owed, and of this one not, or the other way: this
    /// is the first.
    Population {
        /// That page.
        page: PageIndex,
    },
    /// An operation has a part of the larger page.
    Operation {
        /// What it is doing.
        by: Activity,
        /// What it has.
        range: PageRange,
    },
    /// A page of the larger one is in quarantine: this is the first.
    Quarantine {
        /// That page.
        page: PageIndex,
    },
}

impl fmt::Display for Clause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folio(level) => write!(f, "its folio is of {level}"),
            Self::HardwareEntry(level) => write!(f, "the entry of its frame is of {level}"),
            Self::Alignment => f.write_str("guest frames and pages are not aligned alike"),
            Self::Fit => f.write_str("the binding ends within the larger page"),
            Self::View => f.write_str("the view maps no larger pages"),
            Self::DirtyLog => f.write_str("the dirty log is on, and is of 4K pages"),
            Self::End => f.write_str("the object ends within the larger page"),
            Self::Visibility { page, is } => write!(f, "page {page} is {is}"),
            Self::Population { page } => {
                write!(f, "of page {page} the contents are owed, or of this one, and not of both")
            }
            Self::Operation { by, range } => write!(f, "a {by} holds pages {range}"),
            Self::Quarantine { page } => write!(f, "page {page} is in quarantine"),
        }
    }
}

impl Clause {
    /// Which of the limits it is.
    pub const fn limit(self) -> Limit {
        match self {
            Self::Folio(_) => Limit::Folio,
            Self::HardwareEntry(_) => Limit::HardwareEntry,
            Self::Alignment | Self::Fit => Limit::Binding,
            Self::View => Limit::View,
            Self::DirtyLog => Limit::DirtyLog,
            Self::End | Self::Visibility { .. } | Self::Population { .. } => Limit::Visibility,
            Self::Operation { .. } => Limit::Operation,
            Self::Quarantine { .. } => Limit::Quarantine,
        }
    }
}

/// The largest level at which a page can be mapped, and what keeps it from the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LevelLimit {
    /// The level.
    pub level: Level,
    /// The clause; none where there is no larger level.
    pub by: Option<Clause>,
}

/// Where a VM sees a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shown {
    /// The VM.
    pub vm: VmId,
    /// By which slot.
    pub slot: Slot,
    /// At which frame.
    pub gfn: Gfn,
    /// What the binding wishes the page to be.
    pub wanted: Visibility,
    /// How large it can be mapped there.
    pub limit: LevelLimit,
}

/// An operation that holds a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// What it is doing.
    pub by: Activity,
    /// The run of pages that it holds.
    pub range: PageRange,
    /// Whether it is being undone.
    pub undoing: bool,
    /// Whether nobody drives it any more: the next who meets it undoes it.
    pub abandoned: bool,
}

/// A pin on a page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pinned {
    /// The pages that are pinned with it.
    pub range: PageRange,
    /// What kind of pin.
    pub kind: PinKind,
    /// Who holds it.
    pub holder: Holder,
}

/// All that is known of a page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Explanation {
    /// The page.
    pub page: PageIndex,
    /// What is granted, and whether its contents are there.
    pub facts: PageFacts,
    /// Its contents were to come, and did not.
    pub failed: bool,
    /// It is out of use, for good.
    pub quarantined: bool,
    /// The views that hold a poison marker in its place.
    pub markers: Vec<View>,
    /// The operation that holds it.
    pub held: Option<Held>,
    /// How many answers and copies are in flight on it.
    pub in_flight: usize,
    /// Who has it pinned.
    pub pins: Vec<Pinned>,
    /// Who sees it, and how large at most.
    pub shown: Vec<Shown>,
    /// How large the host view can map it.
    pub host_view: LevelLimit,
    /// The last operations on it, the last of them last.
    pub past: Vec<Past>,
}

impl Engine {
    /// Tells all that is known of a page, which lies in the object.
    pub fn explain(&self, page: PageIndex) -> Explanation {
        let one = PageRange::one(page);
        let facts = self.pages.get(page);
        let shown = self.bindings().filter(|(.., binding)| binding.pages().contains(page));
        let shown = shown.map(|(vm, slot, binding)| self.shown_at(page, (vm, slot), binding));
        let held = self.operations.iter().find_map(|record| {
            Some(Held {
                by: record.activity,
                range: record.claim_on(one)?,
                undoing: record.is_undoing(),
                abandoned: record.is_abandoned(),
            })
        });
        Explanation {
            page,
            facts,
            failed: self.failed.contains(page),
            quarantined: self.quarantine.contains(page),
            markers: [View::Host, View::Guest]
                .into_iter()
                .filter(|&view| self.markers(view).contains(page))
                .collect(),
            held,
            in_flight: self.in_flight.iter().filter(|one| one.range().contains(page)).count(),
            pins: self.pins.on(page),
            shown: shown.collect(),
            host_view: self.limit(View::Host, page, None),
            past: self.history.of(page),
        }
    }

    fn shown_at(&self, page: PageIndex, (vm, slot): (VmId, Slot), binding: &Binding) -> Shown {
        let into = page.get() - binding.pages().start().get();
        let gfn = Gfn::new(binding.gfns().start().get() + into).expect("a frame of the binding");
        let wishes = self.wishes_of(vm, slot, PageRange::one(page));
        let wanted = wishes.first().map_or(self.pages.get(page).visibility, |wish| wish.wanted);
        let limit = self.limit(View::Guest, page, Some(binding));
        Shown { vm, slot, gfn, wanted, limit }
    }

    /// The level at which a page can be mapped, and what keeps it from the next.
    fn limit(&self, view: View, page: PageIndex, binding: Option<&Binding>) -> LevelLimit {
        let limits = self.level_limits(view, page, binding);
        let level = limits.level();
        let larger = Level::ALL.into_iter().find(|&larger| larger > level);
        let by = limits.limiting().zip(larger).map(|(limit, larger)| {
            let around = PageRange::enclosing(page, larger, self.config.geometry);
            match limit {
                Limit::Folio => Clause::Folio(limits.of(Limit::Folio)),
                Limit::HardwareEntry => Clause::HardwareEntry(limits.of(Limit::HardwareEntry)),
                Limit::Visibility => self.not_uniform(page, around),
                Limit::Operation => self.held_in(around),
                Limit::Quarantine => {
                    let first = self.quarantine.first_in(around);
                    Clause::Quarantine { page: first.unwrap_or(page) }
                }
                Limit::Binding => match binding {
                    Some(binding) if larger > binding.congruent() => Clause::Alignment,
                    _ => Clause::Fit,
                },
                Limit::View => Clause::View,
                Limit::DirtyLog => Clause::DirtyLog,
            }
        });
        LevelLimit { level, by }
    }

    /// In what the pages around a page are not like it.
    fn not_uniform(&self, page: PageIndex, around: PageRange) -> Clause {
        if self.check_bounds(around).is_err() {
            return Clause::End;
        }
        let facts = self.pages.get(page);
        let other_kind = |other: PageFacts| other.visibility != facts.visibility;
        if let Some(page) = self.first_page(around, other_kind) {
            return Clause::Visibility { page, is: facts.visibility.other() };
        }
        let other = self.first_page(around, |other| other.population != facts.population);
        Clause::Population { page: other.unwrap_or(page) }
    }

    /// The operation that has a part of these pages.
    fn held_in(&self, around: PageRange) -> Clause {
        let held = self.operations.iter().find_map(|record| {
            Some(Clause::Operation { by: record.activity, range: record.claim_on(around)? })
        });
        held.expect("an operation limits the level")
    }
}

/// Whether contents are owed, in a word.
impl fmt::Display for Population {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Owed => "owed",
            Self::Whole => "whole",
        })
    }
}
