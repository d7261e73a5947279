//! The dirty log of a slot (`KVM_MEM_LOG_DIRTY_PAGES`): which of its frames guests have written to.
//!
//! As on a CPU with page-modification logging (Intel SDM volume 3, section 29.3.6): the walk that
//! lets a write through notes the frame, and a TLB lets through only writes to frames that are
//! noted. So whoever takes the log has the TLBs flushed, and the next write to a page walks again.
//! A slot that logs is mapped by 4K (`kvm_mmu_hugepage_adjust()`, arch/x86/kvm/mmu/mmu.c): a large
//! entry would be noted once for all of its frames.
//!
//! What the hypervisor writes on a guest's behalf is noted, too: the accessed and dirty bits of the
//! guest's tables, and writes to tables that are shadowed.
//!
//! # Holes
//! What the host writes (the trusted view, a process, a device) is none of the slot's.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use polder_units::Gfn;

use crate::guest::Vcpu;
use crate::vm::{Slot, slot_mut};
use crate::{Error, Machine, Plant, VmId};

impl Machine {
    /// Has the slot at `gfn` log what guests write from now on, or no longer. What it maps is taken
    /// out of stage 2: by 4K it is mapped again, or as large as it fits. A log that is on already
    /// goes on with what it has.
    ///
    /// # Errors
    /// [`Error::NoSlot`]; [`Error::Protected`] where a hypervisor keeps stage 2; [`Error::Gone`].
    ///
    /// ```
    /// use polder_machine::{Config, Machine, Side};
    /// use polder_units::{Gfn, Level, PageCount, PageIndex, PageRange};
    ///
    /// let mut machine = Machine::new(Config::x86_64(PageCount::from(64)))?;
    /// let object = machine.create_object(PageCount::from(16))?;
    /// let vm = machine.create_vm()?;
    /// let vcpu = machine.add_vcpu(vm)?;
    /// let gfn = Gfn::from(3);
    /// machine.bind(vm, Gfn::from(0), object, PageRange::between(0, 16).unwrap())?;
    /// machine.allocate(object, PageIndex::from(3), Level::Size4K)?;
    ///
    /// machine.log_dirty(vm, gfn, true)?;
    /// let resolved = machine.tdp_resolve(vm, gfn)?;
    /// machine.tdp_map(&resolved, Level::Size4K, true)?;
    /// machine.vcpu(vcpu)?.write_u64(gfn.gpa(), Side::Shared, 7)?;
    /// assert_eq!(machine.take_dirty(vm, gfn)?, [gfn]);
    /// assert_eq!(machine.take_dirty(vm, gfn)?, []);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn log_dirty(&mut self, vm: VmId, gfn: Gfn, on: bool) -> Result<(), Error> {
        self.check_stage2_is_ours(vm)?;
        let Slot { gfns, dirty, .. } = self.slot_mut(vm, gfn)?;
        let gfns = *gfns;
        match on {
            true => *dirty = Some(dirty.take().unwrap_or_default()),
            false => *dirty = None,
        }
        self.tdp_zap(vm, gfns).map(drop)
    }

    /// The frames of the slot at `gfn` that guests have written to since it was asked last, or
    /// began to log, in order; none of a slot that does not log. From now on a write to one is
    /// noted again.
    ///
    /// # Errors
    /// [`Error::NoSlot`]; [`Error::Gone`].
    pub fn take_dirty(&mut self, vm: VmId, gfn: Gfn) -> Result<Vec<Gfn>, Error> {
        let Slot { gfns, dirty, .. } = self.slot_mut(vm, gfn)?;
        let (gfns, taken) = (*gfns, dirty.as_mut().map(core::mem::take));
        let taken: Vec<Gfn> = taken.into_iter().flatten().collect();
        if !taken.is_empty() {
            self.flush_vm(vm, gfns)?;
        }
        Ok(taken)
    }

    fn slot_mut(&mut self, vm: VmId, gfn: Gfn) -> Result<&mut Slot, Error> {
        slot_mut(&mut self.vms.get_mut(vm)?.slots, gfn).ok_or(Error::NoSlot { gfn })
    }

    /// Notes a write to a guest's frame that its own vCPUs do not make.
    pub(crate) fn note_dirty(&mut self, vm: VmId, gfn: Gfn) -> Result<(), Error> {
        if let Some(log) = log_of(&mut self.vms.get_mut(vm)?.slots, gfn) {
            log.insert(gfn);
        }
        Ok(())
    }
}

/// The log of the slot with a frame, if it has one.
fn log_of(slots: &mut [Slot], gfn: Gfn) -> Option<&mut BTreeSet<Gfn>> {
    slot_mut(slots, gfn)?.dirty.as_mut()
}

impl Vcpu<'_> {
    /// Notes that a translation of `gfn` was made, for a write or not. Whether the TLB may let
    /// writes through by it.
    pub(crate) fn log(&mut self, gfn: Gfn, write: bool) -> bool {
        let Some(log) = log_of(self.slots, gfn) else { return true };
        if write {
            log.insert(gfn);
        }
        write || log.contains(&gfn)
    }

    /// Notes that the hypervisor writes to a table of the guest's.
    pub(crate) fn log_table(&mut self, gfn: Gfn) {
        if !self.plants.has(Plant::TableUnlogged) {
            self.log(gfn, true);
        }
    }
}
