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
use alloc::sync::Arc;
use core::fmt;
use core::marker::PhantomData;

use polder_units::{PageIndex, PageRange};

use crate::sync::{AtomicU32, AtomicU64, OnceBox, Ordering};

/// Places in a block of them.
const THREADS: usize = if cfg!(feature = "loom") { 2 } else { 64 };
/// Pins in a place, and in the first block of those that are more.
const PINS: usize = if cfg!(feature = "loom") { 1 } else { 7 };
const MORE: usize = if cfg!(feature = "loom") { 1 } else { 64 };

/// The places of threads, and of those that are too many for the block.
pub(super) struct Places {
    block: [OnceBox<Place>; THREADS],
    more: OnceBox<Self>,
}

/// A thread's own, in cache lines that no other thread writes to; with more where it is full.
#[repr(align(128))]
struct Place {
    entries: [Entry; PINS],
    more: OnceBox<More>,
}

/// What is too much for a place: a guest decides how many slices its chain of buffers takes, so one
/// is found in no more time however many there are.
struct More {
    entries: Box<[Entry]>,
    list: Arc<List>,
    /// Twice as many, where all of these are held.
    next: OnceBox<Self>,
}

/// Which entries of [`More`] are free. Each entry knows it, and not the pin, which is to be small:
/// it is moved about with every slice of guest memory.
struct List {
    /// The first free entry; those after it by their links.
    free: AtomicU32,
    /// How many are held.
    held: AtomicU32,
}

/// No free entry.
const NONE: u32 = u32::MAX;

/// One pin, held as often as it was cloned; free if not at all.
struct Entry {
    start: AtomicU64,
    end: AtomicU64,
    held: AtomicU32,
    /// Of [`More`]: while it is held, its own index; while it is free, the next free one's.
    link: AtomicU32,
    /// Of [`More`]: where it is noted as free again.
    list: Option<Arc<List>>,
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
        let mut look = |entries: &[Entry]| {
            let held = entries.iter().filter_map(Entry::range);
            let here = held.filter_map(|pinned| Some(pinned.intersection(range)?.start()));
            first = here.chain(first).min();
        };
        for place in self.block.iter().filter_map(OnceBox::get) {
            look(&place.entries);
            let mut more = place.more.get();
            while let Some(block) = more {
                if block.list.held.load(Ordering::Acquire) > 0 {
                    look(&block.entries);
                }
                more = block.next.get();
            }
        }
        first.into_iter().chain(self.more.get().and_then(|more| more.first_in(range))).min()
    }
}

impl Place {
    fn new() -> Self {
        let entries = core::array::from_fn(|_| Entry::new(NONE, None));
        Self { entries, more: OnceBox::new() }
    }

    #[inline(always)]
    fn free(&self) -> &Entry {
        let free = self.entries.iter().find(|entry| entry.held.load(Ordering::Relaxed) == 0);
        match free {
            Some(free) => free,
            None => self.more.get_or_init(|| Box::new(More::new(MORE))).take(),
        }
    }
}

impl More {
    fn new(count: usize) -> Self {
        let count = u32::try_from(count).expect("memory holds fewer");
        let [free, held] = [(); 2].map(|()| AtomicU32::new(0));
        let list = Arc::new(List { free, held });
        let entry = |next| Entry::new(next, Some(Arc::clone(&list)));
        Self { entries: (1..count).chain([NONE]).map(entry).collect(), list, next: OnceBox::new() }
    }

    /// A free entry, of these or those after them.
    #[cold]
    fn take(&self) -> &Entry {
        let mut block = self;
        while block.list.free.load(Ordering::Relaxed) == NONE {
            let twice = || Box::new(Self::new(2 * block.entries.len()));
            block = block.next.get_or_init(twice);
        }
        let List { free, held } = &*block.list;
        let first = free.load(Ordering::Relaxed);
        let entry = &block.entries[first as usize];
        free.store(entry.link.load(Ordering::Relaxed), Ordering::Relaxed);
        entry.link.store(first, Ordering::Relaxed);
        held.store(held.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        entry
    }
}

impl List {
    /// Takes an entry back that is held no more.
    #[cold]
    fn give(&self, entry: &Entry) {
        let own = entry.link.load(Ordering::Relaxed);
        entry.link.store(self.free.load(Ordering::Relaxed), Ordering::Relaxed);
        self.free.store(own, Ordering::Relaxed);
        self.held.store(self.held.load(Ordering::Relaxed) - 1, Ordering::Release);
    }
}

impl Entry {
    fn new(link: u32, list: Option<Arc<List>>) -> Self {
        let [start, end] = [(); 2].map(|()| AtomicU64::new(0));
        Self { start, end, held: AtomicU32::new(0), link: AtomicU32::new(link), list }
    }

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
        if let (1, Some(list)) = (held, &self.entry.list) {
            list.give(self.entry);
        }
    }
}

impl fmt::Debug for Local<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local").finish_non_exhaustive()
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use alloc::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Pin(PageRange),
        Clone(usize),
        Drop(usize),
    }

    fn range() -> impl Strategy<Value = PageRange> {
        (0..100_u64, 1..20_u64)
            .prop_filter_map("a range", |(start, count)| PageRange::between(start, start + count))
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => range().prop_map(Op::Pin),
            1 => any::<usize>().prop_map(Op::Clone),
            3 => any::<usize>().prop_map(Op::Drop),
        ]
    }

    proptest! {
        /// However many one thread holds, and in whatever order they go.
        #[test]
        fn pins_of_a_thread_are_those_that_it_holds(
            before in 0..600_usize,
            ops in prop::collection::vec((op(), range()), 0..200),
        ) {
            let places = Places::new();
            let first = PageRange::between(0, 1).unwrap();
            let mut held: Vec<_> = (0..before).map(|_| (places.note(3, first), first)).collect();
            for (op, asked) in ops {
                match op {
                    Op::Pin(range) => held.push((places.note(3, range), range)),
                    Op::Clone(at) if !held.is_empty() => {
                        let (pin, range) = &held[at % held.len()];
                        held.push((pin.clone(), *range));
                    }
                    Op::Drop(at) if !held.is_empty() => drop(held.swap_remove(at % held.len())),
                    Op::Clone(_) | Op::Drop(_) => {}
                }
                let pages = held.iter().filter_map(|(_, range)| range.intersection(asked));
                prop_assert_eq!(places.first_in(asked), pages.map(PageRange::start).min());
            }
            drop(held);
            prop_assert_eq!(places.first_in(PageRange::between(0, 200).unwrap()), None);
        }
    }
}
