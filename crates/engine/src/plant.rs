//! Bugs that can be planted into the engine and its host, for the checkers that have to find them
//! before they are trusted. Without the feature `plant`, which no product turns on, there is no
//! bug to plant and nothing here does anything.

use alloc::vec::Vec;

use crate::Step;

/// A bug in a protocol.
#[cfg(feature = "plant")]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Bug {
    /// No large RMP entry is smashed, by an operation or because of a fault.
    ForgottenSmash,
    /// [`can_install_large_rmp_entry`](crate::can_install_large_rmp_entry) does not ask for the
    /// alignment of the guest frame.
    MisalignedLarge,
    /// Undoing leaves the RMP as it is.
    NotReverted,
    /// Undoing goes first to last.
    ForwardUndo,
    /// Undoing leaves out the step that failed.
    SkippedFailed,
}

#[cfg(feature = "plant")]
impl crate::Engine {
    /// Plants a bug.
    pub fn plant(&mut self, bug: Bug) {
        self.plants.0 = Some(bug);
    }
}

/// What is planted.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Plants(#[cfg(feature = "plant")] Option<Bug>);

#[cfg(feature = "plant")]
impl Plants {
    /// What it makes of the steps for the RMP.
    pub(crate) fn in_steps(self, steps: &mut Vec<Step>) {
        if self.0 == Some(Bug::ForgottenSmash) {
            steps.retain(|step| !matches!(step, Step::Smash(_)));
        }
    }

    /// What it makes of a way back.
    pub(crate) fn in_undo(self, back: &mut Vec<Step>) {
        match self.0 {
            Some(Bug::NotReverted) => {
                back.retain(|step| !matches!(step, Step::Assign(_) | Step::Unassign(_)));
            }
            Some(Bug::ForwardUndo) => back.reverse(),
            _ => {}
        }
    }

    /// Whether the step that failed is undone.
    pub(crate) fn undo_failed(self) -> bool {
        self.0 != Some(Bug::SkippedFailed)
    }
}

#[cfg(not(feature = "plant"))]
#[expect(clippy::unused_self, reason = "with the feature it is used")]
impl Plants {
    pub(crate) const fn in_steps(self, _: &mut Vec<Step>) {}

    pub(crate) const fn in_undo(self, _: &mut Vec<Step>) {}

    pub(crate) const fn undo_failed(self) -> bool {
        true
    }
}
