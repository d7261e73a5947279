//! Why the machine refuses an operation of its driver.

use polder_units::{Gfn, Level, PageIndex, Pfn};

use crate::{ObjectId, Vpn};

/// An operation that the machine refuses. It changed nothing.
///
/// What the simulated CPUs meet (faults, signals) is no error but an outcome:
/// [`HostExit`](crate::HostExit) and [`Exit`](crate::Exit).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Error {
    /// The number names nothing (any more): `EBADF`.
    #[error("{what} {number} does not exist")]
    Gone {
        /// The kind of thing.
        what: &'static str,
        /// Its number.
        number: u32,
    },
    /// 2^32 things of a kind.
    #[error("no number is left for another {0}")]
    TooMany(&'static str),
    /// The thing is still used by others: `EBUSY`.
    #[error("{object} is still mapped by a process or bound by a vm")]
    InUse {
        /// The thing.
        object: ObjectId,
    },
    /// Frame or page numbers that no address of the machine reaches: `EINVAL`.
    #[error("{number:#x} lies outside the machine's address space of {end:#x} pages")]
    Space {
        /// The first number outside.
        number: u64,
        /// The pages of an address space.
        end: u64,
    },
    /// Pages past the end of the object: `EINVAL`.
    #[error("page {page} lies past the end of {object}")]
    Beyond {
        /// The object.
        object: ObjectId,
        /// The first page past its end.
        page: PageIndex,
    },
    /// A machine of no frames, or of a TLB whose size is no power of two.
    #[error("a machine needs at least one frame and TLBs of a power of two of entries")]
    Config,
    /// A number that is no multiple of the level's pages, or two that differ modulo it: `EINVAL`.
    #[error("{number:#x} is not aligned to a {level} page, or not alike in both spaces")]
    Misaligned {
        /// The number.
        number: u64,
        /// The level asked for.
        level: Level,
    },
    /// SNP is not enabled, or the VM is none of SNP.
    #[error("the machine's snp is not enabled, or the vm is not one of snp")]
    NoSnp,
    /// pKVM is not enabled.
    #[error("the machine's pkvm is not enabled")]
    NoPkvm,
    /// The hypervisor keeps stage 2: the host asks it, and maps nothing itself.
    #[error("stage 2 of {vm} is the hypervisor's: donate or share the page")]
    Protected {
        /// The VM.
        vm: crate::VmId,
    },
    /// pKVM's hypervisor did not do it.
    #[error(transparent)]
    Pkvm(#[from] crate::PkvmFail),
    /// Another's pin is in the way of a pin, or this one's would be in the way of another's.
    #[error("pfn {} can't be pinned so: {} of {} has it", .by.pfn, .by.pin, .by.process)]
    Pinned {
        /// Who has it.
        by: crate::Holder,
    },
    /// The IOMMU translates no such access.
    #[error(transparent)]
    Iommu(#[from] crate::IommuFault),
    /// Something is there already: `EEXIST`.
    #[error("there is already something at {number:#x}")]
    Exists {
        /// The first number at which it is.
        number: u64,
    },
    /// The object has no folio at that page: `EFAULT` of `UFFDIO_CONTINUE`.
    #[error("{object} has no memory at page {page}")]
    Hole {
        /// The object.
        object: ObjectId,
        /// The page.
        page: PageIndex,
    },
    /// No VMA at that address: `ENOENT`.
    #[error("no mapping of the process covers page {vpn}")]
    NoVma {
        /// The page of the process.
        vpn: Vpn,
    },
    /// No userfaultfd is registered on the VMA: `ENOENT` of `UFFDIO_POISON`.
    #[error("the mapping at page {vpn} is not watched")]
    NotWatched {
        /// The page of the process.
        vpn: Vpn,
    },
    /// No memory slot at that guest frame.
    #[error("no memory slot of the vm covers gfn {gfn}")]
    NoSlot {
        /// The guest frame.
        gfn: Gfn,
    },
    /// The level is above what folio, view, slot or alignment allow.
    #[error("a {level} mapping was asked for where {largest} is the largest possible")]
    TooLarge {
        /// The level asked for.
        level: Level,
        /// The largest possible.
        largest: Level,
    },
    /// `mmu_invalidate_seq` has moved on, or an invalidation of the gfn runs: resolve again.
    #[error("the mapping of gfn {gfn} was invalidated since it was resolved; resolve it again")]
    Stale {
        /// The guest frame.
        gfn: Gfn,
    },
    /// An invalidation is ended that was not begun.
    #[error("no invalidation of the vm's guest frames is in progress")]
    NotInvalidating,
    /// Another holds the folio lock: try again when it is released.
    #[error("the folio of pfn {pfn} is locked by another")]
    Locked {
        /// A frame of the folio.
        pfn: Pfn,
    },
    /// The operation needs the folio lock, and the caller does not hold it.
    #[error("the folio of pfn {pfn} must be locked by the caller")]
    NotLocked {
        /// A frame of the folio.
        pfn: Pfn,
    },
    /// The frame belongs to no folio: it is free.
    #[error("pfn {pfn} is free")]
    Free {
        /// The frame.
        pfn: Pfn,
    },
    /// No free frames, or an allocation that was made to fail: `ENOMEM`.
    #[error("no free {level} block of frames")]
    NoMemory {
        /// The level asked for.
        level: Level,
    },
    /// Host page tables still map the folio.
    #[error("the folio of pfn {pfn} is still mapped {mapcount} times by host page tables")]
    Mapped {
        /// A frame of the folio.
        pfn: Pfn,
        /// Its map count.
        mapcount: u32,
    },
    /// Somebody holds references that the page cache and the mappings do not explain.
    #[error("the folio of pfn {pfn} has {foreign} references beyond cache and mappings")]
    Referenced {
        /// A frame of the folio.
        pfn: Pfn,
        /// How many. A pin of a small folio is 1024 of them.
        foreign: u64,
    },
    /// The range covers only a part of a folio.
    #[error("only a part of the {level} folio at page {page} is named: split it first")]
    Part {
        /// The folio's first page.
        page: PageIndex,
        /// Its level.
        level: Level,
    },
    /// The folios are not the parts of one aligned block of frames.
    #[error("the folios at page {page} are not the parts of one aligned {level} block")]
    Scattered {
        /// The first page.
        page: PageIndex,
        /// The level asked for.
        level: Level,
    },
    /// The guest's own tables do not translate the page: the guest's affair.
    #[error("the guest's tables do not translate page {page:#x}: {why}")]
    Untranslated {
        /// The page, by its number in the space that the root translates.
        page: u64,
        /// Why.
        why: crate::Untranslated,
    },
    /// The guest's tables say that the page was never used: a mapping ahead would hide its first
    /// use from the guest.
    #[error("the guest's tables say that page {page:#x} was never used")]
    NotAccessed {
        /// The page, by its number in the space that the root translates.
        page: u64,
    },
    /// A table of the guest's lies where no slot is, or no memory.
    #[error("the guest's page table at gfn {gfn} can't be read: there is no memory")]
    Table {
        /// The guest frame.
        gfn: Gfn,
    },
    /// More entries of a guest's tables than were to be looked at.
    #[error("the guest's page tables have more than {most} entries")]
    TooManyEntries {
        /// How many were to be looked at.
        most: u64,
    },
    /// An SNP guest's page tables are encrypted: nothing can shadow them.
    #[error("an snp guest's page tables can't be read, and so not shadowed")]
    NoIndirect,
    /// A process of the machine can't map anonymous memory: guests have it, and the trusted view.
    #[error("{object} is anonymous memory, which no process of the machine maps")]
    Anonymous {
        /// The object.
        object: ObjectId,
    },
    /// A write of a page that is the zero page or another's, too: [`Machine::write_fault`] first.
    ///
    /// [`Machine::write_fault`]: crate::Machine::write_fault
    #[error("page {page} of {object} has to be copied before it is written to")]
    ToCopy {
        /// The object.
        object: ObjectId,
        /// The page.
        page: PageIndex,
    },
    /// Faults at this guest frame end in the VMM.
    #[error("faults at gfn {gfn} end in the VMM")]
    Userfault {
        /// The frame.
        gfn: Gfn,
    },
    /// Only anonymous memory is copied by a fork.
    #[error("{object} is not anonymous memory: a fork shares it")]
    NotAnonymous {
        /// The object.
        object: ObjectId,
    },
    /// Bytes outside of the pinned pages or of the object.
    #[error("{len} bytes at {offset:#x} reach past the end")]
    OutOfBounds {
        /// The first byte.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// The hardware's check refused the access.
    #[error(transparent)]
    Refused(#[from] crate::Refused),
}
