//! Who reaches a frame, and the one check that hardware makes of it.
//!
//! Every access of the machine passes here when its translation is made: a host CPU's and a
//! vCPU's when their TLB is filled (what a TLB holds is not checked again, as on SNP: AMD APM
//! volume 2, section 15.36.10), a device's and the trusted view's at each access. A machine
//! without SNP and pKVM lets everybody in; with them, [`Rmp`] or [`Pkvm`] decides.

use alloc::boxed::Box;
use alloc::collections::BTreeSet;

use polder_units::{Level, PageCount, Pfn};

use crate::Asid;
use crate::pkvm::{self, Pkvm};
use crate::rmp::Rmp;

/// How a frame is reached.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Path {
    /// A host CPU: a process, the kernel, or the driver's trusted view.
    Host,
    /// A guest, as private memory (C-bit set, or a protected VM's own memory).
    GuestPrivate,
    /// A guest, as memory shared with the host.
    GuestShared,
    /// A device.
    Device,
}

/// The check that an access did not pass; the RMP's by their names in AMD APM volume 2, section
/// 15.36.10.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, thiserror::Error)]
pub enum AccessCheck {
    /// Another processor is at work on the RMP entry: try again.
    #[error("its rmp entry is in use")]
    InUse,
    /// A write to a page, or by a mapping of a 2M page, of which something is assigned.
    #[error("it is not the hypervisor's, or a part of its 2M page is not")]
    HypervisorOwned,
    /// The page is not assigned to the guest's ASID.
    #[error("it is not this guest's")]
    GuestOwned,
    /// The page is assigned to the guest for another guest-physical address.
    #[error("it is this guest's at another gfn")]
    ReverseMap,
    /// The page is immutable: the firmware works on it.
    #[error("it is immutable")]
    Mutable,
    /// Stage 2 maps it at another size than the RMP has it.
    #[error("stage 2 and the rmp disagree about its size")]
    PageSize,
    /// PVALIDATE or RMPADJUST of 4K in a page that the RMP has as 2M: PSMASH, then again.
    #[error("an instruction for 4K met a 2M rmp entry")]
    InstructionSize,
    /// The guest has not validated it.
    #[error("the guest has not validated it")]
    Validated,
    /// VMRUN of a page that is no VMSA.
    #[error("it is no vmsa")]
    Vmsa,
    /// pKVM: the host's stage 2 has no such page. It is a guest's, or the hypervisor's.
    #[error("the host's stage 2 has no page there: it is a guest's, or the hypervisor's")]
    HostStage2,
    /// pKVM: the IOMMU keeps from the host's devices what the host's stage 2 has not.
    #[error("the iommu keeps it from the host's devices")]
    Iommu,
    /// The kernel has taken it out of its direct map.
    #[error("it is not in the kernel's direct map")]
    DirectMap,
}

/// An access that the hardware refused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
#[error("hardware refused the access to pfn {pfn}: {check}")]
pub struct Refused {
    /// How the frame was reached.
    pub path: Path,
    /// The frame.
    pub pfn: Pfn,
    /// Whether it was a write.
    pub write: bool,
    /// The check that it did not pass.
    pub check: AccessCheck,
}

/// What the one who was refused meets (AMD APM volume 2, section 15.36.10, table 15-39).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum AccessFault {
    /// `#PF` with the RMP bit, in the host.
    PageFault,
    /// `#VMEXIT(NPF)` with the RMP bit.
    Npf {
        /// The ENC bit: the guest meant its private memory.
        enc: bool,
        /// The SIZEM bit: PVALIDATE or RMPADJUST did not fit the entry's size. A mere access that
        /// does not fit stage 2's size to the entry's has the RMP bit only.
        sizem: bool,
    },
    /// `#VC` with `PAGE_NOT_VALIDATED`, in the guest: the hypervisor does not see it.
    NotValidated,
    /// `#VMEXIT(VMEXIT_INVALID)`: VMRUN of what is no VMSA of the guest (table 15-41).
    InvalidVmsa,
    /// The IOMMU refuses the device.
    Iommu,
    /// A stage-2 abort of the host's, handed back by the hypervisor: `SIGSEGV` to a process, and
    /// to the kernel an oops (`is_pkvm_stage2_abort()`, arch/arm64/mm/fault.c).
    HostAbort,
    /// A page fault of the kernel's own, in its direct map: an oops.
    Oops,
}

impl Refused {
    /// What the one who was refused meets.
    pub const fn fault(&self) -> AccessFault {
        match (self.path, self.check) {
            (_, AccessCheck::Vmsa) => AccessFault::InvalidVmsa,
            (_, AccessCheck::HostStage2) => AccessFault::HostAbort,
            (_, AccessCheck::DirectMap) => AccessFault::Oops,
            (Path::Host, _) => AccessFault::PageFault,
            (Path::Device, _) => AccessFault::Iommu,
            (_, AccessCheck::Validated) => AccessFault::NotValidated,
            (path, check) => AccessFault::Npf {
                enc: matches!(path, Path::GuestPrivate),
                sizem: matches!(check, AccessCheck::InstructionSize),
            },
        }
    }
}

/// An access, as the hardware sees it when the translation is made.
#[derive(Clone, Copy)]
pub(crate) struct Access {
    pub(crate) path: Path,
    /// The ASID and the guest frame's number, of an access to an SNP guest's private memory.
    pub(crate) private: Option<(Asid, u64)>,
    pub(crate) pfn: Pfn,
    /// The level of the mapping.
    pub(crate) level: Level,
    pub(crate) write: bool,
}

impl Access {
    pub(crate) const fn host(pfn: Pfn, level: Level, write: bool) -> Self {
        Self { path: Path::Host, private: None, pfn, level, write }
    }

    pub(crate) const fn device(pfn: Pfn, write: bool) -> Self {
        Self { path: Path::Device, private: None, pfn, level: Level::Size4K, write }
    }

    pub(crate) const fn refused(&self, check: AccessCheck) -> Refused {
        let Self { path, pfn, write, .. } = *self;
        Refused { path, pfn, write, check }
    }
}

/// What keeps memory from those who may not reach it: none, SNP, or pKVM; and the frames that the
/// kernel keeps from itself.
#[derive(Clone, Hash, Default)]
pub(crate) struct Protection {
    pub(crate) rmp: Option<Box<Rmp>>,
    pub(crate) pkvm: Option<Box<Pkvm>>,
    pub(crate) off_direct_map: BTreeSet<u64>,
}

impl Protection {
    /// Whether the access may be made.
    #[inline]
    pub(crate) fn check(&self, access: &Access) -> Result<(), Refused> {
        if let Some(pkvm) = &self.pkvm {
            pkvm::check(pkvm, access)?;
        }
        match &self.rmp {
            None => Ok(()),
            Some(rmp) => rmp.check(access),
        }
    }

    /// Whether the kernel may write `count` frames from `pfn` on, by 4K mappings.
    pub(crate) fn check_block(&self, pfn: Pfn, count: PageCount) -> Result<(), Refused> {
        if let Some(pkvm) = &self.pkvm
            && let Some(gone) = pkvm.first_gone(pfn.get(), pfn.get() + count.get())
        {
            let (path, pfn) = (Path::Host, Pfn::new(gone).unwrap_or(pfn));
            return Err(Refused { path, pfn, write: true, check: AccessCheck::HostStage2 });
        }
        match &self.rmp {
            None => Ok(()),
            Some(rmp) => rmp.check_block(pfn, count),
        }
    }
}
