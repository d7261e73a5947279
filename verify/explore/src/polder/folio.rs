//! The folios of memory of a pool, by what the requests that were granted make of them: what is
//! shared in part is split, along the path; what has become private as a whole is merged.

use polder_explored_engine::Visibility;
use polder_units::Level;

use super::check::broken;
use super::kept::Pages;
use super::setup::Setup;
use super::{World, start};
use crate::system::Violation;

/// The level that every page's folio has at first.
pub(super) fn first(setup: &Setup) -> u8 {
    if setup.pooled { start::pooled_level(setup) as u8 } else { 0 }
}

impl World {
    /// The pages of a level around a page, as a set.
    fn block(&self, level: Level, page: u8) -> Pages {
        let pages = self.setup.geometry.pages(level).get();
        let first = u64::from(page) - u64::from(page) % pages;
        (first..first + pages).filter(|&page| page < 8).fold(0, |set, page| set | 1 << page)
    }

    /// Whether all of a set is private, or all of it shared.
    fn uniform(&self, pages: Pages) -> bool {
        [0, pages].contains(&(self.promised.private & pages))
    }

    /// Works out what becomes of folios by a conversion of pages, which is true by now.
    pub(super) fn reshaped(&mut self, pages: Pages, to: Visibility) {
        if !self.setup.pooled {
            return;
        }
        for level in [Level::Size1G, Level::Size2M] {
            for page in 0..self.setup.pages {
                let is_whole = self.promised.folios[usize::from(page)] >= level as u8;
                let block = self.block(level, page);
                if is_whole && !self.uniform(block) {
                    self.set_level(block, level as u8 - 1);
                }
            }
        }
        if to == Visibility::Shared {
            return;
        }
        let largest = start::pooled_level(&self.setup);
        for level in [Level::Size2M, Level::Size1G].into_iter().filter(|&it| it <= largest) {
            for page in (0..self.setup.pages).filter(|page| pages & 1 << page != 0) {
                let block = self.block(level, page);
                let pieces = (0..8).filter(|page| block & 1 << page != 0);
                let mut pieces = pieces.map(|page: usize| self.promised.folios[page]);
                let whole = pieces.all(|folio| folio == level as u8 - 1);
                if whole && block & !self.promised.private & !self.promised.quarantine == 0 {
                    self.set_level(block, level as u8);
                }
            }
        }
    }

    fn set_level(&mut self, pages: Pages, level: u8) {
        for page in (0..8).filter(|page| pages & 1 << page != 0) {
            self.promised.folios[page] = level;
        }
    }

    /// Whether the machine has the folios that were worked out. For a state at rest.
    pub(super) fn check_folios(&self, out: Pages) -> Result<(), Violation> {
        if !self.setup.pooled {
            return Ok(());
        }
        for page in 0..self.setup.pages {
            let backing = self.machine.machine.backing(self.parts.object, u32::from(page).into());
            let Ok(Some(backing)) = backing else { continue };
            let expected = self.promised.folios[usize::from(page)];
            if backing.level as u8 != expected && out & self.block(Level::Size1G, page) == 0 {
                let what = format!("page {page} is of a {} folio, and should not", backing.level);
                return broken("INV-5", what);
            }
        }
        Ok(())
    }
}
