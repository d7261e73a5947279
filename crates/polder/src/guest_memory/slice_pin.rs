//! The pin that rides in a slice, as what `vm-memory` calls its bitmap.

use polder_engine::Local;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// What a [`GuestRegion`](super::GuestRegion) has in place of a bitmap: slices of it pin.
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

/// The pin of a slice; none of an empty one. A clone is another pin of the same pages.
#[derive(Clone, Debug)]
#[expect(dead_code, reason = "held for what its end does")]
pub struct SlicePin<'a>(pub(super) Option<Local<'a>>);

impl<'a> WithBitmapSlice<'_> for SlicePin<'a> {
    type S = SlicePin<'a>;
}

impl BitmapSlice for SlicePin<'_> {}

impl Bitmap for SlicePin<'_> {
    fn mark_dirty(&self, _: usize, _: usize) {}

    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    #[inline(always)]
    fn slice_at(&self, _: usize) -> Self {
        self.clone()
    }
}
