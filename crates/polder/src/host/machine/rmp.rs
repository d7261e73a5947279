//! The machine's RMP, for the memory of an SNP guest.
//!
//! ```text
//!                    RMP of its frame
//! shared page        not assigned
//! private page       assigned to the VM that sees it at that gfn, from the conversion on or, where
//!                    it had no memory then, from the answer that maps it first
//! no memory          not assigned: memory is unassigned before it is freed
//! ```
//! Each instruction is a step of its own. What an instruction needs to know is looked up before it,
//! and again if it fails: another CPU may have been faster. `FAIL_INUSE` is tried again, a bounded
//! number of times. So is `FAIL_OVERLAP` where no entry of another size is to be seen: then it says
//! that somebody is at work on one, and is told as in use. An overlap by a wrong size never goes
//! away, and is told as such at once.
//!
//! Not all private pages with memory are assigned: a page whose first mapping was refused is not,
//! and neither is one that no VM sees. So what is unassigned is noted down, and an operation that
//! is undone gives that back, and no more (`rmp/taken.rs`).

mod merge;
mod taken;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(feature = "plant")]
use polder_engine::NotLarge;
use polder_engine::{LargeRmpEntry, VmId, can_install_large_rmp_entry};
use polder_linux::Errno;
use polder_machine::{Asid, Backing, Machine, Resolved, RmpEntry, RmpFail, RmpSize, RmpUpdate};
use polder_units::{Geometry, Gfn, GfnRange, Level, PageCount, PageIndex, PageRange, Pfn};

use self::taken::Taken;
use super::{MachineHost, refused};
use crate::Error;
use crate::host::{Smashed, failed};
use crate::sync::Mutex;

/// How often an instruction is tried again that met another at work.
const RMP_RETRIES: u32 = 32;

/// What is kept about the RMP.
#[derive(Default)]
pub(super) struct Rmp {
    /// The VM that the memory's private pages are assigned to: the first that it was bound to.
    owner: Mutex<Option<Owner>>,
    taken: Mutex<Taken>,
    large: AtomicU64,
    merged: AtomicU64,
    left_small: AtomicU64,
    #[cfg(feature = "plant")]
    bug: Mutex<Option<polder_engine::Bug>>,
}

#[derive(Clone, Copy)]
struct Owner {
    id: VmId,
    vm: polder_machine::VmId,
    asid: Asid,
}

impl Rmp {
    pub(super) fn counts(&self) -> [u64; 3] {
        [&self.large, &self.merged, &self.left_small].map(|count| count.load(Ordering::Relaxed))
    }
}

/// The ASID of a VM.
pub(super) fn asid(id: VmId) -> Result<Asid, Error> {
    let number = id.0.checked_add(1).and_then(|number| u16::try_from(number).ok());
    number.and_then(Asid::new).ok_or_else(|| failed("SNP_LAUNCH_START", Errno::NOSPC))
}

/// What is to be done after a look at a page.
enum Next {
    /// Go on so many pages further.
    On(u64),
    /// Look again, because of what may have passed then.
    Again(Error),
}

impl Next {
    /// After an instruction that no entry of another size stood in the way of.
    fn after(result: Result<(), RmpFail>, pages: u64, page: PageIndex) -> Result<Self, Error> {
        match result {
            Ok(()) => Ok(Self::On(pages)),
            // The entries do not overlap, as who calls this has seen: somebody at work on one of
            // the other size does.
            Err(RmpFail::InUse | RmpFail::Overlap) => {
                Ok(Self::Again(Error::Rmp { page, fail: RmpFail::InUse }))
            }
            Err(fail) => Err(Error::Rmp { page, fail }),
        }
    }
}

/// A page with memory, and its entry.
struct Found {
    pfn: Pfn,
    folio: Level,
    entry: RmpEntry,
    geometry: Geometry,
}

impl Found {
    fn at(machine: &Machine, host: &MachineHost, page: PageIndex) -> Result<Option<Self>, Error> {
        let backing = machine.backing(host.object, page).map_err(refused)?;
        let Some(Backing { pfn, level: folio }) = backing else { return Ok(None) };
        let entry = machine.rmp_entry(pfn).expect("the rmp covers all frames");
        Ok(Some(Self { pfn, folio, entry, geometry: machine.geometry() }))
    }

    fn is_large(&self) -> bool {
        self.entry.assigned && self.entry.size == RmpSize::Size2M
    }

