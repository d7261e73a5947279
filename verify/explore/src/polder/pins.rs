//! Pins by the library's callers: with the engine's lock, without it, and exclusive ones.
//!
//! Who pins without the lock takes two steps, as `polder_engine::Pinner::pin` does: the pin is
//! counted, and then he looks whether it may stay. If not, he gives it back and asks the engine.

use polder_explored_engine::{Blocked, Holder, PinId, PinKind, WaitFor, Waiting};

use super::check::{broken, first};
use super::kept::{Pages, one};
use super::{Slip, Stage, Task, World};
use crate::system::Violation;

/// Who pins with the lock, who without, and who exclusively.
const DEVICE: &str = "a device";
const QUEUE: &str = "a queue";
const HYPERVISOR: &str = "a hypervisor";

impl World {
    pub(super) fn pin(&mut self, actor: usize, page: u8) -> Result<(), Violation> {
        let holder = Holder::new(DEVICE);
        let pinned = self.engine(|engine| engine.pin(one(page), PinKind::LongTerm, holder));
        self.pinned(actor, page, pinned)
    }

    /// What the engine said to who asked for a pin.
    fn pinned(
        &mut self,
        actor: usize,
        page: u8,
        pinned: Result<PinId, Blocked>,
    ) -> Result<(), Violation> {
        match pinned {
            Ok(pin) => {
                self.promised.pins[usize::from(page)] += 1;
                self.say(|| format!("pins page {page}"));
                self.go(actor, Stage::Held(pin));
                Ok(())
            }
            Err(blocked) => self.blocked(actor, blocked),
        }
    }

    /// Gives back what [`Stage::Held`] has.
    pub(super) fn unpin(&mut self, actor: usize, pin: PinId) -> Result<(), Violation> {
        let page = match self.task(actor) {
            Some(Task::Pin(page) | Task::PinUnlocked(page)) => {
                self.promised.pins[usize::from(page)] -= 1;
                page
            }
            Some(Task::PinAlone(page)) => {
                self.promised.alone[usize::from(page)] -= 1;
                page
            }
            task => unreachable!("no pin: {task:?}"),
        };
        self.engine(|engine| engine.unpin(pin));
        self.say(|| format!("unpins page {page}"));
        self.done(actor);
        Ok(())
    }

    /// Counts a pin, without the engine's lock.
    pub(super) fn count_pin(&mut self, actor: usize, page: u8) -> Result<(), Violation> {
        if self.setup.slips(Slip::LooksBeforeCounting) {
            let may = self.engine.engine.may_pin(one(page));
            self.say(|| format!("looks whether page {page} may be pinned: {may}"));
            self.go(actor, if may { Stage::Looked } else { Stage::AskPin });
            return Ok(());
        }
        let pin = self.engine(|engine| engine.count_pin(one(page), Holder::new(QUEUE)));
        self.say(|| format!("counts a pin of page {page}"));
        self.go(actor, Stage::Counted(pin));
        Ok(())
    }

    /// Counts a pin after a look that said it may: a bug.
    pub(super) fn count_late(&mut self, actor: usize) -> Result<(), Violation> {
        let Some(Task::PinUnlocked(page)) = self.task(actor) else { return Ok(()) };
        let pin = self.engine(|engine| engine.count_pin(one(page), Holder::new(QUEUE)));
        self.pinned(actor, page, Ok(pin))
    }

    /// Looks whether a pin that was counted may stay.
    pub(super) fn look_at_gate(&mut self, actor: usize, pin: PinId) -> Result<(), Violation> {
        let Some(Task::PinUnlocked(page)) = self.task(actor) else { return Ok(()) };
        if self.engine.engine.may_pin(one(page)) {
            return self.pinned(actor, page, Ok(pin));
        }
        self.engine(|engine| engine.unpin(pin));
        self.say(|| format!("finds page {page} closed, and counts no more"));
        self.go(actor, Stage::AskPin);
        Ok(())
    }

