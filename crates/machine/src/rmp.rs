//! SEV-SNP's reverse map table: who owns each frame, and at which guest frame.
//!
//! AMD APM volume 2, section 15.36, read as tables:
//!
//! | there | here |
//! |---|---|
//! | table 15-34, the fields of an entry | [`RmpEntry`] |
//! | table 15-35, who owns a page | [`RmpEntry::owner`] |
//! | 15.36.5 RMPUPDATE, 15.36.11 PSMASH | [`Machine::rmpupdate`], [`Machine::psmash`] |
//! | 15.36.6 PVALIDATE, 15.36.7 RMPADJUST, table 15-40 | [`Vcpu::pvalidate`], [`Vcpu::rmpadjust`] |
//! | table 15-39, access checks | [`AccessCheck`](crate::AccessCheck), made in `rmp/check.rs` |
//! | table 15-41, VMRUN's checks | [`Machine::vmrun`] |
//! | the firmware's PAGE_UNSMASH, PAGE_RECLAIM, LAUNCH_UPDATE | [`Machine::page_unsmash`], [`Machine::page_reclaim`], [`Machine::launch_update`] |
//!
//! # The rule
//! The entry of a 2M-aligned frame says the level of all of its 2M. A 4K entry is found by its own
//! frame; every frame of a 2M entry finds the aligned one. There is no 1G entry. "2M" is the second
//! level of the machine's [`Geometry`].
//!
//! An entry that is not assigned has no fields: RMPUPDATE zeroes them, the size too (S.
//! Christopherson, 17 July 2021, on "KVM: SVM: Reclaim the guest pages when SEV-SNP VM
//! terminates"). So only assigned entries are kept, and a machine without private memory has none.
//!
//! # Contention
//! An instruction is a step, so it never meets another half done. [`Machine::rmp_hold`] keeps an
//! entry, or the entries of a 2M page, in use over steps, as another CPU or the firmware does.
//! Who comes for the same entry gets `FAIL_INUSE`, who comes for one of another size that overlaps
//! gets `FAIL_OVERLAP`; PSMASH, PVALIDATE and accesses know in-use only. A VMSA is in use while
//! its vCPU runs.
//!
//! # Not modelled
//! - Launch, but for `SNP_LAUNCH_UPDATE` of a page ([`Machine::launch_update`]); attestation.
//! - VMPLs other than 0, and with them RMPADJUST but for the VMSA bit.
//! - Memory outside of the RMP; the RMP's own pages; the direct map (the trusted view writes as
//!   through 4K mappings, which `adjust_direct_map()` of arch/x86/virt/svm/sev.c makes true).
//! - VMRUN's reverse-map check: the machine's vCPUs have no VMSA contents.
//! - TLB flushes by RMP instructions: none is assumed, what a TLB holds goes on working, and
//!   [`Machine::audit`] reports an entry that the RMP would not let in now.

mod audit;
mod check;
mod cipher;
mod firmware;
mod guest;
mod host;

use alloc::collections::BTreeMap;
use core::fmt;
use core::num::NonZeroU16;

use polder_units::{Geometry, Gfn, Level, PageCount, Pfn};

pub(crate) use cipher::Cipher;
pub use firmware::FirmwareFail;

use crate::table::{Found, Table};
use crate::{LockOwner, VcpuId};
#[cfg(doc)]
use crate::{Machine, Vcpu};

/// The ASID of an SNP guest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Asid(NonZeroU16);

impl Asid {
    /// The ASID with this number; `None` for 0, which is the host's and the firmware's, and from
    /// 0x3ff on: an entry has ten bits for it, and all ones mark one that the firmware has locked.
    pub const fn new(number: u16) -> Option<Self> {
        match NonZeroU16::new(number) {
            Some(some) if number < 0x3ff => Some(Self(some)),
            _ => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl fmt::Debug for Asid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Asid({})", self.0)
    }
}

impl fmt::Display for Asid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "asid {}", self.0)
    }
}

/// The size of an entry's page. One bit: there is no third.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RmpSize {
    /// 4K.
    Size4K,
    /// 2M.
    Size2M,
}

impl RmpSize {
    /// The size that has a level; `None` for 1G.
    pub const fn of(level: Level) -> Option<Self> {
        match level {
            Level::Size4K => Some(Self::Size4K),
            Level::Size2M => Some(Self::Size2M),
            Level::Size1G => None,
        }
    }

    /// The level of a page of this size.
    pub const fn level(self) -> Level {
        match self {
            Self::Size4K => Level::Size4K,
            Self::Size2M => Level::Size2M,
        }
    }
}

