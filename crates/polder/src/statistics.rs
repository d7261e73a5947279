//! What has happened, counted.

use std::sync::atomic::{AtomicU64, Ordering};

use polder_engine::{Response, View, Visibility};
use polder_units::PageCount;

use crate::host::Smashed;

/// What has happened to a memory so far.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Statistics {
    /// Conversions to private that succeeded.
    pub to_private: u64,
    /// Conversions to shared that succeeded.
    pub to_shared: u64,
    /// Pages that they changed.
    pub converted_pages: u64,
    /// Conversions that were refused or failed.
    pub refused: u64,
    /// Guest accesses that came to [`Memory::guest_fault`](crate::Memory::guest_fault) or to a
    /// fault thread.
    pub guest_faults: u64,
    /// Touches of the host view that were mapped.
    pub host_faults: u64,
    /// Touches and copies by the host that were denied.
    pub denied: u64,
    /// What happened to the RMP; all zero but for an SNP guest's memory.
    pub rmp: RmpStatistics,
}

/// What happened to the RMP of an SNP guest's memory.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct RmpStatistics {
    /// Times that a 2M page was assigned by one large entry, also by an operation that failed later
    /// and took it back, or on the way back itself.
    pub large: u64,
    /// Large entries that were smashed because a guest's access or PVALIDATE met them at 4K.
    pub smashed: u64,
    /// Such faults that found the entry smashed already.
    pub spurious: u64,
    /// Such faults during which somebody else smashed the entry.
    pub raced: u64,
    /// 2M pages whose 4K entries were merged to a large one.
    pub merged: u64,
    /// 2M pages of which a merge left the 4K entries: they are not of one folio or not seen by one
    /// binding where a large entry can be, do not agree, or are in use by others.
    pub left_small: u64,
}

/// [`Statistics`] in the making.
#[derive(Default)]
pub(crate) struct Counters {
    to_private: AtomicU64,
    to_shared: AtomicU64,
    converted_pages: AtomicU64,
    refused: AtomicU64,
    guest_faults: AtomicU64,
    host_faults: AtomicU64,
    denied: AtomicU64,
    smashed: AtomicU64,
    spurious: AtomicU64,
    raced: AtomicU64,
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn converted(&self, to: Visibility, pages: PageCount) {
        add(
            match to {
                Visibility::Private => &self.to_private,
                Visibility::Shared => &self.to_shared,
            },
            1,
        );
        add(&self.converted_pages, pages.get());
    }

    pub(crate) fn refused(&self) {
        add(&self.refused, 1);
    }

    pub(crate) fn guest_fault(&self) {
        add(&self.guest_faults, 1);
    }

    pub(crate) fn denied(&self) {
        add(&self.denied, 1);
    }

    pub(crate) fn smashed(&self, smashed: Smashed) {
        match smashed {
            Smashed::Done => add(&self.smashed, 1),
            Smashed::Spurious => add(&self.spurious, 1),
            Smashed::Raced => add(&self.raced, 1),
            Smashed::Busy => {}
        }
    }

    /// A touch of a view is answered so. Noted before it is: whoever goes on by it finds it
    /// counted.
    pub(crate) fn answered(&self, view: View, response: Response) {
        add(self.of_answer(view, response), 1);
    }

    /// It could not be answered after all.
    pub(crate) fn unanswered(&self, view: View, response: Response) {
        self.of_answer(view, response).fetch_sub(1, Ordering::Relaxed);
    }

    fn of_answer(&self, view: View, response: Response) -> &AtomicU64 {
        match (view, response) {
            (View::Guest, _) => &self.guest_faults,
            (View::Host, Response::Map) => &self.host_faults,
            (View::Host, Response::Poison) => &self.denied,
        }
    }

    /// The counts, with those that the host keeps: [`Host::rmp_counts`](crate::host::Host).
    pub(crate) fn read(&self, [large, merged, left_small]: [u64; 3]) -> Statistics {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Statistics {
            to_private: of(&self.to_private),
            to_shared: of(&self.to_shared),
            converted_pages: of(&self.converted_pages),
            refused: of(&self.refused),
            guest_faults: of(&self.guest_faults),
            host_faults: of(&self.host_faults),
            denied: of(&self.denied),
            rmp: RmpStatistics {
                large,
                smashed: of(&self.smashed),
                spurious: of(&self.spurious),
                raced: of(&self.raced),
                merged,
                left_small,
            },
        }
    }
}
