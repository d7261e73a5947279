//! Guests: vCPUs, what they access and what they ask for.
//!
//! A guest is a program of accesses and requests, stepped one at a time; or it is driven from
//! outside through [`Vcpu::read`] and [`Vcpu::write`]. Either way an access asks the vCPU's TLB
//! first and the tables of its root only on a miss. Addresses are those that the root translates
//! ([`Root::space`](crate::Root::space)): guest-physical ones as a rule, linear ones where the
//! guest's page tables are shadowed.

use alloc::sync::Arc;
use alloc::vec::Vec;

use polder_units::{Geometry, Gfn, GfnRange, Gpa, Level, PAGE_SHIFT, PAGE_SIZE, Pfn};

use crate::access::{Access, Protection};
use crate::chunk::{chunks, chunks_mut, pages};
use crate::frames::{Frames, frame_at};
use crate::guest_table::{GuestMemory, Pte, Stopped, Walk};
use crate::object::Object;
use crate::plant::Plants;
use crate::rmp::{Cipher, Rmp, Snp};
use crate::root::{Paging, Roots};
use crate::shadow::{FoundLeaf, ShadowMmu};
use crate::slab::Slab;
use crate::table::{Found, Table};
use crate::tlb::{Tlb, Translation, guest_tag};
use crate::vm::{Slot, TdpEntry};
use crate::{
    AccessCheck, Error, Intercept, Machine, ObjectId, PageFault, Path, Plant, Refused, RmpResult,
    RmpSize, VmId,
};

/// The side of memory that a guest means by an address: SNP's C-bit, TDX's shared bit, or what
/// it has asked the hypervisor for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Side {
    /// The guest's own.
    Private,
    /// Shared with the host.
    Shared,
}

impl Side {
    pub(crate) const fn path(self) -> Path {
        match self {
            Self::Private => Path::GuestPrivate,
            Self::Shared => Path::GuestShared,
        }
    }
}

/// One vCPU of a VM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VcpuId {
    /// Its VM.
    pub vm: VmId,
    /// Its number in the VM, from 0.
    pub index: u16,
}

/// What a guest asks the hypervisor for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Request {
    /// Make guest frames private or shared: `KVM_HC_MAP_GPA_RANGE`, a page state change, pKVM's
    /// share and unshare.
    MapGpaRange {
        /// The frames.
        range: GfnRange,
        /// What they should be.
        side: Side,
    },
}

/// One instruction of a guest's program.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Op {
    /// Read 8 bytes.
    Read {
        /// Where.
        gpa: Gpa,
        /// As which side.
        side: Side,
    },
    /// Write 8 bytes, little-endian.
    Write {
        /// Where.
        gpa: Gpa,
        /// As which side.
        side: Side,
        /// What.
        value: u64,
    },
    /// Ask the hypervisor.
    Request(Request),
    /// What the hypervisor has to carry out where it is intercepted.
    Privileged(Intercept),
    /// [`Vcpu::pvalidate`].
    Pvalidate {
        /// The page's first frame.
        gfn: Gfn,
        /// Its size.
        size: RmpSize,
        /// Validate it, or rescind.
        validate: bool,
    },
    /// [`Vcpu::rmpadjust`].
    Rmpadjust {
        /// The page's first frame.
        gfn: Gfn,
        /// Its size.
        size: RmpSize,
        /// Make it a VMSA, or no longer.
        vmsa: bool,
    },
}

/// An access that stage 2 does not let through.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GuestFault {
    /// The guest frame; above 2^40 (2^52 bytes) with x86-64's geometry, no slot ever covers it.
    pub gfn: Gfn,
    /// The page accessed, by its number in the space that the root translates: `gfn`'s own number
    /// for the direct root. For another root `gfn` is what the guest's tables have there, or where
    /// one of these tables lies that has to be read first.
    pub page: u64,
    /// Whether it was a write.
    pub write: bool,
    /// The side that the guest meant.
    pub side: Side,
}