/// What the RMP says of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmpEntry {
    /// It is a guest's or the firmware's.
    pub assigned: bool,
    /// The size of the page that it is part of.
    pub size: RmpSize,
    /// No instruction may change it, and its guest may not touch it.
    pub immutable: bool,
    /// The guest frame that it is, for this very frame also inside of a 2M page.
    pub gfn: Gfn,
    /// The guest that it is assigned to.
    pub asid: Option<Asid>,
    /// The guest has validated it.
    pub validated: bool,
    /// It holds a vCPU's registers.
    pub vmsa: bool,
}

/// Who owns a frame (AMD APM volume 2, table 15-35).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RmpOwner {
    /// Shared memory, and all that was never assigned.
    Hypervisor,
    /// A guest.
    Guest(Asid),
    /// The AMD secure processor, or nobody yet who may use it (the firmware's "reclaim").
    Firmware,
}

impl RmpEntry {
    /// The entry of a frame that is not assigned: zeros.
    pub const HYPERVISOR: Self = Self {
        assigned: false,
        size: RmpSize::Size4K,
        immutable: false,
        gfn: match Gfn::new(0) {
            Some(gfn) => gfn,
            None => unreachable!(),
        },
        asid: None,
        validated: false,
        vmsa: false,
    };

    /// Who owns the frame.
    pub const fn owner(&self) -> RmpOwner {
        match (self.assigned, self.asid) {
            (false, _) => RmpOwner::Hypervisor,
            (true, Some(asid)) => RmpOwner::Guest(asid),
            (true, None) => RmpOwner::Firmware,
        }
    }
}

/// What RMPUPDATE is to make of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmpUpdate {
    /// Assign it.
    pub assigned: bool,
    /// How much: also where it takes away (see [`Machine::rmpupdate`]).
    pub size: RmpSize,
    /// Let no instruction change it from now on.
    pub immutable: bool,
    /// The guest frame.
    pub gfn: Gfn,
    /// The guest; `None` is ASID 0.
    pub asid: Option<Asid>,
}

impl RmpUpdate {
    /// Makes a page of `size` a guest's: `rmp_make_private()` (arch/x86/virt/svm/sev.c).
    pub const fn private(asid: Asid, gfn: Gfn, size: RmpSize) -> Self {
        Self { assigned: true, size, immutable: false, gfn, asid: Some(asid) }
    }

    /// Gives a page of `size` back to the hypervisor: `rmp_make_shared()`.
    pub const fn shared(size: RmpSize) -> Self {
        let RmpEntry { assigned, immutable, gfn, asid, .. } = RmpEntry::HYPERVISOR;
        Self { assigned, size, immutable, gfn, asid }
    }
}

/// Why an RMP instruction did nothing. The codes are of AMD APM volume 3, as in the compilers'
/// `__rmpupdate`, `__psmash`, `__pvalidate` and arch/x86/include/asm/sev.h.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, thiserror::Error)]
pub enum RmpFail {
    /// `#UD`: SNP is not enabled, or the guest is none of SNP.
    #[error("#UD: SNP is not enabled here")]
    Undefined,
    /// An operand that can't be.
    #[error("FAIL_INPUT: misaligned, outside of the rmp, or fields that contradict each other")]
    Input,
    /// The entry is immutable.
    #[error("FAIL_PERMISSION: the rmp entry is immutable; ask the firmware to reclaim it")]
    Permission,
    /// Another processor is modifying the entry.
    #[error("FAIL_INUSE: another processor is at work on the rmp entry; try again")]
    InUse,
    /// 4K and 2M entries would overlap, or somebody is at work on such.
    #[error("FAIL_OVERLAP: 4K and 2M rmp entries overlap")]
    Overlap,
    /// The page that PVALIDATE or RMPADJUST names as 2M is of 4K pages.
    #[error("FAIL_SIZEMISMATCH: the page is of 4K pages; name each by itself")]
    SizeMismatch,
    /// PSMASH of what is no 2M page of a guest.
    #[error("FAIL_BADADDR: no 2M rmp entry that could be smashed")]
    BadAddress,
}

impl RmpFail {
    /// The result in EAX; `None` for an exception.
    pub const fn code(self) -> Option<u32> {
        match self {
            Self::Undefined => None,
            Self::Input => Some(1),
            Self::Permission => Some(2),
            Self::InUse => Some(3),
            Self::Overlap => Some(4),
            Self::SizeMismatch => Some(6),
            Self::BadAddress => Some(7),
        }
    }
}

