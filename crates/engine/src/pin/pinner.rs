//! [`Pinner`]: a holder, and how it pins without the engine's lock.

use alloc::sync::Arc;
use core::fmt;

use polder_units::{PageIndex, PageRange};

use super::counts::Counts;
use super::gate::Gate;
use super::local::{Local, Places};
use crate::sync::{AtomicU32, Ordering, fence, fence_after_atomic, light_fence};
use crate::{Holder, PageFacts, PageReader, PinKind, Population, Visibility};

/// What may be pinned.
const PINNABLE: PageFacts =
    PageFacts { visibility: Visibility::Shared, population: Population::Whole };

/// What every pinner and the engine share.
pub(super) struct Shared {
    pub(super) gate: Gate,
    /// How many wait for pins to go.
    pub(super) waiting: AtomicU32,
}

impl Shared {
    /// Whether a pin of `range` may stay, which was counted, and a fence passed, before.
    #[inline(always)]
    pub(super) fn may_stay(&self, reader: &PageReader, range: PageRange) -> bool {
        self.gate.is_open(range) && reader.are_all(range, PINNABLE)
    }
}

/// The pins of one holder.
pub(super) struct Held {
    pub(super) holder: Holder,
    pub(super) kind: PinKind,
    pub(super) counts: Counts,
    /// Of a holder that pins by [`Pinner::pin_here`].
    pub(super) places: Option<Places>,
}

impl Held {
    /// The first page of `range` that it has pinned.
    pub(super) fn first_in(&self, range: PageRange) -> Option<PageIndex> {
        let counted = self.counts.first_in(range);
        let noted = self.places.as_ref().and_then(|places| places.first_in(range));
        counted.into_iter().chain(noted).min()
    }
}

/// The answer of a [`Pinner`] that can't pin by itself: ask [`Engine::pin_as`], which refuses with
/// the reason, has the caller wait, or pins.
///
/// [`Engine::pin_as`]: crate::Engine::pin_as
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AskEngine;

/// A holder that pins pages without the engine's lock. Its clones are the same holder.
///
/// What is pinned is to be unpinned as often, by [`Pinner::unpin`] with the same range: whoever
/// links the engine wraps that in a guard.
#[derive(Clone)]
pub struct Pinner {
    pub(super) shared: Arc<Shared>,
    pub(super) reader: PageReader,
    pub(super) held: Arc<Held>,
    /// Whether who looks for pins brings a barrier.
    pub(super) barrier: bool,
}

impl Pinner {
    /// Who it is.
    pub fn holder(&self) -> &Holder {
        &self.held.holder
    }

    /// For how long it pins.
    pub fn kind(&self) -> PinKind {
        self.held.kind
    }

    /// Pins pages, which stay shared until they are unpinned.
    ///
    /// # Errors
    /// [`AskEngine`]: some page is not shared and whole, or an operation, an exclusive pin or the
    /// object's end is in the way.
    #[inline(always)]
    pub fn pin(&self, range: PageRange) -> Result<(), AskEngine> {
        if range.end() > self.reader.pages().get() {
            return Err(AskEngine);
        }
        self.held.counts.add(range);
        fence_after_atomic();
        if self.may_pin(range) {
            return Ok(());
        }
        self.unpin(range);
        Err(AskEngine)
    }

    /// Unpins pages that were pinned. Whether somebody waits for that, and is to be told.
    ///
    /// # Panics
    /// If they were not.
    #[inline(always)]
    pub fn unpin(&self, range: PageRange) -> bool {
        self.held.counts.remove(range);
        fence_after_atomic();
        self.shared.waiting.load(Ordering::Relaxed) != 0
    }

    /// Pins pages by a note that stays with the calling thread, which is `thread` and no other is.
    ///
    /// # Errors
    /// [`AskEngine`] as for [`Pinner::pin`]: ask [`Engine::pin_here_as`].
    ///
    /// # Panics
    /// Of a holder that was not made for it ([`Engine::pinner_here`]).
    ///
    /// [`Engine::pin_here_as`]: crate::Engine::pin_here_as
    /// [`Engine::pinner_here`]: crate::Engine::pinner_here
    #[inline(always)]
    pub fn pin_here(&self, thread: usize, range: PageRange) -> Result<Local<'_>, AskEngine> {
        let noted = self.note(thread, range);
        match self.barrier {
            true => light_fence(),
            false => fence(Ordering::SeqCst),
        }
        if self.may_pin(range) { Ok(noted) } else { Err(AskEngine) }
    }

    #[inline(always)]
    pub(super) fn note(&self, thread: usize, range: PageRange) -> Local<'_> {
        let places = self.held.places.as_ref().expect("it was made for pins that stay here");
        places.note(thread, range)
    }

    #[inline(always)]
    fn may_pin(&self, range: PageRange) -> bool {
        self.shared.may_stay(&self.reader, range)
    }
}

impl fmt::Debug for Pinner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinner")
            .field("holder", self.holder())
            .field("kind", &self.kind())
            .finish_non_exhaustive()
    }
}
