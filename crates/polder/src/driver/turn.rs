//! Waiting in turn: who waits has a place in the engine's queue (`engine/src/turns.rs`), and gives
//! it up whatever becomes of him.

use polder_engine::{Engine, Turn, View};
use polder_units::{PageIndex, PageRange};

use super::Driver;

/// A place in the queue, if its holder has to wait. Dropped, it is left, and those behind are told:
/// so it has to outlive the lock in which its holder asks.
pub(crate) struct InTurn<'a> {
    driver: &'a Driver,
    turn: Option<Turn>,
}

impl<'a> InTurn<'a> {
    pub(crate) fn new(driver: &'a Driver) -> Self {
        Self { driver, turn: None }
    }

    /// Asks in the turn of whoever waits.
    pub(crate) fn ask<T>(&mut self, engine: &mut Engine, ask: impl FnOnce(&mut Engine) -> T) -> T {
        let (answer, told) = engine.in_turn(&mut self.turn, ask);
        if told {
            self.driver.changed();
        }
        answer
    }
}

impl Drop for InTurn<'_> {
    fn drop(&mut self) {
        if let Some(turn) = self.turn.take() {
            if let Some(mut engine) = self.driver.try_engine() {
                engine.leave(turn);
            }
            self.driver.changed();
        }
    }
}

impl Driver {
    /// Keeps touches for whichever fault thread asks next, those that are kept already with the
    /// place that they have in the queue.
    pub(crate) fn keep_touches(&self, touches: impl IntoIterator<Item = (View, PageIndex)>) {
        let mut waiting = self.waiting.lock();
        for touch in touches {
            waiting.entry(touch).or_insert(None);
        }
    }

    /// Forgets touches that were answered, and how many. Whoever waits behind them is told when the
    /// answer is given back.
    pub(super) fn forget_touches(&self, view: View, range: PageRange) -> usize {
        let of = |(other, page): &(View, PageIndex)| *other == view && range.contains(*page);
        let mut turns = Vec::new();
        let mut waiting = self.waiting.lock();
        let before = waiting.len();
        waiting.retain(|touch, turn| {
            let answered = of(touch);
            turns.extend(turn.take_if(|_| answered));
            !answered
        });
        let answered = before - waiting.len();
        drop(waiting);
        if !turns.is_empty()
            && let Some(mut engine) = self.try_engine()
        {
            turns.into_iter().for_each(|turn| engine.leave(turn));
        }
        answered
    }
}
