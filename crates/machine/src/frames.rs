//! Physical frames: which are free, and what they contain.
//!
//! Contents are real bytes or symbolic, as chosen when the machine is made. A symbolic frame keeps
//! eight bytes and shows them all over the page (a byte address counts modulo 8), so that
//! a search over states compares a word per frame and can still tell a half-written page from a
//! whole one. Everything else is the same for both.
//!
//! A freed frame keeps what it contained until it is allocated again, as on real hardware without
//! `init_on_free`: who reaches it through a stale translation reads the old bytes. Allocation
//! zeroes (`clear_huge_page`, `clear_highpage` in mm/shmem.c and mm/hugetlb.c).

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};

use polder_units::{Geometry, Level, PageCount, Pfn};

use crate::rmp::Cipher;
use crate::table::{Table, index};

/// What a frame contains.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Contents {
    /// 4096 bytes, zero until first written.
    Bytes,
    /// Eight bytes, repeated over the page: a token for the search over interleavings.
    Symbolic,
}

const PAGE: usize = 4096;
const TOKEN: usize = 8;

/// The frame `offset` further on in the block that starts at `head`.
pub(crate) fn frame_at(head: Pfn, offset: u64) -> Pfn {
    match Pfn::new(head.get() + offset) {
        Some(pfn) => pfn,
        None => unreachable!("no block reaches past the machine's frames"),
    }
}

/// A number of pages of one address space.
pub(crate) fn page_count(pages: u64) -> PageCount {
    match PageCount::new(pages) {
        Some(count) => count,
        None => unreachable!("an address space has fewer than 2^52 pages"),
    }
}

#[derive(Clone, Hash)]
enum Store {
    Bytes(Table<Box<[u8; PAGE]>>),
    Symbolic(Table<[u8; TOKEN]>),
}

/// The frames of a machine.
#[derive(Clone, Hash)]
pub(crate) struct Frames {
    store: Store,
    free: Free,
}

/// Where in what a frame keeps `len` bytes at `offset` of the page lie, run by run.
fn runs(kept: usize, offset: u64, len: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let at = (index(offset) + done) % kept;
        let run = (kept - at).min(len - done);
        let from = done;
        done += run;
        (run > 0).then_some((at, from, run))
    })
}

impl Frames {
    pub(crate) fn new(count: PageCount, geometry: Geometry, contents: Contents) -> Self {
        let store = match contents {
            Contents::Bytes => Store::Bytes(Table::new(geometry)),
            Contents::Symbolic => Store::Symbolic(Table::new(geometry)),
        };
        Self { store, free: Free::new(count, geometry) }
    }

    fn kept(&self, pfn: Pfn) -> Option<&[u8]> {
        Some(match &self.store {
            Store::Bytes(table) => table.get(pfn.get())?.entry.as_slice(),
            Store::Symbolic(table) => table.get(pfn.get())?.entry.as_slice(),
        })
    }

    /// What the frame keeps, as bytes to change; they are allocated now if it was zero.
    fn kept_mut(&mut self, pfn: Pfn) -> &mut [u8] {
        match &mut self.store {
            Store::Bytes(table) => {
                table.get_or_insert_with(pfn.get(), || Box::new([0; PAGE])).as_mut_slice()
            }
            Store::Symbolic(table) => table.get_or_insert_with(pfn.get(), || [0; TOKEN]),
        }
    }

    /// Reads bytes of a frame. `offset + buffer.len()` is at most a page.
    pub(crate) fn read(&self, pfn: Pfn, offset: u64, buffer: &mut [u8]) {
        let Some(kept) = self.kept(pfn) else {
            buffer.fill(0);
            return;
        };
        if let Some(bytes) = kept.get(index(offset)..index(offset) + buffer.len()) {
            buffer.copy_from_slice(bytes);
            return;
        }
        for (at, from, run) in runs(kept.len(), offset, buffer.len()) {
            buffer[from..from + run].copy_from_slice(&kept[at..at + run]);
        }
    }

    /// Reads the 8 bytes at `offset`, which is at most 4088.
    #[inline]
    pub(crate) fn read_u64(&self, pfn: Pfn, offset: u64) -> u64 {
        if let Store::Bytes(table) = &self.store {
            let Some(found) = table.get(pfn.get()) else { return 0 };
            if let Some(word) = found.entry.get(index(offset)..).and_then(<[u8]>::first_chunk) {
                return u64::from_le_bytes(*word);
            }
        }
        let mut word = [0; 8];
        self.read(pfn, offset, &mut word);
        u64::from_le_bytes(word)
    }

    /// Writes bytes of a frame. `offset + bytes.len()` is at most a page.
    pub(crate) fn write(&mut self, pfn: Pfn, offset: u64, bytes: &[u8]) {
        let kept = self.kept_mut(pfn);
        if let Some(kept) = kept.get_mut(index(offset)..index(offset) + bytes.len()) {
            kept.copy_from_slice(bytes);
            return;
        }
        for (at, from, run) in runs(kept.len(), offset, bytes.len()) {
            kept[at..at + run].copy_from_slice(&bytes[from..from + run]);
        }
    }

