//! Copies by the host's API: checked, held while the bytes move, given back.

use polder_units::PageRange;

use crate::fault::InFlight;
use crate::{Blocked, Engine};

/// A copy in flight. It is to be given back by [`Engine::copied`], whatever became of it:
/// operations on its pages wait for that.
#[must_use = "operations wait until it is given back"]
#[derive(PartialEq, Eq, Debug)]
pub struct Copying(InFlight);

impl Engine {
    /// Allows a copy between the host and pages that are shared.
    ///
    /// # Errors
    /// Refused beyond the object, for a page that is private, owed or in quarantine; busy where an
    /// operation holds a page.
    pub fn copy(&mut self, range: PageRange) -> Result<Copying, Blocked> {
        self.check_host_access(range)?;
        Ok(Copying(self.take_off(range)))
    }

    /// Takes a copy back.
    pub fn copied(&mut self, copying: Copying) {
        self.land(&copying.0);
    }
}