/// What an RMP instruction came to; success is EAX = 0.
pub type RmpResult<T = ()> = Result<T, RmpFail>;

/// What makes a VM one of SNP.
#[derive(Clone, Copy, Hash)]
pub(crate) struct Snp {
    pub(crate) asid: Asid,
    /// Its memory's key. No two launches have the same: the firmware makes it.
    pub(crate) key: u64,
}

/// The fields of an assigned entry; its size is its level in the table.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Entry {
    pub(crate) gfn: Gfn,
    pub(crate) asid: Option<Asid>,
    pub(crate) immutable: bool,
    pub(crate) validated: bool,
    pub(crate) vmsa: bool,
}

impl Entry {
    /// The entry of the page `offset` further on, as PSMASH makes it.
    fn part(&self, offset: u64) -> Self {
        Self { gfn: gfn_at(self.gfn, offset), ..*self }
    }
}

/// The guest frame `offset` into a page that was assigned.
pub(crate) fn gfn_at(gfn: Gfn, offset: u64) -> Gfn {
    match Gfn::new(gfn.get() + offset) {
        Some(gfn) => gfn,
        None => unreachable!("RMPUPDATE takes no page that reaches past the last guest frame"),
    }
}

/// Who has an entry in use.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum User {
    Agent(LockOwner),
    Vcpu(VcpuId),
}

/// The table.
#[derive(Clone, Hash)]
pub(crate) struct Rmp {
    /// The assigned entries, at 4K and 2M.
    pub(crate) entries: Table<Entry>,
    /// The entries that are in use, by their first frame.
    pub(crate) held: BTreeMap<u64, (RmpSize, User)>,
    frames: u64,
    geometry: Geometry,
    /// How many SNP guests there have been: each has a key of its own.
    launches: u64,
}

impl Rmp {
    pub(crate) fn new(frames: PageCount, geometry: Geometry) -> Self {
        let (entries, held) = (Table::new(geometry), BTreeMap::new());
        Self { entries, held, frames: frames.get(), geometry, launches: 0 }
    }

    /// The key of a guest that is being launched.
    pub(crate) const fn new_key(&mut self) -> u64 {
        self.launches += 1;
        self.launches
    }

    /// Whether any page is assigned to `asid`.
    pub(crate) fn uses(&self, asid: Asid) -> bool {
        self.entries.iter().any(|found| found.entry.asid == Some(asid))
    }

    /// What it says of a frame that it covers.
    pub(crate) fn entry(&self, pfn: Pfn) -> RmpEntry {
        let Some(Found { start, level, entry }) = self.entries.get(pfn.get()) else {
            return RmpEntry::HYPERVISOR;
        };
        let Entry { gfn, asid, immutable, validated, vmsa } = *entry;
        let gfn = gfn_at(gfn, pfn.get() - start);
        let size = if level == Level::Size4K { RmpSize::Size4K } else { RmpSize::Size2M };
        RmpEntry { assigned: true, size, immutable, gfn, asid, validated, vmsa }
    }

    /// The frames of the page of `size` at `pfn`, if it is aligned and the RMP covers it.
    fn page(&self, pfn: Pfn, size: RmpSize) -> RmpResult<(u64, u64)> {
        let pages = self.geometry.pages(size.level());
        let (start, end) = (pfn.get(), pfn.get() + pages.get());
        let covered = pfn.is_multiple_of(pages) && end <= self.frames;
        if covered { Ok((start, end)) } else { Err(RmpFail::Input) }
    }

    /// The frames of the 2M page around `pfn`.
    fn region(&self, pfn: Pfn) -> (u64, u64) {
        let pages = self.geometry.pages(Level::Size2M).get();
        let start = pfn.get() & !(pages - 1);
        (start, start + pages)
    }

    /// The first frames of the entries in use that overlap `[start..end)`.
    fn in_use(&self, (start, end): (u64, u64)) -> impl Iterator<Item = u64> {
        self.held.iter().filter_map(move |(at, (size, _))| {
            let pages = self.geometry.pages(size.level()).get();
            (*at < end && start < at + pages).then_some(*at)
        })
    }

    /// Refuses an instruction that would meet another at work.
    fn check_idle(&self, page: (u64, u64)) -> RmpResult {
        let mut overlap = false;
        for at in self.in_use(page) {
            if at == page.0 {
                return Err(RmpFail::InUse);
            }
            overlap = true;
        }
        if overlap { Err(RmpFail::Overlap) } else { Ok(()) }
    }
}
