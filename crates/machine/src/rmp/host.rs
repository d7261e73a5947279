//! The instructions of the hypervisor: RMPUPDATE, PSMASH, VMRUN as far as it concerns the RMP.

use polder_units::{Gfn, Level, Pfn};

use crate::access::Access;
use crate::rmp::{Entry, Rmp, User};
use crate::table::Found;
use crate::{
    AccessCheck, Error, LockOwner, Machine, Path, Plant, RmpEntry, RmpFail, RmpResult, RmpSize,
    RmpUpdate, VcpuId,
};

impl Machine {
    /// Turns SNP on (`SYSCFG[SecureNestedPagingEn]`): no page is assigned. Nothing turns it off.
    pub fn enable_snp(&mut self) {
        let (frames, geometry) = (self.config.frames, self.config.geometry);
        self.protection.rmp.get_or_insert_with(|| Rmp::new(frames, geometry).into());
    }

    /// What the RMP says of a frame: RMPREAD, with the 2M entry looked up where one covers the
    /// frame, as `snp_lookup_rmpentry()` does. `None` without SNP or past the last frame.
    pub fn rmp_entry(&self, pfn: Pfn) -> Option<RmpEntry> {
        let covered = pfn.get() < self.config.frames.get();
        self.protection.rmp.as_ref().filter(|_| covered).map(|rmp| rmp.entry(pfn))
    }

    /// RMPUPDATE: changes who owns a page.
    ///
    /// Taking a page away names its size too, and the size must be right, but is not kept: an
    /// entry that is not assigned is all zeros. Validated and VMSA survive only if owner, guest
    /// frame and size stay, that is, if nothing but the immutable bit changes; any other update
    /// clears them (AMD APM volume 2, sections 15.36.6 and 15.36.11). The guest frame's alignment
    /// is not checked: the access checks make a 2M entry for an unaligned one useless.
    ///
    /// # Errors
    /// - [`RmpFail::Input`]: 2M of an unaligned frame; a page that is not assigned but has an ASID
    ///   or is immutable; outside of the RMP; guest frames past the last.
    /// - [`RmpFail::InUse`], [`RmpFail::Overlap`]: somebody else is at work on it.
    /// - [`RmpFail::Permission`]: the entry is immutable.
    /// - [`RmpFail::Overlap`]: 4K of a page that is part of a 2M entry, whether of its first frame
    ///   (as the pseudo-code says) or another (as the hardware does: B. Singh, 19 July 2021, in the
    ///   thread that the head of `rmp.rs` cites); 2M of a page of which a 4K entry is assigned.
    pub fn rmpupdate(&mut self, pfn: Pfn, new: RmpUpdate) -> RmpResult {
        let overlap_planted = self.plants.has(Plant::LargeOverAssigned);
        let keep_planted = self.plants.has(Plant::KeptValidated);
        let rmp = self.rmp_mut()?;
        let (start, end) = rmp.page(pfn, new.size)?;
        let contradicts = !new.assigned && (new.immutable || new.asid.is_some());
        if contradicts || Gfn::new(new.gfn.get() + (end - start) - 1).is_none() {
            return Err(RmpFail::Input);
        }
        rmp.check_idle((start, end))?;
        let level = new.size.level();
        let old = rmp.entries.get(start).map(|found| (found.level, *found.entry));
        if old.is_some_and(|(_, old)| old.immutable) {
            return Err(RmpFail::Permission);
        }
        let overlaps = match new.size {
            RmpSize::Size4K => old.is_some_and(|(there, _)| there > level),
            RmpSize::Size2M => {
                let there = rmp.entries.first_in(start, end);
                there.is_some_and(|found| found.level < level) && !overlap_planted
            }
        };
        if overlaps {
            return Err(RmpFail::Overlap);
        }
        let same = |(there, old): &(Level, Entry)| {
            *there == level && old.asid == new.asid && old.gfn == new.gfn
        };
        let kept = old.filter(|old| same(old) || keep_planted).map(|(_, old)| old);
        rmp.entries.drain(start, end, |_| ());
        if new.assigned {
            let entry = Entry {
                gfn: new.gfn,
                asid: new.asid,
                immutable: new.immutable,
                validated: kept.is_some_and(|old| old.validated),
                vmsa: kept.is_some_and(|old| old.vmsa),
            };
            let added = rmp.entries.insert(start, level, entry);
            assert!(added.is_ok(), "the rmp entry of pfn {pfn} was just emptied");
        }
        Ok(())
    }

