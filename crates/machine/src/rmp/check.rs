//! The checks of an access against the RMP: AMD APM volume 2, table 15-39.
//!
//! | access | checks, in order |
//! |---|---|
//! | host, device, a guest's shared memory, a plain guest: write | in use, hypervisor-owned |
//! | the same: read | none; assigned memory reads as ciphertext |
//! | an SNP guest's private memory: read and write | in use, guest-owned, reverse-map, mutable, page-size, validated |

use polder_units::{Level, PageCount, Pfn};

use crate::access::Access;
use crate::rmp::{Entry, Rmp, gfn_at};
use crate::table::Found;
use crate::{AccessCheck, Asid, Path, Refused};

impl Rmp {
    pub(crate) fn check(&self, access: &Access) -> Result<(), Refused> {
        let failed = match access.private {
            Some((asid, gfn)) => self.check_private(access, asid, gfn),
            None if access.write => self.check_hypervisor_owned(access),
            None => Ok(()),
        };
        failed.map_err(|check| access.refused(check))
    }

    /// "Hypervisor-owned": by a mapping of 2M, all of the 2M page has to be. A mapping of 1G counts
    /// as the 2M that its TLB entry would be.
    fn check_hypervisor_owned(&self, access: &Access) -> Result<(), AccessCheck> {
        let (start, end) = match access.level {
            Level::Size4K => (access.pfn.get(), access.pfn.get() + 1),
            Level::Size2M | Level::Size1G => self.region(access.pfn),
        };
        if self.in_use((start, end)).next().is_some() {
            return Err(AccessCheck::InUse);
        }
        match self.entries.first_in(start, end) {
            Some(_) => Err(AccessCheck::HypervisorOwned),
            None => Ok(()),
        }
    }

    fn check_private(&self, access: &Access, asid: Asid, gfn: u64) -> Result<(), AccessCheck> {
        let found = self.check_owned(access.pfn, asid, gfn)?;
        let large = |level| level != Level::Size4K;
        if large(access.level) != large(found.level) {
            return Err(AccessCheck::PageSize);
        }
        if found.entry.validated { Ok(()) } else { Err(AccessCheck::Validated) }
    }

    /// The checks that PVALIDATE and RMPADJUST make as well, up to mutable.
    pub(crate) fn check_owned(
        &self,
        pfn: Pfn,
        asid: Asid,
        gfn: u64,
    ) -> Result<Found<&Entry>, AccessCheck> {
        if self.in_use((pfn.get(), pfn.get() + 1)).next().is_some() {
            return Err(AccessCheck::InUse);
        }
        let found = self.entries.get(pfn.get()).ok_or(AccessCheck::GuestOwned)?;
        let entry = found.entry;
        if entry.asid != Some(asid) {
            return Err(AccessCheck::GuestOwned);
        }
        if gfn_at(entry.gfn, pfn.get() - found.start).get() != gfn {
            return Err(AccessCheck::ReverseMap);
        }
        if entry.immutable { Err(AccessCheck::Mutable) } else { Ok(found) }
    }

    /// Refuses a block of frames of which one is assigned, naming it.
    pub(crate) fn check_block(&self, pfn: Pfn, count: PageCount) -> Result<(), Refused> {
        let found = self.entries.first_in(pfn.get(), pfn.get() + count.get());
        match found.and_then(|found| Pfn::new(found.start.max(pfn.get()))) {
            None => Ok(()),
            Some(pfn) => {
                let check = AccessCheck::HypervisorOwned;
                Err(Refused { path: Path::Host, pfn, write: true, check })
            }
        }
    }
}