    /// The pages of a large entry.
    fn pages(&self) -> u64 {
        self.geometry.pages(Level::Size2M).get()
    }

    /// How far into its 2M frames it is.
    fn offset(&self) -> u64 {
        self.pfn.get() % self.pages()
    }

    /// The first of its 2M frames.
    fn head(&self) -> Pfn {
        Pfn::new(self.pfn.get() - self.offset()).expect("below a frame")
    }

    /// The pages from this one to the end of its entry.
    fn left(&self) -> u64 {
        if self.is_large() { self.pages() - self.offset() } else { 1 }
    }
}

impl MachineHost {
    #[cfg(feature = "plant")]
    pub(crate) fn plant(&self, bug: polder_engine::Bug) {
        if let Some(rmp) = &self.rmp {
            *rmp.bug.lock() = Some(bug);
        }
    }

    #[cfg(feature = "plant")]
    fn bug(&self) -> Option<polder_engine::Bug> {
        *self.rmp().bug.lock()
    }

    fn rmp(&self) -> &Rmp {
        self.rmp.as_ref().expect("asked for of an SNP guest's memory only")
    }

    /// Whether the memory is an SNP guest's.
    pub(super) const fn is_snp(&self) -> bool {
        self.rmp.is_some()
    }

    fn owner(&self) -> Option<Owner> {
        self.rmp.as_ref().and_then(|rmp| *rmp.owner.lock())
    }

    /// Refuses a VM other than the first that the memory was bound to.
    pub(super) fn check_owner(&self, id: VmId) -> Result<(), Error> {
        match self.owner() {
            Some(owner) if owner.id != id => Err(Error::OneVm { owner: owner.id, vm: id }),
            _ => asid(id).map(drop),
        }
    }

    /// Notes that the memory was bound to a VM, as [`Self::check_owner`] allowed. Whoever was first
    /// has it. Nothing is called with the lock held that takes the machine's: those who hold that
    /// one ask for the owner.
    pub(super) fn own(&self, id: VmId, vm: polder_machine::VmId) -> Result<(), Error> {
        if let Some(rmp) = &self.rmp {
            let asid = asid(id)?;
            rmp.owner.lock().get_or_insert(Owner { id, vm, asid });
        }
        Ok(())
    }

