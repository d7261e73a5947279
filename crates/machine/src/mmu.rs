//! A fault's two steps, whatever root the vCPU has: find what is to be mapped, then map it.
//!
//! Finding reads `mmu_invalidate_seq` first, then walks what has to be walked: nothing for the
//! direct root, the guest's own tables for the others. Mapping does nothing if either has changed
//! since: an invalidation came, the guest wrote to a table, the vCPU has another root.

use alloc::vec::Vec;

use polder_units::{Gfn, GfnRange, Level, PAGE_SHIFT};

use crate::guest_table::{GuestMemory, Pte, Stopped, Untranslated, Walk};
use crate::root::Root;
use crate::shadow::{FoundLeaf, NewLeaf};
use crate::table::Found;
use crate::vm::Vm;
use crate::{Error, Machine, Plant, Resolved, Spte, VcpuId, VmId};

/// What a page is mapped for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Touch {
    /// A guest reads it.
    Read,
    /// A guest writes to it.
    Write,
    /// Nobody touches it yet: mapped as for a read, and not called accessed, neither in the entry
    /// nor in the guest's tables.
    Prefault,
}

/// Guest frames, and where a guest's tables show them: from the page with this number on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Alias {
    /// The first page, by its number in the space that the root translates.
    pub page: u64,
    /// The frames.
    pub gfns: GfnRange,
}

/// How a page of an indirect root's space was found.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Via {
    pub(crate) vcpu: VcpuId,
    pub(crate) root: Root,
    pub(crate) page: u64,
    pub(crate) walk: Walk,
}

impl Machine {
    /// First step of a fault at page number `page` of the space that the vCPU's root translates:
    /// read the sequence, then find the guest frame and its memory.
    ///
    /// # Errors
    /// [`Error::Untranslated`] if the guest's tables do not map it; [`Error::NotAccessed`], of a
    /// prefault, if they say that it was never used: a mapping would hide its first use from the
    /// guest; [`Error::Table`] if a table can't be read; as [`Machine::tdp_resolve`].
    pub fn resolve(&self, vcpu: VcpuId, page: u64, touch: Touch) -> Result<Resolved, Error> {
        let root = self.root(vcpu)?;
        let Some(table) = root.table() else {
            let space = Error::Space { number: page, end: crate::table::space(self.geometry()) };
            return self.resolve_gfn(vcpu.vm, Gfn::new(page).ok_or(space)?, touch);
        };
        let walk = self.walk(vcpu.vm, table, page, touch == Touch::Write)?;
        if touch == Touch::Prefault && !walk.accessed() && !self.plants.has(Plant::AccessedSet) {
            return Err(Error::NotAccessed { page });
        }
        let mut resolved = self.resolve_gfn(vcpu.vm, walk.gfn, touch)?;
        resolved.writable &= walk.writable() && walk.dirty();
        resolved.largest = resolved.largest.min(walk.level);
        resolved.via = Some(Via { vcpu, root, page, walk });
        Ok(resolved)
    }

    /// Second step: map what was resolved, at `level` at most, and for writing at most if
    /// `writable`. Returns the level that it is mapped at.
    ///
    /// # Errors
    /// [`Error::Stale`]: resolve again; [`Error::TooLarge`] above [`Resolved::largest`];
    /// [`Error::Gone`].
    pub fn map(
        &mut self,
        resolved: &Resolved,
        level: Level,
        writable: bool,
    ) -> Result<Level, Error> {
        let Some(via) = resolved.via else { return self.tdp_map(resolved, level, writable) };
        let (gfn, vm) = (resolved.gfn(), resolved.vm);
        self.check_current(resolved)?;
        let table = via.root.table().filter(|_| self.root(via.vcpu) == Ok(via.root));
        let table = table.ok_or(Error::Stale { gfn })?;
        let write = resolved.touch == Touch::Write;
        if self.walk(vm, table, via.page, write) != Ok(via.walk) {
            return Err(Error::Stale { gfn });
        }
        if level > resolved.largest() {
            return Err(Error::TooLarge { level, largest: resolved.largest() });
        }
        let used = self.used(resolved.touch);
        let writable = writable && resolved.writable;
        let new = NewLeaf { level, pfn: resolved.pfn(), writable, used };
        let (objects, frames) = (&self.objects, &self.frames);
        let (zero_page, geometry) = (self.zero_page, self.config.geometry);
        let Vm { slots, shadow, table: tdp, .. } = self.vms.get_mut(vm)?;
        if write && writable && shadow.is_tracked(gfn) && shadow.may_unsync(gfn) {
            shadow.unsync(gfn);
        }
        let memory = GuestMemory { slots, objects, frames, zero_page, geometry };
        let (level, flush) = shadow.map((table, via.page), &via.walk, new, &memory, tdp);
        self.flush_if(vm, flush)?;
        Ok(level)
    }

