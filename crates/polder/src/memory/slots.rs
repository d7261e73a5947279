//! Who changes slots, and who keeps them as they are: in the order in which they came. So a
//! prefault, which keeps slots for a part at a time, has no more than that part of it done before a
//! change that waits; and no stream of either kind keeps out the other.

use std::collections::VecDeque;

use crate::driver::Driver;
use crate::sync::{Condvar, Mutex};
use crate::watch::Moment;

#[derive(Default)]
pub(crate) struct Slots {
    queue: Mutex<Queue>,
    /// Somebody has gone, or has got what he waited for.
    moved: Condvar,
}

#[derive(Default)]
struct Queue {
    /// How many have come.
    came: u64,
    /// Those of them who wait.
    waiting: VecDeque<u64>,
    /// How many keep the slots as they are.
    kept: usize,
    /// Somebody changes them.
    changing: bool,
}

/// Slots stay as they are, or are its holder's to change, until it is dropped.
pub(crate) struct Held<'a> {
    slots: &'a Slots,
    change: bool,
}

/// A place among those who wait; left when dropped, also by a panic.
struct Place<'a> {
    slots: &'a Slots,
    number: u64,
}

impl Slots {
    /// Keeps slots as they are.
    pub(crate) fn keep(&self, driver: &Driver) -> Held<'_> {
        self.hold(driver, false)
    }

    /// Keeps slots from being changed by others, or kept.
    pub(crate) fn change(&self, driver: &Driver) -> Held<'_> {
        self.hold(driver, true)
    }

    /// That somebody waits is told again and again, as of whoever waits for an operation.
    fn hold(&self, driver: &Driver, change: bool) -> Held<'_> {
        if let Some(held) = self.try_hold(change) {
            return held;
        }
        let place = self.come();
        let mut queue = self.queue.lock();
        while queue.waiting.front() != Some(&place.number) || !queue.is_free(change) {
            driver.tell(Moment::Waits);
            self.moved.wait_for(&mut queue, driver.ask_again);
        }
        queue.enter(change);
        drop(queue);
        Held { slots: self, change }
    }

    fn try_hold(&self, change: bool) -> Option<Held<'_>> {
        let mut queue = self.queue.lock();
        let free = queue.waiting.is_empty() && queue.is_free(change);
        free.then(|| {
            queue.enter(change);
            Held { slots: self, change }
        })
    }

    fn come(&self) -> Place<'_> {
        let mut queue = self.queue.lock();
        let number = queue.came;
        queue.came += 1;
        queue.waiting.push_back(number);
        Place { slots: self, number }
    }
}

impl Queue {
    fn is_free(&self, change: bool) -> bool {
        !self.changing && (!change || self.kept == 0)
    }

    fn enter(&mut self, change: bool) {
        match change {
            true => self.changing = true,
            false => self.kept += 1,
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.slots.queue.lock().waiting.retain(|other| *other != self.number);
        self.slots.moved.notify_all();
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut queue = self.slots.queue.lock();
        match self.change {
            true => queue.changing = false,
            false => queue.kept -= 1,
        }
        drop(queue);
        self.slots.moved.notify_all();
    }
}
