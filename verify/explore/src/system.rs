//! What the search needs to know of whatever it searches.

use std::fmt;

/// An invariant was broken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// Its name: `INV-1` to `INV-10`.
    pub invariant: &'static str,
    /// How.
    pub what: String,
}

impl Violation {
    pub(crate) fn new(invariant: &'static str, what: impl Into<String>) -> Self {
        Self { invariant, what: what.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.invariant, self.what)
    }
}

/// In the middle of what an actor is: a kind of work, and how far that has come, by their numbers
/// among [`System::WORKS`] and [`System::STAGES`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Point {
    /// The kind of work.
    pub work: u8,
    /// How far it has come; 0 between two pieces of work.
    pub stage: u8,
}

/// A state of several actors at work, and how each can go on. A clone goes its own way.
///
/// An actor that waits has no way to go on until what it waits for has come: whether it is woken
/// then is not searched.
pub trait System: Clone {
    /// The kinds of work, at most 32.
    const WORKS: &'static [&'static str];

    /// How far work can have come, at most 64; the first is for who does none.
    const STAGES: &'static [&'static str];

    /// How many actors there are.
    fn actors(&self) -> usize;

    /// In how many ways an actor can take its next step. None if it waits or has done its work.
    fn ways(&self, actor: usize) -> u8;

    /// The way in which he takes it where all take turns and nobody has to die. None if he waits.
    fn turn(&self, actor: usize) -> Option<u8> {
        (self.ways(actor) > 0).then_some(0)
    }

    /// Whether an actor has nothing left to do.
    fn is_done(&self, actor: usize) -> bool;

    /// Takes a step of an actor.
    ///
    /// # Errors
    /// An invariant that the step itself breaks: by what was read, by who was refused.
    fn take(&mut self, actor: usize, way: u8) -> Result<(), Violation>;

    /// Looks at every invariant that can be told from a state. Asked once for each.
    ///
    /// # Errors
    /// One that is broken.
    fn check(&self) -> Result<(), Violation>;

    /// 64 bits that states from which the same can happen have in common.
    fn fingerprint(&self) -> u64;

    /// What an actor is in the middle of.
    fn point(&self, actor: usize) -> Point;

    /// The points at which an actor can be met.
    fn points(&self, actor: usize) -> Vec<Point>;

    /// An actor's name.
    fn name(&self, actor: usize) -> String;

    /// From now on, keeps a line about each step.
    fn tell(&mut self);

    /// The line about the last step.
    fn told(&mut self) -> String;
}
