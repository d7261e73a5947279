//! One slot of a VM, as a region of `vm-memory`.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use polder_engine::{AskEngine, Errno, Local, Pinner};
use polder_linux::View;
use polder_units::{PAGE_SIZE, PageIndex, PageRange};
use vm_memory::bitmap::BS;
use vm_memory::{
    AtomicAccess, Bytes, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestUsize,
    MemoryRegionAddress, ReadVolatile, VolatileSlice, WriteVolatile,
};

use super::slice_pin::{Pinning, SlicePin};
use super::{Result, Slice};
use crate::dirty::Marks;
use crate::{Binding, Error, Memory, OnBusy};

/// One slot of a VM: its guest frames, and the object's pages behind them.
pub struct GuestRegion {
    pub(super) start: GuestAddress,
    pub(super) length: u64,
    /// Where it starts in the object, in bytes.
    offset: u64,
    /// Where slices point; none where the object is no memory of this process.
    view: Option<Arc<View>>,
    pinner: Pinner,
    on_busy: OnBusy,
    /// Where writes are logged: the memory's own.
    pub(super) dirty: Arc<Marks>,
    memory: Arc<Memory>,
}

impl GuestRegion {
    pub(super) fn new(
        memory: &Arc<Memory>,
        binding: &Binding,
        pinner: &Pinner,
        on_busy: OnBusy,
    ) -> Self {
        Self {
            start: GuestAddress(binding.gfns().start().gpa().get()),
            length: binding.pages().count().bytes().unwrap_or(u64::MAX),
            offset: binding.pages().start().offset(),
            view: memory.driver.host.views().pinned_view().cloned(),
            pinner: pinner.clone(),
            on_busy,
            dirty: Arc::clone(&memory.driver.dirty),
            memory: Arc::clone(memory),
        }
    }

    /// Whether it has `count` bytes at `at`.
    #[inline(always)]
    fn has(&self, at: MemoryRegionAddress, count: usize) -> Result<()> {
        match at.0.checked_add(count as u64) {
            Some(end) if end <= self.length => Ok(()),
            _ => Err(GuestMemoryError::InvalidBackendAddress),
        }
    }

    #[inline(always)]
    fn view(&self) -> Result<&View> {
        self.view.as_deref().ok_or(GuestMemoryError::InvalidBackendAddress)
    }

    /// A slice of `count` bytes at `at`, which it has.
    #[inline(always)]
    pub(super) fn slice(&self, at: MemoryRegionAddress, count: usize) -> Result<Slice<'_>> {
        let (view, offset) = (self.view()?, self.offset + at.0);
        let pin = self.pin(offset, count)?;
        Ok(view.slice(offset, count, SlicePin { pin, region: self, offset }))
    }

    /// Pins the pages of `count` bytes at `offset` of the object, which are in it.
    #[inline(always)]
    fn pin(&self, offset: u64, count: usize) -> Result<Option<Local<'_>>> {
        let Some(last) = (count as u64).checked_sub(1) else { return Ok(None) };
        let [first, last] = [offset / PAGE_SIZE, (offset + last) / PAGE_SIZE];
        let pages = match PageIndex::new(first) {
            Some(page) if first == last => PageRange::one(page),
            _ => PageRange::between(first, last + 1).expect("pages of the object"),
        };
        match self.pinner.pin_here(crate::sync::thread_place(), pages) {
            Ok(pin) => Ok(Some(pin)),
            Err(AskEngine) => self.ask(pages),
        }
    }

    /// Pins in the way that works always; refuses with the reason.
    #[cold]
    fn ask(&self, pages: PageRange) -> Result<Option<Local<'_>>> {
        let thread = crate::sync::thread_place();
        let pinned = self
            .memory
            .driver
            .claim(self.on_busy, |engine| engine.pin_here_as(&self.pinner, thread, pages));
        match pinned {
            Ok(pin) => Ok(Some(pin)),
            Err(error) => Err(GuestMemoryError::IOError(io::Error::new(kind(&error), error))),
        }
    }

    /// At most `count` bytes at `at`.
    fn at_most(&self, at: MemoryRegionAddress, count: usize) -> Result<Slice<'_>> {
        let left = self.length.checked_sub(at.0).filter(|&left| left > 0);
        let left = left.ok_or(GuestMemoryError::InvalidBackendAddress)?;
        self.get_slice(at, usize::try_from(left).map_or(count, |left| left.min(count)))
    }
}

