//! The traits of the `vm-memory` crate, for what is written for them: `virtio-queue`,
//! `linux-loader`, vhost.
//!
//! [`GuestMemory`] is what a VM's slots showed when it was made. Of it, slices can be had of pages
//! that are shared, and a slice **pins** its pages as long as it, or one made from it, exists: they
//! stay shared, and a conversion or discard under it is refused, naming the holder that the guest
//! memory was made for. The pin rides in the slice as what `vm-memory` calls its bitmap.
//!
//! # Rules
//! - A slice points into the *host view*. Whoever keeps a raw pointer longer than its slice meets
//!   there, once the page is private, what any stray pointer does: SIGBUS, not the guest's secret.
//!   (Of hugetlb pages into the *trusted view*, for the host view shows such a page only while all
//!   of it is shared: there a pointer without its slice reads what is there.)
//! - The first touch of a page after it became shared is a fault that a fault thread answers.
//! - A slice stays with its thread, as those of `vm-memory` do.
//! - The guest memory keeps the [`Memory`] alive: no slice outlives the threads that answer for it.
//! - A `vm-memory` reader or writer lets go of each slice once its last byte has been taken.
//!
//! What a device does with it, in full, is in `docs/devices.md`. Two things have the name
//! `GuestMemory`: for the trait's methods, `use polder::vm_memory::GuestMemory as _`.
//!
//! # Holes
//! - Slices are not named among [`Memory::dead_pins`]; they are given back all the same.
//! - A part of a slice pins all that the whole one did.
//! - What is written by a raw pointer into a slice is in no dirty log, as everywhere in
//!   `vm-memory`: call `mark_dirty` of the slice's bitmap, or [`Memory::mark_dirty`].
//! - A slice that a thread keeps in a thread-local variable for its very end is taken for another
//!   thread's. Don't.

use std::fmt;
use std::io;
use std::iter::FusedIterator;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use polder_engine::{AskEngine, Errno, Holder, Local, Pinner};
use polder_linux::View;
use polder_units::{GfnRange, PAGE_SIZE, PageIndex, PageRange, RangeError};
use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Address, AtomicAccess, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryRegion, GuestRegionCollection, GuestUsize, MemoryRegionAddress, Permissions,
    ReadVolatile, VolatileSlice, WriteVolatile,
};

use crate::dirty::Marks;
use crate::{Binding, Error, Memory, OnBusy, Refusal, VmId};

type Result<T> = std::result::Result<T, GuestMemoryError>;

/// A VM's slots, to be read and written by guest-physical address.
///
/// It is a `vm_memory::GuestMemory`; for what asks for a `vm_memory::GuestMemoryBackend`, there are
/// its [regions](GuestMemory::regions). Clones are of the same slots and the same holder.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    regions: GuestRegionCollection<GuestRegion>,
    /// The largest of them, which is looked at first.
    largest: Arc<GuestRegion>,
}

/// The slices that some bytes of guest memory are in.
#[derive(Debug)]
pub struct Slices<'a> {
    memory: &'a GuestMemory,
    at: GuestAddress,
    left: usize,
}

type Slice<'a> = VolatileSlice<'a, SlicePin<'a>>;

/// One slot of a VM: its guest frames, and the object's pages behind them.
pub struct GuestRegion {
    start: GuestAddress,
    length: u64,
    /// Where it starts in the object, in bytes.
    offset: u64,
    /// Where slices point; none where the object is no memory of this process.
    view: Option<Arc<View>>,
    pinner: Pinner,
    on_busy: OnBusy,
    memory: Arc<Memory>,
}

impl Memory {
    /// What a VM's slots show now, for code that is written for `vm-memory`. Slices pin under the
    /// name `holder`. Where an operation is in the way of one, `on_busy` says whether to wait for
    /// it. A slot that is bound later is not in it; one that is unbound still is.
    ///
    /// ```no_run
    /// # use std::sync::Arc;
    /// # use polder::vm_memory::{Bytes, GuestAddress};
    /// # use polder::{Holder, Memory, OnBusy, VmId};
    /// # fn queue(memory: &Arc<Memory>, vm: VmId) -> Result<(), Box<dyn std::error::Error>> {
    /// let guest = memory.guest_memory(vm, Holder::new("virtio-blk"), OnBusy::Wait)?;
    /// let descriptor: u64 = guest.read_obj(GuestAddress(0x1000))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Refusal::NoSlots`] of a VM without slots; [`Error::NotOffered`] on the simulated machine,
    /// whose memory nothing can point to.
    pub fn guest_memory(
        self: &Arc<Self>,
        vm: VmId,
        holder: Holder,
        on_busy: OnBusy,
    ) -> std::result::Result<GuestMemory, Error> {
        if self.driver.host.views().host_view().is_none() {
            return Err(Error::NotOffered {
                what: "the simulated machine's memory is not of this process: nothing can point \
                    to it",
                way_out: "copy by Memory::read and Memory::write, or use another host",
            });
        }
        let of_vm = |(of, _, binding): (VmId, _, Binding)| (of == vm).then_some(binding);
        let mut bindings: Vec<Binding> = self.bindings().into_iter().filter_map(of_vm).collect();
        bindings.sort_by_key(|binding| binding.gfns().start());
        let barrier = polder_linux::can_barrier();
        let pinner = self.driver.engine().pinner_here(holder, barrier);
        let region = |binding| Arc::new(self.region(binding, &pinner, on_busy));
        let regions: Vec<Arc<GuestRegion>> = bindings.iter().map(region).collect();
        let none = Refusal::NoSlots { vm };
        let largest = regions.iter().max_by_key(|region| region.length).cloned();
        let largest = largest.ok_or_else(|| none.clone())?;
        let regions = GuestRegionCollection::from_arc_regions(regions).map_err(|_| none)?;
        Ok(GuestMemory { regions, largest })
    }

