//! What a process meets when it touches memory.
//!
//! A TLB hit asks nobody. A miss walks the page table; what that does not map is a fault: for the
//! driver on a watched VMA, for the kernel elsewhere. The machine keeps no list of faults: a thread
//! that was given one is stopped by whoever steps it, and touches again when it was answered.

use alloc::vec::Vec;

use polder_units::{Level, PageIndex, Pfn};

use crate::access::Access;
use crate::chunk::{chunks, chunks_mut, pages};
use crate::frames::frame_at;
use crate::host_mmu::HostEntry;
use crate::table::Found;
use crate::tlb::Translation;
use crate::{Error, Hva, Machine, ObjectId, ProcessId, Refused, Thread, Vpn};

/// A touch of a page that the driver has to answer: map it, poison it, or let it wait.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostFault {
    /// Who touched.
    pub process: ProcessId,
    /// Where.
    pub vpn: Vpn,
    /// The object mapped there.
    pub object: ObjectId,
    /// The object's page.
    pub page: PageIndex,
    /// Whether it was a write.
    pub write: bool,
    /// The page is in the page cache, only not mapped: a minor fault. Otherwise it is missing.
    pub minor: bool,
}

/// Why a touch is answered with `SIGBUS`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, thiserror::Error)]
pub enum Sigbus {
    /// A poison marker denies the page.
    #[error("it is poisoned")]
    Poisoned,
    /// It lies past the object's end.
    #[error("it lies past the end of the object")]
    Beyond,
    /// The kernel had no memory for it.
    #[error("there is no memory for it")]
    NoMemory,
}

/// Why a process's access was not made. No byte of it was.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum HostExit {
    /// The driver has to answer; then touch again.
    #[error("page {} of the process waits for a fault to be answered", .0.vpn)]
    Fault(HostFault),
    /// The kernel's own fault waits for the lock of the folio there; then touch again.
    #[error("the fault at page {vpn} waits for the lock of its folio, pfn {pfn}")]
    Wait {
        /// Where.
        vpn: Vpn,
        /// A frame of the folio.
        pfn: Pfn,
    },
    /// `SIGBUS`; from a system call, `EFAULT`.
    #[error("the touch of page {vpn} is denied: {why}")]
    Sigbus {
        /// Where.
        vpn: Vpn,
        /// Why.
        why: Sigbus,
    },
    /// `SIGSEGV`: nothing is mapped there, or not for writing.
    #[error("no mapping of the process lets it access page {vpn} so")]
    Segv {
        /// Where.
        vpn: Vpn,
    },
    /// Another's pin is in the way of a pin, or this one's would be in the way of another's.
    #[error("page {vpn} can't be pinned so: {} of {} has it", .by.pin, .by.process)]
    Pinned {
        /// Where.
        vpn: Vpn,
        /// Who has it.
        by: crate::Holder,
    },
    /// The hardware refused.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The driver asked for what does not exist.
    #[error(transparent)]
    Invalid(#[from] Error),
}

impl Machine {
    /// A thread reads memory of its process.
    ///
    /// # Errors
    /// What the thread met instead; the buffer is unchanged.
    pub fn host_read(
        &mut self,
        thread: Thread,
        hva: Hva,
        buffer: &mut [u8],
    ) -> Result<(), HostExit> {
        let frames = self.translate_all(thread, hva, buffer.len(), false)?;
        for (pfn, (_, at, chunk)) in frames.zip(chunks_mut(hva.get(), buffer)) {
            self.frames.read(pfn, at, chunk);
        }
        Ok(())
    }

    /// A thread writes memory of its process.
    ///
    /// # Errors
    /// What the thread met instead; nothing was written.
    pub fn host_write(&mut self, thread: Thread, hva: Hva, bytes: &[u8]) -> Result<(), HostExit> {
        let frames = self.translate_all(thread, hva, bytes.len(), true)?;
        for (pfn, (_, at, chunk)) in frames.zip(chunks(hva.get(), bytes)) {
            self.frames.write(pfn, at, chunk);
        }
        Ok(())
    }

