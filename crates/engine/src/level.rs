//! At which level a page can be mapped, and what keeps it from a larger one (INV-5).
//!
//! ```text
//! mapping level <= folio, hardware entry, uniform visibility, binding, view,
//!                  and nothing in it that an operation holds or that is in quarantine
//! ```

use core::fmt;

use polder_units::{Level, PageIndex, PageRange};

use crate::plant::Bug;
use crate::{Binding, Engine, View};

/// What bounds the level at which a page is mapped.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Limit {
    /// The folio that the page lies in.
    Folio,
    /// The entry that the hardware keeps of its frame (the RMP).
    HardwareEntry,
    /// Its neighbours are not all of the same visibility and as whole, or the object ends.
    Visibility,
    /// An operation holds a neighbour.
    Operation,
    /// A neighbour is in quarantine.
    Quarantine,
    /// The binding: gfns and pages are not congruent, or it has a part of the larger page only.
    Binding,
    /// The view does not map larger pages.
    View,
    /// What guests write is logged, page by page.
    DirtyLog,
}

impl Limit {
    /// Every limit.
    pub const ALL: [Self; 8] = [
        Self::Folio,
        Self::HardwareEntry,
        Self::Visibility,
        Self::Operation,
        Self::Quarantine,
        Self::Binding,
        Self::View,
        Self::DirtyLog,
    ];
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Folio => "folio",
            Self::HardwareEntry => "hardware entry",
            Self::Visibility => "visibility",
            Self::Operation => "operation",
            Self::Quarantine => "quarantine",
            Self::Binding => "binding",
            Self::View => "view",
            Self::DirtyLog => "dirty log",
        })
    }
}

/// The largest level that each [`Limit`] allows, in the order of [`Limit::ALL`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LevelLimits([Level; Limit::ALL.len()]);

impl LevelLimits {
    /// The level that a limit allows.
    pub const fn of(&self, limit: Limit) -> Level {
        self.0[limit as usize]
    }

    /// Each limit, with the level that it allows.
    pub fn iter(&self) -> impl Iterator<Item = (Limit, Level)> + '_ {
        Limit::ALL.into_iter().zip(self.0)
    }

    /// The level at which the page can be mapped: the smallest of all.
    pub fn level(&self) -> Level {
        self.0.into_iter().min().unwrap_or(Level::Size4K)
    }

    /// The first of the limits that keep the page from being mapped larger; `None` at 1G.
    pub fn limiting(&self) -> Option<Limit> {
        let level = self.level();
        let first = self.iter().find(|&(_, allowed)| allowed == level);
        first.filter(|_| level < Level::Size1G).map(|(limit, _)| limit)
    }

    /// The same where the hardware's entry for the page allows no more than `level`.
    #[must_use]
    pub const fn with_hardware(mut self, level: Level) -> Self {
        self.0[Limit::HardwareEntry as usize] = level;
        self
    }
}

impl Engine {
    /// What bounds the level at which a page of the object can be mapped: in the host view, or for
    /// a guest that sees it by `binding`. What the hardware has of its frame the host knows:
    /// [`LevelLimits::with_hardware`]; and whether it logs what guests write.
    ///
    /// # Panics
    /// If the page lies past the object.
    pub fn level_limits(
        &self,
        view: View,
        page: PageIndex,
        binding: Option<&Binding>,
    ) -> LevelLimits {
        let geometry = self.config.geometry;
        let bound = binding.map_or(Level::Size1G, |binding| binding.level(page, geometry));
        self.limits_within(view, page, bound)
    }

    /// As [`Self::level_limits`], with the level that the binding allows.
    pub(crate) fn limits_within(&self, view: View, page: PageIndex, bound: Level) -> LevelLimits {
        let around = |level| PageRange::enclosing(page, level, self.config.geometry);
        let largest = |fits: &dyn Fn(PageRange) -> bool| {
            let mut levels = Level::ALL.into_iter().skip(1);
            let failing = levels.find(|&level| !fits(around(level)));
            failing.map_or(Level::Size1G, |level| level.smaller().unwrap_or(Level::Size4K))
        };
        let claims_count = !self.plants.has(Bug::LargeOverClaimed);
        let view_level = match view {
            View::Host => self.config.host_view_level,
            View::Guest => Level::Size1G,
        };
        LevelLimits([
            self.folios.level(page),
            Level::Size1G,
            self.pages.level(page),
            largest(&|range| !(claims_count && self.is_claimed(range))),
            largest(&|range| self.quarantine.first_in(range).is_none()),
            bound,
            view_level,
            Level::Size1G,
        ])
    }
}
