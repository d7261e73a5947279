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

mod region;
mod slice_pin;

use std::iter::FusedIterator;
use std::sync::Arc;

use polder_engine::Holder;
use polder_units::{GfnRange, PAGE_SIZE, RangeError};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestRegionCollection, MemoryRegionAddress, Permissions, VolatileSlice,
};

pub use self::region::GuestRegion;
pub use self::slice_pin::{Pinning, SlicePin};
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
        let region = |binding| Arc::new(GuestRegion::new(self, binding, &pinner, on_busy));
        let regions: Vec<Arc<GuestRegion>> = bindings.iter().map(region).collect();
        let none = Refusal::NoSlots { vm };
        let largest = regions.iter().max_by_key(|region| region.length).cloned();
        let largest = largest.ok_or_else(|| none.clone())?;
        let regions = GuestRegionCollection::from_arc_regions(regions).map_err(|_| none)?;
        Ok(GuestMemory { regions, largest })
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
    ///
    /// ```no_run
    /// # use polder::{Error, guest_memory::GuestMemory};
    /// # use polder::vm_memory::GuestAddress;
    /// /// The driver has written where its ring of 256 descriptors is.
    /// fn set_ring(guest: &GuestMemory, at: u64) -> Result<GuestAddress, Error> {
    ///     guest.check(GuestAddress(at), 256 * 16)?;
    ///     Ok(GuestAddress(at))
    /// }
    /// ```
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
