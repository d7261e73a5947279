//! Guests: vCPUs, what they access and what they ask for.
//!
//! A guest is a program of accesses and requests, stepped one at a time; or it is driven from
//! outside through [`Vcpu::read`] and [`Vcpu::write`]. Either way an access asks the vCPU's TLB
//! first and stage 2 only on a miss.

use alloc::sync::Arc;
use alloc::vec::Vec;

use polder_units::{Gfn, GfnRange, Gpa, Level, PAGE_SIZE, Pfn};

use crate::access::{Access, Protection};
use crate::chunk::{chunks, chunks_mut, pages};
use crate::frames::{Frames, frame_at};
use crate::plant::Plants;
use crate::rmp::{Cipher, Rmp, Snp};
use crate::table::{Found, Table};
use crate::tlb::{Tlb, Translation, guest_tag};
use crate::vm::TdpEntry;
use crate::{AccessCheck, Error, Machine, Path, Plant, Refused, RmpResult, RmpSize, VmId};

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
}

/// A vCPU, to run.
pub struct Vcpu<'a> {
    state: &'a mut VcpuState,
    pub(crate) table: &'a Table<TdpEntry>,
    frames: &'a mut Frames,
    pub(crate) protection: &'a mut Protection,
    pub(crate) snp: Option<Snp>,
    pub(crate) vm: VmId,
    plants: &'a Plants,
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
        vcpus.push(VcpuState { tlb, program: Arc::new([]), next: 0 });
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
        let state = vm.vcpus.get_mut(usize::from(vcpu.index)).ok_or(gone)?;
        let (table, frames, snp) = (&vm.table, &mut self.frames, vm.snp);
        let (protection, plants) = (&mut self.protection, &self.plants);
        Ok(Vcpu { state, table, frames, protection, snp, vm: vcpu.vm, plants })
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
            Op::Pvalidate { gfn, size, validate } => {
                self.pvalidate(gfn, size, validate).map(Ran::Pvalidated)
            }
            Op::Rmpadjust { gfn, size, vmsa } => {
                self.rmpadjust(gfn, size, vmsa).map(Ran::Rmpadjusted)
            }
        };
        if !matches!(ran, Err(Exit::Fault(_) | Exit::Refused(_))) {
            self.state.next += 1;
        }
        ran
    }

    /// Reads guest memory. All pages are translated before the first byte is read.
    ///
    /// # Errors
    /// [`Exit::Fault`] or [`Exit::Refused`] at the first page that is not let through.
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
    /// [`Exit::Fault`] or [`Exit::Refused`] at the first page that is not let through.
    pub fn write(&mut self, gpa: Gpa, side: Side, bytes: &[u8]) -> Result<(), Exit> {
        let frames = self.translate_all(gpa, side, bytes.len(), true)?;
        for (pfn, (_, at, chunk)) in frames.zip(chunks(gpa.get(), bytes)) {
            match self.cipher(side) {
                None => self.frames.write(pfn, at, chunk),
                Some(cipher) => self.frames.write_private(cipher, pfn, at, chunk),
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
    fn translate(&mut self, gfn: u64, side: Side, write: bool) -> Result<Pfn, Exit> {
        let tag = guest_tag(gfn, side == Side::Private);
        match self.state.tlb.hit(tag, write) {
            Some(pfn) => Ok(pfn),
            None => self.walk(gfn, side, write, tag),
        }
    }

    /// What the contents of memory of this side are encrypted with.
    #[inline]
    fn cipher(&self, side: Side) -> Option<Cipher> {
        self.snp.filter(|_| side == Side::Private).map(|snp| Cipher::new(snp.key))
    }

    /// Walks stage 2, asks the hardware, and fills the TLB.
    fn walk(&mut self, gfn: u64, side: Side, write: bool, tag: u64) -> Result<Pfn, Exit> {
        let found = self.table.get(gfn).filter(|found| found.entry.writable || !write);
        let Some(Found { start, level, entry }) = found else {
            let gfn = Gpa::new(gfn << polder_units::PAGE_SHIFT).gfn();
            return Err(Exit::Fault(GuestFault { gfn, write, side }));
        };
        let pfn = frame_at(entry.pfn, gfn - start);
        let writable = match &self.protection.rmp {
            None => entry.writable,
            Some(rmp) => self.check(rmp, (gfn, side, write), pfn, level)? && entry.writable,
        };
        self.state.tlb.fill(tag, Translation { pfn, level, writable });
        Ok(pfn)
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
