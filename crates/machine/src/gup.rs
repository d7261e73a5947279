//! `get_user_pages`: pins on the memory of a process, by the slow path and by GUP-fast.
//!
//! GUP-fast (`gup_fast_pte_range()`, mm/gup.c) takes no lock, so it can take its reference of a
//! folio that has just gone from the page table, or been freed and used again. It looks a second
//! time and lets go if the entry changed; in between, a holder of the folio lock sees a reference
//! that nobody will answer for. Each of its three steps is one [`GupFast::step`].
//!
//! # Exclusive pins
//! No kernel has them; they are what was proposed for pKVM and Gunyah (`FOLL_EXCLUSIVE`, thread 3),
//! as Polder would have them. Kept by frame, not in the reference count: a frame that is pinned
//! exclusively has that pin and no other, by whichever process's mapping and by GUP-fast as well,
//! which looks after it has taken its reference. Plain references (page cache, mappings) do not
//! conflict. Who never asks for one has a kernel without them.

use alloc::vec::Vec;

use polder_units::{Level, PAGE_SHIFT, PageRange, Pfn, PfnRange};

use crate::access::Access;
use crate::chunk::{self, chunks, chunks_mut};
use crate::table::index;
use crate::{Error, HostExit, HostPte, Machine, ObjectId, PinId, Plant, ProcessId, Vpn, VpnRange};

/// How long a pin is meant to last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PinKind {
    /// For one transfer: direct I/O.
    Short,
    /// Until further notice (`FOLL_LONGTERM`): registered buffers, VFIO.
    LongTerm,
    /// Until further notice, and nobody else may pin it (`FOLL_EXCLUSIVE`, as proposed).
    Exclusive,
}

#[derive(Clone, Hash)]
pub(crate) struct Pin {
    pub(crate) process: ProcessId,
    pub(crate) kind: PinKind,
    /// GUP-fast has not yet looked a second time.
    pub(crate) speculative: bool,
    /// The folios' counts were raised (they are, but for [`Plant::LostPin`]).
    pub(crate) counted: bool,
    pub(crate) pages: Vec<Pfn>,
}

/// Who pins a frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Holder {
    /// The frame that is pinned.
    pub pfn: Pfn,
    /// The pin.
    pub pin: PinId,
    /// The process whose memory was pinned.
    pub process: ProcessId,
    /// How long it is meant to last.
    pub kind: PinKind,
    /// It is GUP-fast's reference before the second look: soon gone, or soon a pin.
    pub speculative: bool,
}

/// GUP-fast of one page, between two of its steps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GupFast {
    process: ProcessId,
    vpn: Vpn,
    write: bool,
    kind: PinKind,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Stage {
    ReadEntry,
    Grab { entry: HostPte, pfn: Pfn },
    Recheck { entry: HostPte, pin: PinId },
}

/// What a step of GUP-fast came to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GupStep {
    /// There is another step to do.
    Again(GupFast),
    /// The page is pinned.
    Pinned(PinId),
    /// Nothing is held: the slow path has to do it, or the page is not there.
    Fallback,
}

impl GupFast {
    /// GUP-fast on page `vpn` of a process, for writing or reading, before its first step.
    pub const fn new(process: ProcessId, vpn: Vpn, write: bool, kind: PinKind) -> Self {
        Self { process, vpn, write, kind, stage: Stage::ReadEntry }
    }

    /// Does the first step, which changes nothing: reads the entry.
    pub fn read(self, machine: &Machine) -> GupStep {
        match self.entry(machine) {
            entry @ HostPte::Mapped { pfn, .. } => {
                GupStep::Again(Self { stage: Stage::Grab { entry, pfn }, ..self })
            }
            HostPte::None | HostPte::Poison => GupStep::Fallback,
        }
    }