    /// Asks the engine, once it can be said.
    pub(super) fn ask_for_pin(&mut self, actor: usize) -> Result<(), Violation> {
        let Some(Task::PinUnlocked(page)) = self.task(actor) else { return Ok(()) };
        let holder = Holder::new(QUEUE);
        let pinned = self.engine(|engine| engine.pin(one(page), PinKind::Short, holder));
        self.pinned(actor, page, pinned)
    }

    /// Closes a page for an exclusive pin: nobody pins it from here on.
    pub(super) fn wait_alone(&mut self, actor: usize, page: u8) -> Result<(), Violation> {
        let what = WaitFor::Exclusive(Holder::new(HYPERVISOR));
        match self.engine(|engine| engine.wait_for_pins(&[one(page)], what)) {
            Ok(waiting) => {
                self.say(|| format!("closes page {page}, to have it alone"));
                self.go(actor, Stage::Alone(waiting));
                Ok(())
            }
            Err(blocked) => self.blocked(actor, blocked),
        }
    }

    /// Looks for other pins, and has the page alone or gives up.
    pub(super) fn pin_alone(&mut self, actor: usize, waiting: Waiting) -> Result<(), Violation> {
        let Some(Task::PinAlone(page)) = self.task(actor) else { return Ok(()) };
        match self.engine(|engine| engine.pin_exclusive(waiting)) {
            Ok(pin) => {
                self.promised.alone[usize::from(page)] += 1;
                self.say(|| format!("pins page {page} exclusively"));
                self.go(actor, Stage::Held(pin));
                Ok(())
            }
            Err((waiting, blocked)) => {
                self.engine(|engine| engine.stop_waiting(waiting));
                match blocked {
                    // It gives up, whatever the reason.
                    Blocked::Busy(refusal) => self.blocked(actor, Blocked::Refused(refusal)),
                    blocked => self.blocked(actor, blocked),
                }
            }
        }
    }

    /// Whether pins are in the way of somebody who looks for them, all of which are about to go:
    /// who counted them has not looked yet, or found that he came too late.
    pub(super) fn passes(&self, pages: Pages, found: bool) -> bool {
        // A neighbour's counts where its folio would have to be split.
        let pages = if self.setup.pooled { Pages::MAX } else { pages };
        found && !self.device_has(pages) && self.pinned_for_long(pages) == 0
    }

    /// Those of the pages that a pin was promised for.
    pub(super) fn pinned_for_long(&self, pages: Pages) -> Pages {
        let promised = &self.promised;
        let pinned = |page: &usize| promised.pins[*page] > 0 || promised.alone[*page] > 0;
        (0..8).filter(pinned).fold(0, |all, page| all | 1 << page) & pages
    }

    /// Those of the pages that somebody has counted a pin of, and not looked.
    pub(super) fn counted(&self, pages: Pages) -> Pages {
        let actors = 0..self.setup.actors.len();
        let counted =
            actors.filter_map(|actor| match (self.actors[actor].stage, self.task(actor)) {
                (Stage::Counted(_), Some(Task::PinUnlocked(page))) => Some(1 << page),
                _ => None,
            });
        counted.fold(0, |all, page: Pages| all | page) & pages
    }

    /// An exclusive pin is the only one, and of no page that is private.
    pub(super) fn check_alone(&self) -> Result<(), Violation> {
        let promised = &self.promised;
        for page in 0..usize::from(self.setup.pages) {
            let (alone, pins) = (promised.alone[page], promised.pins[page]);
            if alone > 1 || alone == 1 && pins > 0 {
                return broken("INV-7", format!("page {page} is pinned exclusively, and twice"));
            }
            if alone == 1 && self.reach().device & 1 << page != 0 {
                let what = format!("page {page} is pinned exclusively, and mapped for a device");
                return broken("INV-7", what);
            }
        }
        let private = self.pinned_for_long(promised.private);
        if private != 0 {
            let page = first(private);
            return broken("INV-7", format!("{page} is private, and the library pins it"));
        }
        Ok(())
    }
}