/// Why a vCPU stopped. The access it stopped in has not been made, no byte of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Exit {
    /// A stage-2 fault: answer it, then let the vCPU go on.
    #[error("gfn {} is not mapped so in stage 2", .0.gfn)]
    Fault(GuestFault),
    /// The hardware refused.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The guest's own tables do not let it through: a `#PF` of the guest's, or, of nested tables,
    /// an exit to the guest that made them.
    #[error("the guest's own tables do not translate page {:#x}: {}", .0.page, .0.why)]
    PageFault(PageFault),
    /// An instruction that the hypervisor carries out; the guest goes on behind it.
    #[error("the guest's instruction is intercepted")]
    Intercept(Intercept),
    /// The guest asks for something; it goes on behind the request.
    #[error("the guest asks for something")]
    Request(Request),
    /// The program has ended.
    #[error("the guest has halted")]
    Halted,
}

/// What a step of a guest's program came to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Ran {
    /// It read this.
    Read(u64),
    /// It wrote.
    Wrote,
    /// PVALIDATE's result, and whether it changed anything.
    Pvalidated(RmpResult<bool>),
    /// RMPADJUST's result.
    Rmpadjusted(RmpResult),
}

#[derive(Clone, Hash)]
pub(crate) struct VcpuState {
    pub(crate) tlb: Tlb,
    pub(crate) program: Arc<[Op]>,
    pub(crate) next: usize,
    pub(crate) paging: Paging,
    pub(crate) roots: Roots,
}

/// A vCPU, to run.
pub struct Vcpu<'a> {
    state: &'a mut VcpuState,
    /// The VM's other vCPUs.
    others: [&'a mut [VcpuState]; 2],
    pub(crate) table: &'a mut Table<TdpEntry>,
    shadow: &'a mut ShadowMmu,
    slots: &'a [Slot],
    objects: &'a Slab<ObjectId, Object>,
    zero_page: Option<Pfn>,
    geometry: Geometry,
    accessed_dirty: bool,
    /// Pages of the access in progress that hold shadowed tables, and these tables' frames: the
    /// hypervisor writes there on the guest's behalf.
    tables: Vec<(u64, Gfn)>,
    frames: &'a mut Frames,
    pub(crate) protection: &'a mut Protection,
    pub(crate) snp: Option<Snp>,
    pub(crate) vm: VmId,
    plants: &'a Plants,
}

const fn fault(gfn: Gfn, page: u64, side: Side, write: bool) -> Exit {
    Exit::Fault(GuestFault { gfn, page, write, side })
}

/// A fault of the direct root.
const fn fault_at(page: u64, side: Side, write: bool) -> Exit {
    fault(Gpa::new(page << PAGE_SHIFT).gfn(), page, side, write)
}

impl Machine {
    /// Adds a vCPU with an empty program.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::TooMany`] above 2^16.
    pub fn add_vcpu(&mut self, vm: VmId) -> Result<VcpuId, Error> {
        let tlb = Tlb::new(self.config.tlb_entries);
        let vcpus = &mut self.vms.get_mut(vm)?.vcpus;
        let index = u16::try_from(vcpus.len()).map_err(|_| Error::TooMany("vcpu"))?;
        vcpus.push(VcpuState {
            tlb,
            program: Arc::new([]),
            next: 0,
            paging: Paging::default(),
            roots: Roots::new(),
        });
        Ok(VcpuId { vm, index })
    }

