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
        self.free.blocks[level as usize].len()
    }
}

/// The free frames, as aligned blocks as large as they can be: a buddy allocator.
#[derive(Clone, Hash)]
struct Free {
    geometry: Geometry,
    /// The first frames of the free blocks, by level.
    blocks: [BTreeSet<u64>; 3],
    /// How many next smaller blocks of a 2M (index 0) or 1G (1) block are free.
    parts: [BTreeMap<u64, u64>; 2],
}

impl Free {
    fn new(count: PageCount, geometry: Geometry) -> Self {
        let mut free = Self { geometry, blocks: Default::default(), parts: Default::default() };
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

    /// The block of the next larger level around `start`, its level and its count of free parts.
    fn parent(
        &mut self,
        start: u64,
        level: Level,
    ) -> Option<(u64, Level, &mut BTreeMap<u64, u64>)> {
        let larger = level.larger()?;
        let parent = start & !(self.geometry.pages(larger).get() - 1);
        Some((parent, larger, &mut self.parts[level as usize]))
    }

    fn take(&mut self, level: Level) -> Option<u64> {
        if let Some(start) = self.blocks[level as usize].pop_first() {
            self.one_part_less(start, level);
            return Some(start);
        }
        let start = self.take(level.larger()?)?;
        let larger = self.geometry.pages(level.larger()?).get();
        let pages = self.geometry.pages(level).get();
        for part in (start + pages..start + larger).step_by(index(pages)) {
            self.give(part, level);
        }
        Some(start)
    }

    fn one_part_less(&mut self, start: u64, level: Level) {
        if let Some((parent, _, parts)) = self.parent(start, level)
            && let Some(count) = parts.get_mut(&parent)
        {
            *count -= 1;
            if *count == 0 {
                parts.remove(&parent);
            }
        }
    }

    fn give(&mut self, start: u64, level: Level) {
        assert!(self.blocks[level as usize].insert(start), "frame {start:#x} is freed twice");
        let pages = self.geometry.pages(level).get();
        let geometry = self.geometry;
        let Some((parent, larger, parts)) = self.parent(start, level) else { return };
        let count = parts.entry(parent).or_insert(0);
        *count += 1;
        if *count * pages == geometry.pages(larger).get() {
            parts.remove(&parent);
            for part in (parent..parent + geometry.pages(larger).get()).step_by(index(pages)) {
                self.blocks[level as usize].remove(&part);
            }
            self.give(parent, larger);
        }
    }

    fn count(&self) -> u64 {
        let pages = |level| self.geometry.pages(level).get();
        Level::ALL.map(|level| self.blocks[level as usize].len() as u64 * pages(level)).iter().sum()
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