    fn region(
        self: &Arc<Self>,
        binding: &Binding,
        pinner: &Pinner,
        on_busy: OnBusy,
    ) -> GuestRegion {
        GuestRegion {
            start: GuestAddress(binding.gfns().start().gpa().get()),
            length: binding.pages().count().bytes().unwrap_or(u64::MAX),
            offset: binding.pages().start().offset(),
            view: self.driver.host.views().pinned_view().cloned(),
            pinner: pinner.clone(),
            on_busy,
            memory: Arc::clone(self),
        }
    }
}

/// Why Polder refused what came back as an error of `vm-memory`'s, if it was Polder who did: `None`
/// for an address outside the slots. `virtio-queue` has such errors inside its own
/// (`Error::GuestMemory`, `Error::GuestMemoryError`).
///
/// ```
/// # use polder::{Error, Refusal, guest_memory::{self, GuestMemory}};
/// # use polder::vm_memory::{Bytes, GuestAddress};
/// # fn index(guest: &GuestMemory) -> Result<u16, String> {
/// let read = guest.read_obj(GuestAddress(0x1002));
/// read.map_err(|error| match guest_memory::refusal(&error) {
///     Some(Error::Refused(Refusal::Private { page })) => format!("the ring's page {page} is private"),
///     _ => error.to_string(),
/// })
/// # }
/// ```
pub fn refusal(error: &GuestMemoryError) -> Option<&Error> {
    match error {
        GuestMemoryError::IOError(error) => error.get_ref()?.downcast_ref(),
        _ => None,
    }
}

impl GuestMemory {
    /// Each slot.
    pub fn regions(&self) -> &GuestRegionCollection<GuestRegion> {
        &self.regions
    }

    #[inline(always)]
    fn find(&self, at: GuestAddress) -> Result<(&GuestRegion, MemoryRegionAddress)> {
        let largest = &*self.largest;
        match at.0.wrapping_sub(largest.start.0) {
            offset if offset < largest.length => Ok((largest, MemoryRegionAddress(offset))),
            _ => self.find_among_all(at),
        }
    }

    #[cold]
    fn find_among_all(&self, at: GuestAddress) -> Result<(&GuestRegion, MemoryRegionAddress)> {
        self.regions.to_region_addr(at).ok_or(GuestMemoryError::InvalidGuestAddress(at))
    }

    /// Says whether a device may have `count` bytes at `at` now, all of them, or why not: to refuse
    /// a driver whose ring it can't reach, with the reason.
    ///
    /// # Errors
    /// [`Refusal::Private`] and the other refusals, naming the first page in the way;
    /// [`Refusal::Unbound`] where a byte lies outside every slot, [`Refusal::Range`] where there is
    /// no such address. With [`OnBusy::Wait`] it waits for operations.
    pub fn check(&self, at: GuestAddress, count: usize) -> std::result::Result<(), Error> {
        let mut slices = Slices { memory: self, at, left: count };
        while let Some(slice) = slices.next() {
            let Err(why) = slice else { continue };
            return Err(match refusal(&why) {
                Some(refused) => refused.clone(),
                None => self.outside(slices.at, at, count).into(),
            });
        }
        Ok(())
    }

    /// The frames from `first` to the end of `count` bytes at `at` are not all in slots.
    fn outside(&self, first: GuestAddress, at: GuestAddress, count: usize) -> Refusal {
        let end = at.checked_add(count as u64 - 1);
        let frames =
            |end: GuestAddress| GfnRange::between(first.0 / PAGE_SIZE, end.0 / PAGE_SIZE + 1);
        match end.and_then(frames) {
            Some(gfns) => Refusal::Unbound { gfns },
            None => Refusal::Range(RangeError::Overflow { start: at.0 }),
        }
    }

