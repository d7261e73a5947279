//! What a source was asked for, counted.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Pager;

/// What a source has been asked for so far, and what came.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct SourceStatistics {
    /// Pages whose demand had them brought.
    pub demanded: u64,
    /// Pages brought before anybody asked for them.
    pub ahead: u64,
    /// Pages that turned out to be zeros without being read; counted in neither of the above.
    pub zeros: u64,
    /// Reads of the source.
    pub reads: u64,
    /// Bytes that came.
    pub bytes: u64,
    /// Pages whose contents could not be brought.
    pub failed: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) demanded: AtomicU64,
    pub(super) ahead: AtomicU64,
    pub(super) zeros: AtomicU64,
    pub(super) reads: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) failed: AtomicU64,
}

pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Pager {
    pub(crate) fn statistics(&self) -> SourceStatistics {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { demanded, ahead, zeros, reads, bytes, failed } = &self.counters;
        SourceStatistics {
            demanded: of(demanded),
            ahead: of(ahead),
            zeros: of(zeros),
            reads: of(reads),
            bytes: of(bytes),
            failed: of(failed),
        }
    }
}