    /// Gives a vCPU a program and starts it at its first instruction.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn load(&mut self, vcpu: VcpuId, program: Arc<[Op]>) -> Result<(), Error> {
        let state = self.vcpu_state(vcpu)?;
        (state.program, state.next) = (program, 0);
        Ok(())
    }

    /// A vCPU, to run.
    ///
    /// # Errors
    /// [`Error::Gone`].
    #[inline]
    pub fn vcpu(&mut self, vcpu: VcpuId) -> Result<Vcpu<'_>, Error> {
        let vm = self.vms.get_mut(vcpu.vm)?;
        let gone = Error::Gone { what: "vcpu", number: u32::from(vcpu.index) };
        let (before, from) = vm.vcpus.split_at_mut_checked(vcpu.index.into()).ok_or(gone)?;
        let (state, after) = from.split_first_mut().ok_or(gone)?;
        Ok(Vcpu {
            state,
            others: [before, after],
            table: &mut vm.table,
            shadow: &mut vm.shadow,
            slots: &vm.slots,
            objects: &self.objects,
            zero_page: self.zero_page,
            geometry: self.config.geometry,
            accessed_dirty: self.config.accessed_dirty,
            tables: Vec::new(),
            frames: &mut self.frames,
            protection: &mut self.protection,
            snp: vm.snp,
            vm: vcpu.vm,
            plants: &self.plants,
        })
    }

    pub(crate) fn vcpu_ref(&self, vcpu: VcpuId) -> Result<&VcpuState, Error> {
        let gone = Error::Gone { what: "vcpu", number: u32::from(vcpu.index) };
        self.vms.get(vcpu.vm)?.vcpus.get(usize::from(vcpu.index)).ok_or(gone)
    }

    pub(crate) fn vcpu_state(&mut self, vcpu: VcpuId) -> Result<&mut VcpuState, Error> {
        Ok(self.vcpu(vcpu)?.state)
    }
}