    /// A slice of bytes that lie in one slot.
    ///
    /// # Errors
    /// `InvalidGuestAddress` outside every slot, `InvalidBackendAddress` past the end of one; and
    /// what [`refusal`] tells.
    #[inline]
    pub fn get_slice(&self, at: GuestAddress, count: usize) -> Result<Slice<'_>> {
        let (region, at) = self.find(at)?;
        region.get_slice(at, count)
    }
}

impl vm_memory::GuestMemory for GuestMemory {
    type PhysicalMemory = GuestRegionCollection<GuestRegion>;
    type Bitmap = Pinning;

    /// Whether all the bytes are in slots, and shared now.
    fn check_range(&self, at: GuestAddress, count: usize, access: Permissions) -> bool {
        self.get_slices(at, count, access).is_ok_and(|mut slices| slices.all(|it| it.is_ok()))
    }

    #[inline(always)]
    fn get_slices<'a>(
        &'a self,
        at: GuestAddress,
        count: usize,
        _: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Pinning>>> {
        Ok(Slices { memory: self, at, left: count })
    }

    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        Some(&self.regions)
    }
}

impl<'a> Slices<'a> {
    #[inline(always)]
    fn take(&mut self) -> Result<Slice<'a>> {
        let (region, at) = self.memory.find(self.at)?;
        let rest = usize::try_from(region.length - at.0).unwrap_or(usize::MAX);
        let slice = region.slice(at, self.left.min(rest))?;
        self.left -= slice.len();
        if self.left > 0 {
            let next = self.at.checked_add(slice.len() as u64);
            self.at = next.ok_or(GuestMemoryError::GuestAddressOverflow)?;
        }
        Ok(slice)
    }
}

impl<'a> Iterator for Slices<'a> {
    type Item = Result<Slice<'a>>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let slice = self.take();
        if slice.is_err() {
            self.left = 0;
        }
        Some(slice)
    }
}

impl FusedIterator for Slices<'_> {}

impl<'a> GuestMemorySliceIterator<'a, SlicePin<'a>> for Slices<'a> {
    #[inline(always)]
    fn stop_on_error(mut self) -> Result<impl Iterator<Item = Slice<'a>>> {
        let first = self.next().transpose()?;
        Ok(Good { first, rest: self })
    }
}

/// Slices up to the first that can't be had. (Not a chain of iterators: those move each slice a
/// few times more, which costs what a pin does.)
struct Good<'a> {
    first: Option<Slice<'a>>,
    rest: Slices<'a>,
}

impl<'a> Iterator for Good<'a> {
    type Item = Slice<'a>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        match self.first.take() {
            Some(first) => Some(first),
            None if self.rest.left == 0 => None,
            None => self.rest.next()?.ok(),
        }
    }
}

impl GuestRegion {
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
    fn slice(&self, at: MemoryRegionAddress, count: usize) -> Result<Slice<'_>> {
        let (view, offset) = (self.view()?, self.offset + at.0);
        let pin = self.pin(offset, count)?;
        let pin = SlicePin { pin, offset, dirty: &self.memory.driver.dirty };
        Ok(view.slice(offset, count, pin))
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
        SlicePin { pin: None, offset: self.offset, dirty: &self.memory.driver.dirty }
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

/// What a [`GuestRegion`] has in place of a bitmap: slices of it pin.
#[derive(Clone, Copy, Debug)]
pub enum Pinning {}

impl<'a> WithBitmapSlice<'a> for Pinning {
    type S = SlicePin<'a>;
}

impl Bitmap for Pinning {
    fn mark_dirty(&self, _: usize, _: usize) {
        match *self {}
    }

    fn dirty_at(&self, _: usize) -> bool {
        match *self {}
    }

    fn slice_at(&self, _: usize) -> SlicePin<'_> {
        match *self {}
    }
}

/// The pin of a slice, none of an empty one, and where its writes are logged. A clone is another
/// pin of the same pages.
#[derive(Clone)]
pub struct SlicePin<'a> {
    #[expect(dead_code, reason = "held for what its end does")]
    pin: Option<Local<'a>>,
    /// Where the slice begins in the object, in bytes.
    offset: u64,
    dirty: &'a Marks,
}

impl fmt::Debug for SlicePin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlicePin").field("offset", &self.offset).finish_non_exhaustive()
    }
}

impl<'a> WithBitmapSlice<'_> for SlicePin<'a> {
    type S = SlicePin<'a>;
}

impl BitmapSlice for SlicePin<'_> {}

impl Bitmap for SlicePin<'_> {
    #[inline(always)]
    fn mark_dirty(&self, at: usize, count: usize) {
        self.dirty.wrote(self.offset.wrapping_add(at as u64), count);
    }

    /// Whether a write is in the log that was not taken: of a write that did not come this way it
    /// is not known.
    fn dirty_at(&self, at: usize) -> bool {
        self.dirty.has(self.offset.wrapping_add(at as u64))
    }

    #[inline(always)]
    fn slice_at(&self, at: usize) -> Self {
        Self { offset: self.offset.wrapping_add(at as u64), ..self.clone() }
    }
}
