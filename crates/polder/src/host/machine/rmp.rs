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

mod assign;
mod merge;
mod smash;
mod taken;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};

use polder_engine::VmId;
use polder_linux::Errno;
use polder_machine::{Asid, Backing, Machine, Resolved, RmpEntry, RmpFail, RmpSize, RmpUpdate};
use polder_units::{Geometry, GfnRange, Level, PageCount, PageIndex, PageRange, Pfn};

use self::taken::Taken;
use super::{MachineHost, refused};
use crate::Error;
use crate::host::failed;
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
}

fn frames(head: Pfn, count: PageCount) -> impl Iterator<Item = Pfn> {
    (head.get()..head.get() + count.get()).map_while(Pfn::new)
}
