//! [`Pin`]: pages that stay shared.

use std::fmt;

use polder_engine::PinId;
use polder_units::PageRange;

use crate::Memory;

/// Pages that stay shared while it is held. It can't outlive its memory.
#[must_use = "dropping it unpins the pages"]
pub struct Pin<'a> {
    pub(crate) memory: &'a Memory,
    /// Until it is given back.
    pub(crate) id: Option<PinId>,
    pub(crate) range: PageRange,
}

impl Pin<'_> {
    /// The pages.
    pub fn range(&self) -> PageRange {
        self.range
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        let driver = &self.memory.driver;
        if let (Some(mut engine), Some(id)) = (driver.try_engine(), self.id.take()) {
            engine.unpin(id);
        }
        driver.released();
    }
}

impl fmt::Debug for Pin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("range", &self.range).finish_non_exhaustive()
    }
}
