//! The instructions of an SNP guest: PVALIDATE, and RMPADJUST as far as it makes VMSAs.
//!
//! Both name a page by its guest address and a size (AMD APM volume 2, table 15-40):
//!
//! | asked for | entry | meets |
//! |---|---|---|
//! | 4K | 2M | `#VMEXIT(NPF)` with SIZEM: the hypervisor smashes, the guest tries again |
//! | 2M | 4K, or stage 2 maps 4K | `FAIL_SIZEMISMATCH`: the guest names each 4K page |

use polder_units::{Gfn, Level, Pfn};

use crate::access::Access;
use crate::frames::frame_at;
use crate::guest::{Exit, GuestFault, Side, Vcpu};
use crate::rmp::Entry;
use crate::{AccessCheck, Path, RmpFail, RmpResult, RmpSize};

impl Vcpu<'_> {
    /// PVALIDATE: says whether the guest accepts a page where it is. Returns whether that changed
    /// anything (the carry flag is clear): a guest that finds its page validated already has to
    /// ask itself by whom.
    ///
    /// # Errors
    /// [`Exit`]: a stage-2 fault, or the RMP refuses (table above; not this guest's page, at
    /// another guest frame, immutable, in use).
    pub fn pvalidate(
        &mut self,
        gfn: Gfn,
        size: RmpSize,
        validate: bool,
    ) -> Result<RmpResult<bool>, Exit> {
        self.adjust(gfn, size, |entry| {
            let changed = entry.validated != validate;
            entry.validated = validate;
            Ok(changed)
        })
    }

    /// RMPADJUST by VMPL 0: makes a page a VMSA, or no longer.
    ///
    /// # Errors
    /// As [`Vcpu::pvalidate`], and of a page that is not validated.
    pub fn rmpadjust(&mut self, gfn: Gfn, size: RmpSize, vmsa: bool) -> Result<RmpResult, Exit> {
        self.adjust(gfn, size, |entry| {
            if !entry.validated {
                return Err(AccessCheck::Validated);
            }
            entry.vmsa = vmsa;
            Ok(())
        })
    }

    fn adjust<T>(
        &mut self,
        gfn: Gfn,
        size: RmpSize,
        change: impl FnOnce(&mut Entry) -> Result<T, AccessCheck>,
    ) -> Result<RmpResult<T>, Exit> {
        let (Some(snp), Some(rmp)) = (self.snp, &mut self.protection.rmp) else {
            return Ok(Err(RmpFail::Undefined));
        };
        if !gfn.is_multiple_of(rmp.geometry.pages(size.level())) {
            return Ok(Err(RmpFail::Input));
        }
        let Some(found) = self.table.get(gfn.get()) else {
            return Err(Exit::Fault(GuestFault {
                gfn,
                page: gfn.get(),
                write: false,
                side: Side::Private,
            }));
        };
        let pfn: Pfn = frame_at(found.entry.pfn, gfn.get() - found.start);
        let mapped = found.level;
        let path = Path::GuestPrivate;
        let access = Access { path, private: None, pfn, level: mapped, write: false };
        let refused = |check| Exit::Refused(access.refused(check));
        let found = rmp.check_owned(pfn, snp.asid, gfn.get()).map_err(refused)?;
        let large = |level| level != Level::Size4K;
        match (size, large(mapped), large(found.level)) {
            (RmpSize::Size4K, false, false) | (RmpSize::Size2M, true, true) => {}
            (RmpSize::Size4K, _, true) => return Err(refused(AccessCheck::InstructionSize)),
            (RmpSize::Size4K, true, false) => return Err(refused(AccessCheck::PageSize)),
            (RmpSize::Size2M, ..) => return Ok(Err(RmpFail::SizeMismatch)),
        }
        let Some(found) = rmp.entries.get_mut(pfn.get()) else {
            unreachable!("the entry was found above");
        };
        change(found.entry).map(Ok).map_err(refused)
    }
}
