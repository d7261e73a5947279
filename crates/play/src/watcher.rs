//! Who watches: tells the player what happens, and stops an actor's thread where his step is held.

use std::cell::{Cell, RefCell};
use std::sync::mpsc::{Receiver, Sender};

use polder::units::PageRange;
use polder::{Moment, View, Watch};

use crate::outcome::Outcome;
use crate::scenario::Hold;

/// What came to the player's ears.
#[derive(Debug)]
pub(crate) enum Event {
    /// An actor's step has ended.
    Done(usize, Box<Outcome>),
    /// An actor's step has stopped where it was to be held.
    Held(usize, String),
    /// An actor has asked for what another holds.
    Waits(usize),
    /// A touch of a page waits.
    TouchWaits(View, PageRange),
    /// Something else has happened, in an actor's step or in a fault thread.
    Moment(Option<usize>, Moment),
}

/// An actor, known to his own thread.
pub(crate) struct Here {
    pub(crate) actor: usize,
    pub(crate) events: Sender<Event>,
    /// How to go on, once held; gone when the story is over.
    pub(crate) resume: Receiver<Option<Hold>>,
    pub(crate) hold: Cell<Option<Hold>>,
    pub(crate) steps: Cell<u64>,
}

thread_local! {
    static HERE: RefCell<Option<Here>> = const { RefCell::new(None) };
}

/// Makes the calling thread an actor's.
pub(crate) fn become_actor(here: Here) {
    HERE.with(|it| *it.borrow_mut() = Some(here));
}

/// Begins a step of the calling actor's.
pub(crate) fn begin(hold: Option<Hold>) {
    HERE.with(|here| {
        if let Some(here) = here.borrow().as_ref() {
            here.hold.set(hold);
            here.steps.set(0);
        }
    });
}

/// Tells the player what happens, and stops an actor's thread where his step is to be held.
pub(crate) struct Watcher {
    pub(crate) events: Sender<Event>,
}

impl Watch for Watcher {
    fn at(&self, moment: Moment) {
        // A player who has gone is told nothing.
        let is_actors = HERE.with(|here| match here.borrow().as_ref() {
            Some(here) => {
                here.at(moment);
                true
            }
            None => false,
        });
        if is_actors {
            return;
        }
        let _ = self.events.send(match moment {
            Moment::TouchWaits(view, range) => Event::TouchWaits(view, range),
            moment => Event::Moment(None, moment),
        });
    }
}

impl Here {
    fn at(&self, moment: Moment) {
        if moment == Moment::Waits {
            let _ = self.events.send(Event::Waits(self.actor));
            return;
        }
        let where_ = match (moment, self.hold.get()) {
            (Moment::Reached(stage), Some(Hold::At(hold))) if stage == hold => stage.to_string(),
            (Moment::Step(step), hold) => {
                self.steps.set(self.steps.get() + 1);
                match hold {
                    Some(Hold::BeforeStep(nth)) if nth == self.steps.get() => {
                        format!("before step {nth}: {step}")
                    }
                    _ => String::new(),
                }
            }
            _ => String::new(),
        };
        if where_.is_empty() {
            let _ = self.events.send(Event::Moment(Some(self.actor), moment));
            return;
        }
        if let Moment::Reached(_) = moment {
            let _ = self.events.send(Event::Moment(Some(self.actor), moment));
        }
        let _ = self.events.send(Event::Held(self.actor, where_));
        // Nobody to say so: it goes on to its end.
        self.hold.set(self.resume.recv().unwrap_or(None));
        if let Moment::Step(_) = moment {
            let _ = self.events.send(Event::Moment(Some(self.actor), moment));
        }
    }
}