fn kind(error: &Error) -> io::ErrorKind {
    match error.errno() {
        Errno::EACCES => io::ErrorKind::PermissionDenied,
        Errno::EAGAIN => io::ErrorKind::ResourceBusy,
        Errno::EINVAL => io::ErrorKind::InvalidInput,
        _ => io::ErrorKind::Other,
    }
}

impl GuestMemoryRegion for GuestRegion {
    type B = Pinning;

    fn len(&self) -> GuestUsize {
        self.length
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    /// Pins nothing; what is marked in it is in the dirty log.
    fn bitmap(&self) -> BS<'_, Self::B> {
        SlicePin { pin: None, region: self, offset: self.offset }
    }

    /// Where the byte is in the host view. Nothing is pinned by it: a touch is denied whenever the
    /// page is private.
    fn get_host_address(&self, at: MemoryRegionAddress) -> Result<*mut u8> {
        self.has(at, 1)?;
        Ok(self.view()?.slice(self.offset + at.0, 1, ()).ptr_guard_mut().as_ptr())
    }

    #[inline(always)]
    fn get_slice(
        &self,
        at: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, Self::B>>> {
        self.has(at, count)?;
        self.slice(at, count)
    }
}

/// Copies by a slice of the bytes meant: one of the whole region would pin pages that nobody asks
/// for, and be refused for one that is private.
impl Bytes<MemoryRegionAddress> for GuestRegion {
    type E = GuestMemoryError;

    fn write(&self, from: &[u8], at: MemoryRegionAddress) -> Result<usize> {
        Ok(self.at_most(at, from.len())?.write(from, 0)?)
    }

    fn read(&self, into: &mut [u8], at: MemoryRegionAddress) -> Result<usize> {
        Ok(self.at_most(at, into.len())?.read(into, 0)?)
    }

    fn write_slice(&self, from: &[u8], at: MemoryRegionAddress) -> Result<()> {
        Ok(self.get_slice(at, from.len())?.write_slice(from, 0)?)
    }

    fn read_slice(&self, into: &mut [u8], at: MemoryRegionAddress) -> Result<()> {
        Ok(self.get_slice(at, into.len())?.read_slice(into, 0)?)
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        at: MemoryRegionAddress,
        from: &mut F,
        count: usize,
    ) -> Result<usize> {
        Ok(self.at_most(at, count)?.read_volatile_from(0, from, count)?)
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        at: MemoryRegionAddress,
        from: &mut F,
        count: usize,
    ) -> Result<()> {
        Ok(self.get_slice(at, count)?.read_exact_volatile_from(0, from, count)?)
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        to: &mut F,
        count: usize,
    ) -> Result<usize> {
        Ok(self.at_most(at, count)?.write_volatile_to(0, to, count)?)
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        to: &mut F,
        count: usize,
    ) -> Result<()> {
        Ok(self.get_slice(at, count)?.write_all_volatile_to(0, to, count)?)
    }

    fn store<T: AtomicAccess>(&self, value: T, at: MemoryRegionAddress, o: Ordering) -> Result<()> {
        Ok(self.get_slice(at, size_of::<T>())?.store(value, 0, o)?)
    }

    fn load<T: AtomicAccess>(&self, at: MemoryRegionAddress, order: Ordering) -> Result<T> {
        Ok(self.get_slice(at, size_of::<T>())?.load(0, order)?)
    }
}

impl fmt::Debug for GuestRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRegion")
            .field("start", &self.start)
            .field("length", &self.length)
            .field("holder", self.pinner.holder())
            .finish_non_exhaustive()
    }
}
