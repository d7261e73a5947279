//! What the search over interleavings (`verify/explore`) needs of the engine beside what a driver
//! needs. Compiled for it alone.
//!
//! A driver's handle is affine and tells the engine when it is dropped. A search keeps thousands
//! of states, each with its own engine, and goes on from any of them: there a handle is *parked*
//! as plain data between two steps and *resumed* for the next, in whichever copy of the engine.
//! What a driver can do with a handle, the search does with the same functions.

use alloc::sync::Arc;
use core::hash::{Hash, Hasher};
use core::sync::atomic::{AtomicBool, Ordering};

use polder_units::PageRange;

use crate::fault::InFlight;
use crate::operation::{OpId, Operation};
use crate::{Answer, Copying, Engine, Holder, PinId, Waiting};

impl Engine {
    /// A copy of its own: abandoning an operation in the one leaves the other as it is.
    #[must_use]
    pub fn fork(&self) -> Self {
        let mut fork = self.clone();
        for record in &mut fork.operations {
            let abandoned = record.is_abandoned();
            record.abandoned = Arc::new(AtomicBool::new(abandoned));
        }
        fork
    }

    /// Puts a handle away without abandoning its operation.
    pub fn park<S>(&mut self, operation: Operation<S>) -> OpId {
        let id = operation.id();
        drop(operation);
        self.record(id).abandoned.store(false, Ordering::Release);
        id
    }

    /// Takes a parked handle up again, at the stage that its operation is at.
    pub fn resume<S>(&self, id: OpId) -> Operation<S> {
        Operation::resumed(id, &self.record(id).abandoned)
    }

    /// Drops the handle of an operation, as a thread that dies does.
    pub fn abandon(&mut self, id: OpId) {
        self.record(id).abandoned.store(true, Ordering::Release);
    }

    /// [`Engine::is_drained`] of a parked handle.
    pub fn is_drained_of(&self, id: OpId) -> bool {
        let operation = self.resume::<()>(id);
        let drained = self.is_drained(&operation);
        drop(operation);
        self.record(id).abandoned.store(false, Ordering::Release);
        drained
    }

    /// Whether an operation claims a page of `range`, driven by somebody or not.
    pub fn is_held(&self, range: PageRange) -> bool {
        self.is_claimed(range)
    }

    /// Whether an operation that somebody drives claims a page of `range`: who asks has to wait.
    pub fn is_busy(&self, range: PageRange) -> bool {
        self.operations
            .iter()
            .any(|record| record.claim_on(range).is_some() && !record.is_abandoned())
    }

    /// Which operation in flight it is, counted from 0. Ids only grow; places come again.
    pub fn place_of(&self, id: OpId) -> usize {
        self.operations.iter().take_while(|record| record.id != id).count()
    }

    /// Which answer or copy in flight it is, counted from 0.
    pub fn place_in_flight(&self, in_flight: InFlight) -> usize {
        self.in_flight.iter().take_while(|other| other.id() != in_flight.id()).count()
    }

    /// Whose pin it is, counted from 0, and of which pages.
    pub fn place_of_pin(&self, pin: PinId) -> (usize, PageRange) {
        self.pins.place_of(pin)
    }

    /// The first half of [`Pinner::pin`](crate::Pinner::pin), by a holder of this name: its pin is
    /// counted. A [`Pinner`](crate::Pinner) itself stays with the engine that it was made of.
    pub fn count_pin(&mut self, range: PageRange, holder: Holder) -> PinId {
        self.count_pin_of(range, holder)
    }

    /// The second half: whether the pin may stay. If not, it is given back.
    pub fn may_pin(&self, range: PageRange) -> bool {
        self.pins.may_stay(&self.reader(), range)
    }

    /// Whether an operation, parked, would find pins in its way.
    pub fn finds_pins(&self, id: OpId) -> bool {
        self.find_pins(id).is_err()
    }

    /// Whether somebody waits for pins of `range` to go.
    pub fn is_awaited(&self, range: PageRange) -> bool {
        self.pins.is_awaited(range)
    }

    /// Which of those who wait it is, counted from 0.
    pub fn place_of_wait(&self, waiting: Waiting) -> usize {
        self.pins.place_of_wait(waiting)
    }

    /// Hashes all that what happens from here on depends on: places stand for ids, and how the
    /// engine came here does not count.
    pub fn fingerprint<H: Hasher>(&self, state: &mut H) {
        self.pages.hash(state);
        self.folios.fingerprint(state);
        for (vm, slot, binding) in self.bindings() {
            (vm, slot, *binding).hash(state);
        }
        for record in &self.operations {
            record.fingerprint(state);
        }
        u64::MAX.hash(state);
        for in_flight in &self.in_flight {
            in_flight.range().hash(state);
        }
        u64::MAX.hash(state);
        self.pins.fingerprint(state);
        (&self.devices, self.launched).hash(state);
        self.wishes.hash(state);
        self.markers.hash(state);
        self.failed.hash(state);
        self.quarantine.hash(state);
    }
}

impl Answer {
    /// Which answer in flight it is.
    pub fn in_flight(&self) -> InFlight {
        self.in_flight
    }
}

impl Copying {
    /// The copies in flight that it is made of, put away.
    pub fn park(self) -> impl Iterator<Item = InFlight> {
        self.0.into_iter()
    }

    /// A parked copy of one run, taken up again.
    pub fn resume(parked: InFlight) -> Self {
        Self(alloc::vec![parked])
    }
}
