//! What a guest writes to tables that are shadowed.
//!
//! - **Write-tracking**: a guest frame with a shadow page that is in sync is mapped read-only, by
//!   every root, and in no large page. What a guest writes there is carried out by the hypervisor,
//!   which drops the entries written over.
//! - **Unsync**: a table of the last level is let out of sync at the first write, because guests
//!   write many entries in a row. What it shadows is stale then, as a TLB is, until the guest
//!   flushes: INVLPG of a page, a load of CR3, VMRUN.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use polder_units::{Gfn, Level};

use super::{Entry, Flush, Key, Page, ShadowMmu};
use crate::guest_table::{GuestMemory, Pte};
use crate::table::Table;
use crate::vm::TdpEntry;

impl ShadowMmu {
    /// Whether a guest frame is mapped read-only because it has shadow pages in sync.
    pub(crate) fn is_tracked(&self, gfn: Gfn) -> bool {
        !self.tracked.is_empty() && self.tracked.contains_key(&gfn.get())
    }

    /// Whether one of the guest frames `[start..end)` is.
    pub(crate) fn tracks_in(&self, start: u64, end: u64) -> bool {
        !self.tracked.is_empty() && self.tracked.range(start..end).next().is_some()
    }

    /// Whether every shadow page of a frame is of the last level, so that it may go out of sync.
    pub(crate) fn may_unsync(&self, gfn: Gfn) -> bool {
        self.pages_of(gfn).all(|key| key.level == 1)
    }

    /// The indirect pages of a frame that are in sync.
    fn pages_of(&self, gfn: Gfn) -> impl Iterator<Item = Key> {
        self.of_tables(gfn.get(), gfn.get() + 1)
            .filter(|(_, page)| !page.unsync)
            .map(|(key, _)| key)
    }

    /// The indirect pages of frames `[start..end)`.
    pub(super) fn of_tables(&self, start: u64, end: u64) -> impl Iterator<Item = (Key, &Page)> {
        let first = |gfn| Key { gfn, level: 0, direct: false, writable: false };
        let range = self.pages.range(first(start)..first(end));
        range.filter(|(key, _)| !key.direct).map(|(key, page)| (*key, page))
    }

    /// Has a guest frame mapped read-only, by small pages, by every root.
    pub(super) fn track(&mut self, gfn: u64, tdp: &mut Table<TdpEntry>) -> Flush {
        let count = self.tracked.entry(gfn).or_insert(0);
        *count += 1;
        if *count > 1 {
            return Flush::NO;
        }
        let mut flush = Flush::NO;
        if let Some(found) = tdp.get_mut(gfn) {
            if found.level != Level::Size4K {
                tdp.remove(gfn);
                flush.0 = true;
            } else if core::mem::replace(&mut found.entry.writable, false) {
                flush.0 = true;
            }
        }
        for (level, at) in self.mappings_of(gfn, gfn + 1) {
            if level != Level::Size4K {
                flush.and(self.drop_entry(at));
            } else if let Some(leaf) = self.leaf_mut(at) {
                flush.0 |= core::mem::replace(&mut leaf.writable, false);
            }
        }
        flush
    }

    pub(super) fn untrack(&mut self, gfn: u64) {
        if let Some(count) = self.tracked.get_mut(&gfn) {
            *count -= 1;
            if *count == 0 {
                self.tracked.remove(&gfn);
            }
        }
    }

    /// Lets the shadow pages of a frame, all of the last level, out of sync: it can be written to.
    pub(crate) fn unsync(&mut self, gfn: Gfn) {
        for key in self.pages_of(gfn).collect::<Vec<_>>() {
            if let Some(page) = self.pages.get_mut(&key) {
                page.unsync = true;
            }
        }
        self.tracked.remove(&gfn.get());
    }

    /// A guest has written `len` bytes at `offset` of a frame: the entries there are dropped.
    pub(crate) fn written(&mut self, gfn: Gfn, offset: u64, len: usize) -> Flush {
        let last = (offset + (len as u64).max(1) - 1) / 8;
        let index = |word: u64| u16::try_from(word).unwrap_or(u16::MAX);
        let over = index(offset / 8)..=index(last);
        let mut flush = Flush::NO;
        for key in self.pages_of(gfn).collect::<Vec<_>>() {
            let entries = self.pages.get(&key).map(|page| page.entries.range(over.clone()));
            let indices: Vec<u16> = entries.into_iter().flatten().map(|(at, _)| *at).collect();
            for index in indices {
                flush.and(self.drop_entry((key, index)));
            }
        }
        flush
    }

    /// Reads a table again, that has been let out of sync: what it no longer says is dropped.
    fn sync(&mut self, key: Key, memory: &GuestMemory<'_>, tdp: &mut Table<TdpEntry>) -> Flush {
        let table = Gfn::new(key.gfn);
        let entries = self.pages.get(&key).map(|page| &page.entries);
        let entries: Vec<(u16, Entry)> =
            entries.into_iter().flatten().map(|(index, entry)| (*index, *entry)).collect();
        let mut flush = Flush::NO;
        for (index, entry) in entries {
            let (Some(table), Entry::Leaf(leaf)) = (table, entry) else { continue };
            let Ok(pte) = memory.entry(table, index) else { return self.free(key) };
            if !pte.has(Pte::PRESENT | Pte::USER | Pte::ACCESSED) || pte.gfn() != leaf.gfn {
                flush.and(self.drop_entry((key, index)));
            } else if leaf.writable && !pte.has(Pte::WRITABLE | Pte::DIRTY) {
                flush.0 = true;
                if let Some(leaf) = self.leaf_mut((key, index)) {
                    leaf.writable = false;
                }
            }
        }
        if let Some(page) = self.pages.get_mut(&key) {
            page.unsync = false;
            flush.and(self.track(key.gfn, tdp));
        }
        flush
    }

    /// Reads every table below a root again that is out of sync.
    pub(crate) fn sync_root(
        &mut self,
        root: Gfn,
        memory: &GuestMemory<'_>,
        tdp: &mut Table<TdpEntry>,
    ) -> Flush {
        self.sync_below(Key::top(root), memory, tdp)
    }

    pub(super) fn sync_below(
        &mut self,
        key: Key,
        memory: &GuestMemory<'_>,
        tdp: &mut Table<TdpEntry>,
    ) -> Flush {
        let (mut all, mut seen) = (alloc::vec![key], BTreeSet::new());
        let mut flush = Flush::NO;
        while let Some(key) = all.pop() {
            let Some(page) = self.pages.get(&key) else { continue };
            if page.unsync {
                flush.and(self.sync(key, memory, tdp));
                continue;
            }
            let children = page.entries.values().filter_map(|entry| match entry {
                Entry::Table(child) => Some(*child),
                Entry::Leaf(_) => None,
            });
            all.extend(children.filter(|child| seen.insert(*child)));
        }
        flush
    }

    /// The guest flushes a page: what a table out of sync has of it is dropped.
    pub(crate) fn invlpg(&mut self, root: Gfn, page: u64) -> Flush {
        let Some(found) = self.find(root, page) else { return Flush::NO };
        let unsync = self.pages.get(&found.at.0).is_some_and(|page| page.unsync);
        if unsync { self.drop_entry(found.at) } else { Flush::NO }
    }
}