    /// The frames of every page of an access; nothing is allocated for one page.
    fn translate_all(
        &mut self,
        thread: Thread,
        hva: Hva,
        len: usize,
        write: bool,
    ) -> Result<impl Iterator<Item = Pfn> + use<>, HostExit> {
        let mut vpns = pages(hva.get(), len).filter_map(Vpn::new);
        let first = vpns.next().map(|vpn| self.translate_host(thread, vpn, write)).transpose()?;
        let rest = vpns.map(|vpn| self.translate_host(thread, vpn, write));
        let rest: Result<Vec<_>, HostExit> = rest.collect();
        Ok(first.into_iter().chain(rest?))
    }

    fn translate_host(&mut self, thread: Thread, vpn: Vpn, write: bool) -> Result<Pfn, HostExit> {
        if let Some(pfn) = self.tlb_mut(thread)?.hit(vpn.get(), write) {
            return Ok(pfn);
        }
        let mut translation = self.fault_in(thread.process, vpn, write)?;
        let Translation { pfn, level, .. } = translation;
        self.protection.check(&Access::host(pfn, level, write))?;
        // What a read was let into, a write may be refused: it has to come here again.
        let write_too = || self.protection.check(&Access::host(pfn, level, true)).is_ok();
        translation.writable &= write || write_too();
        self.tlb_mut(thread)?.fill(vpn.get(), translation);
        Ok(translation.pfn)
    }

    /// Walks the page table of a process and fills in what the kernel fills in by itself.
    pub(crate) fn fault_in(
        &mut self,
        process: ProcessId,
        vpn: Vpn,
        write: bool,
    ) -> Result<Translation, HostExit> {
        if let Some(translation) = self.walk_host(process, vpn, write)? {
            return Ok(translation);
        }
        let vma = self.processes.get(process)?.vma(vpn)?;
        let (object, range, view) = (vma.object, vma.range, vma.view);
        let page = vma.page_of(vpn).ok_or(HostExit::Segv { vpn })?;
        if page.get() >= self.objects.get(object)?.pages.get() {
            return Err(HostExit::Sigbus { vpn, why: Sigbus::Beyond });
        }
        let backing = self.objects.get(object)?.backing(page);
        if view.watched {
            let minor = backing.is_some();
            return Err(HostExit::Fault(HostFault { process, vpn, object, page, write, minor }));
        }
        if backing.is_none() {
            self.allocate(object, page, Level::Size4K).map_err(|error| match error {
                Error::NoMemory { .. } => HostExit::Sigbus { vpn, why: Sigbus::NoMemory },
                other => other.into(),
            })?;
        }
        let mapped = self.map_page_of_range(process, vpn, range);
        mapped.map_err(|error| match error {
            Error::Locked { pfn } => HostExit::Wait { vpn, pfn },
            other => other.into(),
        })?;
        self.walk_host(process, vpn, write)?.ok_or(HostExit::Segv { vpn })
    }

    fn walk_host(
        &self,
        process: ProcessId,
        vpn: Vpn,
        write: bool,
    ) -> Result<Option<Translation>, HostExit> {
        let process = self.processes.get(process)?;
        let vma = process.vma(vpn).map_err(|_| HostExit::Segv { vpn })?;
        let writable = vma.view.writable;
        if write && !writable {
            return Err(HostExit::Segv { vpn });
        }
        match process.table.get(vpn.get()) {
            None => Ok(None),
            Some(Found { entry: HostEntry::Poison, .. }) => {
                Err(HostExit::Sigbus { vpn, why: Sigbus::Poisoned })
            }
            Some(Found { start, level, entry: HostEntry::Mapped { pfn, .. } }) => {
                let pfn = frame_at(*pfn, vpn.get() - start);
                Ok(Some(Translation { pfn, level, writable }))
            }
        }
    }
}
