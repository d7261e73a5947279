//! KVM userfault: guest frames whose faults end in the VMM, whatever memory is behind them.
//!
//! As proposed for KVM in 2024 and 2025 (`KVM_MEM_USERFAULT`): a slot has a bitmap; a fault at a
//! frame with its bit set is a memory-fault exit of the vCPU that faulted, with a flag, and the VMM
//! clears the bit once the page is there. So nothing of it goes through one queue. Nothing is
//! mapped at a size that would cover such a frame.

use polder_units::{Gfn, GfnRange};

use crate::{Error, Machine, VmId};

impl Machine {
    /// Has faults at guest frames end in the VMM, or no longer. Those that begin to are taken out
    /// of stage 2.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn set_userfaults(&mut self, vm: VmId, gfns: GfnRange, on: bool) -> Result<(), Error> {
        let bits = &mut self.vms.get_mut(vm)?.userfaults;
        for gfn in gfns.frames().map(Gfn::get) {
            if on {
                bits.insert(gfn);
            } else {
                bits.remove(&gfn);
            }
        }
        if on {
            self.tdp_zap(vm, gfns)?;
        }
        Ok(())
    }

    /// Whether a fault at a guest frame ends in the VMM.
    pub fn is_userfault(&self, vm: VmId, gfn: Gfn) -> bool {
        self.vms.get(vm).is_ok_and(|vm| vm.userfaults.contains(&gfn.get()))
    }
}