    /// Does the next step: read the entry; take a reference; look again.
    ///
    /// # Errors
    /// [`Error::Gone`] if the pin that it holds was released by somebody else.
    pub fn step(self, machine: &mut Machine) -> Result<GupStep, Error> {
        let again = |stage| Ok(GupStep::Again(Self { stage, ..self }));
        match self.stage {
            Stage::ReadEntry => Ok(self.read(machine)),
            Stage::Grab { entry, pfn } => {
                // folio_try_get() fails on a count of 0; a frame in use again is another's folio.
                if machine.counts(pfn).is_err() || self.is_kept_out(machine, pfn) {
                    return Ok(GupStep::Fallback);
                }
                let pages = alloc::vec![pfn];
                let pin = machine.add_pin(self.process, self.kind, pages, true)?;
                again(Stage::Recheck { entry, pin })
            }
            Stage::Recheck { entry, pin } => {
                if self.entry(machine) == entry || machine.plants.has(Plant::StaleGup) {
                    machine.pins.get_mut(pin)?.speculative = false;
                    return Ok(GupStep::Pinned(pin));
                }
                machine.unpin(pin)?;
                Ok(GupStep::Fallback)
            }
        }
    }

    /// Whether a pin of this kind is not to be had.
    fn is_kept_out(&self, machine: &Machine, pfn: Pfn) -> bool {
        let ignores = machine.plants.has(Plant::GupFastIgnoresExclusive);
        !ignores && machine.pin_conflict(self.kind, pfn).is_some()
    }

    /// The entry, as an access of this kind may use it.
    fn entry(&self, machine: &Machine) -> HostPte {
        let process = machine.processes.get(self.process);
        let allowed = process
            .and_then(|process| process.vma(self.vpn))
            .is_ok_and(|vma| vma.view.writable || !self.write);
        let entry = allowed.then(|| machine.host_pte(self.process, self.vpn));
        entry.and_then(Result::ok).unwrap_or(HostPte::None)
    }
}

impl Machine {
    /// Pins pages of a process (`pin_user_pages()`, the slow path), faulting them in.
    ///
    /// The whole range is one step: who wants zaps to fall between its pages pins each by itself.
    ///
    /// # Errors
    /// What a touch of the first page that cannot be had meets; [`HostExit::Pinned`] where an
    /// exclusive pin is in the way, or a pin in the way of an exclusive one: of those a
    /// [speculative](Holder::speculative) one is soon gone. Nothing is pinned then.
    pub fn pin_user_pages(
        &mut self,
        process: ProcessId,
        range: VpnRange,
        write: bool,
        kind: PinKind,
    ) -> Result<PinId, HostExit> {
        let pages: Result<Vec<_>, HostExit> =
            range.frames().map(|vpn| Ok(self.fault_in(process, vpn, write)?.pfn)).collect();
        let pages = pages?;
        for (vpn, pfn) in range.frames().zip(&pages) {
            if let Some(by) = self.pin_conflict(kind, *pfn) {
                return Err(HostExit::Pinned { vpn, by });
            }
        }
        Ok(self.add_pin(process, kind, pages, false)?)
    }

    /// Pins pages of an object for a process, by no mapping of its (`memfd_pin_folios()`,
    /// mm/gup.c). Holes are allocated.
    ///
    /// # Errors
    /// [`Error::Beyond`] the object's end; [`Error::NoMemory`]; [`Error::Pinned`] as
    /// [`Machine::pin_user_pages`]. Nothing is pinned then.
    pub fn pin_object_pages(
        &mut self,
        process: ProcessId,
        object: ObjectId,
        range: PageRange,
        kind: PinKind,
    ) -> Result<PinId, Error> {
        self.object_range(object, range)?;
        let mut pages = Vec::new();
        for page in range.frames() {
            let pfn = match self.backing(object, page)? {
                Some(backing) => backing.pfn,
                None => self.allocate(object, page, Level::Size4K)?,
            };
            if let Some(by) = self.pin_conflict(kind, pfn) {
                return Err(Error::Pinned { by });
            }
            pages.push(pfn);
        }
        self.add_pin(process, kind, pages, false)
    }