    /// How the vCPU's root has page number `page` of its space.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn mapped(&self, vcpu: VcpuId, page: u64) -> Result<Option<Spte>, Error> {
        let root = self.root(vcpu)?;
        let vm = self.vms.get(vcpu.vm)?;
        let Some(table) = root.table() else {
            return Gfn::new(page).map_or(Ok(None), |gfn| self.spte(vcpu.vm, gfn));
        };
        Ok(vm.shadow.find(table, page).map(|FoundLeaf { level, leaf, .. }| {
            let offset = page & (self.pages(level) - 1);
            let pfn = crate::frames::frame_at(leaf.pfn, offset);
            let (accessed, dirty) = (leaf.accessed, leaf.dirty);
            Spte { pfn, level, writable: leaf.writable, accessed, dirty }
        }))
    }

    /// The guest frame behind page number `page` of the space that the vCPU's root translates, as
    /// the guest's tables have it now. The level is that of the guest's own mapping.
    ///
    /// # Errors
    /// [`Error::Untranslated`]; [`Error::Table`]; [`Error::Gone`].
    pub fn translated(&self, vcpu: VcpuId, page: u64) -> Result<(Gfn, Level), Error> {
        match self.root(vcpu)?.table() {
            Some(table) => {
                let walk = self.walk(vcpu.vm, table, page, false)?;
                Ok((walk.gfn, walk.level))
            }
            None => {
                let end = crate::table::space(self.geometry());
                let gfn = Gfn::new(page).ok_or(Error::Space { number: page, end })?;
                Ok((gfn, Level::Size1G))
            }
        }
    }

    /// Where the guest's tables show guest frames of `gfns` in the space that the vCPU's root
    /// translates: a walk of all of its tables, each entry looked at (which is what it costs: what
    /// the guest has mapped, not what was asked for). Tables that can't be read show nothing.
    ///
    /// # Errors
    /// [`Error::TooManyEntries`] after `most` entries: a guest can have tables lead to each other.
    pub fn aliases(&self, vcpu: VcpuId, gfns: GfnRange, most: u64) -> Result<Vec<Alias>, Error> {
        let Some(table) = self.root(vcpu)?.table() else {
            return Ok(alloc::vec![Alias { page: gfns.start().get(), gfns }]);
        };
        let memory = self.guest_memory(vcpu.vm)?;
        let mut runs: Vec<Alias> = Vec::new();
        let mut budget = most;
        let all = memory.each(table, &mut budget, &mut |page, gfn, pages| {
            let start = gfn.get().max(gfns.start().get());
            let end = (gfn.get() + pages).min(gfns.end());
            let Some(here) = GfnRange::between(start, end) else { return };
            let at = page + (start - gfn.get());
            let follows = |last: &Alias| last.page + last.gfns.count().get() == at;
            match runs.last_mut().filter(|last| follows(last)) {
                Some(last) if last.gfns.append(here).is_some() => {
                    last.gfns = last.gfns.append(here).unwrap_or(here);
                }
                _ => runs.push(Alias { page: at, gfns: here }),
            }
        });
        if all { Ok(runs) } else { Err(Error::TooManyEntries { most }) }
    }

    /// Puts together what the entry of a guest's table is to be, and writes it there as the guest
    /// would: for who sets a guest up. Tables that are shadowed are not told.
    ///
    /// # Errors
    /// [`Error::Table`] if there is no memory there; [`Error::Gone`].
    pub fn write_pte(&mut self, vm: VmId, table: Gfn, index: u16, pte: Pte) -> Result<(), Error> {
        let bound = self.bound(vm, table)?;
        self.write_fault(bound.object, bound.page)?;
        let backing = self.backing(bound.object, bound.page)?.ok_or(Error::Table { gfn: table })?;
        self.frames.write(backing.pfn, u64::from(index) * 8, &pte.0.to_le_bytes());
        self.note_dirty(vm, table)
    }

    pub(crate) fn guest_memory(&self, vm: VmId) -> Result<GuestMemory<'_>, Error> {
        let vm = self.vms.get(vm)?;
        let (zero_page, geometry) = (self.zero_page, self.config.geometry);
        let (objects, frames) = (&self.objects, &self.frames);
        Ok(GuestMemory { slots: &vm.slots, objects, frames, zero_page, geometry })
    }

    fn walk(&self, vm: VmId, table: Gfn, page: u64, write: bool) -> Result<Walk, Error> {
        let walked = self.guest_memory(vm)?.walk(table, page, write);
        walked.map_err(|stopped| match stopped {
            Stopped::Untranslated(why) => Error::Untranslated { page, why },
            Stopped::Table(gfn) => Error::Table { gfn },
        })
    }

    /// The accessed and the dirty bit of a new entry.
    pub(crate) fn used(&self, touch: Touch) -> (bool, bool) {
        let always = !self.config.accessed_dirty;
        let accessed = touch != Touch::Prefault || self.plants.has(Plant::AccessedSet);
        (always || accessed, always || touch == Touch::Write)
    }

    pub(crate) fn check_current(&self, resolved: &Resolved) -> Result<(), Error> {
        let (gfn, vm) = (resolved.gfn(), self.vms.get(resolved.vm)?);
        let stale = vm.invalidated(gfn, resolved.sequence);
        if stale && !self.plants.has(Plant::StaleSequence) {
            return Err(Error::Stale { gfn });
        }
        Ok(())
    }

    /// Clears the accessed bits of what maps `gfns` in any root, and says whether one was set
    /// (`kvm_age_gfn()`). TLBs are left as they are.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn age(&mut self, vm: VmId, gfns: GfnRange) -> Result<bool, Error> {
        if !self.config.accessed_dirty {
            return Ok(true);
        }
        let vm = self.vms.get_mut(vm)?;
        let mut any = vm.shadow.age(gfns.start().get(), gfns.end());
        let mut next = gfns.start().get();
        while let Some(Found { start, level, .. }) = vm.table.first_in(next, gfns.end()) {
            next = start + vm.table.pages(level);
            if let Some(found) = vm.table.get_mut(start) {
                any |= core::mem::replace(&mut found.entry.accessed, false);
            }
        }
        Ok(any)
    }
}

/// Why a page of an indirect root's space is not translated, as an exit tells it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageFault {
    /// The page, by its number in the space that the root translates.
    pub page: u64,
    /// Whether it was a write.
    pub write: bool,
    /// Why.
    pub why: Untranslated,
}

impl PageFault {
    /// The first byte of the page.
    pub const fn address(&self) -> u64 {
        self.page << PAGE_SHIFT
    }
}
