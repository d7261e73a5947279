//! Faults that can be planted into the machine: off unless asked for.
//!
//! They are the bugs that a checker has to find before it is trusted.

/// A bug of the simulated kernel or hardware.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Plant {
    /// Flushes leave every TLB as it is.
    SkipFlush,
    /// GUP-fast does not look at the page table again after taking its reference.
    StaleGup,
    /// TDP mappings are made though `mmu_invalidate_seq` has moved on.
    StaleSequence,
    /// Mapping a folio into a host page table does not raise its map count.
    LostMapcount,
    /// Pinning a folio raises neither its reference nor its pin count.
    LostPin,
    /// PSMASH leaves the second of its 4K entries unvalidated.
    SmashUnvalidates,
    /// RMPUPDATE of 2M does not look for 4K entries that are assigned.
    LargeOverAssigned,
    /// RMPUPDATE keeps the validated bit whatever it changes.
    KeptValidated,
    /// A guest's access is let through though stage 2 and the RMP disagree about its size.
    NoSizeCheck,
    /// GUP-fast does not look whether a page is pinned exclusively.
    GupFastIgnoresExclusive,
    /// A change of pKVM's tables that fails half-way is left half-way.
    HalfDonation,
    /// What the host loses under pKVM stays open to its devices.
    IommuForgotten,
    /// pKVM's hypervisor gives pages to the host as they are.
    NotScrubbed,
    /// A prefault calls what it maps accessed.
    AccessedSet,
    /// A page that others have, too, is written to without a copy.
    CopyForgotten,
    /// A load of CR3 does not read tables again that are out of sync.
    StaleShadow,
    /// A huge page is back in its pool with the first of its frames that comes back.
    ReturnedEarly,
    /// What the hypervisor writes to a guest's page tables is not in the dirty log.
    TableUnlogged,
}

impl Plant {
    /// Every plant.
    pub const ALL: [Self; 18] = [
        Self::SkipFlush,
        Self::StaleGup,
        Self::StaleSequence,
        Self::LostMapcount,
        Self::LostPin,
        Self::SmashUnvalidates,
        Self::LargeOverAssigned,
        Self::KeptValidated,
        Self::NoSizeCheck,
        Self::GupFastIgnoresExclusive,
        Self::HalfDonation,
        Self::IommuForgotten,
        Self::NotScrubbed,
        Self::AccessedSet,
        Self::CopyForgotten,
        Self::StaleShadow,
        Self::ReturnedEarly,
        Self::TableUnlogged,
    ];
}

/// What is planted.
#[derive(Clone, Default, Hash)]
pub(crate) struct Plants {
    set: [bool; Plant::ALL.len()],
    /// How many allocations succeed before one fails.
    allocations: Option<u64>,
}

impl Plants {
    pub(crate) const fn has(&self, plant: Plant) -> bool {
        self.set[plant as usize]
    }

    pub(crate) const fn set(&mut self, plant: Plant, on: bool) {
        self.set[plant as usize] = on;
    }

    pub(crate) const fn fail_allocation(&mut self, nth: Option<u64>) {
        self.allocations = nth;
    }

    /// Whether the allocation that is being made fails.
    pub(crate) const fn allocation_fails(&mut self) -> bool {
        match self.allocations {
            Some(0) => {
                self.allocations = None;
                true
            }
            Some(left) => {
                self.allocations = Some(left - 1);
                false
            }
            None => false,
        }
    }
}
