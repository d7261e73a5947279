//! The pin that rides in a slice, as what `vm-memory` calls its bitmap; and is one of the dirty log.

use polder_engine::Local;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use super::GuestRegion;

/// What a [`GuestRegion`] has in place of a bitmap: slices of it pin.
#[derive(Clone, Copy, Debug)]
pub enum Pinning {}

impl<'a> WithBitmapSlice<'a> for Pinning {
    type S = SlicePin<'a>;
}

impl Bitmap for Pinning {
    fn mark_dirty(&self, _: usize, _: usize) {
        match *self {}
    }

    fn dirty_at(&self, _: usize) -> bool {
        match *self {}
    }

    fn slice_at(&self, _: usize) -> SlicePin<'_> {
        match *self {}
    }
}

/// The pin of a slice, none of an empty one, and where its writes are logged. A clone is another
/// pin of the same pages.
#[derive(Clone, Debug)]
pub struct SlicePin<'a> {
    #[expect(dead_code, reason = "held for what its end does")]
    pub(super) pin: Option<Local<'a>>,
    pub(super) region: &'a GuestRegion,
    /// Where the slice begins in the object, in bytes.
    pub(super) offset: u64,
}

impl<'a> WithBitmapSlice<'_> for SlicePin<'a> {
    type S = SlicePin<'a>;
}

impl BitmapSlice for SlicePin<'_> {}

impl Bitmap for SlicePin<'_> {
    #[inline(always)]
    fn mark_dirty(&self, at: usize, count: usize) {
        self.region.dirty.wrote(self.offset.wrapping_add(at as u64), count);
    }

    /// Whether a write by a slice is in the dirty log that was not taken; of others it is not known.
    fn dirty_at(&self, at: usize) -> bool {
        self.region.dirty.has(self.offset.wrapping_add(at as u64))
    }

    #[inline(always)]
    fn slice_at(&self, at: usize) -> Self {
        Self { offset: self.offset.wrapping_add(at as u64), ..self.clone() }
    }
}
