//! Turns: whoever waits is not overtaken for good.
//!
//! What asks and finds pages held waits outside the engine, and asks again when something has
//! ended. By then somebody else may hold them, and one who converts the same pages over and over
//! always does. So who waits has a place in a queue ([`Engine::in_turn`]), with the pages that he
//! found held, and keeps it until he asks and finds nothing held.
//!
//! - An *operation* is not begun on pages for which somebody came before it: it waits behind him,
//!   or is refused ([`Refusal::Awaited`]).
//! - Faults, copies and pins let nobody go first: no operation waits for them to begin. Nor does a
//!   population: a page is populated once, and who waits for the page may wait for just that.
//! - Who waits for another's wait for pins ([`Engine::wait_for_pins`]) has a place among those who
//!   want the same, and is in no operation's way: it may be the one that the other waits to do.
//!
//! So who came first waits for operations in flight and nobody else, all of which end by
//! themselves, and each one after him for those before him.
//!
//! There are as many places as threads that wait, and touches that do.

use alloc::vec::Vec;

use polder_units::PageRange;

use crate::{Blocked, Engine, Refusal};

/// A place in the queue, to be kept by who asks again ([`Engine::in_turn`]), or else left
/// ([`Engine::leave`]).
#[must_use = "others wait until it is left"]
#[derive(PartialEq, Eq, Hash, Debug)]
pub struct Turn(u64);

/// What somebody waits for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Awaited {
    /// That an operation ends.
    Operation,
    /// That somebody else's wait for pins ends.
    Unpinned,
}

/// What the last question met.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
enum Met {
    #[default]
    Nothing,
    /// These pages, held by somebody.
    Held(PageRange, Awaited),
    /// An operation that is to be undone first.
    Abandoned,
}

#[derive(Clone, Debug)]
struct Place {
    id: u64,
    awaits: Awaited,
    /// What was found held so far.
    ranges: Vec<PageRange>,
}

/// Those who wait, in the order in which they came.
#[derive(Clone, Default, Debug)]
pub(crate) struct Turns {
    queue: Vec<Place>,
    /// Who asks, if he has a place.
    asking: Option<u64>,
    met: Met,
}

impl Turns {
    /// Notes that pages were found held.
    pub(crate) fn note_held(&mut self, range: PageRange, by: Awaited) {
        self.met = Met::Held(range, by);
    }

    /// Notes that what holds pages is to be undone.
    pub(crate) fn note_abandoned(&mut self) {
        self.met = Met::Abandoned;
    }

    /// Who came before the one who asks, and waits for pages of `range` and for this, at most.
    fn first(&self, range: PageRange, at_most: Awaited) -> Option<(PageRange, Awaited)> {
        let before = self.queue.iter().take_while(|place| Some(place.id) != self.asking);
        let mut before = before.filter(|place| place.awaits <= at_most);
        before.find_map(|place| {
            let held = place.ranges.iter().find(|held| held.overlaps(range))?;
            Some((*held, place.awaits))
        })
    }
}

impl Engine {
    /// Asks for something in the turn of whoever waits for it, and gives him a place if he has to
    /// wait, or takes it from him if he no longer has to. Also says whether those who wait behind
    /// him are to be told: they may go on.
    pub fn in_turn<T>(
        &mut self,
        turn: &mut Option<Turn>,
        ask: impl FnOnce(&mut Self) -> T,
    ) -> (T, bool) {
        self.turns.asking = turn.as_ref().map(|turn| turn.0);
        self.turns.met = Met::Nothing;
        let answer = ask(self);
        self.turns.asking = None;
        let told = match (self.turns.met, turn.take()) {
            (Met::Nothing, None) => false,
            (Met::Nothing, Some(mine)) => {
                self.leave(mine);
                true
            }
            (Met::Abandoned, mine) => {
                *turn = mine;
                false
            }
            (Met::Held(range, awaits), mine) => {
                let mine = mine.unwrap_or_else(|| self.queue_up(awaits));
                let told = self.await_more(&mine, range, awaits);
                *turn = Some(mine);
                told
            }
        };
        (answer, told)
    }

    /// Leaves the queue. Those who wait behind are to be told.
    pub fn leave(&mut self, turn: Turn) {
        let at = self.turns.queue.iter().position(|place| place.id == turn.0);
        self.turns.queue.remove(at.expect("a place is left once"));
    }

    fn queue_up(&mut self, awaits: Awaited) -> Turn {
        let id = self.next_id();
        self.turns.queue.push(Place { id, awaits, ranges: Vec::new() });
        Turn(id)
    }

    /// Notes what a place's holder found held. Whether he is in the way of fewer than before.
    fn await_more(&mut self, turn: &Turn, range: PageRange, awaits: Awaited) -> bool {
        let place = self.turns.queue.iter_mut().find(|place| place.id == turn.0);
        let place = place.expect("a place is left once");
        if !place.ranges.iter().any(|known| known.contains_range(range)) {
            place.ranges.push(range);
        }
        core::mem::replace(&mut place.awaits, awaits) < awaits
    }

    /// Blocks an operation on any other that claims a page of `range`, and on whoever came before
    /// it and waits for one.
    #[inline]
    pub(crate) fn check_turn(&mut self, range: PageRange) -> Result<(), Blocked> {
        if self.turns.queue.is_empty() {
            return self.check_claims(range);
        }
        self.check_turn_of(range, Awaited::Operation)
    }

    /// The same for a wait for pins.
    pub(crate) fn check_turn_to_wait(&mut self, range: PageRange) -> Result<(), Blocked> {
        self.check_turn_of(range, Awaited::Unpinned)
    }

    #[cold]
    fn check_turn_of(&mut self, range: PageRange, at_most: Awaited) -> Result<(), Blocked> {
        self.check_claims(range)?;
        let Some((held, awaits)) = self.turns.first(range, at_most) else { return Ok(()) };
        self.turns.note_held(range, awaits);
        Err(Blocked::Busy(Refusal::Awaited { range, held }))
    }
}
