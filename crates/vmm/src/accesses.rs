//! How a guest on the simulated machine reaches its memory: which side it means, and what it does
//! about pages that it has not accepted yet.
//!
//! A guest of KVM's software-protected type, or of SNP, has its page tables say which pages it
//! means as private. This one looks at what is granted before each access, also when the VMM has
//! changed that unasked: a real guest is told.
//!
//! # Holes
//! A page that is not validated is accepted and cleared at its first use, as Linux does unaccepted
//! memory (`arch/x86/coco/sev/core.c`, `snp_accept_memory()`). A real guest keeps a list of what it
//! has accepted, so that a hypervisor can't have it accept a page twice; this one does not.

use std::sync::{PoisonError, RwLock};

use polder::machine::RmpFail;
use polder::units::{Geometry, Gfn, GfnRange, Gpa, Level, PAGE_BYTES, PageCount};
use polder::{GuestExit, MachineVcpu, Memory, MemoryFault, Visibility, VmId};

/// How often an access is made again because what is granted changed under it.
const CHANGES: u32 = 1000;

/// A vCPU of the simulated machine and what its guest knows of memory.
pub struct Accesses<'a> {
    vcpu: MachineVcpu,
    memory: (&'a Memory, VmId),
    /// Held for writing while a page is accepted: none uses it before it is cleared.
    accepting: &'a RwLock<()>,
}

impl<'a> Accesses<'a> {
    /// Those of a vCPU; the vCPUs of a guest share one lock.
    pub fn new(vcpu: MachineVcpu, memory: (&'a Memory, VmId), accepting: &'a RwLock<()>) -> Self {
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
        self.accepted(|vcpu| vcpu.read(gpa, side, into))
    }

    /// [`Self::write`] as private or as shared, whatever is granted.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_as(&self, gpa: Gpa, side: Visibility, from: &[u8]) -> Result<(), GuestExit> {
        self.accepted(|vcpu| vcpu.write(gpa, side, from))
    }

    /// No longer accepts the private pages among `gfns`, as before asking for them to be shared.
    /// Returns those that were accepted.
    ///
    /// # Errors
    /// [`GuestExit`].
    pub fn rescind(&self, gfns: GfnRange) -> Result<Vec<(Gfn, Level)>, GuestExit> {
        let mut rescinded = Vec::new();
        let (memory, vm) = self.memory;
        if !memory.platform().has_rmp() || memory.pages_of(vm, gfns).is_err() {
            return Ok(rescinded);
        }
        let mut next = gfns.start().get();
        while let Some(rest) = GfnRange::between(next, gfns.end()) {
            let gfn = rest.start();
            let private = self.granted(gfn) == Some(Visibility::Private);
            let (level, result) =
                if private { self.rescind_at(rest)? } else { (Level::Size4K, false) };
            if result {
                rescinded.push((gfn, level));
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

    /// Accepts pages again, as they are: what it asked for was refused, and nothing has changed.
    ///
    /// # Errors
    /// [`GuestExit`].
    pub fn keep(&self, rescinded: &[(Gfn, Level)]) -> Result<(), GuestExit> {
        for &(gfn, level) in rescinded {
            let pages = GfnRange::enclosing(gfn, level, Geometry::X86_64);
            if let Err(RmpFail::SizeMismatch) = self.vcpu.pvalidate(gfn, level, true)? {
                for gfn in pages.frames() {
                    let _ = self.vcpu.pvalidate(gfn, Level::Size4K, true)?;
                }
            }
        }
        Ok(())
    }

    /// What is granted of the page behind a frame.
    fn granted(&self, gfn: Gfn) -> Option<Visibility> {
        let (memory, vm) = self.memory;
        let page = *memory.pages_of(vm, GfnRange::one(gfn)).ok()?.first()?;
        Some(memory.facts(page).ok()?.first()?.1.visibility)
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
        mut access: impl FnMut(&MachineVcpu) -> Result<(), GuestExit>,
    ) -> Result<(), GuestExit> {
        loop {
            let made = {
                let _none_is_cleared =
                    self.accepting.read().unwrap_or_else(PoisonError::into_inner);
                access(&self.vcpu)
            };
            match made {
                Err(GuestExit::NotValidated(gfn)) => self.accept(gfn)?,
                other => return other,
            }
        }
    }

    /// Accepts and clears the page around a frame: of 2M if that is one, as `pvalidate_pages()`
    /// (arch/x86/coco/sev/core.c) tries first.
    fn accept(&self, gfn: Gfn) -> Result<(), GuestExit> {
        let _alone = self.accepting.write().unwrap_or_else(PoisonError::into_inner);
        let large = GfnRange::enclosing(gfn, Level::Size2M, Geometry::X86_64);
        match self.vcpu.pvalidate(large.start(), Level::Size2M, true) {
            Ok(Ok(changed)) => return if changed { self.clear(large) } else { Ok(()) },
            // Of 4K pages; or not all of it is this guest's private memory.
            Ok(Err(_)) | Err(GuestExit::MemoryFault(_)) => {}
            Err(other) => return Err(other),
        }
        match self.vcpu.pvalidate(gfn, Level::Size4K, true)? {
            Ok(true) => self.clear(GfnRange::one(gfn)),
            // Another vCPU was faster, or the page is another one by now: the access shows.
            Ok(false) | Err(_) => Ok(()),
        }
    }

    fn clear(&self, gfns: GfnRange) -> Result<(), GuestExit> {
        let side = Visibility::Private;
        gfns.frames().try_for_each(|gfn| match self.vcpu.write(gfn.gpa(), side, &[0; PAGE_BYTES]) {
            // It has been taken away again: nothing is left to clear.
            Err(GuestExit::MemoryFault(_) | GuestExit::NotValidated(_)) => Ok(()),
            other => other,
        })
    }
}

/// The frames of a request, if they are some.
pub(crate) fn frames(gpa: Gpa, pages: u64) -> Option<GfnRange> {
    let aligned = gpa.page_offset() == 0;
    GfnRange::new(gpa.gfn(), PageCount::new(pages)?).ok().filter(|_| aligned)
}
