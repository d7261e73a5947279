//! The rmap: from a guest frame to the entries that map it, so that who takes memory away finds
//! them whatever linear addresses they are at.

use alloc::vec::Vec;

use polder_units::{Gfn, Level};

use super::{At, Flush, Key, ShadowMmu};

impl ShadowMmu {
    /// The entries that map one of the guest frames `[start..end)`.
    pub(super) fn mappings_of(&self, start: u64, end: u64) -> Vec<(Level, At)> {
        let mut found = Vec::new();
        for level in Level::ALL {
            let first = start & !(self.geometry.pages(level).get() - 1);
            let here = self.rmap[level as usize].range(first..end).flat_map(|(_, at)| at);
            found.extend(here.map(|at| (level, *at)));
        }
        found
    }

    pub(super) fn forget(&mut self, level: Level, gfn: Gfn, at: At) {
        let rmap = &mut self.rmap[level as usize];
        if let Some(there) = rmap.get_mut(&gfn.get()) {
            there.remove(&at);
            if there.is_empty() {
                rmap.remove(&gfn.get());
            }
        }
    }

    /// Takes what maps guest frames `[start..end)` away, and the shadows of tables in them.
    pub(crate) fn zap(&mut self, start: u64, end: u64) -> bool {
        let mappings = self.mappings_of(start, end);
        let tables: Vec<Key> = self.of_tables(start, end).map(|(key, _)| key).collect();
        let any = !mappings.is_empty() || !tables.is_empty();
        for (_, at) in mappings {
            let _: Flush = self.drop_entry(at);
        }
        for key in tables {
            let _: Flush = self.free(key);
        }
        any
    }

    /// Clears the accessed bits of what maps guest frames `[start..end)`; whether one was set.
    pub(crate) fn age(&mut self, start: u64, end: u64) -> bool {
        let mut any = false;
        for (_, at) in self.mappings_of(start, end) {
            let accessed = self.leaf_mut(at).map(|leaf| &mut leaf.accessed);
            any |= accessed.is_some_and(|accessed| core::mem::replace(accessed, false));
        }
        any
    }
}
