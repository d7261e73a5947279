//! The kernel's direct map: where it is asked for, no page that anybody can see is in it.
//!
//! A page leaves it when it is published: before the first mapping, whichever way its contents
//! came. It is back before its memory is freed or made zeros, which the kernel does by that map.
//! Polder's own copies go by a mapping of the VMM's then, which is what the trusted view is on a
//! real host.

use polder_machine::Machine;
use polder_units::{PageRange, PfnRange};

use super::{MachineHost, refused};
use crate::Error;

impl MachineHost {
    /// Has pages that are published taken off the direct map from here on.
    pub(crate) fn off_direct_map(mut self) -> Self {
        self.hides = true;
        self
    }

    /// Takes pages that are about to be seen off the direct map: those that have memory.
    pub(super) fn hide(&self, machine: &mut Machine, range: PageRange) -> Result<(), Error> {
        if !self.hides {
            return Ok(());
        }
        for page in range.frames() {
            if let Some(backing) = machine.backing(self.object, page).map_err(refused)? {
                machine.direct_map_remove(PfnRange::one(backing.pfn)).map_err(refused)?;
            }
        }
        Ok(())
    }

    /// Does what the kernel does by the direct map, with the pages back in it; those that have
    /// memory afterwards leave it again.
    pub(super) fn by_direct_map<T>(
        &self,
        machine: &mut Machine,
        range: PageRange,
        kernel: impl FnOnce(&mut Machine) -> T,
    ) -> Result<T, Error> {
        for page in range.frames().filter(|_| self.hides) {
            if let Some(backing) = machine.backing(self.object, page).map_err(refused)? {
                machine.direct_map_restore(PfnRange::one(backing.pfn));
            }
        }
        let done = kernel(machine);
        self.hide(machine, range)?;
        Ok(done)
    }
}
