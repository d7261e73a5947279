//! Stage 2: the two-dimensional page table of each VM and its fault path.
//!
//! A fault is answered in two steps, as `kvm_tdp_mmu_page_fault()` does: [`Machine::tdp_resolve`]
//! reads `mmu_invalidate_seq` and then finds the frame, without any lock; [`Machine::tdp_map`] maps
//! it only if no invalidation has begun or ended since (`mmu_invalidate_retry_gfn()`,
//! include/linux/kvm_host.h). Entries hold no reference of the folio: who takes memory away
//! invalidates first.

use polder_units::{Gfn, GfnRange, Level, PageCount, Pfn};

use crate::anonymous::Behind;
use crate::frames::{frame_at, page_count};
use crate::mmu::{Touch, Via};
use crate::table::Found;
use crate::vm::{Bound, Invalidating, Sequence, TdpEntry, Vm};
use crate::{Error, Machine, Plant, VcpuId, VmId};

/// A guest frame whose memory was found but is not mapped yet.
///
/// Its hash, like the machine's, leaves out the sequence that it remembers: a search hashes
/// [`Resolved::is_current`] beside it, which is all that can matter from now on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Resolved {
    pub(crate) vm: VmId,
    gfn: Gfn,
    pfn: Pfn,
    bound: Bound,
    pub(crate) largest: Level,
    pub(crate) sequence: Sequence,
    /// What it is for.
    pub(crate) touch: Touch,
    /// What is behind may be written to.
    pub(crate) writable: bool,
    /// How the frame was found, by another root than the direct one.
    pub(crate) via: Option<Via>,
}

impl Resolved {
    /// The guest frame.
    pub const fn gfn(&self) -> Gfn {
        self.gfn
    }

    /// The frame behind it.
    pub const fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// The object's page behind it.
    pub const fn bound(&self) -> Bound {
        self.bound
    }

    /// Whether what is behind may be written to: not the zero page, nor one that is to be copied
    /// first ([`Machine::write_fault`]); and the guest's own tables let it.
    pub const fn writable(&self) -> bool {
        self.writable
    }

    /// The largest level that folio, slot and alignment allow.
    pub const fn largest(&self) -> Level {
        self.largest
    }

    /// Whether it may still be mapped.
    pub fn is_current(&self, machine: &Machine) -> bool {
        machine.vms.get(self.vm).is_ok_and(|vm| !vm.invalidated(self.gfn, self.sequence))
    }

    /// The same, and never current: for who notes elsewhere whether it is.
    #[must_use]
    pub const fn detached(self) -> Self {
        Self { sequence: Sequence::FIRST, ..self }
    }

    /// The same, as if it had been resolved on this machine, now.
    #[must_use]
    pub fn renewed(self, machine: &Machine) -> Self {
        let sequence = machine.vms.get(self.vm).map_or(Sequence::FIRST, |vm| vm.sequence);
        Self { sequence, ..self }
    }
}

/// What a TDP table says of a guest frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Spte {
    /// The frame.
    pub pfn: Pfn,
    /// The level of the entry.
    pub level: Level,
    /// Whether writes are let through.
    pub writable: bool,
    /// Whether it was used; always on a machine without such bits.
    pub accessed: bool,
    /// Whether it was written through; always on a machine without such bits.
    pub dirty: bool,
}

impl Machine {
    /// First step of a fault by the direct root: read the sequence, then find the memory of `gfn`.
    ///
    /// # Errors
    /// [`Error::NoSlot`]; [`Error::Hole`] if nothing is allocated there; [`Error::Gone`].
    pub fn tdp_resolve(&self, vm: VmId, gfn: Gfn) -> Result<Resolved, Error> {
        self.resolve_gfn(vm, gfn, Touch::Read)
    }