impl Vcpu<'_> {
    /// Runs the next instruction of the program.
    ///
    /// # Errors
    /// Why it stopped. After a fault or a refusal the same instruction is next.
    pub fn step(&mut self) -> Result<Ran, Exit> {
        let op = self.state.program.get(self.state.next).copied().ok_or(Exit::Halted)?;
        let ran = match op {
            Op::Read { gpa, side } => self.read_u64(gpa, side).map(Ran::Read),
            Op::Write { gpa, side, value } => self.write_u64(gpa, side, value).map(|()| Ran::Wrote),
            Op::Request(request) => Err(Exit::Request(request)),
            Op::Privileged(intercept) => Err(Exit::Intercept(intercept)),
            Op::Pvalidate { gfn, size, validate } => {
                self.pvalidate(gfn, size, validate).map(Ran::Pvalidated)
            }
            Op::Rmpadjust { gfn, size, vmsa } => {
                self.rmpadjust(gfn, size, vmsa).map(Ran::Rmpadjusted)
            }
        };
        if !matches!(ran, Err(Exit::Fault(_) | Exit::Refused(_) | Exit::PageFault(_))) {
            self.state.next += 1;
        }
        ran
    }

    /// Reads guest memory. All pages are translated before the first byte is read.
    ///
    /// # Errors
    /// [`Exit::Fault`], [`Exit::PageFault`] or [`Exit::Refused`] at the first page that is not let
    /// through.
    pub fn read(&mut self, gpa: Gpa, side: Side, buffer: &mut [u8]) -> Result<(), Exit> {
        let frames = self.translate_all(gpa, side, buffer.len(), false)?;
        for (pfn, (_, at, chunk)) in frames.zip(chunks_mut(gpa.get(), buffer)) {
            self.frames.read(pfn, at, chunk);
            if let Some(cipher) = self.cipher(side) {
                cipher.apply(pfn, at, chunk);
            }
        }
        Ok(())
    }

    /// Writes guest memory. All pages are translated before the first byte is written.
    ///
    /// # Errors
    /// As [`Vcpu::read`].
    pub fn write(&mut self, gpa: Gpa, side: Side, bytes: &[u8]) -> Result<(), Exit> {
        self.tables.clear();
        let frames = self.translate_all(gpa, side, bytes.len(), true)?;
        let tables = core::mem::take(&mut self.tables);
        let mut tables = tables.into_iter();
        for (pfn, (page, at, chunk)) in frames.zip(chunks(gpa.get(), bytes)) {
            match self.cipher(side) {
                None => self.frames.write(pfn, at, chunk),
                Some(cipher) => self.frames.write_private(cipher, pfn, at, chunk),
            }
            if tables.as_slice().first().is_some_and(|(at, _)| *at == page)
                && let Some((_, gfn)) = tables.next()
            {
                self.wrote_table(gfn, at, chunk.len());
            }
        }
        Ok(())
    }

    /// Reads 8 bytes, little-endian.
    ///
    /// # Errors
    /// As [`Vcpu::read`].
    #[inline]
    pub fn read_u64(&mut self, gpa: Gpa, side: Side) -> Result<u64, Exit> {
        if gpa.page_offset() <= PAGE_SIZE - 8 {
            let pfn = self.translate(gpa.gfn().get(), side, false)?;
            let word = self.frames.read_u64(pfn, gpa.page_offset());
            let cipher = self.cipher(side);
            return Ok(word ^ cipher.map_or(0, |it| it.word_at(pfn, gpa.page_offset())));
        }
        let mut word = [0; 8];
        self.read(gpa, side, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Writes 8 bytes, little-endian.
    ///
    /// # Errors
    /// As [`Vcpu::write`].
    #[inline]
    pub fn write_u64(&mut self, gpa: Gpa, side: Side, value: u64) -> Result<(), Exit> {
        self.write(gpa, side, &value.to_le_bytes())
    }

    /// The frames of every page of an access; nothing is allocated for one page.
    fn translate_all(
        &mut self,
        gpa: Gpa,
        side: Side,
        len: usize,
        write: bool,
    ) -> Result<impl Iterator<Item = Pfn> + use<>, Exit> {
        let mut gfns = pages(gpa.get(), len);
        let first = gfns.next().map(|gfn| self.translate(gfn, side, write)).transpose()?;
        let rest: Result<Vec<_>, Exit> = gfns.map(|gfn| self.translate(gfn, side, write)).collect();
        Ok(first.into_iter().chain(rest?))
    }

    #[inline]
    fn translate(&mut self, page: u64, side: Side, write: bool) -> Result<Pfn, Exit> {
        let root = self.state.roots.tag();
        let tag = guest_tag(page, side == Side::Private, root);
        match self.state.tlb.hit(tag, write) {
            Some(pfn) => Ok(pfn),
            None if root == 0 => self.walk(page, side, write, tag),
            None => self.walk_shadow(page, side, write, tag),
        }
    }

    /// What the contents of memory of this side are encrypted with.
    #[inline]
    fn cipher(&self, side: Side) -> Option<Cipher> {
        self.snp.filter(|_| side == Side::Private).map(|snp| Cipher::new(snp.key))
    }

    /// Walks stage 2, asks the hardware, and fills the TLB.
    fn walk(&mut self, gfn: u64, side: Side, write: bool, tag: u64) -> Result<Pfn, Exit> {
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
        self.state.tlb.fill(tag, Translation { pfn, level, writable: writable && dirty });
        Ok(pfn)
    }

    /// Walks the shadow pages of the root, and fills the TLB. What they do not have, the guest's
    /// own tables are asked about.
    #[inline(never)]
    fn walk_shadow(&mut self, page: u64, side: Side, write: bool, tag: u64) -> Result<Pfn, Exit> {
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
            let writable = leaf.writable && dirty;
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
        self.tables.push((page, gfn));
        Ok(pfn)
    }

    /// The guest has written to a table that is shadowed.
    fn wrote_table(&mut self, gfn: Gfn, offset: u64, len: usize) {
        let flush = self.shadow.written(gfn, offset, len);
        if flush.0 && !self.plants.has(Plant::SkipFlush) {
            self.state.tlb.clear();
            self.others.iter_mut().for_each(|vcpus| vcpus.iter_mut().for_each(|it| it.tlb.clear()));
        }
    }

    fn memory(&self) -> GuestMemory<'_> {
        let (slots, objects, frames) = (self.slots, self.objects, &*self.frames);
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
