//! What a TLB miss asks: stage 2 or the shadow pages, the guest's own tables, and the RMP.

use polder_units::{Gfn, Gpa, Level, PAGE_SHIFT, Pfn};

use super::{Exit, GuestFault, Side, Vcpu};
use crate::access::Access;
use crate::frames::frame_at;
use crate::guest_table::{GuestMemory, Pte, Stopped, Walk};
use crate::rmp::Rmp;
use crate::shadow::FoundLeaf;
use crate::table::Found;
use crate::tlb::Translation;
use crate::{AccessCheck, PageFault, Plant, Refused};

const fn fault(gfn: Gfn, page: u64, side: Side, write: bool) -> Exit {
    Exit::Fault(GuestFault { gfn, page, write, side })
}

/// A fault of the direct root.
const fn fault_at(page: u64, side: Side, write: bool) -> Exit {
    fault(Gpa::new(page << PAGE_SHIFT).gfn(), page, side, write)
}

impl Vcpu<'_> {
    /// Walks stage 2, asks the hardware, and fills the TLB.
    pub(super) fn walk(
        &mut self,
        gfn: u64,
        side: Side,
        write: bool,
        tag: u64,
    ) -> Result<Pfn, Exit> {
        let found = self.table.get(gfn);
        let Some(Found { start, level, entry: &entry }) = found else {
            return Err(fault_at(gfn, side, write));
        };
        let pfn = frame_at(entry.pfn, gfn - start);
        if write && !entry.writable {
            return self.write_table((gfn, side), Gpa::new(gfn << PAGE_SHIFT).gfn(), pfn);
        }
        let writable = match &self.protection.rmp {
            None => entry.writable,
            Some(rmp) => self.check(rmp, (gfn, side, write), pfn, level)? && entry.writable,
        };
        // A write finds an entry that is not dirty once more.
        let dirty = entry.dirty || write;
        if self.accessed_dirty
            && (!entry.accessed || dirty != entry.dirty)
            && let Some(Found { entry, .. }) = self.table.get_mut(gfn)
        {
            (entry.accessed, entry.dirty) = (true, dirty);
        }
        let logged = self.log(Gpa::new(gfn << PAGE_SHIFT).gfn(), write);
        let writable = writable && dirty && logged;
        self.state.tlb.fill(tag, Translation { pfn, level, writable });
        Ok(pfn)
    }

    /// Walks the shadow pages of the root, and fills the TLB. What they do not have, the guest's
    /// own tables are asked about.
    #[inline(never)]
    pub(super) fn walk_shadow(
        &mut self,
        page: u64,
        side: Side,
        write: bool,
        tag: u64,
    ) -> Result<Pfn, Exit> {
        let Some(table) = self.state.roots.current().table() else {
            return Err(fault_at(page, side, write));
        };
        if let Some(FoundLeaf { at, level, leaf }) = self.shadow.find(table, page)
            && (leaf.writable || !write)
        {
            let offset = page & (self.geometry.pages(level).get() - 1);
            let pfn = frame_at(leaf.pfn, offset);
            let dirty = leaf.dirty || write;
            if self.accessed_dirty
                && let Some(leaf) = self.shadow.leaf_mut(at)
            {
                (leaf.accessed, leaf.dirty) = (true, dirty);
            }
            let gfn = Gpa::new((leaf.gfn.get() + offset) << PAGE_SHIFT).gfn();
            let writable = leaf.writable && dirty && self.log(gfn, write);
            self.state.tlb.fill(tag, Translation { pfn, level, writable });
            return Ok(pfn);
        }
        let walk = self.walk_guest(table, page, side, write)?;
        match self.shadow.find(table, page) {
            // It is there, and read-only: what it holds may be a table.
            Some(FoundLeaf { level, leaf, .. }) if write => {
                let offset = page & (self.geometry.pages(level).get() - 1);
                let there = leaf.gfn.get() + offset == walk.gfn.get();
                match there {
                    true => self.write_table((page, side), walk.gfn, frame_at(leaf.pfn, offset)),
                    false => Err(fault(walk.gfn, page, side, write)),
                }
            }
            _ => Err(fault(walk.gfn, page, side, write)),
        }
    }

    /// Walks the guest's own tables, as the hypervisor does for a fault: marks entries accessed and
    /// the last one dirty.
    fn walk_guest(&mut self, table: Gfn, page: u64, side: Side, write: bool) -> Result<Walk, Exit> {
        let walked = self.memory().walk(table, page, write);
        let walk = walked.map_err(|stopped| match stopped {
            Stopped::Untranslated(why) => Exit::PageFault(PageFault { page, write, why }),
            Stopped::Table(gfn) => fault(gfn, page, side, false),
        })?;
        let last = walk.steps().last();
        for step in walk.steps() {
            let dirty = if write && Some(step) == last { Pte::DIRTY } else { 0 };
            let entry = step.entry.0 | Pte::ACCESSED | dirty;
            if entry == step.entry.0 {
                continue;
            }
            match self.memory().behind(step.table) {
                Some(behind) if behind.writable => {
                    let offset = u64::from(step.index) * 8;
                    self.frames.write(behind.pfn, offset, &entry.to_le_bytes());
                    self.log_table(step.table);
                }
                _ => return Err(fault(step.table, page, side, true)),
            }
        }
        Ok(walk)
    }

    /// A write of a frame that is mapped read-only. If that is because of a table in it whose
    /// shadow stays in sync, the hypervisor makes the write; else it is a fault.
    fn write_table(&mut self, (page, side): (u64, Side), gfn: Gfn, pfn: Pfn) -> Result<Pfn, Exit> {
        let tracked = self.shadow.is_tracked(gfn) && !self.shadow.may_unsync(gfn);
        let writable = self.memory().behind(gfn).is_some_and(|it| it.writable && it.pfn == pfn);
        if !tracked || !writable {
            return Err(fault(gfn, page, side, true));
        }
        self.log_table(gfn);
        self.tables.push((page, gfn));
        Ok(pfn)
    }

    /// The guest has written to a table that is shadowed.
    pub(super) fn wrote_table(&mut self, gfn: Gfn, offset: u64, len: usize) {
        let flush = self.shadow.written(gfn, offset, len);
        if flush.0 && !self.plants.has(Plant::SkipFlush) {
            self.state.tlb.clear();
            self.others.iter_mut().for_each(|vcpus| vcpus.iter_mut().for_each(|it| it.tlb.clear()));
        }
    }

    fn memory(&self) -> GuestMemory<'_> {
        let (slots, objects, frames) = (&*self.slots, self.objects, &*self.frames);
        let (zero_page, geometry) = (self.zero_page, self.geometry);
        GuestMemory { slots, objects, frames, zero_page, geometry }
    }

    /// Asks the RMP, and says whether a write would pass too: what a read was let into, a write may
    /// be refused, and has to come here again. Kept out of the walk of a machine without SNP.
    #[inline(never)]
    fn check(
        &self,
        rmp: &Rmp,
        (gfn, side, write): (u64, Side, bool),
        pfn: Pfn,
        level: Level,
    ) -> Result<bool, Exit> {
        let private = self.snp.filter(|_| side == Side::Private).map(|snp| (snp.asid, gfn));
        let access = Access { path: side.path(), private, pfn, level, write };
        match rmp.check(&access) {
            Err(Refused { check: AccessCheck::PageSize, .. })
                if self.plants.has(Plant::NoSizeCheck) => {}
            checked => checked?,
        }
        // Private reads and writes are checked alike.
        let same = write || private.is_some();
        Ok(same || rmp.check(&Access { write: true, ..access }).is_ok())
    }
}
