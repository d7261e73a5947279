//! A sparse table by frame number, with entries at three levels: the shape of every page table
//! of the machine, and of its folios, page caches and frame contents.
//!
//! A table holds nothing for what was never set, so a machine of a terabyte costs kilobytes. A
//! walk is at most five loads. Nothing here depends on the order in which entries were set:
//! two tables with the same entries hash alike, whatever happened before.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::hash::{Hash, Hasher};

use polder_units::{Geometry, Level};

/// Slots of one table of 1G slots: the fourth level of x86-64 tables.
const TOP_SHIFT: u32 = 9;

/// How many 1G slots an address space has: 2^52 bytes with [`Geometry::X86_64`], the widest
/// physical address of AMD64 (AMD APM volume 2, section 5.3).
const SLOTS_1G: u64 = 1 << 22;

/// The frames of every address space of a machine, as a number: none lies at or above it.
pub(crate) fn space(geometry: Geometry) -> u64 {
    geometry.pages(Level::Size1G).get() * SLOTS_1G
}

#[derive(Clone)]
enum Slot<E> {
    Empty,
    Leaf(E),
    Table(Box<[Slot<E>]>),
}

/// An entry and the pages it covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Found<T> {
    /// The first frame number it covers.
    pub(crate) start: u64,
    /// Its level.
    pub(crate) level: Level,
    /// The entry.
    pub(crate) entry: T,
}

/// Something is in the way of an insertion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Occupied {
    /// The first frame number of what is in the way.
    pub(crate) start: u64,
}

/// The table. Frame numbers given to it are below [`space`]; what lies above is never found.
#[derive(Clone)]
pub(crate) struct Table<E> {
    shift_2m: u32,
    shift_1g: u32,
    tops: Vec<Vec<Slot<E>>>,
}

/// A frame number, or a part of one, as an index.
#[expect(clippy::cast_possible_truncation, reason = "below 2^40: `space` bounds every number")]
pub(crate) fn index(number: u64) -> usize {
    number as usize
}

fn empty<E>(slots: usize) -> Box<[Slot<E>]> {
    (0..slots).map(|_| Slot::Empty).collect()
}

impl<E> Slot<E> {
    fn is_vacant(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Leaf(_) => false,
            Self::Table(slots) => slots.iter().all(Self::is_vacant),
        }
    }
}

impl<E> Table<E> {
    pub(crate) fn new(geometry: Geometry) -> Self {
        let shift = |level| geometry.pages(level).get().trailing_zeros();
        Self { shift_2m: shift(Level::Size2M), shift_1g: shift(Level::Size1G), tops: Vec::new() }
    }

    fn shift(&self, level: Level) -> u32 {
        match level {
            Level::Size4K => 0,
            Level::Size2M => self.shift_2m,
            Level::Size1G => self.shift_1g,
        }
    }

    pub(crate) fn pages(&self, level: Level) -> u64 {
        1 << self.shift(level)
    }

    /// The slots of a table whose slots are of `level`.
    fn slots(&self, level: Level) -> usize {
        match level {
            Level::Size4K => 1 << self.shift_2m,
            Level::Size2M => 1 << (self.shift_1g - self.shift_2m),
            Level::Size1G => 1 << TOP_SHIFT,
        }
    }

    fn slot_index(&self, number: u64, level: Level) -> usize {
        index(number >> self.shift(level)) & (self.slots(level) - 1)
    }

    fn aligned(&self, number: u64, level: Level) -> u64 {
        number & !(self.pages(level) - 1)
    }

    /// The entry that covers `number`.
    #[inline]
    pub(crate) fn get(&self, number: u64) -> Option<Found<&E>> {
        let top = self.tops.get(index(number >> self.shift_1g >> TOP_SHIFT))?;
        let mut slot = top.get(self.slot_index(number, Level::Size1G))?;
        for level in [Level::Size1G, Level::Size2M, Level::Size4K] {
            match slot {
                Slot::Empty => return None,
                Slot::Leaf(entry) => {
                    return Some(Found { start: self.aligned(number, level), level, entry });
                }
                Slot::Table(slots) => {
                    slot = slots.get(self.slot_index(number, level.smaller()?))?;
                }
            }
        }
        None
    }