    /// Writes bytes of a frame as a guest's private memory.
    pub(crate) fn write_private(&mut self, cipher: Cipher, pfn: Pfn, offset: u64, bytes: &[u8]) {
        self.write(pfn, offset, bytes);
        let kept = self.kept_mut(pfn);
        let len = bytes.len().min(kept.len());
        for (at, from, run) in runs(kept.len(), offset, len) {
            cipher.apply(pfn, offset + from as u64, &mut kept[at..at + run]);
        }
    }

    /// Makes a frame contain what another one does.
    pub(crate) fn copy(&mut self, from: Pfn, to: Pfn) {
        let mut bytes = [0; PAGE];
        let kept = self.kept(from).map_or(0, <[u8]>::len);
        self.read(from, 0, &mut bytes[..kept]);
        match kept {
            0 => self.zero(to, PageCount::ONE),
            kept => self.write(to, 0, &bytes[..kept]),
        }
    }

    /// Makes `count` frames from `pfn` on contain zeros.
    pub(crate) fn zero(&mut self, pfn: Pfn, count: PageCount) {
        let (start, end) = (pfn.get(), pfn.get() + count.get());
        match &mut self.store {
            Store::Bytes(table) => table.drain(start, end, |_| ()),
            Store::Symbolic(table) => table.drain(start, end, |_| ()),
        }
    }

    /// Makes what a frame contains a guest's private memory.
    pub(crate) fn encrypt(&mut self, cipher: Cipher, pfn: Pfn) {
        let kept = self.kept_mut(pfn);
        cipher.apply(pfn, 0, kept);
    }

    /// Takes the lowest free block of `level`, as it is; `None` if there is none.
    pub(crate) fn take(&mut self, level: Level) -> Option<Pfn> {
        self.free.take(level).and_then(Pfn::new)
    }

    /// Gives back the block of `level` at `pfn`.
    pub(crate) fn free(&mut self, pfn: Pfn, level: Level) {
        self.free.give(pfn.get(), level);
    }

    /// How many frames are free.
    pub(crate) fn free_count(&self) -> u64 {
        self.free.count()
    }

    /// How many free blocks of `level` there are, not counting those inside larger ones.
    pub(crate) fn free_blocks(&self, level: Level) -> usize {
        self.free.blocks(level)
    }
}

/// The free frames, as aligned blocks as large as they can be: a buddy allocator.
#[derive(Clone, Hash)]
struct Free {
    geometry: Geometry,
    /// The first frames of the free 1G blocks.
    whole: BTreeSet<u64>,
    /// Which parts are free of the 2M (index 0) and 1G (1) blocks that are so in part.
    parts: [BTreeMap<u64, Parts>; 2],
}

/// Which of up to 512 parts of a block are free, a bit each.
#[derive(Clone, Default, Hash)]
struct Parts([u64; 8]);

impl Parts {
    fn all_but_first(count: usize) -> Self {
        let word = |at: usize| match count.saturating_sub(at * 64) {
            0 => 0,
            left @ 1..64 => (1 << left) - 1,
            _ => u64::MAX,
        };
        let mut words = core::array::from_fn(word);
        words[0] &= !1;
        Self(words)
    }

    /// Takes the first one.
    fn pop_first(&mut self) -> Option<usize> {
        let at = self.0.iter().position(|&word| word != 0)?;
        let bit = self.0[at].trailing_zeros() as usize;
        self.0[at] &= self.0[at] - 1;
        Some(at * 64 + bit)
    }

    /// Adds one; whether it was not there.
    fn insert(&mut self, part: usize) -> bool {
        let (word, bit) = (&mut self.0[part / 64], 1 << (part % 64));
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }
}

impl Free {
    fn new(count: PageCount, geometry: Geometry) -> Self {
        let mut free = Self { geometry, whole: BTreeSet::new(), parts: Default::default() };
        let mut start = 0;
        for level in Level::ALL.into_iter().rev() {
            let pages = geometry.pages(level).get();
            while count.get() - start >= pages {
                free.give(start, level);
                start += pages;
            }
        }
        free
    }

    fn take(&mut self, level: Level) -> Option<u64> {
        let Some(larger) = level.larger() else { return self.whole.pop_first() };
        let pages = self.geometry.pages(level).get();
        if let Some(mut in_part) = self.parts[level as usize].first_entry() {
            let part = in_part.get_mut().pop_first()?;
            let start = in_part.key() + part as u64 * pages;
            if in_part.get().count() == 0 {
                in_part.remove();
            }
            return Some(start);
        }
        let start = self.take(larger)?;
        let count = index(self.geometry.pages(larger).get() / pages);
        self.parts[level as usize].insert(start, Parts::all_but_first(count));
        Some(start)
    }

