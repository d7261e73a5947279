//! How a guest on the simulated machine reaches its memory: which side it means, and what it does
//! about pages that it has not accepted yet.
//!
//! A guest of KVM's software-protected type, or of SNP, has its page tables say which pages it
//! means as private. This one looks at what is granted before each access, also when the VMM has
//! changed that unasked: a real guest is told.
//!
//! A page that it gives away and gets back, because what it asked for was refused, it accepts as it
//! is: it keeps a digest of what the page held, and compares.
//!
//! # Holes
//! A page that is not validated is accepted and cleared at its first use, as Linux does unaccepted
//! memory (`arch/x86/coco/sev/core.c`, `snp_accept_memory()`). A real guest keeps a list of what it
//! has accepted, so that a hypervisor can't have it accept a page twice; this one does not.

use std::collections::BTreeSet;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use polder::machine::RmpFail;
use polder::units::{Geometry, Gfn, GfnRange, Gpa, Level, PAGE_BYTES, PageCount, PageRange};
use polder::{GuestExit, MachineVcpu, Memory, MemoryFault, Visibility, VmId};

/// How often an access is made again because what is granted changed under it.
const CHANGES: u32 = 1000;

/// What the vCPUs of a guest share, so that none uses a page between its acceptance and the end of
/// its clearing: the frames that are accepted and not cleared, because whoever was at it was
/// kicked. It is locked for writing while pages are accepted, and for reading by private accesses.
#[derive(Debug, Default)]
pub struct Accepting(RwLock<BTreeSet<Gfn>>);

impl Accepting {
    fn read(&self) -> RwLockReadGuard<'_, BTreeSet<Gfn>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeSet<Gfn>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pages that a guest has rescinded, and what they held.
#[derive(Default, Debug)]
pub struct Rescinded {
    /// Each page's first frame, and its size.
    pages: Vec<(Gfn, Level)>,
    /// Each frame that was accepted, and the digest of its bytes.
    held: Vec<(Gfn, u64)>,
}

/// A page that does not hold what its guest left in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Changed {
    /// The page.
    pub gpa: Gpa,
    /// The digest of what it held.
    pub held: u64,
    /// The digest of what it holds; none of a page that its guest can't have again.
    pub found: Option<u64>,
}

/// A vCPU of the simulated machine and what its guest knows of memory.
pub struct Accesses<'a> {
    vcpu: MachineVcpu,
    memory: (&'a Memory, VmId),
    accepting: &'a Accepting,
}

impl<'a> Accesses<'a> {
    /// Those of a vCPU; the vCPUs of a guest share what they are accepting.
    pub fn new(vcpu: MachineVcpu, memory: (&'a Memory, VmId), accepting: &'a Accepting) -> Self {
        Self { vcpu, memory, accepting }
    }

    /// Reads guest memory, of one page.
    ///
    /// # Errors
    /// [`GuestExit`]; the buffer is unchanged.
    pub fn read(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), GuestExit> {
        self.as_granted(gpa, |side| self.read_as(gpa, side, into))
    }

    /// Writes guest memory, of one page.
    ///
    /// # Errors
    /// [`GuestExit`]; nothing was written.
    pub fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestExit> {
        self.as_granted(gpa, |side| self.write_as(gpa, side, from))
    }

    /// [`Self::read`] as private or as shared, whatever is granted.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_as(&self, gpa: Gpa, side: Visibility, into: &mut [u8]) -> Result<(), GuestExit> {
        self.accepted((gpa, side), |vcpu| vcpu.read(gpa, side, into))
    }