    /// The entry that covers `number`, to change it.
    #[inline]
    pub(crate) fn get_mut(&mut self, number: u64) -> Option<Found<&mut E>> {
        let level = self.get(number)?.level;
        let start = self.aligned(number, level);
        match self.slot_mut(number, level)? {
            Slot::Leaf(entry) => Some(Found { start, level, entry }),
            _ => None,
        }
    }

    /// The slot of `level` at `number`, if the tables above it exist.
    fn slot_mut(&mut self, number: u64, level: Level) -> Option<&mut Slot<E>> {
        let at = |level| self.slot_index(number, level);
        let (at_1g, at_2m, at_4k) = (at(Level::Size1G), at(Level::Size2M), at(Level::Size4K));
        let top = self.tops.get_mut(index(number >> self.shift_1g >> TOP_SHIFT))?;
        let mut slot = top.get_mut(at_1g)?;
        for (below, next) in [(Level::Size2M, at_2m), (Level::Size4K, at_4k)] {
            if below < level {
                break;
            }
            let Slot::Table(slots) = slot else { return None };
            slot = slots.get_mut(next)?;
        }
        Some(slot)
    }

    /// Sets the entry of `level` at `number`, which must be vacant.
    pub(crate) fn insert(&mut self, number: u64, level: Level, entry: E) -> Result<(), Occupied> {
        let start = self.aligned(number, level);
        if let Some(found) = self.first_in(start, start + self.pages(level)) {
            return Err(Occupied { start: found.start });
        }
        *self.slot_or_new(number, level) = Slot::Leaf(entry);
        Ok(())
    }

    /// The slot of `level` at `number`; the tables above it are made. No leaf covers it.
    fn slot_or_new(&mut self, number: u64, level: Level) -> &mut Slot<E> {
        let number_of = |level| self.slots(level);
        let (slots_2m, slots_4k) = (number_of(Level::Size2M), number_of(Level::Size4K));
        let at = |level| self.slot_index(number, level);
        let (at_1g, at_2m, at_4k) = (at(Level::Size1G), at(Level::Size2M), at(Level::Size4K));
        let top_index = index(number >> self.shift_1g >> TOP_SHIFT);
        if self.tops.len() <= top_index {
            self.tops.resize_with(top_index + 1, Vec::new);
        }
        let top = &mut self.tops[top_index];
        if top.len() <= at_1g {
            top.resize_with(at_1g + 1, || Slot::Empty);
        }
        let mut slot = &mut top[at_1g];
        let below = [(Level::Size2M, at_2m, slots_2m), (Level::Size4K, at_4k, slots_4k)];
        for (_, next, slots) in below.into_iter().filter(|(below, ..)| *below >= level) {
            assert!(!matches!(slot, Slot::Leaf(_)), "an entry covers {number:#x} already");
            if let Slot::Empty = slot {
                *slot = Slot::Table(empty(slots));
            }
            let Slot::Table(slots) = slot else { unreachable!("it was made a table above") };
            slot = &mut slots[next];
        }
        slot
    }

    /// Takes away the entry that covers `number`.
    pub(crate) fn remove(&mut self, number: u64) -> Option<Found<E>> {
        let level = self.get(number)?.level;
        let start = self.aligned(number, level);
        let slot = self.slot_mut(number, level)?;
        let Slot::Leaf(entry) = core::mem::replace(slot, Slot::Empty) else { return None };
        // A table is given back when its last slot is emptied and the others are empty: enough
        // for ranges taken away in order, and no count to keep for each table.
        for parent in level.larger().into_iter().chain([Level::Size1G]) {
            let last = (start + self.pages(level)).is_multiple_of(self.pages(parent));
            if let Some(slot) = self.slot_mut(number, parent)
                && last
                && parent > level
                && slot.is_vacant()
            {
                *slot = Slot::Empty;
            }
        }
        Some(Found { start, level, entry })
    }

