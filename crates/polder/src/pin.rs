//! [`Pin`]: pages that stay shared.

use std::fmt;

use polder_engine::PinId;
use polder_units::PageRange;

use crate::Memory;

/// Pages that stay shared while it is held. It can't outlive its memory:
///
/// ```compile_fail
/// # use polder::{Holder, HostKind, Memory, PinKind, units::{PageCount, PageRange}};
/// let memory = Memory::builder(PageCount::from(2u32)).host(HostKind::Machine).shared().build()?;
/// let pages = PageRange::between(0, 1).unwrap();
/// let pin = memory.pin(pages, PinKind::Short, Holder::new("disk"))?;
/// drop(memory); // error: cannot move out of `memory` because it is borrowed
/// drop(pin);
/// # Ok::<_, polder::Error>(())
/// ```
#[must_use = "dropping it unpins the pages"]
pub struct Pin<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) id: PinId,
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
        if let Some(mut engine) = driver.try_engine() {
            // A pin is given back once, here.
            let _ = engine.unpin(self.id);
        }
        driver.released();
    }
}

impl fmt::Debug for Pin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("range", &self.range).finish_non_exhaustive()
    }
}