    /// [`Self::write`] as private or as shared, whatever is granted.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_as(&self, gpa: Gpa, side: Visibility, from: &[u8]) -> Result<(), GuestExit> {
        self.accepted((gpa, side), |vcpu| vcpu.write(gpa, side, from))
    }

    /// Asks for pages to be private or shared, by the guest's own hypercall; the answer, as a guest
    /// gets it. `None` where the guest's request goes to the VMM and no hypervisor has a part in
    /// it.
    ///
    /// # Errors
    /// [`GuestExit`].
    pub fn convert(&self, gfns: GfnRange, to: Visibility) -> Result<Option<i64>, GuestExit> {
        if !self.memory.0.platform().guest_decides() {
            return Ok(None);
        }
        match self.vcpu.convert(gfns, to) {
            Ok(_) => Ok(Some(0)),
            Err(GuestExit::Failed(error)) => Ok(Some(-i64::from(error.errno() as i32))),
            Err(other) => Err(other),
        }
    }

    /// No longer accepts the private pages among `gfns`, as before asking for them to be shared. No
    /// other vCPU may write to them meanwhile. Returns those that were accepted.
    ///
    /// # Errors
    /// [`GuestExit`].
    pub fn rescind(&self, gfns: GfnRange) -> Result<Rescinded, GuestExit> {
        let mut rescinded = Rescinded::default();
        let (memory, vm) = self.memory;
        if !memory.platform().has_rmp() || memory.pages_of(vm, gfns).is_err() {
            return Ok(rescinded);
        }
        for gfn in gfns.frames() {
            let held = if self.is_private(GfnRange::one(gfn)) { self.digest(gfn)? } else { None };
            rescinded.held.extend(held.map(|held| (gfn, held)));
        }
        let mut next = gfns.start().get();
        while let Some(rest) = GfnRange::between(next, gfns.end()) {
            let gfn = rest.start();
            let private = self.is_private(GfnRange::one(gfn));
            let (level, result) =
                if private { self.rescind_at(rest)? } else { (Level::Size4K, false) };
            if result {
                rescinded.pages.push((gfn, level));
            }
            next += Geometry::X86_64.pages(level).get();
        }
        Ok(rescinded)
    }

    /// Rescinds the first page, of 2M if that is one. What it is of, and whether it was accepted.
    fn rescind_at(&self, gfns: GfnRange) -> Result<(Level, bool), GuestExit> {
        let gfn = gfns.start();
        let large = GfnRange::enclosing(gfn, Level::Size2M, Geometry::X86_64);
        for level in [Level::Size2M, Level::Size4K] {
            if level == Level::Size2M && (large.start() != gfn || !gfns.contains_range(large)) {
                continue;
            }
            match self.vcpu.pvalidate(gfn, level, false) {
                Ok(Ok(changed)) => return Ok((level, changed)),
                // Of 4K pages; or of the other kind by now.
                Ok(Err(_)) | Err(GuestExit::MemoryFault(_)) => {}
                Err(other) => return Err(other),
            }
        }
        Ok((Level::Size4K, false))
    }

    /// Accepts pages again, as they are: what it asked for was refused, and nothing should have
    /// changed. That is not the hypervisor's to say: who was given the page meanwhile could write
    /// to it. So nobody uses them before they are found to hold what they held; the first that does
    /// not is returned.
    ///
    /// # Errors
    /// [`GuestExit`].
    pub fn keep(&self, rescinded: &Rescinded) -> Result<Option<Changed>, GuestExit> {
        if rescinded.pages.is_empty() {
            // Who waits amid an access holds the lock, and is not waited for without need.
            return Ok(None);
        }
        let _alone = self.accepting.write();
        for &(gfn, level) in &rescinded.pages {
            let pages = GfnRange::enclosing(gfn, level, Geometry::X86_64);
            if let Some(Err(RmpFail::SizeMismatch)) = self.accept_again(gfn, level)? {
                for gfn in pages.frames() {
                    let _ = self.accept_again(gfn, Level::Size4K)?;
                }
            }
        }
        for &(gfn, held) in &rescinded.held {
            let found = self.digest(gfn)?;
            if found != Some(held) {
                return Ok(Some(Changed { gpa: gfn.gpa(), held, found }));
            }
        }
        Ok(None)
    }

    /// PVALIDATE of a page, unless it can't be had any more: it is of the other kind by now, or in
    /// quarantine.
    fn accept_again(
        &self,
        gfn: Gfn,
        level: Level,
    ) -> Result<Option<Result<bool, RmpFail>>, GuestExit> {
        match self.vcpu.pvalidate(gfn, level, true) {
            Ok(answer) => Ok(Some(answer)),
            Err(GuestExit::MemoryFault(_)) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// A digest of what a private page holds, if it is accepted.
    fn digest(&self, gfn: Gfn) -> Result<Option<u64>, GuestExit> {
        let mut bytes = [0; PAGE_BYTES];
        match self.vcpu.read(gfn.gpa(), Visibility::Private, &mut bytes) {
            Ok(()) => Ok(Some(digest(&bytes))),
            // Not accepted; or of the other kind by now.
            Err(GuestExit::NotValidated(_) | GuestExit::MemoryFault(_)) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// What is granted of the page behind a frame.
    fn granted(&self, gfn: Gfn) -> Option<Visibility> {
        let (memory, vm) = self.memory;
        let page = *memory.pages_of(vm, GfnRange::one(gfn)).ok()?.first()?;
        Some(memory.facts(page).ok()?.first()?.1.visibility)
    }

    /// Whether all of the pages behind frames are bound, and private by what is granted.
    fn is_private(&self, gfns: GfnRange) -> bool {
        let (memory, vm) = self.memory;
        let is_private = |&run: &PageRange| {
            let facts = memory.facts(run).unwrap_or_default();
            facts.iter().all(|(_, facts)| facts.visibility == Visibility::Private)
        };
        memory.pages_of(vm, gfns).is_ok_and(|runs| runs.iter().all(is_private))
    }

    /// Makes an access as the side that is granted.
    fn as_granted(
        &self,
        gpa: Gpa,
        mut access: impl FnMut(Visibility) -> Result<(), GuestExit>,
    ) -> Result<(), GuestExit> {
        if !self.memory.0.platform().tells_accesses_apart() {
            // A plain VM's guest doesn't say as which side; the machine is told this one.
            return access(Visibility::Private);
        }
        for _ in 0..CHANGES {
            let side = self.granted(gpa.gfn()).unwrap_or(Visibility::Private);
            match access(side) {
                Err(GuestExit::MemoryFault(MemoryFault::Mismatch { .. })) => {}
                other => return other,
            }
        }
        access(Visibility::Private)
    }

    /// Makes an access, accepting pages as they are met.
    fn accepted(
        &self,
        (gpa, side): (Gpa, Visibility),
        mut access: impl FnMut(&MachineVcpu) -> Result<(), GuestExit>,
    ) -> Result<(), GuestExit> {
        let (memory, vm) = self.memory;
        let mut access = |vcpu: &MachineVcpu| {
            loop {
                match access(vcpu) {
                    Err(GuestExit::Userfault(gfn)) => memory.fetch_for(vm, gfn)?,
                    other => return other,
                }
            }
        };
        if side == Visibility::Shared || !self.memory.0.platform().has_rmp() {
            // Nothing is to be accepted; and who waits for a page that is owed is in nobody's way.
            return access(&self.vcpu);
        }
        loop {
            let made = {
                let uncleared = self.accepting.read();
                (!uncleared.contains(&gpa.gfn())).then(|| access(&self.vcpu))
            };
            match made {
                None => self.clear(&mut self.accepting.write(), GfnRange::one(gpa.gfn()))?,
                Some(Err(GuestExit::NotValidated(gfn))) => self.accept(gfn)?,
                Some(other) => return other,
            }
        }
    }

    /// Accepts and clears the page around a frame.
    fn accept(&self, gfn: Gfn) -> Result<(), GuestExit> {
        let mut uncleared = self.accepting.write();
        let Some(accepted) = self.validate(gfn)? else { return Ok(()) };
        uncleared.extend(accepted.frames());
        self.clear(&mut uncleared, accepted)
    }

    /// Validates the page around a frame, of 2M if that is one, as `pvalidate_pages()`
    /// (arch/x86/coco/sev/core.c) tries first. `None` where another vCPU was faster, or the page is
    /// another one by now: the access shows.
    fn validate(&self, gfn: Gfn) -> Result<Option<GfnRange>, GuestExit> {
        let large = GfnRange::enclosing(gfn, Level::Size2M, Geometry::X86_64);
        // To try is to touch the first page, which may be somebody else's affair.
        if self.is_private(large) {
            match self.vcpu.pvalidate(large.start(), Level::Size2M, true) {
                Ok(Ok(changed)) => return Ok(changed.then_some(large)),
                Err(GuestExit::Kicked) => return Err(GuestExit::Kicked),
                // Of 4K pages; or the first one can't be had, which says nothing about this one.
                Ok(Err(_)) | Err(_) => {}
            }
        }
        let validated = self.vcpu.pvalidate(gfn, Level::Size4K, true)?;
        Ok((validated == Ok(true)).then_some(GfnRange::one(gfn)))
    }

    /// Clears those of the frames that are accepted and not cleared yet.
    fn clear(&self, uncleared: &mut BTreeSet<Gfn>, gfns: GfnRange) -> Result<(), GuestExit> {
        for gfn in gfns.frames() {
            if !uncleared.contains(&gfn) {
                continue;
            }
            match self.vcpu.write(gfn.gpa(), Visibility::Private, &[0; PAGE_BYTES]) {
                // Or it has been taken away again: nothing is left to clear.
                Ok(()) | Err(GuestExit::MemoryFault(_) | GuestExit::NotValidated(_)) => {
                    uncleared.remove(&gfn)
                }
                Err(other) => return Err(other),
            };
        }
        Ok(())
    }
}

/// A digest of a page's bytes: FNV-1a, by words. Whoever wants to can forge it; a guest that has to
/// do with such takes a keyed hash.
fn digest(bytes: &[u8; PAGE_BYTES]) -> u64 {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().fold(0xcbf2_9ce4_8422_2325, |digest, word| {
        (digest ^ u64::from_le_bytes(*word)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The frames of a request, if they are some.
pub(crate) fn frames(gpa: Gpa, pages: u64) -> Option<GfnRange> {
    let aligned = gpa.page_offset() == 0;
    GfnRange::new(gpa.gfn(), PageCount::new(pages)?).ok().filter(|_| aligned)
}

#[cfg(test)]
#[path = "accesses_tests.rs"]
mod tests;