    /// The first entry that covers frames of `[number..end)`; it may start before.
    pub(crate) fn first_in(&self, number: u64, end: u64) -> Option<Found<&E>> {
        let found = self.get(number);
        if found.is_some() || end <= number + 1 {
            return found.filter(|_| number < end);
        }
        let first_1g = number >> self.shift_1g;
        let (first_top, mut first) =
            (index(first_1g >> TOP_SHIFT), self.slot_index(number, Level::Size1G));
        for (top_index, top) in self.tops.iter().enumerate().skip(first_top) {
            for (slot_index, slot) in top.iter().enumerate().skip(first) {
                let slot_number = (top_index << TOP_SHIFT | slot_index) as u64;
                let start = slot_number << self.shift_1g;
                if start >= end {
                    return None;
                }
                if let Some(found) = self.first_below(slot, start, Level::Size1G, (number, end)) {
                    return Some(found);
                }
            }
            first = 0;
        }
        None
    }

    fn first_below<'a>(
        &self,
        slot: &'a Slot<E>,
        start: u64,
        level: Level,
        (from, end): (u64, u64),
    ) -> Option<Found<&'a E>> {
        match slot {
            Slot::Empty => None,
            Slot::Leaf(entry) => Some(Found { start, level, entry }),
            Slot::Table(slots) => {
                let below = level.smaller()?;
                let skip = index(from.saturating_sub(start) >> self.shift(below));
                let stop = end.saturating_sub(start).div_ceil(self.pages(below));
                let stop = index(stop.min(slots.len() as u64));
                slots.iter().enumerate().take(stop).skip(skip).find_map(|(at, slot)| {
                    let start = start + ((at as u64) << self.shift(below));
                    self.first_below(slot, start, below, (from, end))
                })
            }
        }
    }

    /// The entries that cover frames of `[start..end)`, in order; the first may start before.
    pub(crate) fn range(&self, start: u64, end: u64) -> impl Iterator<Item = Found<&E>> {
        let mut from = start;
        core::iter::from_fn(move || {
            let found = self.first_in(from, end)?;
            from = found.start + self.pages(found.level);
            Some(found)
        })
    }

    /// Every entry, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Found<&E>> {
        self.range(0, u64::MAX)
    }

    /// The 4K entry at `number`, made by `new` if there is none.
    ///
    /// # Panics
    /// If a larger entry covers it: the caller's table has none.
    pub(crate) fn get_or_insert_with(&mut self, number: u64, new: impl FnOnce() -> E) -> &mut E {
        let slot = self.slot_or_new(number, Level::Size4K);
        if let Slot::Empty = slot {
            *slot = Slot::Leaf(new());
        }
        let Slot::Leaf(entry) = slot else { unreachable!("a 4K slot is never a table") };
        entry
    }

    /// Takes away every entry that covers frames of `[start..end)`, whole.
    pub(crate) fn drain(&mut self, start: u64, end: u64, taken: impl FnMut(Found<E>)) {
        self.drain_if(start, end, |_| true, taken);
    }

    /// Takes away, whole, the `wanted` of the entries that cover frames of `[start..end)`.
    pub(crate) fn drain_if(
        &mut self,
        start: u64,
        end: u64,
        wanted: impl Fn(&E) -> bool,
        mut taken: impl FnMut(Found<E>),
    ) {
        let mut from = start;
        while let Some(found) = self.first_in(from, end) {
            let (start, wanted) = (found.start, wanted(found.entry));
            from = start + self.pages(found.level);
            if let Some(found) = wanted.then(|| self.remove(start)).flatten() {
                taken(found);
            }
        }
    }

    /// Splits the entry that covers `number` into entries of the next smaller level.
    ///
    /// `part` makes each from the old one and its distance from the old one's start, in pages.
    pub(crate) fn split(&mut self, number: u64, part: impl Fn(&E, u64) -> E) {
        let Some((level, below)) =
            self.get(number).and_then(|found| Some((found.level, found.level.smaller()?)))
        else {
            return;
        };
        let (slots, pages) = (self.slots(below) as u64, self.pages(below));
        let Some(slot) = self.slot_mut(number, level) else { return };
        if let Slot::Leaf(entry) = slot {
            *slot = Slot::Table((0..slots).map(|at| Slot::Leaf(part(entry, at * pages))).collect());
        }
    }
}

impl<E: Hash> Hash for Table<E> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for found in self.iter() {
            ((found.start << 2) | found.level as u64).hash(state);
            found.entry.hash(state);
        }
        u64::MAX.hash(state);
    }
}

#[cfg(test)]
mod tests;
