//! Exclusive pins, and waiting for pins to go. Both close pages first and look for pins afterwards,
//! so that neither starves: those who hold a page go, and nobody comes.

use alloc::vec::Vec;

use polder_units::PageRange;

use super::PinId;
use crate::plant::Bug;
use crate::turns::Awaited;
use crate::{Activity, Blocked, Engine, Holder, PinKind, Refusal};

/// Why somebody waits for pins to go.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum WaitFor {
    /// To do this, once they have.
    Operation(Activity),
    /// To have the pages pinned exclusively by this holder.
    Exclusive(Holder),
}

/// Somebody who waits for pins of pages to go ([`Engine::wait_for_pins`]).
#[must_use = "nobody can pin the pages until the wait is over"]
#[derive(PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "explore", derive(Clone, Copy))]
pub struct Waiting(u64);

/// The same, from the inside.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Waiter {
    id: u64,
    ranges: Vec<PageRange>,
    what: WaitFor,
}

/// An exclusive pin that is held.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Exclusive {
    pub(super) id: u64,
    pub(super) range: PageRange,
    pub(super) holder: Holder,
}

#[cfg(feature = "explore")]
impl Waiter {
    pub(super) fn fingerprint<H: core::hash::Hasher>(&self, state: &mut H) {
        core::hash::Hash::hash(&(&self.ranges, &self.what), state);
    }
}

impl Waiter {
    #[cfg(feature = "explore")]
    pub(super) fn is(&self, waiting: &Waiting) -> bool {
        self.id == waiting.0
    }

    /// The first of the pages that it waits for in `range`: that part, and all around it.
    pub(super) fn first_in(&self, range: PageRange) -> Option<(PageRange, PageRange)> {
        self.ranges.iter().find_map(|&other| Some((other.intersection(range)?, other)))
    }
}

impl Exclusive {
    /// What it says to others, about its first page in `range`.
    pub(super) fn refusal(&self, range: PageRange) -> Option<Refusal> {
        let page = self.range.intersection(range)?.start();
        Some(Refusal::Pinned { page, kind: PinKind::Exclusive, holder: self.holder.clone() })
    }
}

impl Engine {
    /// Waits for the pins of pages to go: nobody can pin them from here on, who tries waits. It is
    /// over with [`Engine::stop_waiting`] or [`Engine::pin_exclusive`]; in between,
    /// [`Engine::still_pinned`] tells.
    ///
    /// # Errors
    /// For an exclusive pin: refused where [`Engine::pin`] is. Refused beyond the object; busy
    /// where an operation holds a page or another waits for one.
    pub fn wait_for_pins(
        &mut self,
        ranges: &[PageRange],
        what: WaitFor,
    ) -> Result<Waiting, Blocked> {
        for &range in ranges {
            self.check_bounds(range)?;
            self.check_turn_to_wait(range)?;
            self.check_waiting(range)?;
            if let WaitFor::Exclusive(_) = what {
                self.check_host_access(range)?;
            }
        }
        let id = self.next_id();
        ranges.iter().for_each(|&range| self.pins.close(range));
        self.pins.waiting.push(Waiter { id, ranges: ranges.to_vec(), what });
        self.wait_for_unpin(true);
        Ok(Waiting(id))
    }

    /// The first pin of the pages that is still there. To be asked after a barrier, where one is
    /// needed ([`Engine::needs_barrier`]).
    pub fn still_pinned(&self, waiting: &Waiting) -> Option<Refusal> {
        let ranges = &self.waiter(waiting).ranges;
        ranges.iter().find_map(|&range| self.check_pins(range).err())
    }

    /// Stops waiting: the pages can be pinned again.
    pub fn stop_waiting(&mut self, waiting: Waiting) {
        let waiter = self.end_wait(waiting);
        let gate = self.pins.gate();
        waiter.ranges.iter().for_each(|&range| gate.open(range));
    }

    /// Pins the pages exclusively that a [`WaitFor::Exclusive`] waited for: no other pin of any
    /// kind is there, nor can come, until it is given back by [`Engine::unpin`].
    ///
    /// # Errors
    /// [`Refusal::Pinned`] while there is another, or a device has a page mapped; and where
    /// [`Engine::pin`] is refused or has to wait. The wait is as it was.
    ///
    /// # Panics
    /// If an operation was waited for, or other than one range.
    pub fn pin_exclusive(&mut self, waiting: Waiting) -> Result<PinId, (Waiting, Blocked)> {
        for range in self.waiter(&waiting).ranges.clone() {
            match self.check_host_access(range) {
                Ok(()) => {}
                Err(blocked) => return Err((waiting, blocked)),
            }
        }
        if !self.plants.has(Bug::ExclusiveUnchecked)
            && let Some(refusal) = self.still_pinned(&waiting)
        {
            return Err((waiting, refusal.into()));
        }
        let ranges = self.waiter(&waiting).ranges.iter();
        let mapped = ranges.map(|&range| self.check_dma(range)).find_map(Result::err);
        if !self.plants.has(Bug::ExclusiveBesideDma)
            && let Some(refusal) = mapped
        {
            return Err((waiting, refusal.into()));
        }
        let Waiter { id, ranges, what } = self.end_wait(waiting);
        let (WaitFor::Exclusive(holder), [range]) = (what, &ranges[..]) else {
            panic!("an exclusive pin of one range is what was waited for");
        };
        // The gate stays closed.
        let pin = PinId { holder: id, range: *range };
        self.pins.exclusive.push(Exclusive { id, range: *range, holder });
        Ok(pin)
    }

    /// Blocks a pin where somebody waits for pins to go, or has an exclusive one.
    pub(super) fn check_waiting(&mut self, range: PageRange) -> Result<(), Blocked> {
        self.check_exclusive(range)?;
        let mut waiters = self.pins.waiting.iter();
        let waiter = waiters.find_map(|waiter| Some((waiter.first_in(range)?, waiter)));
        let Some(((part, held), waiter)) = waiter else { return Ok(()) };
        let refusal = match &waiter.what {
            &WaitFor::Operation(by) => Refusal::Busy { range, by, held },
            WaitFor::Exclusive(holder) => Refusal::Pinned {
                page: part.start(),
                kind: PinKind::Exclusive,
                holder: holder.clone(),
            },
        };
        self.turns.note_held(range, Awaited::Unpinned);
        Err(Blocked::Busy(refusal))
    }

    /// Refuses a range of which a page is pinned exclusively.
    pub(crate) fn check_exclusive(&self, range: PageRange) -> Result<(), Refusal> {
        let refusal = self.pins.exclusive.iter().find_map(|pin| pin.refusal(range));
        refusal.map_or(Ok(()), Err)
    }

    fn waiter(&self, waiting: &Waiting) -> &Waiter {
        let found = self.pins.waiting.iter().find(|waiter| waiter.id == waiting.0);
        found.expect("a wait is over once")
    }

    fn end_wait(&mut self, waiting: Waiting) -> Waiter {
        let at = self.pins.waiting.iter().position(|waiter| waiter.id == waiting.0);
        self.wait_for_unpin(false);
        self.pins.waiting.swap_remove(at.expect("a wait is over once"))
    }
}
