//! Bugs that can be planted into the engine and its host, for the checkers that have to find them
//! before they are trusted: the search over interleavings (`verify/explore`), the scenarios and the
//! behaviour table (`verify/behaviour`).
//!
//! Each is one `if` at the place where somebody could make the mistake. Without the feature
//! `plant`, which no product turns on, [`Plants::has`] is `false`, always.

/// A bug in a protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(not(feature = "plant"), expect(unreachable_pub, reason = "the checkers' alone"))]
pub enum Bug {
    /// References are looked for while the pages can still be reached.
    CheckBeforeCuttingOff,
    /// A conversion is true from its claim on.
    CommitBeforeHardware,
    /// Undoing goes first to last.
    ForwardUndo,
    /// Undoing leaves out the step that failed.
    SkippedFailed,
    /// Undoing leaves the RMP as it is.
    NotReverted,
    /// No large RMP entry is smashed, by an operation or because of a fault.
    ForgottenSmash,
    /// [`can_install_large_rmp_entry`](crate::can_install_large_rmp_entry) does not ask for the
    /// alignment of the guest frame.
    #[cfg(feature = "plant")]
    MisalignedLarge,
    /// The RMP has pages assigned before anybody is cut off from them.
    AssignedBeforeCutOff,
    /// The RMP has pages assigned before references to them are looked for.
    AssignedBeforeCheck,
    /// One table says what is wished and what is granted: it changes with the wish, and back if
    /// that can't be granted. Who asks for a page waits for its claim as ever.
    OneTable,
    /// The same, and guest faults and touches do not wait for a claim: the table answers them.
    OneTableUnclaimed,
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
    /// Pages that an operation has claimed can be pinned by who does not ask the engine.
    PinnedWhileDrained,
    /// An exclusive pin is granted without a look at pins that were taken without the lock.
    ExclusiveUnchecked,
    /// An exclusive pin is granted of a page that a device has mapped.
    ExclusiveBesideDma,
    /// A touch of a page whose contents are to come is answered.
    OwedShown,
    /// What a VMM wishes counts as granted, where the guest decides.
    WantedIsGranted,
    /// A device keeps what becomes private until references were looked for and hardware was told.
    DmaUnmappedLate,
    /// A device keeps what becomes private.
    DmaForgotten,
    /// Pages are moved while they are mapped.
    MovedMapped,
    /// A folio is split though all of it is converted.
    SplitNotMinimal,
    /// Of a folio that is split or merged the rest is not claimed.
    NeighboursUnclaimed,
    /// A folio with a pinned page in it is merged or split nevertheless.
    ReshapedWhilePinned,
    /// The level of a mapping is that of the folio, also where its pages are of two kinds.
    StaleLevel,
    /// A population of some pages of a folio counts for all of it: they are in the page cache.
    FolioPopulated,
    /// A page that is whole is populated again as long as another of its folio is owed: the hole is
    /// looked for in the folio, not in the page map.
    HolePopulatedTwice,
    /// A huge page that its last unpin has given back is given back again.
    ReturnedTwice,
    /// Taking a page back that was not used loses the promise it was taken on.
    ReservationLost,
    /// A discard leaves what is owed owed: the source brings the old contents.
    DiscardKeepsSource,
}

/// Which bug is planted.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Plants(#[cfg(feature = "plant")] Option<Bug>);

#[cfg(feature = "plant")]
impl Plants {
    pub(crate) const fn of(bug: Bug) -> Self {
        Self(Some(bug))
    }
}

#[cfg(feature = "plant")]
impl crate::Engine {
    /// Plants a bug.
    pub fn plant(&mut self, bug: Bug) {
        self.plants.0 = Some(bug);
    }
}

impl Plants {
    #[cfg(feature = "plant")]
    pub(crate) fn has(self, bug: Bug) -> bool {
        self.0 == Some(bug)
    }

    #[cfg(not(feature = "plant"))]
    #[expect(clippy::unused_self, reason = "with the feature it is used")]
    pub(crate) const fn has(self, _: Bug) -> bool {
        false
    }

    /// Whether one table says what is wished and what is granted.
    pub(crate) fn one_table(self) -> bool {
        self.has(Bug::OneTable) || self.has(Bug::OneTableUnclaimed)
    }
}
