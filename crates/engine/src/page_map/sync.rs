//! The atomics of the page map: the real ones, or loom's under `--cfg loom`.

use alloc::boxed::Box;

#[cfg(not(loom))]
pub(super) use core::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
pub(super) use once_cell::race::OnceBox;

/// `len` words of 0. Large ones come from the system untouched: only what is written to takes
/// memory.
#[cfg(not(loom))]
pub(super) fn zeroed_words(len: usize) -> Box<[AtomicU64]> {
    bytemuck::zeroed_slice_box(len)
}

#[cfg(loom)]
pub(super) fn zeroed_words(len: usize) -> Box<[AtomicU64]> {
    (0..len).map(|_| AtomicU64::new(0)).collect()
}

#[cfg(loom)]
pub(super) use loom::sync::atomic::{AtomicU64, Ordering};

/// A [`once_cell::race::OnceBox`] whose publication loom can see and reorder.
#[cfg(loom)]
pub(super) struct OnceBox<T> {
    value: std::sync::OnceLock<Box<T>>,
    published: loom::sync::atomic::AtomicBool,
}

#[cfg(loom)]
impl<T> OnceBox<T> {
    pub(super) fn new() -> Self {
        let published = loom::sync::atomic::AtomicBool::new(false);
        Self { value: std::sync::OnceLock::new(), published }
    }

    pub(super) fn get(&self) -> Option<&T> {
        let published = self.published.load(Ordering::Acquire);
        published.then(|| self.value.get()).flatten().map(|value| &**value)
    }

    pub(super) fn get_or_init(&self, value: impl FnOnce() -> Box<T>) -> &T {
        let value = self.value.get_or_init(value);
        self.published.store(true, Ordering::Release);
        value
    }
}
