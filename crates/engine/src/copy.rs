//! Copies by the host's API: checked, held while the bytes move, given back.

use alloc::vec::Vec;

use polder_units::PageRange;

use crate::fault::InFlight;
use crate::{Blocked, Engine};

/// A copy in flight. It is to be given back by [`Engine::copied`], whatever became of it:
/// operations on its pages wait for that.
#[must_use = "operations wait until it is given back"]
#[derive(PartialEq, Eq, Debug)]
pub struct Copying(pub(crate) Vec<InFlight>);

impl Engine {
    /// Allows a copy between the host and pages that are shared. All of the runs or none: who
    /// waits for one of them holds no other, so that no two can wait for each other.
    ///
    /// # Errors
    /// Refused beyond the object, for a page that is private, owed or in quarantine; busy where an
    /// operation holds a page.
    pub fn copy(&mut self, runs: &[PageRange]) -> Result<Copying, Blocked> {
        for &run in runs {
            self.check_host_access(run)?;
        }
        Ok(Copying(runs.iter().map(|&run| self.take_off(run)).collect()))
    }

    /// Takes a copy back.
    pub fn copied(&mut self, copying: Copying) {
        for in_flight in &copying.0 {
            self.land(in_flight);
        }
    }
}
