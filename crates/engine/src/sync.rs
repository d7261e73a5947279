//! The atomics of what is read without the engine's lock: the real ones, or loom's in `verify/loom`.

use alloc::boxed::Box;

#[cfg(not(feature = "loom"))]
pub(crate) use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(feature = "loom"))]
pub(crate) use once_cell::race::OnceBox;

#[cfg(feature = "loom")]
pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// The half of a fence that costs nothing. It orders a store before a later load only for the
/// compiler; the processor's half is brought by whoever looks for the store, who has every other
/// processor pass a barrier first (`membarrier(2)`).
#[inline]
pub(crate) fn light_fence() {
    #[cfg(not(feature = "loom"))]
    core::sync::atomic::compiler_fence(Ordering::SeqCst);
    // Loom knows no such barrier: both sides get a whole fence, which orders what the two halves
    // order together.
    #[cfg(feature = "loom")]
    fence(Ordering::SeqCst);
}

/// A fence after an atomic read-modify-write that is sequentially consistent: on x86 that is a
/// whole fence by itself (Linux' `smp_mb__after_atomic()`, `Documentation/atomic_t.txt`), and
/// another one would cost more than the pin that it stands in.
#[inline(always)]
pub(crate) fn fence_after_atomic() {
    #[cfg(all(target_arch = "x86_64", not(feature = "loom")))]
    core::sync::atomic::compiler_fence(Ordering::SeqCst);
    #[cfg(not(all(target_arch = "x86_64", not(feature = "loom"))))]
    fence(Ordering::SeqCst);
}

/// `len` words of 0. Large ones come from the system untouched: only what is written to takes
/// memory.
#[cfg(not(feature = "loom"))]
pub(crate) fn zeroed_words(len: usize) -> Box<[AtomicU64]> {
    bytemuck::zeroed_slice_box(len)
}

#[cfg(feature = "loom")]
pub(crate) fn zeroed_words(len: usize) -> Box<[AtomicU64]> {
    (0..len).map(|_| AtomicU64::new(0)).collect()
}

/// `len` counts of 0, as [`zeroed_words`].
#[cfg(not(feature = "loom"))]
pub(crate) fn zeroed_counts(len: usize) -> Box<[AtomicU32]> {
    bytemuck::zeroed_slice_box(len)
}

#[cfg(feature = "loom")]
pub(crate) fn zeroed_counts(len: usize) -> Box<[AtomicU32]> {
    (0..len).map(|_| AtomicU32::new(0)).collect()
}

/// A [`once_cell::race::OnceBox`] whose publication loom can see and reorder.
#[cfg(feature = "loom")]
pub(crate) struct OnceBox<T> {
    value: std::sync::OnceLock<Box<T>>,
    published: loom::sync::atomic::AtomicBool,
}

#[cfg(feature = "loom")]
impl<T> OnceBox<T> {
    pub(crate) fn new() -> Self {
        let published = loom::sync::atomic::AtomicBool::new(false);
        Self { value: std::sync::OnceLock::new(), published }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        let published = self.published.load(Ordering::Acquire);
        published.then(|| self.value.get()).flatten().map(|value| &**value)
    }

    pub(crate) fn get_or_init(&self, value: impl FnOnce() -> Box<T>) -> &T {
        let value = self.value.get_or_init(value);
        self.published.store(true, Ordering::Release);
        value
    }
}
