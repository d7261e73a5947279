//! Pins that never leave their thread, for whoever pins and unpins around a few bytes.
//!
//! A thread notes such a pin in a place of its own, by plain stores: no other thread writes there,
//! so nothing is locked and no counter is shared. What a shared counter's atomic instruction would
//! order, the conversion has ordered for everybody: after it closed the gate it has every processor
//! pass a barrier (`membarrier(2)`), and then reads the places. See [`super::gate`]. Where the
//! kernel has no such barrier, each pin passes a fence of its own.
//!
//! Places are made when they are used first, and kept until the holder goes.

use alloc::boxed::Box;
use core::fmt;
use core::marker::PhantomData;

use polder_units::{PageIndex, PageRange};

use crate::sync::{AtomicU32, AtomicU64, OnceBox, Ordering};

/// Places in a block of them.
const THREADS: usize = if cfg!(loom) { 2 } else { 64 };
/// Pins in one part of a place.
const PINS: usize = if cfg!(loom) { 1 } else { 7 };

/// The places of threads, and of those that are too many for the block.
pub(super) struct Places {
    block: [OnceBox<Place>; THREADS],
    more: OnceBox<Self>,
}

/// A thread's own, in cache lines that no other thread writes to; with more where it is full.
#[repr(align(128))]
struct Place {
    entries: [Entry; PINS],
    more: OnceBox<Self>,
}

/// One pin, held as often as it was cloned; free if not at all.
struct Entry {
    start: AtomicU64,
    end: AtomicU64,
    held: AtomicU32,
}

impl Places {
    pub(super) fn new() -> Self {
        Self { block: core::array::from_fn(|_| OnceBox::new()), more: OnceBox::new() }
    }

    /// Notes a pin in the place of `thread`, which is the caller's alone. It counts when a light
    /// fence has been passed.
    #[inline(always)]
    pub(super) fn note(&self, thread: usize, range: PageRange) -> Local<'_> {
        let place = match self.block.get(thread).and_then(OnceBox::get) {
            Some(place) => place,
            None => self.make(thread),
        };
        let entry = place.free();
        entry.start.store(range.start().get(), Ordering::Relaxed);
        entry.end.store(range.end(), Ordering::Relaxed);
        entry.held.store(1, Ordering::Release);
        Local { entry, thread: PhantomData }
    }

    #[cold]
    fn make(&self, thread: usize) -> &Place {
        match self.block.get(thread) {
            Some(place) => place.get_or_init(|| Box::new(Place::new())),
            None => self.more.get_or_init(|| Box::new(Self::new())).make(thread - THREADS),
        }
    }

    /// The first page of `range` that is pinned, once every processor has passed a barrier. What
    /// is being pinned or unpinned may come out as either.
    pub(super) fn first_in(&self, range: PageRange) -> Option<PageIndex> {
        let mut first = None;
        for place in self.block.iter().filter_map(OnceBox::get) {
            let mut part = Some(place);
            while let Some(place) = part {
                let held = place.entries.iter().filter_map(Entry::range);
                let here = held.filter_map(|pinned| Some(pinned.intersection(range)?.start()));
                first = here.chain(first).min();
                part = place.more.get();
            }
        }
        first.into_iter().chain(self.more.get().and_then(|more| more.first_in(range))).min()
    }
}

impl Place {
    fn new() -> Self {
        let entry =
            |_| Entry { start: AtomicU64::new(0), end: AtomicU64::new(0), held: AtomicU32::new(0) };
        Self { entries: core::array::from_fn(entry), more: OnceBox::new() }
    }

    #[inline(always)]
    fn free(&self) -> &Entry {
        let free = self.entries.iter().find(|entry| entry.held.load(Ordering::Relaxed) == 0);
        match free {
            Some(free) => free,
            None => self.further(),
        }
    }

    #[cold]
    fn further(&self) -> &Entry {
        self.more.get_or_init(|| Box::new(Self::new())).free()
    }
}

impl Entry {
    fn range(&self) -> Option<PageRange> {
        if self.held.load(Ordering::Acquire) == 0 {
            return None;
        }
        PageRange::between(self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed))
    }
}

/// A pin in a thread's place. It stays with its thread; a clone holds it once more.
#[must_use = "dropping it unpins the pages"]
pub struct Local<'a> {
    entry: &'a Entry,
    thread: PhantomData<*const ()>,
}

impl Clone for Local<'_> {
    #[inline(always)]
    fn clone(&self) -> Self {
        let held = self.entry.held.load(Ordering::Relaxed);
        assert!(held < u32::MAX, "a pin was cloned four billion times");
        self.entry.held.store(held + 1, Ordering::Relaxed);
        Self { entry: self.entry, thread: PhantomData }
    }
}

impl Drop for Local<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // What was done with the pages comes before whoever finds them unpinned.
        let held = self.entry.held.load(Ordering::Relaxed);
        self.entry.held.store(held - 1, Ordering::Release);
    }
}

impl fmt::Debug for Local<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local").finish_non_exhaustive()
    }
}
