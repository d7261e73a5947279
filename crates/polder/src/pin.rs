//! [`Pin`]: pages that stay shared. [`Pinner`]: who pins often.

use std::fmt;

use polder_engine::{AskEngine, Holder, PinId, PinKind};
use polder_units::PageRange;

use crate::driver::Driver;
use crate::{Error, OnBusy};

/// How many pins of dead holders are remembered.
const DEAD_KEPT: usize = 64;

/// Pages that stay shared while it is held. It can't outlive its memory, nor be given back twice:
///
/// ```compile_fail,E0505
/// # use polder::{Holder, Memory, PinKind, units::PageRange};
/// fn outlived(memory: Memory, pages: PageRange) {
///     let pin = memory.pin(pages, PinKind::Short, Holder::new("a device")).unwrap();
///     drop(memory);
///     drop(pin);
/// }
/// ```
/// ```compile_fail,E0382
/// # use polder::{Holder, Memory, PinKind, units::PageRange};
/// fn twice(memory: &Memory, pages: PageRange) {
///     let pin = memory.pin(pages, PinKind::Short, Holder::new("a device")).unwrap();
///     drop(pin);
///     drop(pin);
/// }
/// ```
#[must_use = "dropping it unpins the pages"]
pub struct Pin<'a> {
    how: How<'a>,
    range: PageRange,
}

/// How the pin was taken, and so is given back. Small: a pin of a [`Pinner`] is moved as often as
/// it is taken.
enum How<'a> {
    /// With the engine's lock.
    Id(Box<ById<'a>>),
    /// Without it.
    By(&'a Pinner<'a>),
}

struct ById<'a> {
    driver: &'a Driver,
    /// There until it is given back.
    id: Option<PinId>,
    kind: PinKind,
    holder: Holder,
}

impl<'a> Pin<'a> {
    pub(crate) fn by_id(driver: &'a Driver, id: PinId, (kind, holder): (PinKind, Holder)) -> Self {
        let range = id.range();
        Self { how: How::Id(Box::new(ById { driver, id: Some(id), kind, holder })), range }
    }

    /// The pages.
    pub fn range(&self) -> PageRange {
        self.range
    }
}

impl Drop for Pin<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        match &mut self.how {
            How::By(pinner) => pinner.unpin(self.range),
            How::Id(pin) => pin.give_back(),
        }
        if std::thread::panicking() {
            self.note_dead();
        }
    }
}

impl ById<'_> {
    #[inline(never)]
    fn give_back(&mut self) {
        if let (Some(mut engine), Some(id)) = (self.driver.try_engine(), self.id.take()) {
            engine.unpin(id);
        }
        self.driver.released();
    }
}

impl Pin<'_> {
    #[cold]
    fn note_dead(&self) {
        match &self.how {
            How::Id(pin) => pin.driver.note_dead(DeadPin {
                range: self.range,
                kind: pin.kind,
                holder: pin.holder.clone(),
            }),
            How::By(pinner) => pinner.note_dead(self.range),
        }
    }
}

impl Driver {
    /// Remembers a pin that was given back because its holder's thread panics.
    fn note_dead(&self, pin: DeadPin) {
        let mut dead = self.dead_pins.lock();
        if dead.len() == DEAD_KEPT {
            dead.remove(0);
        }
        dead.push(pin);
    }
}

impl fmt::Debug for Pin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("range", &self.range).finish_non_exhaustive()
    }
}

/// A pin that was given back because the thread that held it panicked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeadPin {
    /// Its pages.
    pub range: PageRange,
    /// How long it was meant to be held.
    pub kind: PinKind,
    /// Who held it.
    pub holder: Holder,
}

/// A holder that pins often, without the engine's lock where nothing is in the way. It may be used
/// by several threads; what it pins is held under its name.
///
/// ```no_run
/// # use polder::{Error, Holder, Memory, OnBusy, PinKind, units::PageRange};
/// # fn queue(memory: &Memory, buffer: PageRange) -> Result<(), Error> {
/// let disk = memory.pinner(PinKind::Short, Holder::new("virtio-blk"))?;
/// let in_flight = disk.pin(buffer, OnBusy::Wait)?;
/// // ... a transfer ...
/// drop(in_flight);
/// # Ok(())
/// # }
/// ```
pub struct Pinner<'a> {
    pub(crate) driver: &'a Driver,
    pub(crate) pinner: polder_engine::Pinner,
}

impl Pinner<'_> {
    /// Pins pages of the object, which must be shared: they stay shared until the pin is dropped.
    ///
    /// # Errors
    /// As [`Memory::pin_with`](crate::Memory::pin_with).
    #[inline(always)]
    pub fn pin(&self, range: PageRange, on_busy: OnBusy) -> Result<Pin<'_>, Error> {
        self.pin_pages(range, on_busy)?;
        Ok(Pin { how: How::By(self), range })
    }

    /// Pins pages until [`Pinner::unpin`].
    #[inline(always)]
    pub(crate) fn pin_pages(&self, range: PageRange, on_busy: OnBusy) -> Result<(), Error> {
        match self.pinner.pin(range) {
            Ok(()) => Ok(()),
            Err(AskEngine) => self.ask(range, on_busy),
        }
    }

    #[cold]
    fn ask(&self, range: PageRange, on_busy: OnBusy) -> Result<(), Error> {
        self.driver.claim(on_busy, |engine| engine.pin_as(&self.pinner, range))
    }

    /// Gives pages back that were pinned.
    #[inline(always)]
    pub(crate) fn unpin(&self, range: PageRange) {
        if self.pinner.unpin(range) {
            self.driver.changed();
        }
    }

    /// Remembers pages that were given back because the holder's thread panics.
    #[cold]
    pub(crate) fn note_dead(&self, range: PageRange) {
        let (kind, holder) = (self.pinner.kind(), self.holder().clone());
        self.driver.note_dead(DeadPin { range, kind, holder });
    }

    /// Who it is.
    pub fn holder(&self) -> &Holder {
        self.pinner.holder()
    }
}

impl fmt::Debug for Pinner<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pinner.fmt(f)
    }
}