    pub(crate) fn resolve_gfn(&self, vm: VmId, gfn: Gfn, touch: Touch) -> Result<Resolved, Error> {
        let sequence = self.vms.get(vm)?.sequence;
        let bound @ Bound { object, page } = self.bound(vm, gfn)?;
        let behind = self.objects.get(object)?.behind(page, self.zero_page);
        let Behind { pfn, level, writable } = behind.ok_or(Error::Hole { object, page })?;
        if touch == Touch::Write && !writable {
            return Err(Error::ToCopy { object, page });
        }
        let userfaults = &self.vms.get(vm)?.userfaults;
        if userfaults.contains(&gfn.get()) {
            return Err(Error::Userfault { gfn });
        }
        let slot = self.vms.get(vm)?.slot(gfn)?;
        let fits = |level: &Level| {
            let pages = self.pages(*level);
            let at = GfnRange::enclosing(gfn, *level, self.config.geometry);
            let all_there = userfaults.range(at.start().get()..at.end()).next().is_none();
            let fits = gfn.get() % pages == page.get() % pages && slot.gfns.contains_range(at);
            fits && all_there && slot.dirty.is_none()
        };
        let mut levels = Level::ALL.into_iter().rev().filter(|candidate| *candidate <= level);
        let largest = levels.find(fits).unwrap_or(Level::Size4K);
        Ok(Resolved { vm, gfn, pfn, bound, largest, sequence, touch, writable, via: None })
    }

    /// Second step of a fault: map what was resolved, at `level`, if nothing was invalidated
    /// since. Returns the level that it is mapped at: a larger entry there already is kept, and
    /// smaller ones are replaced, with a flush.
    ///
    /// # Errors
    /// [`Error::Stale`]: resolve again; [`Error::TooLarge`] above [`Resolved::largest`];
    /// [`Error::Protected`] where a hypervisor keeps stage 2; [`Error::Gone`].
    pub fn tdp_map(
        &mut self,
        resolved: &Resolved,
        level: Level,
        writable: bool,
    ) -> Result<Level, Error> {
        let Resolved { vm, gfn, pfn, largest, touch, .. } = *resolved;
        self.check_stage2_is_ours(vm)?;
        self.check_current(resolved)?;
        if level > largest {
            return Err(Error::TooLarge { level, largest });
        }
        let (accessed, dirty) = self.used(touch);
        let geometry = self.config.geometry;
        let Vm { table, shadow, .. } = self.vms.get_mut(vm)?;
        // A frame with a table that is shadowed is mapped read-only, and in no large page.
        let tracks = |level: &Level| {
            let at = GfnRange::enclosing(gfn, *level, geometry);
            shadow.tracks_in(at.start().get(), at.end())
        };
        let level = Level::ALL.into_iter().rfind(|it| *it <= level && !tracks(it));
        let level = level.unwrap_or(Level::Size4K);
        let mut writable = writable && resolved.writable;
        if shadow.is_tracked(gfn) {
            if touch == Touch::Write && writable && shadow.may_unsync(gfn) {
                shadow.unsync(gfn);
            } else {
                writable = false;
            }
        }
        let at = GfnRange::enclosing(gfn, level, geometry);
        let offset = gfn.get() - at.start().get();
        let head = frame_at(Pfn::from(0), pfn.get() - offset);
        if let Some(Found { start, level: there, entry }) = table.get_mut(gfn.get())
            && there >= level
            && entry.pfn.get() + (gfn.get() - start) == pfn.get()
        {
            entry.writable |= writable;
            entry.accessed |= accessed;
            entry.dirty |= dirty;
            return Ok(there);
        }
        let mut replaced = false;
        table.drain(at.start().get(), at.end(), |_| replaced = true);
        let added =
            table.insert(gfn.get(), level, TdpEntry { pfn: head, writable, accessed, dirty });
        assert!(added.is_ok(), "the entry at gfn {gfn} was just emptied");
        if replaced {
            self.flush_vm(vm, at)?;
        }
        Ok(level)
    }

