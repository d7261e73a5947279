//! Touches that come as exits of the vCPU: KVM userfault, as the machine has it.
//!
//! Every frame of a slot begins with its bit set, also where nothing is owed: a touch there costs
//! an exit, once, and the VMM clears the bit.

use polder_engine::VmId;
use polder_units::{Gfn, GfnRange, PageRange};

use super::{MachineHost, refused};
use crate::Error;

impl MachineHost {
    /// Has touches end in the VMM, in slots from here on.
    pub(crate) fn with_exits(mut self) -> Self {
        self.exits = true;
        self
    }

    /// Sets the bits of a new slot.
    pub(super) fn begin_exits(
        &self,
        vm: polder_machine::VmId,
        gfns: GfnRange,
    ) -> Result<(), Error> {
        if self.exits {
            self.lock().set_userfaults(vm, gfns, true).map_err(refused)
        } else {
            Ok(())
        }
    }

    /// Clears the bits of the frames that show pages, for good.
    pub(crate) fn end_exits(&self, id: VmId, pages: PageRange) -> Result<(), Error> {
        let vm = self.vm(id).ok_or(Error::NoSuchVm)?;
        let mut machine = self.lock();
        let shown: Vec<_> = machine.gfns_of(self.object, pages).collect();
        let ours = shown.into_iter().filter(|(of, _)| *of == vm);
        ours.map(|(_, gfns)| gfns)
            .try_for_each(|gfns| machine.set_userfaults(vm, gfns, false))
            .map_err(refused)
    }

    /// Whether a guest's fault at a frame ends in the VMM.
    pub(crate) fn exits_at(&self, vm: polder_machine::VmId, gfn: Gfn) -> bool {
        self.exits && self.lock().is_userfault(vm, gfn)
    }
}
