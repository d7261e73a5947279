//! VMs and their slots: which object's pages show at which guest frames.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::hash::{Hash, Hasher};

use polder_units::{Gfn, GfnRange, PageIndex, PageRange, Pfn};

use crate::guest::VcpuState;
use crate::rmp::{Snp, User};
use crate::shadow::ShadowMmu;
use crate::table::Table;
use crate::{Asid, Error, Machine, ObjectId, VmId};

/// `mmu_invalidate_seq`. Left out of hashes: only whether two are equal means anything.
///
/// All VMs of a machine count on one counter, so that what was resolved for a VM that is gone is
/// never current for the next one of its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Sequence(u64);

impl Sequence {
    pub(crate) const FIRST: Self = Self(0);
}

impl Hash for Sequence {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

#[derive(Clone, Hash)]
pub(crate) struct Slot {
    pub(crate) gfns: GfnRange,
    pub(crate) object: ObjectId,
    pub(crate) first: PageIndex,
    /// The frames that guests wrote to, of a slot that logs them.
    pub(crate) dirty: Option<BTreeSet<Gfn>>,
}

impl Slot {
    /// The object's page at a guest frame that lies in the slot.
    pub(crate) fn page(&self, gfn: Gfn) -> Option<(ObjectId, PageIndex)> {
        let offset = gfn.get().checked_sub(self.gfns.start().get())?;
        Some((self.object, PageIndex::new(self.first.get() + offset)?))
    }
}

/// The slot that covers a guest frame, of slots in their order.
pub(crate) fn slot_of(slots: &[Slot], gfn: Gfn) -> Option<&Slot> {
    let after = slots.partition_point(|slot| slot.gfns.start() <= gfn);
    slots[..after].last().filter(|slot| slot.gfns.contains(gfn))
}

/// The same, to change it.
pub(crate) fn slot_mut(slots: &mut [Slot], gfn: Gfn) -> Option<&mut Slot> {
    let after = slots.partition_point(|slot| slot.gfns.start() <= gfn);
    slots[..after].last_mut().filter(|slot| slot.gfns.contains(gfn))
}

/// An entry of a TDP table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct TdpEntry {
    pub(crate) pfn: Pfn,
    pub(crate) writable: bool,
    /// A translation was made of it; always set on a machine without such bits.
    pub(crate) accessed: bool,
    /// It was written through; always set on a machine without such bits.
    pub(crate) dirty: bool,
}

/// Invalidations in progress: how many, and the frames they are about.
#[derive(Clone, Copy, Hash)]
pub(crate) struct Invalidating {
    pub(crate) count: u32,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

#[derive(Clone, Hash)]
pub(crate) struct Vm {
    pub(crate) slots: Vec<Slot>,
    pub(crate) table: Table<TdpEntry>,
    /// The other roots' tables.
    pub(crate) shadow: ShadowMmu,
    /// Hardware translates guest-physical addresses (NPT, EPT).
    pub(crate) two_dimensional: bool,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) sequence: Sequence,
    pub(crate) invalidating: Option<Invalidating>,
    /// The guest frames whose faults end in the VMM.
    pub(crate) userfaults: BTreeSet<u64>,
    /// Of an SNP guest.
    pub(crate) snp: Option<Snp>,
    /// A protected VM of pKVM's.
    pub(crate) protected: bool,
}

impl Vm {
    pub(crate) fn uses(&self, object: ObjectId) -> bool {
        self.slots.iter().any(|slot| slot.object == object)
    }

    pub(crate) fn slot(&self, gfn: Gfn) -> Result<&Slot, Error> {
        slot_of(&self.slots, gfn).ok_or(Error::NoSlot { gfn })
    }

    /// `mmu_invalidate_retry_gfn()`.
    pub(crate) fn invalidated(&self, gfn: Gfn, since: Sequence) -> bool {
        let now = self.invalidating.is_some_and(|it| it.start <= gfn.get() && gfn.get() < it.end);
        now || self.sequence != since
    }
}

