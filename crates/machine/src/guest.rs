//! Guests: vCPUs, what they access and what they ask for.
//!
//! A guest is a program of accesses and requests, stepped one at a time; or it is driven from
//! outside through [`Vcpu::read`] and [`Vcpu::write`]. Either way an access asks the vCPU's TLB
//! first and the tables of its root only on a miss. Addresses are those that the root translates
//! ([`Root::space`](crate::Root::space)): guest-physical ones as a rule, linear ones where the
//! guest's page tables are shadowed.

mod access;
mod walk;

use alloc::sync::Arc;
use alloc::vec::Vec;

use polder_units::{Geometry, Gfn, GfnRange, Gpa, Pfn};

use crate::access::Protection;
use crate::frames::Frames;
use crate::object::Object;
use crate::plant::Plants;
use crate::rmp::Snp;
use crate::root::{Paging, Roots};
use crate::shadow::ShadowMmu;
use crate::slab::Slab;
use crate::table::Table;
use crate::tlb::Tlb;
use crate::vm::{Slot, TdpEntry};
use crate::{
    Error, Intercept, Machine, ObjectId, PageFault, Path, Refused, RmpResult, RmpSize, VmId,
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
    pub(crate) slots: &'a mut [Slot],
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
    pub(crate) plants: &'a Plants,
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
            slots: &mut vm.slots,
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
}
