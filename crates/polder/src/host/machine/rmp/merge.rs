//! Merging, by the firmware: each 4K entry is made immutable, all are made one, and the one is
//! taken back (the machine's `rmp/firmware.rs`).
//!
//! It costs the guest its mappings of 2M, so it is looked first whether they can be merged.

use std::sync::atomic::Ordering;

use polder_machine::{Machine, RmpEntry, RmpFail, RmpSize, RmpUpdate};
use polder_units::{Gfn, Level, PageIndex, PageRange, Pfn};

use super::{Found, RMP_RETRIES};
use crate::Error;
use crate::host::machine::MachineHost;

impl MachineHost {
    /// Merges the 4K entries of a 2M page if they agree, after taking it out of stage 2, which has
    /// it at 4K. Else they stay, and nothing is touched.
    pub(in super::super) fn merge(&self, range: PageRange) -> Result<(), Error> {
        let Some(head) = self.mergeable(range)? else { return Ok(()) };
        self.unmap_guest(range)?;
        let frozen = super::frames(head, range.count()).try_for_each(|pfn| self.freeze(pfn));
        let merged = frozen.is_ok() && {
            let mut machine = self.lock();
            machine.page_unsmash(head).is_ok()
                && machine.page_reclaim(head, RmpSize::Size2M).is_ok()
        };
        let count = if merged { &self.rmp().merged } else { &self.rmp().left_small };
        count.fetch_add(1, Ordering::Relaxed);
        if merged { Ok(()) } else { self.thaw(range) }
    }

    /// The first frame of a 2M page whose 4K entries can be merged. Those that can't are counted;
    /// where there are none, there is nothing to count.
    fn mergeable(&self, range: PageRange) -> Result<Option<Pfn>, Error> {
        let machine = &*self.lock();
        let mut found = Vec::new();
        for page in range.frames() {
            found.extend(Found::at(machine, self, page)?);
        }
        if !found.iter().any(|found| found.entry.assigned && !found.is_large()) {
            return Ok(None);
        }
        let head = self.agree(machine, range, &found);
        if head.is_none() {
            self.rmp().left_small.fetch_add(1, Ordering::Relaxed);
        }
        Ok(head)
    }

    /// The first frame, if they are one folio's, are seen by one binding where a large entry can
    /// be, and their entries say the same.
    fn agree(&self, machine: &Machine, range: PageRange, found: &[Found]) -> Option<Pfn> {
        let (first, owner) = (found.first()?, self.owner()?);
        let gfns = self.gfns_of(machine, range)?;
        let gfn = gfns.start();
        let pages = first.geometry.pages(Level::Size2M);
        let expected = RmpEntry {
            assigned: true,
            size: RmpSize::Size4K,
            immutable: false,
            gfn,
            asid: Some(owner.asid),
            vmsa: false,
            validated: first.entry.validated,
        };
        let agrees = |(found, (pfn, gfn)): (&Found, (Pfn, Gfn))| {
            found.pfn == pfn && found.entry == RmpEntry { gfn, ..expected }
        };
        let at = super::frames(first.pfn, range.count()).zip(gfns.frames());
        let one = first.folio > Level::Size4K && first.offset() == 0 && gfn.is_multiple_of(pages);
        let whole = found.len() as u64 == range.count().get();
        (one && whole && found.iter().zip(at).all(agrees)).then_some(first.pfn)
    }

    /// Makes a 4K entry immutable, all else as it was.
    fn freeze(&self, pfn: Pfn) -> Result<(), RmpFail> {
        let mut tries = 0;
        loop {
            let mut machine = self.lock();
            let RmpEntry { assigned, size, gfn, asid, .. } =
                machine.rmp_entry(pfn).expect("the rmp covers all frames");
            let frozen =
                machine.rmpupdate(pfn, RmpUpdate { assigned, size, immutable: true, gfn, asid });
            match frozen {
                Err(RmpFail::InUse | RmpFail::Overlap) if tries < RMP_RETRIES => tries += 1,
                frozen => return frozen,
            }
            drop(machine);
            crate::sync::yield_now();
        }
    }

    /// Takes entries back from the firmware, at the level that they have: all that it can.
    pub(in super::super) fn thaw(&self, range: PageRange) -> Result<(), Error> {
        first_failure(range.frames().map(|page| self.thaw_at(page)))
    }

    fn thaw_at(&self, page: PageIndex) -> Result<(), Error> {
        let machine = &mut *self.lock();
        let found = Found::at(machine, self, page)?.filter(|found| found.entry.immutable);
        let Some(found) = found else { return Ok(()) };
        let pfn = if found.is_large() { found.head() } else { found.pfn };
        let reclaimed = machine.page_reclaim(pfn, found.entry.size);
        reclaimed.map_err(|_| Error::Rmp { page, fail: RmpFail::Permission })
    }
}

/// Does all of it, also after a failure; the first one.
fn first_failure(all: impl Iterator<Item = Result<(), Error>>) -> Result<(), Error> {
    let mut first = Ok(());
    for result in all {
        first = first.and(result);
    }
    first
}

#[cfg(test)]
mod tests {
    use polder_engine::{Platform, Slot, VmId};
    use polder_machine::LockOwner;
    use polder_units::PageCount;