    /// Releases a pin (`unpin_user_pages()`); a folio that only it held is freed.
    ///
    /// # Errors
    /// [`Error::Gone`] if there is no such pin: released before, or never taken.
    pub fn unpin(&mut self, pin: PinId) -> Result<(), Error> {
        let pin = self.pins.remove(pin)?;
        self.exclusive -= u32::from(pin.kind == PinKind::Exclusive);
        if pin.counted {
            pin.pages.into_iter().for_each(|pfn| self.unpin_folio(pfn));
        }
        Ok(())
    }

    /// Who keeps a pin of this kind from a frame.
    fn pin_conflict(&self, kind: PinKind, pfn: Pfn) -> Option<Holder> {
        if self.exclusive == 0 && kind != PinKind::Exclusive {
            return None;
        }
        let conflicts = |other: &Holder| {
            kind == PinKind::Exclusive || (other.kind == PinKind::Exclusive && !other.speculative)
        };
        self.holders_of(PfnRange::one(pfn)).find(conflicts)
    }

    /// The frames of a pin, in the order of the range that was pinned.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn pinned_frames(&self, pin: PinId) -> Result<&[Pfn], Error> {
        Ok(&self.pins.get(pin)?.pages)
    }

    /// Who pins which of `frames`, as the machine knows and no kernel can tell: by pin, and in
    /// the order of what each has pinned.
    ///
    /// Its cost grows with all that is pinned: it explains a refusal, it does not decide one.
    pub fn holders_of(&self, frames: PfnRange) -> impl Iterator<Item = Holder> {
        self.pins.iter().flat_map(move |(id, pin)| {
            let pages = pin.pages.iter().filter(move |pfn| frames.contains(**pfn));
            pages.map(move |pfn| Holder {
                pfn: *pfn,
                pin: id,
                process: pin.process,
                kind: pin.kind,
                speculative: pin.speculative,
            })
        })
    }

    /// A device reads from pinned memory, `offset` bytes from the pin's start. No page table and
    /// no TLB is asked: the frames are what was pinned.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::OutOfBounds`]; [`Error::Refused`] by the hardware.
    pub fn dma_read(&self, pin: PinId, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let pages = self.dma_pages(pin, offset, buffer.len(), false)?;
        for (page, at, chunk) in chunks_mut(offset, buffer) {
            if let Some(pfn) = pages.get(index(page)) {
                self.frames.read(*pfn, at, chunk);
            }
        }
        Ok(())
    }

    /// A device writes to pinned memory; as [`Machine::dma_read`].
    ///
    /// # Errors
    /// As [`Machine::dma_read`]; nothing is written then.
    pub fn dma_write(&mut self, pin: PinId, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.dma_pages(pin, offset, bytes.len(), true)?;
        let pages = &self.pins.get(pin)?.pages;
        for (page, at, chunk) in chunks(offset, bytes) {
            if let Some(pfn) = pages.get(index(page)) {
                self.frames.write(*pfn, at, chunk);
            }
        }
        Ok(())
    }

    /// The pages of a pin, if the device may access these bytes of it.
    fn dma_pages(&self, pin: PinId, offset: u64, len: usize, write: bool) -> Result<&[Pfn], Error> {
        let pages = self.pins.get(pin)?.pages.as_slice();
        let (len, size) = (len as u64, (pages.len() as u64) << PAGE_SHIFT);
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::OutOfBounds { offset, len });
        }
        for page in chunk::pages(offset, index(len)) {
            if let Some(pfn) = pages.get(index(page)) {
                self.protection.check(&Access::device(*pfn, write))?;
            }
        }
        Ok(pages)
    }

    fn add_pin(
        &mut self,
        process: ProcessId,
        kind: PinKind,
        pages: Vec<Pfn>,
        speculative: bool,
    ) -> Result<PinId, Error> {
        let counted = !self.plants.has(Plant::LostPin);
        if counted {
            pages.iter().for_each(|pfn| self.folios.pin(*pfn));
        }
        let pin = self.pins.insert(Pin { process, kind, speculative, counted, pages })?;
        self.exclusive += u32::from(kind == PinKind::Exclusive);
        Ok(pin)
    }
}