    /// What stage 2 says of a guest frame.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn spte(&self, vm: VmId, gfn: Gfn) -> Result<Option<Spte>, Error> {
        let found = self.vms.get(vm)?.table.get(gfn.get());
        Ok(found.map(|Found { start, level, entry }| {
            let pfn = frame_at(entry.pfn, gfn.get() - start);
            let TdpEntry { writable, accessed, dirty, .. } = *entry;
            Spte { pfn, level, writable, accessed, dirty }
        }))
    }

    /// Begins an invalidation: from here to its end, no fault in `range` is mapped
    /// (`kvm_mmu_invalidate_begin()`). Several may be in progress.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn invalidate_begin(&mut self, vm: VmId, range: GfnRange) -> Result<(), Error> {
        let invalidating = &mut self.vms.get_mut(vm)?.invalidating;
        let (start, end) = (range.start().get(), range.end());
        *invalidating = Some(match *invalidating {
            None => Invalidating { count: 1, start, end },
            // As the kernel: one range for all that are in progress.
            Some(other) => Invalidating {
                count: other.count + 1,
                start: other.start.min(start),
                end: other.end.max(end),
            },
        });
        Ok(())
    }

    /// Ends an invalidation: whatever was resolved before is stale (`kvm_mmu_invalidate_end()`).
    ///
    /// # Errors
    /// [`Error::NotInvalidating`] if none is in progress; [`Error::Gone`].
    pub fn invalidate_end(&mut self, vm: VmId) -> Result<(), Error> {
        let sequence = self.next_sequence();
        let vm = self.vms.get_mut(vm)?;
        let other = vm.invalidating.ok_or(Error::NotInvalidating)?;
        vm.sequence = sequence;
        let left = Invalidating { count: other.count - 1, ..other };
        vm.invalidating = (left.count > 0).then_some(left);
        Ok(())
    }

    /// Drops the entries of every root that map frames of `range`, whole, and the shadows of tables
    /// in these frames; and flushes nothing.
    ///
    /// Returns whether there was one: only then a flush is needed.
    ///
    /// # Errors
    /// [`Error::Protected`] where a hypervisor keeps stage 2; [`Error::Gone`].
    pub fn tdp_unmap(&mut self, vm: VmId, range: GfnRange) -> Result<bool, Error> {
        self.check_stage2_is_ours(vm)?;
        let Vm { table, shadow, .. } = self.vms.get_mut(vm)?;
        let mut any = shadow.zap(range.start().get(), range.end());
        table.drain(range.start().get(), range.end(), |_| any = true);
        Ok(any)
    }

    /// A whole invalidation in one step: begin, unmap, flush, end.
    ///
    /// # Errors
    /// As [`Machine::tdp_unmap`]; nothing has begun then.
    pub fn tdp_zap(&mut self, vm: VmId, range: GfnRange) -> Result<bool, Error> {
        self.check_stage2_is_ours(vm)?;
        self.invalidate_begin(vm, range)?;
        let any = self.tdp_unmap(vm, range)?;
        self.flush_vm(vm, range)?;
        self.invalidate_end(vm)?;
        Ok(any)
    }

    /// Flushes a range of one vCPU's TLB, and all of what other roots than the direct one
    /// translate.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn flush_vcpu(&mut self, vcpu: VcpuId, range: GfnRange) -> Result<(), Error> {
        let (skip, geometry) = (self.plants.has(Plant::SkipFlush), self.config.geometry);
        let tlb = &mut self.vcpu_state(vcpu)?.tlb;
        if !skip {
            tlb.flush(range.start().get(), range.end(), geometry);
            tlb.flush_indirect();
        }
        Ok(())
    }

    /// Flushes a range of the TLBs of every vCPU of a VM (`kvm_flush_remote_tlbs_range()`).
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn flush_vm(&mut self, vm: VmId, range: GfnRange) -> Result<(), Error> {
        let vcpus = self.vms.get(vm)?.vcpus.len();
        (0..).take(vcpus).try_for_each(|index| self.flush_vcpu(VcpuId { vm, index }, range))
    }

    /// How many pages stage 2 maps.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn tdp_pages(&self, vm: VmId) -> Result<PageCount, Error> {
        let table = &self.vms.get(vm)?.table;
        let pages = table.iter().map(|found| self.pages(found.level)).sum();
        Ok(page_count(pages))
    }
}
