//! Bugs that the search over interleavings (`verify/explore`) has to find before it is trusted.
//!
//! Each is one `if` at the place where somebody could make the mistake. They are there only in the
//! engine that is compiled for the search: in the product [`Plants::has`] is `false`, always.

/// A bug that can be planted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(not(feature = "explore"), expect(unreachable_pub, reason = "the search's alone"))]
pub enum Planted {
    /// References are looked for while the pages can still be reached.
    CheckBeforeCuttingOff,
    /// A conversion is true from its claim on.
    CommitBeforeHardware,
    /// What was done is undone first to last.
    UndoForward,
    /// The step that failed is not undone.
    UndoSkipsFailing,
    /// A binding's gfns and pages are not looked at for being congruent.
    NoCongruence,
    /// A large page is not looked at for lying inside its binding.
    NoFit,
    /// A large page is mapped whatever operation claims a part of it.
    LargeOverClaimed,
    /// An operation does not wait for answers and copies in flight.
    NoDrain,
    /// A second populator is told "exists" while the first one is at work.
    ExistsWhileClaimed,
    /// Who touches a page that is being made private is denied, not made to wait.
    DeniedWhileClaimed,
    /// Nobody sees that an operation was abandoned.
    AbandonedForgotten,
    /// A conversion to shared leaves the markers of earlier denied touches.
    MarkersForgotten,
    /// A conversion does not look for pins.
    PinsForgotten,
    /// A touch of a page whose contents are to come is answered.
    OwedShown,
}

/// Which bug is planted.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Plants(#[cfg(feature = "explore")] pub(crate) Option<Planted>);

impl Plants {
    #[cfg(feature = "explore")]
    pub(crate) fn has(self, planted: Planted) -> bool {
        self.0 == Some(planted)
    }

    #[cfg(not(feature = "explore"))]
    #[expect(clippy::unused_self, reason = "where the search keeps what is planted")]
    pub(crate) const fn has(self, _: Planted) -> bool {
        false
    }
}
