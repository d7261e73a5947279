//! The machine as a whole.

use core::fmt;

use polder_units::{Geometry, Level, PageCount, Pfn};

use crate::access::Protection;
use crate::folio::Folios;
use crate::frames::Frames;
use crate::gup::Pin;
use crate::iommu::Domain;
use crate::object::Object;
use crate::plant::Plants;
use crate::pool::Pool;
use crate::process::Process;
use crate::slab::Slab;
use crate::table::space;
use crate::vm::{Sequence, Vm};
use crate::{Contents, DomainId, Error, ObjectId, PinId, Plant, ProcessId, VmId};

/// What a machine is made of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Config {
    /// Physical memory, in frames; at least 1. Memory of the host is taken only for what is used.
    pub frames: PageCount,
    /// How many pages a huge page has.
    pub geometry: Geometry,
    /// What frames contain.
    pub contents: Contents,
    /// The entries of each TLB: a power of two.
    pub tlb_entries: u32,
    /// Entries of stage 2 have accessed and dirty bits (NPT, EPT from Haswell on).
    pub accessed_dirty: bool,
}

impl Config {
    /// A machine of `frames` frames with x86-64's pages, real bytes and TLBs of 1024 entries.
    pub const fn x86_64(frames: PageCount) -> Self {
        let (geometry, contents) = (Geometry::X86_64, Contents::Bytes);
        Self { frames, geometry, contents, tlb_entries: 1024, accessed_dirty: true }
    }

    /// A small machine for a search over states: tokens for contents, TLBs of 8 entries, no
    /// accessed and dirty bits, which would only make more states.
    pub const fn symbolic(frames: PageCount, geometry: Geometry) -> Self {
        let contents = Contents::Symbolic;
        Self { frames, geometry, contents, tlb_entries: 8, accessed_dirty: false }
    }
}

/// A simulated machine: see the crate's documentation for what it models and what not.
///
/// It has no clock, no threads and no randomness: each call is one step, and the same calls give
/// the same machine. A clone is an independent machine in the same state. A hash tells the state,
/// not the way there: `mmu_invalidate_seq` is left out (see
/// [`Resolved::is_current`](crate::Resolved::is_current)), numbers of things gone are given out
/// again, and tables hash by their entries. Machines that hash alike behave alike.
#[derive(Clone, Hash)]
pub struct Machine {
    pub(crate) config: Config,
    pub(crate) frames: Frames,
    pub(crate) folios: Folios,
    pub(crate) objects: Slab<ObjectId, Object>,
    pub(crate) processes: Slab<ProcessId, Process>,
    pub(crate) vms: Slab<VmId, Vm>,
    pub(crate) pins: Slab<PinId, Pin>,
    pub(crate) domains: Slab<DomainId, Domain>,
    /// How many of the pins are exclusive.
    pub(crate) exclusive: u32,
    pub(crate) pool: Pool,
    pub(crate) protection: Protection,
    pub(crate) plants: Plants,
    pub(crate) sequence: Sequence,
    /// The page of zeros that anonymous memory shows where nothing was written.
    pub(crate) zero_page: Option<Pfn>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (config, free_frames) = (&self.config, &self.free_frames());
        let mut text = f.debug_struct("Machine");
        text.field("config", config).field("free_frames", free_frames).finish_non_exhaustive()
    }
}

impl Machine {
    /// A machine with nothing on it.
    ///
    /// # Errors
    /// [`Error::Config`] for no frames or a TLB whose size is no power of two; [`Error::Space`]
    /// for more frames than an address reaches.
    pub fn new(config: Config) -> Result<Self, Error> {
        let end = space(config.geometry);
        if config.frames.is_zero() || !config.tlb_entries.is_power_of_two() {
            return Err(Error::Config);
        }
        if config.frames.get() > end {
            return Err(Error::Space { number: end, end });
        }
        Ok(Self {
            config,
            frames: Frames::new(config.frames, config.geometry, config.contents),
            folios: Folios::new(config.geometry),
            objects: Slab::new(),
            processes: Slab::new(),
            vms: Slab::new(),
            pins: Slab::new(),
            domains: Slab::new(),
            exclusive: 0,
            pool: Pool::default(),
            protection: Protection::default(),
            plants: Plants::default(),
            sequence: Sequence::FIRST,
            zero_page: None,
        })
    }

    /// What the machine is made of.
    pub const fn config(&self) -> Config {
        self.config
    }

    /// The pages of each level.
    pub const fn geometry(&self) -> Geometry {
        self.config.geometry
    }

    /// How many frames are free.
    pub fn free_frames(&self) -> u64 {
        self.frames.free_count()
    }

    /// How many free blocks of exactly `level` there are (those inside larger ones not counted).
    pub fn free_blocks(&self, level: Level) -> usize {
        self.frames.free_blocks(level)
    }

    /// Plants a bug, or takes it out again.
    pub const fn plant(&mut self, plant: Plant, on: bool) {
        self.plants.set(plant, on);
    }

    /// Makes one allocation of frames fail with [`Error::NoMemory`]: the one after `nth` more
    /// have succeeded; `None` calls it off.
    pub const fn fail_allocation(&mut self, nth: Option<u64>) {
        self.plants.fail_allocation(nth);
    }

    /// The number of pages of `level`.
    pub(crate) fn pages(&self, level: Level) -> u64 {
        self.config.geometry.pages(level).get()
    }

    /// Refuses numbers up to `end` that lie outside of an address space.
    pub(crate) fn in_space(&self, end: u64) -> Result<(), Error> {
        let space = space(self.config.geometry);
        if end > space { Err(Error::Space { number: space, end: space }) } else { Ok(()) }
    }

    pub(crate) fn allocate_frames(&mut self, level: Level) -> Result<Pfn, Error> {
        if self.plants.allocation_fails() {
            return Err(Error::NoMemory { level });
        }
        let pfn = self.frames.take(level).ok_or(Error::NoMemory { level })?;
        let pages = self.config.geometry.pages(level);
        // The kernel zeroes what it allocates, by its direct map: an RMP #PF if a page was freed
        // while assigned, an abort if it was while a guest's under pKVM.
        if let Err(error) = self.check_kernel_block(pfn, level) {
            self.frames.free(pfn, level);
            return Err(error);
        }
        self.frames.zero(pfn, pages);
        Ok(pfn)
    }
}