    use super::*;
    use crate::host::{Host, Vm};

    /// A 2M folio, bound from `gfn` on, with 4K entries.
    fn small(gfn: u32, level: Level) -> (MachineHost, PageRange) {
        let host = MachineHost::new(PageCount::from(512), Platform::Snp).unwrap();
        let all = PageRange::between(0, 512).unwrap();
        host.attach(VmId(0), Vm::Machine).unwrap();
        host.bind(VmId(0), Slot(0), Gfn::from(gfn), all).unwrap();
        let object = host.object;
        match level {
            Level::Size4K => host.allocate(&mut host.lock(), all).unwrap(),
            level => drop(host.lock().allocate(object, 0u32.into(), level).unwrap()),
        }
        host.assign(all).unwrap();
        host.smash_all(all).unwrap();
        (host, all)
    }

    fn merged(host: &MachineHost) -> [u64; 2] {
        let [_, merged, left_small] = host.rmp().counts();
        [merged, left_small]
    }

    fn any_frozen(host: &MachineHost, all: PageRange) -> bool {
        let machine = host.lock();
        let found = all.frames().filter_map(|page| Found::at(&machine, host, page).unwrap());
        found.into_iter().any(|found| found.entry.immutable)
    }

    #[test]
    fn entries_that_agree_are_merged_once_and_what_is_large_is_left_alone() {
        let (host, all) = small(512, Level::Size2M);
        host.merge(all).unwrap();
        assert_eq!(merged(&host), [1, 0]);
        let merged_once = Found::at(&host.lock(), &host, 7u32.into()).unwrap().unwrap();
        assert!(merged_once.is_large() && !merged_once.entry.immutable);
        host.merge(all).unwrap();
        assert_eq!(merged(&host), [1, 0]);
        assert!(Found::at(&host.lock(), &host, 7u32.into()).unwrap().unwrap().is_large());
    }

    #[test]
    fn what_can_not_be_one_entry_is_left_as_it_is_and_mapped() {
        let of_two_bindings = || {
            let (host, all) = small(512, Level::Size2M);
            host.unbind(VmId(0), Slot(0)).unwrap();
            for (slot, at) in [(0, 0), (1, 256)] {
                let half = PageRange::between(at, at + 256).unwrap();
                let gfn = Gfn::new(512 + at).unwrap();
                host.bind(VmId(0), Slot(slot), gfn, half).unwrap();
            }
            (host, all)
        };
        let one_taken = || {
            let (host, all) = small(512, Level::Size2M);
            host.unassign(PageRange::one(9u32.into())).unwrap();
            (host, all)
        };
        for (host, all) in
            [small(512, Level::Size4K), small(513, Level::Size2M), of_two_bindings(), one_taken()]
        {
            let vm = host.vm(VmId(0)).unwrap();
            let (_, seen) = host.lock().gfns_of(host.object, all).next().unwrap();
            let resolved = host.lock().tdp_resolve(vm, seen.start()).unwrap();
            host.lock().tdp_map(&resolved, Level::Size4K, true).unwrap();
            host.merge(all).unwrap();
            assert_eq!(merged(&host), [0, 1]);
            assert!(host.lock().spte(vm, seen.start()).unwrap().is_some(), "it is still mapped");
            assert!(!any_frozen(&host, all));
        }
    }

    #[test]
    fn an_entry_that_others_have_in_use_for_long_leaves_all_of_them_thawed() {
        let (host, all) = small(512, Level::Size2M);
        let pfn = Found::at(&host.lock(), &host, 300u32.into()).unwrap().unwrap().pfn;
        host.lock().rmp_hold(pfn, RmpSize::Size4K, LockOwner(7)).unwrap();
        host.merge(all).unwrap();
        assert_eq!(merged(&host), [0, 1]);
        assert!(!any_frozen(&host, all));
        host.lock().rmp_release(pfn, LockOwner(7)).unwrap();
        host.merge(all).unwrap();
        assert_eq!(merged(&host), [1, 1]);
    }

    #[test]
    fn a_thaw_leaves_levels_as_they_are_and_does_nothing_where_nothing_is_frozen() {
        let (host, all) = small(512, Level::Size2M);
        host.thaw(all).unwrap();
        let head = Found::at(&host.lock(), &host, 0u32.into()).unwrap().unwrap().pfn;
        for large in [false, true] {
            super::super::frames(head, all.count()).for_each(|pfn| host.freeze(pfn).unwrap());
            if large {
                host.lock().page_unsmash(head).unwrap();
            }
            assert!(any_frozen(&host, all));
            host.thaw(all).unwrap();
            assert!(!any_frozen(&host, all));
            let found = Found::at(&host.lock(), &host, 9u32.into()).unwrap().unwrap();
            assert_eq!(found.is_large(), large);
        }
    }

    #[test]
    fn a_thaw_goes_on_after_a_failure_and_tells_the_first() {
        let mut seen = 0;
        let failed = |page: u32| Error::Rmp { page: page.into(), fail: RmpFail::Permission };
        let all = (0..5u32).map(|page| {
            seen += 1;
            if page % 2 == 1 { Err(failed(page)) } else { Ok(()) }
        });
        assert_eq!(first_failure(all), Err(failed(1)));
        assert_eq!(seen, 5);
    }
}