    /// Looks at the pages of a range one after the other, and does something about each.
    fn each(
        &self,
        range: PageRange,
        mut at: impl FnMut(PageIndex) -> Result<Next, Error>,
    ) -> Result<(), Error> {
        let (mut next, mut tries) = (range.start().get(), 0);
        while let Some(rest) = PageRange::between(next, range.end()) {
            let page = rest.start();
            match at(page)? {
                Next::On(pages) => (next, tries) = (next + pages, 0),
                Next::Again(_) if tries < RMP_RETRIES => {
                    tries += 1;
                    crate::sync::yield_now();
                }
                Next::Again(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(super) fn assign(&self, range: PageRange) -> Result<(), Error> {
        self.forget_taken(range);
        self.each(range, |page| self.assign_at(page, range))
    }

    /// Whether what was resolved can be mapped privately at a level: all entries of that page are
    /// as large as they can be, and are for where it is seen.
    pub(super) fn rmp_allows(&self, machine: &Machine, resolved: &Resolved, level: Level) -> bool {
        let geometry = machine.geometry();
        let (all, large) = (geometry.pages(level).get(), geometry.pages(Level::Size2M).get());
        let (gfn, pfn) = (resolved.gfn().get(), resolved.pfn().get());
        if level == Level::Size4K || !self.is_snp() {
            return true;
        }
        let Some(gfn) = gfn.checked_sub(pfn % all) else { return false };
        let head = pfn - pfn % all;
        (0..all / large).map(|at| at * large).all(|offset| {
            let entry = Pfn::new(head + offset).and_then(|pfn| machine.rmp_entry(pfn));
            entry.is_some_and(|entry| {
                entry.assigned
                    && entry.size == RmpSize::Size2M
                    && entry.gfn.get() == gfn + offset
                    && entry.asid == self.owner().map(|owner| owner.asid)
            })
        })
    }

    /// Where the owner sees pages, if one binding shows all of them.
    fn gfns_of(&self, machine: &Machine, range: PageRange) -> Option<GfnRange> {
        let owner = self.owner()?;
        let mut shown = machine.gfns_of(self.object, range).filter(|(vm, _)| *vm == owner.vm);
        shown.next().map(|(_, gfns)| gfns).filter(|gfns| gfns.count() == range.count())
    }

    /// Assigns a page that is about to be mapped, with others of its folio if they are `within`
    /// what is answered for.
    pub(super) fn assign_for(&self, page: PageIndex, within: PageRange) -> Result<(), Error> {
        self.each(PageRange::one(page), |page| self.assign_at(page, within))
    }

    /// Has the firmware take a page, which the host has written, for its guest, which has not
    /// begun.
    pub(super) fn launch_at(&self, page: PageIndex) -> Result<(), Error> {
        self.each(PageRange::one(page), |page| {
            let machine = &mut *self.lock();
            let found = Found::at(machine, self, page)?;
            let gfns = self.gfns_of(machine, PageRange::one(page));
            let (Some(owner), Some(found), Some(gfns)) = (self.owner(), found, gfns) else {
                return Err(Error::NotOffered {
                    what: "what is put onto an SNP guest's private pages is encrypted for where the \
                           guest sees them, and it does not see these",
                    way_out: "bind the pages first",
                });
            };
            if let Some(again) = self.cut_off(machine, PageRange::one(page))? {
                return Ok(again);
            }
            let small = RmpUpdate::private(owner.asid, gfns.start(), RmpSize::Size4K);
            let update = RmpUpdate { immutable: true, ..small };
            if let Err(fail) = machine.rmpupdate(found.pfn, update) {
                return Next::after(Err(fail), 1, page);
            }
            let launched = machine.launch_update(found.pfn);
            launched.map_err(|fail| Error::Firmware { page, fail })?;
            Ok(Next::On(1))
        })
    }

    fn assign_at(&self, page: PageIndex, within: PageRange) -> Result<Next, Error> {
        let Some(owner) = self.owner() else { return Ok(Next::On(1)) };
        let machine = &mut *self.lock();
        let Some(found) = Found::at(machine, self, page)? else { return Ok(Next::On(1)) };
        let shown = self.gfns_of(machine, PageRange::one(page));
        let Some(gfns) = shown else { return Ok(Next::On(1)) };
        let (gfn, entry) = (gfns.start(), found.entry);
        if entry.asid == Some(owner.asid) && entry.gfn == gfn {
            // An RMPUPDATE would take what the guest has validated.
            return Ok(Next::On(found.left()));
        }
        if found.is_large() {
            // It is for where the page was seen before.
            return Next::after(machine.psmash(found.head()), 0, page);
        }
        if let Some((head, at)) = self.large(machine, &found, (page, gfn), within) {
            let all = PageRange::enclosing(page, Level::Size2M, found.geometry);
            if let Some(again) = self.cut_off(machine, all)? {
                return Ok(again);
            }
            let large = RmpUpdate::private(owner.asid, at, RmpSize::Size2M);
            let updated = machine.rmpupdate(head, large);
            self.rmp().large.fetch_add(u64::from(updated.is_ok()), Ordering::Relaxed);
            return Next::after(updated, found.pages() - found.offset(), page);
        }
        if let Some(again) = self.cut_off(machine, PageRange::one(page))? {
            return Ok(again);
        }
        let small = RmpUpdate::private(owner.asid, gfn, RmpSize::Size4K);
        Next::after(machine.rmpupdate(found.pfn, small), 1, page)
    }

    /// Cuts every process off from pages that are about to be assigned, and looks for references,
    /// under the folio's lock, which the kernel's own faults need. Steps before have done so too,
    /// but no claim keeps another process that has the file mapped from touching it again, and the
    /// RMP is not asked about what a TLB has. Who refers to the pages may soon not.
    fn cut_off(&self, machine: &mut Machine, pages: PageRange) -> Result<Option<Next>, Error> {
        machine.zap_object(self.object, pages).map_err(refused)?;
        machine.flush_object(self.object, pages).map_err(refused)?;
        let referenced = self.referenced_on(machine, pages)?;
        Ok(referenced.map(|refusal| Next::Again(refusal.into())))
    }

    /// The first frame and guest frame of the 2M page around a page, if it gets a large entry.
    fn large(
        &self,
        machine: &Machine,
        found: &Found,
        (page, gfn): (PageIndex, Gfn),
        within: PageRange,
    ) -> Option<(Pfn, Gfn)> {
        let around = PageRange::enclosing(page, Level::Size2M, found.geometry);
        let offset = page.get() - around.start().get();
        let frame = Pfn::new(found.pfn.get().checked_sub(offset)?)?;
        let gfn = Gfn::new(gfn.get().checked_sub(offset)?)?;
        let is_assigned = |pfn| machine.rmp_entry(pfn).is_none_or(|entry| entry.assigned);
        let mut frames = frames(frame, around.count());
        let entry = LargeRmpEntry {
            folio: found.folio,
            page: around.start(),
            frame,
            gfn,
            bound: self.gfns_of(machine, around).is_some(),
            within,
            unassigned: found.folio > Level::Size4K && !frames.any(is_assigned),
        };
        let can = can_install_large_rmp_entry(&entry, found.geometry);
        #[cfg(feature = "plant")]
        let can = match (can, self.bug()) {
            (Err(NotLarge::Gfn), Some(polder_engine::Bug::MisalignedLarge)) => Ok(()),
            (can, _) => can,
        };
        can.is_ok().then_some((frame, gfn))
    }

    /// Takes pages back from their guest, and notes which were its.
    pub(super) fn unassign(&self, range: PageRange) -> Result<(), Error> {
        self.forget_taken(range);
        self.each(range, |page| {
            let machine = &mut *self.lock();
            let Some(found) = Found::at(machine, self, page)? else { return Ok(Next::On(1)) };
            if !found.entry.assigned {
                return Ok(Next::On(1));
            }
            if !found.is_large() {
                let small = RmpUpdate::shared(RmpSize::Size4K);
                let taken = machine.rmpupdate(found.pfn, small);
                self.note_taken(taken, PageRange::one(page), &found);
                return Next::after(taken, 1, page);
            }
            let large = RmpUpdate::shared(RmpSize::Size2M);
            let around = PageRange::enclosing(page, Level::Size2M, found.geometry);
            match found.offset() == 0 && range.contains_range(around) {
                true => {
                    let taken = machine.rmpupdate(found.head(), large);
                    self.note_taken(taken, around, &found);
                    Next::after(taken, found.pages(), page)
                }
                // A step before was to smash it.
                false => Err(Error::Rmp { page, fail: RmpFail::Overlap }),
            }
        })
    }

    /// Smashes the large entries of a range.
    pub(super) fn smash_all(&self, range: PageRange) -> Result<(), Error> {
        self.each(range, |page| {
            let machine = &mut *self.lock();
            let Some(found) = Found::at(machine, self, page)? else { return Ok(Next::On(1)) };
            if !found.is_large() {
                return Ok(Next::On(1));
            }
            Next::after(machine.psmash(found.head()), found.left(), page)
        })
    }

    /// Solves a fault for its size: as [`smash_all`](Self::smash_all), for one guest frame, then
    /// takes the 2M page out of stage 2, so that it is mapped anew at the size that the RMP has.
    /// Only if the frame still shows a page of `within`, which nobody else is at work on.
    pub(super) fn smash_at(
        &self,
        vm: polder_machine::VmId,
        gfn: Gfn,
        within: PageRange,
    ) -> Result<Smashed, Error> {
        let bound = self.lock().bound(vm, gfn).ok();
        let Some(page) = bound.map(|bound| bound.page).filter(|&page| within.contains(page)) else {
            return Ok(Smashed::Spurious);
        };
        #[cfg(feature = "plant")]
        if self.bug() == Some(polder_engine::Bug::ForgottenSmash) {
            return Ok(Smashed::Spurious);
        }
        let found = Found::at(&self.lock(), self, page)?;
        let smashed = self.smash_found(page, found)?;
        let mut machine = self.lock();
        let around = GfnRange::enclosing(gfn, Level::Size2M, machine.geometry());
        machine.tdp_zap(vm, around).map_err(refused)?;
        Ok(smashed)
    }

    /// Smashes what was found in a look: a step of its own, as on the processor.
    fn smash_found(&self, page: PageIndex, found: Option<Found>) -> Result<Smashed, Error> {
        let Some(found) = found.filter(Found::is_large) else { return Ok(Smashed::Spurious) };
        let machine = &mut *self.lock();
        match machine.psmash(found.head()) {
            Ok(()) => Ok(Smashed::Done),
            Err(RmpFail::InUse) => Ok(Smashed::Busy),
            Err(fail) => match Found::at(machine, self, page)? {
                Some(now) if now.is_large() => Err(Error::Rmp { page, fail }),
                _ => Ok(Smashed::Raced),
            },
        }
    }
}

fn frames(head: Pfn, count: PageCount) -> impl Iterator<Item = Pfn> {
    (head.get()..head.get() + count.get()).map_while(Pfn::new)
}
