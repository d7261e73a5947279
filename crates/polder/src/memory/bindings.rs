//! Which VM sees which pages where.

use polder_engine::{Binding, Slot, VmId};
use polder_units::{Gfn, GfnRange, PageRange};

#[cfg(doc)]
use crate::Refusal;
use crate::{Error, Memory};

impl Memory {
    /// Shows `pages` to a VM at guest frame `gfn`, by slot `slot`. A slot is immutable: to move
    /// it, unbind and bind.
    ///
    /// # Errors
    /// [`Refusal::Beyond`], [`Refusal::SlotTaken`], [`Refusal::GfnsTaken`],
    /// [`Refusal::PagesTaken`]; [`Error::NoSuchVm`] for a VM that is not of this memory's
    /// [`Memory::attach`]; [`Error::Host`] where KVM refuses the slot; [`Error::NotOffered`] while
    /// there is a dirty log ([`Memory::start_dirty_log`]) that the VM can't have.
    ///
    /// ```
    /// # use polder::{Error, HostKind, Memory, Refusal, Slot, Vm, VmId, units::{Gfn, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// let vm = memory.attach(Vm::Machine)?;
    /// let all = PageRange::between(0, 16).unwrap();
    /// memory.bind(vm, Slot(0), Gfn::from(0x100), all)?;
    /// let again = memory.bind(vm, Slot(0), Gfn::from(0x200), all);
    /// assert_eq!(again, Err(Error::Refused(Refusal::SlotTaken { slot: Slot(0) })));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn bind(&self, vm: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error> {
        let _one_at_a_time = self.slots.change(&self.driver);
        self.driver.ask(|engine| engine.bind(vm, slot, gfn, pages))?;
        self.driver.host.bind(vm, slot, gfn, pages).inspect_err(|_| {
            let unbound = self.driver.engine().unbind(vm, slot);
            assert!(unbound.is_ok(), "it was bound a moment ago: {unbound:?}");
        })?;
        let dirty = &self.driver.dirty;
        if dirty.is_on() {
            // KVM makes a slot that logs of a VM with a dirty ring too, and tells it only now.
            self.driver.host.take_dirty(dirty).inspect_err(|_| {
                let _ = self.driver.unbind(vm, slot);
            })?;
        }
        Ok(())
    }

    /// Deletes a slot. No page is freed. Waits for a [`Memory::prefault`] that is under way, as
    /// [`Memory::bind`] does. KVM waits until no vCPU is in the middle of an access to the slot: a
    /// vCPU that waits for contents has to get them first, or [`Memory::fail`] has to be called.
    ///
    /// # Errors
    /// [`Refusal::NoSuchSlot`]; [`Error::Host`] where KVM can't delete the slot, which is then
    /// still bound, and wants what it did.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Vm, units::{Gfn, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// memory.unbind(vm, Slot(0))?;
    /// assert!(memory.bindings().is_empty());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn unbind(&self, vm: VmId, slot: Slot) -> Result<(), Error> {
        let _one_at_a_time = self.slots.change(&self.driver);
        self.driver.unbind(vm, slot)
    }

    /// Every binding.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Vm, units::{Gfn, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let (of, slot, binding) = memory.bindings()[0];
    /// assert_eq!((of, slot), (vm, Slot(0)));
    /// assert_eq!(binding.gfns().start(), Gfn::from(0x100));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn bindings(&self) -> Vec<(VmId, Slot, Binding)> {
        let engine = self.driver.engine();
        engine.bindings().map(|(vm, slot, binding)| (vm, slot, *binding)).collect()
    }

    /// The pages of the object behind guest frames, in runs.
    ///
    /// # Errors
    /// [`Refusal::Unbound`] unless every frame is bound.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Vm, units::{Gfn, GfnRange, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let pages = memory.pages_of(vm, GfnRange::one(Gfn::from(0x103)))?;
    /// assert_eq!(pages, [PageRange::between(3, 4).unwrap()]);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn pages_of(&self, vm: VmId, gfns: GfnRange) -> Result<Vec<PageRange>, Error> {
        self.driver.ask(|engine| engine.pages_of(vm, gfns))
    }
}