    /// PSMASH: makes a 2M entry 4K entries, with consecutive guest frames and all else as it was,
    /// validated too (AMD APM volume 2, section 15.36.11).
    ///
    /// # Errors
    /// - [`RmpFail::Input`]: not the first frame of a 2M page, or outside of the RMP.
    /// - [`RmpFail::InUse`]: somebody else is at work on an entry of the page.
    /// - [`RmpFail::BadAddress`]: no 2M entry, or an immutable one. Look again: 4K entries mean
    ///   that somebody else was faster (`sev_handle_rmp_fault()`, arch/x86/kvm/svm/sev.c).
    pub fn psmash(&mut self, pfn: Pfn) -> RmpResult {
        let planted = self.plants.has(Plant::SmashUnvalidates);
        let rmp = self.rmp_mut()?;
        let page = rmp.page(pfn, RmpSize::Size2M)?;
        if rmp.in_use(page).next().is_some() {
            return Err(RmpFail::InUse);
        }
        match rmp.entries.get(page.0) {
            Some(Found { level: Level::Size2M, entry, .. }) if !entry.immutable => {}
            _ => return Err(RmpFail::BadAddress),
        }
        rmp.entries.split(page.0, |entry, offset| {
            let part = entry.part(offset);
            Entry { validated: part.validated && !(planted && offset == 1), ..part }
        });
        Ok(())
    }

    /// Keeps the entry of a page in use by `by`, until [`Machine::rmp_release`].
    ///
    /// # Errors
    /// [`RmpFail::InUse`], [`RmpFail::Overlap`] if others use it or a part of it;
    /// [`RmpFail::Input`] if it is not aligned or outside of the RMP; [`RmpFail::Undefined`].
    pub fn rmp_hold(&mut self, pfn: Pfn, size: RmpSize, by: LockOwner) -> RmpResult {
        let rmp = self.rmp_mut()?;
        rmp.check_idle(rmp.page(pfn, size)?)?;
        rmp.held.insert(pfn.get(), (size, User::Agent(by)));
        Ok(())
    }

    /// Lets go of the entry at `pfn`.
    ///
    /// # Errors
    /// [`RmpFail::Input`] if `by` does not have it in use; [`RmpFail::Undefined`].
    pub fn rmp_release(&mut self, pfn: Pfn, by: LockOwner) -> RmpResult {
        let held = &mut self.rmp_mut()?.held;
        match held.get(&pfn.get()) {
            Some((_, User::Agent(owner))) if *owner == by => {
                held.remove(&pfn.get());
                Ok(())
            }
            _ => Err(RmpFail::Input),
        }
    }

    /// VMRUN of an SNP vCPU with its registers at `vmsa`: checks the page (AMD APM volume 2, table
    /// 15-41) and has its entry in use until [`Machine::vmexit`] (section 15.36.12). The vCPU's
    /// steps do not need it.
    ///
    /// # Errors
    /// [`Error::Refused`] by a check; [`Error::NoSnp`] for a plain VM; [`Error::Gone`].
    pub fn vmrun(&mut self, vcpu: VcpuId, vmsa: Pfn) -> Result<(), Error> {
        self.vcpu_state(vcpu)?;
        let snp = self.vms.get(vcpu.vm)?.snp.ok_or(Error::NoSnp)?;
        let rmp = self.rmp_mut().map_err(|_| Error::NoSnp)?;
        let access = Access {
            path: Path::GuestPrivate,
            private: None,
            pfn: vmsa,
            level: Level::Size4K,
            write: true,
        };
        let entry = rmp.entry(vmsa);
        let failed = if rmp.in_use((vmsa.get(), vmsa.get() + 1)).next().is_some()
            || rmp.held.values().any(|(_, user)| *user == User::Vcpu(vcpu))
        {
            Some(AccessCheck::InUse)
        } else if entry.asid != Some(snp.asid) {
            Some(AccessCheck::GuestOwned)
        } else if entry.immutable {
            Some(AccessCheck::Mutable)
        } else {
            (!entry.vmsa).then_some(AccessCheck::Vmsa)
        };
        if let Some(check) = failed {
            return Err(access.refused(check).into());
        }
        rmp.held.insert(vmsa.get(), (RmpSize::Size4K, User::Vcpu(vcpu)));
        Ok(())
    }

    /// #VMEXIT: the vCPU's VMSA is no longer in use. Nothing happens if it does not run.
    pub fn vmexit(&mut self, vcpu: VcpuId) {
        if let Some(rmp) = &mut self.protection.rmp {
            rmp.held.retain(|_, (_, user)| *user != User::Vcpu(vcpu));
        }
    }

    pub(crate) fn rmp_mut(&mut self) -> RmpResult<&mut Rmp> {
        self.protection.rmp.as_deref_mut().ok_or(RmpFail::Undefined)
    }
}