/// The object's page behind a guest frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Bound {
    /// The object.
    pub object: ObjectId,
    /// Its page.
    pub page: PageIndex,
}

impl Machine {
    /// Creates a plain VM without slots and vCPUs.
    ///
    /// # Errors
    /// [`Error::TooMany`].
    pub fn create_vm(&mut self) -> Result<VmId, Error> {
        self.insert_vm(None, true)
    }

    /// Creates a plain VM on a CPU without two-dimensional paging: its guest's page tables are
    /// shadowed as soon as it has some.
    ///
    /// # Errors
    /// [`Error::TooMany`].
    pub fn create_vm_without_tdp(&mut self) -> Result<VmId, Error> {
        self.insert_vm(None, false)
    }

    /// Creates an SNP guest without slots and vCPUs, with a key of its own.
    ///
    /// # Errors
    /// [`Error::NoSnp`] if SNP is not enabled; [`Error::Exists`] if another VM has the ASID, or the
    /// RMP has pages assigned to it; [`Error::TooMany`].
    ///
    /// ```
    /// use polder_machine::{Asid, Config, Machine, RmpSize, RmpUpdate, Side};
    /// use polder_units::{Gfn, Level, PageCount, PageIndex, PageRange};
    ///
    /// let mut machine = Machine::new(Config::x86_64(PageCount::from(1024)))?;
    /// machine.enable_snp();
    /// let asid = Asid::new(1).ok_or("no such asid")?;
    /// let vm = machine.create_snp_vm(asid)?;
    /// let vcpu = machine.add_vcpu(vm)?;
    /// let object = machine.create_object(PageCount::from(512))?;
    /// let (gfn, page) = (Gfn::from(0), PageIndex::from(0));
    /// machine.bind(vm, gfn, object, PageRange::new(page, PageCount::from(512))?)?;
    ///
    /// // The hypervisor assigns and maps 2M; the guest accepts and uses them.
    /// let pfn = machine.allocate(object, page, Level::Size2M)?;
    /// machine.rmpupdate(pfn, RmpUpdate::private(asid, gfn, RmpSize::Size2M))?;
    /// let resolved = machine.tdp_resolve(vm, gfn)?;
    /// machine.tdp_map(&resolved, Level::Size2M, true)?;
    /// let mut guest = machine.vcpu(vcpu)?;
    /// assert!(guest.pvalidate(gfn, RmpSize::Size2M, true)??);
    /// guest.write_u64(gfn.gpa(), Side::Private, 7)?;
    ///
    /// let mut bytes = [0; 8];
    /// machine.object_read(object, 0, &mut bytes)?;
    /// assert_ne!(u64::from_le_bytes(bytes), 7, "the host reads ciphertext");
    /// assert!(machine.object_write(object, 0, &bytes).is_err(), "and writes nothing");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn create_snp_vm(&mut self, asid: Asid) -> Result<VmId, Error> {
        let rmp = self.protection.rmp.as_mut().ok_or(Error::NoSnp)?;
        let taken = self.vms.iter().any(|(_, vm)| vm.snp.is_some_and(|snp| snp.asid == asid));
        if taken || rmp.uses(asid) {
            return Err(Error::Exists { number: asid.get().into() });
        }
        let snp = Snp { asid, key: rmp.new_key() };
        self.insert_vm(Some(snp), true)
    }

    fn insert_vm(&mut self, snp: Option<Snp>, two_dimensional: bool) -> Result<VmId, Error> {
        let sequence = self.next_sequence();
        self.vms.insert(Vm {
            slots: Vec::new(),
            table: Table::new(self.config.geometry),
            shadow: ShadowMmu::new(self.config.geometry),
            two_dimensional,
            vcpus: Vec::new(),
            sequence,
            invalidating: None,
            userfaults: BTreeSet::new(),
            snp,
            protected: false,
        })
    }

    /// Destroys a VM with its vCPUs, slots and stage 2. What the RMP assigned to it stays so until
    /// the driver takes it away; what pKVM gave it is the host's again, scrubbed.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn destroy_vm(&mut self, vm: VmId) -> Result<(), Error> {
        self.vms.get(vm)?;
        self.reclaim_all(vm);
        self.vms.remove(vm)?;
        if let Some(rmp) = &mut self.protection.rmp {
            let of_vm = |user: &User| matches!(user, User::Vcpu(vcpu) if vcpu.vm == vm);
            rmp.held.retain(|_, (_, user)| !of_vm(user));
        }
        Ok(())
    }

    /// Adds a slot: guest frames from `gfn` on show the object's pages `pages`.
    ///
    /// # Errors
    /// [`Error::Exists`] if a slot overlaps; [`Error::Beyond`] the object's end;
    /// [`Error::Space`]; [`Error::Gone`].
    pub fn bind(
        &mut self,
        vm: VmId,
        gfn: Gfn,
        object: ObjectId,
        pages: PageRange,
    ) -> Result<(), Error> {
        self.object_range(object, pages)?;
        let end = gfn.get() + pages.count().get();
        self.in_space(end)?;
        let gfns =
            GfnRange::new(gfn, pages.count()).map_err(|_| Error::Space { number: end, end })?;
        let slots = &mut self.vms.get_mut(vm)?.slots;
        if let Some(other) = slots.iter().find_map(|slot| slot.gfns.intersection(gfns)) {
            return Err(Error::Exists { number: other.start().get() });
        }
        let after = slots.partition_point(|slot| slot.gfns.start() < gfn);
        slots.insert(after, Slot { gfns, object, first: pages.start(), dirty: None });
        Ok(())
    }

    /// Takes the slot at `gfn` away and counts as an invalidation, so that no fault resolved before
    /// is mapped. What stage 2 and the TLBs still map of it is the caller's to unmap and flush.
    ///
    /// # Errors
    /// [`Error::NoSlot`]; [`Error::Gone`].
    pub fn unbind(&mut self, vm: VmId, gfn: Gfn) -> Result<GfnRange, Error> {
        let gfns = self.vms.get(vm)?.slot(gfn)?.gfns;
        let sequence = self.next_sequence();
        let vm = self.vms.get_mut(vm)?;
        vm.slots.retain(|slot| slot.gfns != gfns);
        vm.sequence = sequence;
        Ok(gfns)
    }

    /// The object's page behind a guest frame.
    ///
    /// # Errors
    /// [`Error::NoSlot`]; [`Error::Gone`].
    pub fn bound(&self, vm: VmId, gfn: Gfn) -> Result<Bound, Error> {
        let slot = self.vms.get(vm)?.slot(gfn)?;
        let (object, page) = slot.page(gfn).ok_or(Error::NoSlot { gfn })?;
        Ok(Bound { object, page })
    }

    /// The guest frames of every VM that show the object's pages in `range`.
    pub fn gfns_of(
        &self,
        object: ObjectId,
        range: PageRange,
    ) -> impl Iterator<Item = (VmId, GfnRange)> {
        self.vms.iter().flat_map(move |(id, vm)| {
            let slots = vm.slots.iter().filter(move |slot| slot.object == object);
            slots.filter_map(move |slot| {
                let pages = PageRange::new(slot.first, slot.gfns.count()).ok()?;
                let pages = pages.intersection(range)?;
                let offset = pages.start().checked_sub(slot.first)?;
                let gfn = slot.gfns.start().checked_add(offset)?;
                Some((id, GfnRange::new(gfn, pages.count()).ok()?))
            })
        })
    }

    /// A sequence that no VM has had.
    pub(crate) const fn next_sequence(&mut self) -> Sequence {
        self.sequence.0 += 1;
        self.sequence
    }
}