    fn give(&mut self, start: u64, level: Level) {
        let Some(larger) = level.larger() else {
            assert!(self.whole.insert(start), "frame {start:#x} is freed twice");
            return;
        };
        let (pages, all) = (self.geometry.pages(level).get(), self.geometry.pages(larger).get());
        let parent = start & !(all - 1);
        let parts = self.parts[level as usize].entry(parent).or_default();
        let is_new = parts.insert(index((start - parent) / pages));
        assert!(is_new, "frame {start:#x} is freed twice");
        if parts.count() as u64 * pages == all {
            self.parts[level as usize].remove(&parent);
            self.give(parent, larger);
        }
    }

    /// How many free blocks of `level` there are, not counting those inside larger ones.
    fn blocks(&self, level: Level) -> usize {
        match self.parts.get(level as usize) {
            Some(parts) => parts.values().map(Parts::count).sum(),
            None => self.whole.len(),
        }
    }

    fn count(&self) -> u64 {
        let pages = |level| self.geometry.pages(level).get();
        Level::ALL.map(|level| self.blocks(level) as u64 * pages(level)).iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;

    fn frames(count: u32, contents: Contents) -> Frames {
        Frames::new(count.into(), Geometry::new(4, 2).unwrap(), contents)
    }

    fn allocate(frames: &mut Frames, level: Level) -> Option<Pfn> {
        let pfn = frames.take(level)?;
        frames.zero(pfn, frames.free.geometry.pages(level));
        Some(pfn)
    }

    #[test]
    fn blocks_are_split_as_needed_and_merge_when_all_parts_are_free() {
        let mut frames = frames(11, Contents::Symbolic);
        let blocks = |frames: &Frames| Level::ALL.map(|level| frames.free_blocks(level));
        assert_eq!(blocks(&frames), [3, 0, 1]);
        let small: Vec<_> = (0..4).map(|_| allocate(&mut frames, Level::Size4K).unwrap()).collect();
        assert_eq!(blocks(&frames), [3, 1, 0]);
        assert_eq!(allocate(&mut frames, Level::Size1G), None);
        assert_eq!(frames.free_count(), 7);
        small.into_iter().for_each(|pfn| frames.free(pfn, Level::Size4K));
        assert_eq!(blocks(&frames), [3, 0, 1]);
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn a_frame_freed_twice_is_a_bug_of_ours() {
        let mut frames = frames(1, Contents::Symbolic);
        let pfn = allocate(&mut frames, Level::Size4K).unwrap();
        frames.free(pfn, Level::Size4K);
        frames.free(pfn, Level::Size4K);
    }

    #[test]
    fn a_frame_keeps_its_bytes_until_it_is_allocated_again() {
        let mut frames = frames(4, Contents::Bytes);
        let pfn = allocate(&mut frames, Level::Size4K).unwrap();
        frames.write(pfn, 4092, b"tail");
        frames.free(pfn, Level::Size4K);
        let mut seen = [0; 4];
        frames.read(pfn, 4092, &mut seen);
        assert_eq!(&seen, b"tail");
        assert_eq!(allocate(&mut frames, Level::Size2M), Some(pfn));
        assert_eq!(frames.read_u64(pfn, 4088), 0);
    }

    #[test]
    fn private_bytes_come_back_by_their_cipher_whatever_the_contents_are() {
        for contents in [Contents::Bytes, Contents::Symbolic] {
            let (mut frames, cipher, pfn) = (frames(4, contents), Cipher::new(1), Pfn::from(2));
            let bytes = *b"0123456701234567012";
            for offset in [0, 3, 8] {
                frames.write_private(cipher, pfn, offset, &bytes);
                let mut seen = [0; 19];
                frames.read(pfn, offset, &mut seen);
                assert_ne!(seen, bytes, "{contents:?} {offset}");
                cipher.apply(pfn, offset, &mut seen);
                let until = if contents == Contents::Bytes { 19 } else { 16 };
                assert_eq!(seen[..until], bytes[..until], "{contents:?} {offset}");
            }
        }
    }

    #[test]
    fn a_symbolic_frame_shows_its_token_everywhere() {
        let mut frames = frames(4, Contents::Symbolic);
        let pfn = Pfn::from(2);
        frames.write(pfn, 8 * 17, &7u64.to_le_bytes());
        assert_eq!(frames.read_u64(pfn, 0), 7);
        let mut page = vec![0; 4096];
        frames.read(pfn, 0, &mut page);
        assert!(page.chunks(8).all(|word| word == 7u64.to_le_bytes()));
        frames.write(pfn, 4, &[1; 4]);
        assert_eq!(frames.read_u64(pfn, 4088), 0x0101_0101_0000_0007);
    }
}
