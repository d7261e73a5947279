//! Devices that reach memory by an IOMMU: they have what is shared mapped, and nothing else.
//!
//! Whoever has a device's domain (VFIO, the simulated machine) implements [`Dma`] and is told of
//! every page that becomes shared or private, in the order that is safe: taken away before a
//! conversion to private looks for references, mapped after one to shared has told the hardware. A
//! device is told in pieces of one size, its granule, and of each piece once: an IOMMU takes away
//! only what it was given as a whole.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use polder_engine::{DeviceId, Holder, RangeSet, Step};
use polder_units::{PageCount, PageRange};

use crate::driver::Driver;
use crate::host::machine::MachineDevice;
use crate::sync::Mutex;
use crate::{Error, Memory};

/// What a device's domain has to do. Called from whatever thread converts, with the pages claimed:
/// a call of the memory about these pages from within would wait for itself, and so would an
/// operation on others, behind somebody who waits for both.
pub trait Dma: Send + Sync {
    /// Maps one granule, at whatever address the device sees it.
    ///
    /// # Errors
    /// Nothing is mapped then, and what was going on is undone.
    fn map(&self, pages: PageRange) -> Result<(), Error>;

    /// Takes away one granule that was mapped, the IOTLB's entries too.
    ///
    /// # Errors
    /// It is mapped still then, and what was going on is undone.
    fn unmap(&self, pages: PageRange) -> Result<(), Error>;
}

/// The devices of a memory.
#[derive(Default)]
pub(crate) struct Devices(Mutex<BTreeMap<DeviceId, Arc<Entry>>>);

struct Entry {
    holder: Holder,
    granule: PageCount,
    dma: Arc<dyn Dma>,
    /// What it was told to map.
    mapped: Mutex<RangeSet>,
}

impl Entry {
    /// The granules of a range.
    fn granules(&self, range: PageRange) -> impl Iterator<Item = PageRange> + use<> {
        let pages = self.granule.get();
        let first = (range.start().get()..range.end()).step_by(usize::try_from(pages).unwrap_or(1));
        first.filter_map(move |start| PageRange::between(start, start + pages))
    }

    fn tell(&self, range: PageRange, map: bool) -> Result<(), Error> {
        for pages in self.granules(range) {
            if self.mapped.lock().contains(pages.start()) == map {
                continue;
            }
            let told = if map { self.dma.map(pages) } else { self.dma.unmap(pages) };
            told.map_err(|error| Error::Device {
                holder: self.holder.clone(),
                what: if map { "map" } else { "let go of" },
                pages,
                source: Box::new(error),
            })?;
            let mut mapped = self.mapped.lock();
            if map { mapped.insert(pages) } else { mapped.remove(pages) }
        }
        Ok(())
    }
}

impl Devices {
    /// What devices have mapped, and may write to at any time.
    pub(crate) fn mapped(&self) -> Vec<PageRange> {
        let devices = self.0.lock();
        devices.values().flat_map(|it| it.mapped.lock().runs().collect::<Vec<_>>()).collect()
    }

    /// Takes a step that is a device's; `None` for any other.
    pub(crate) fn take(&self, step: Step) -> Option<Result<(), Error>> {
        let (id, range, map) = match step {
            Step::MapDma(id, range) => (id, range, true),
            Step::UnmapDma(id, range) => (id, range, false),
            _ => return None,
        };
        let entry = self.0.lock().get(&id).cloned();
        // One that was never attached, or is detached, has nothing.
        Some(entry.map_or(Ok(()), |entry| entry.tell(range, map)))
    }
}

/// A device that is attached, until it is dropped.
pub struct Device<'a> {
    driver: &'a Arc<Driver>,
    id: DeviceId,
}

impl Device<'_> {
    /// Detaches it: all that it has mapped is taken away.
    ///
    /// # Errors
    /// [`Error::Device`]: it is attached still, and taken away when it is dropped as far as it
    /// goes.
    pub fn detach(self) -> Result<(), Error> {
        let detached = self.driver.detach(self.id);
        if detached.is_ok() {
            std::mem::forget(self);
        }
        detached
    }
}

impl Drop for Device<'_> {
    fn drop(&mut self) {
        // A domain that does not let go is its owner's to destroy; the memory forgets it.
        if self.driver.detach(self.id).is_err() {
            self.driver.forget_device(self.id);
        }
    }
}

impl fmt::Debug for Device<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A device of the simulated machine, behind an IOMMU domain of its own. It sees the object's page
/// 0 at address 0.
#[derive(Debug)]
pub struct SimulatedDevice<'a> {
    device: Device<'a>,
    dma: Arc<MachineDevice>,
}

impl SimulatedDevice<'_> {
    /// The device reads memory.
    ///
    /// # Errors
    /// [`Error::Machine`] where its domain maps nothing, or the hardware refuses.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.dma.read(offset, into)
    }

    /// The device writes memory.
    ///
    /// # Errors
    /// As [`Self::read`]; nothing was written.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.dma.write(offset, from)
    }

    /// [`Device::detach`].
    ///
    /// # Errors
    /// As there.
    pub fn detach(self) -> Result<(), Error> {
        self.device.detach()
    }
}

impl Memory {
    /// Attaches a device: it has every shared page mapped from here on, `granule` pages at a time,
    /// which counts as a long-term pin by `holder`. Conversions are to be of whole granules then.
    ///
    /// # Errors
    /// [`Refusal::Granule`](crate::Refusal::Granule) where what is shared now is cut;
    /// [`Refusal::Owed`](crate::Refusal::Owed) while contents are; [`Error::Device`]. Nothing is
    /// mapped then.
    ///
    /// ```
    /// use std::sync::Mutex;
    ///
    /// use polder::units::{PageCount, PageRange};
    /// use polder::{Contents, Dma, Error, Holder, HostKind, Memory, OnBusy, Visibility};
    ///
    /// /// What a VMM would do by VFIO's ioctls, noted down.
    /// #[derive(Default)]
    /// struct Told(Mutex<Vec<(bool, PageRange)>>);
    ///
    /// impl Dma for Told {
    ///     fn map(&self, pages: PageRange) -> Result<(), Error> {
    ///         Ok(self.0.lock().unwrap().push((true, pages)))
    ///     }
    ///     fn unmap(&self, pages: PageRange) -> Result<(), Error> {
    ///         Ok(self.0.lock().unwrap().push((false, pages)))
    ///     }
    /// }
    ///
    /// # fn main() -> Result<(), Error> {
    /// let memory = Memory::builder(PageCount::from(16)).host(HostKind::Machine).build()?;
    /// let told = std::sync::Arc::new(Told::default());
    /// let nic = memory.attach_dma(Holder::new("nic"), PageCount::from(2), told.clone())?;
    /// let pages = PageRange::between(4, 8).unwrap();
    /// memory.convert(pages, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
    /// let halves = [PageRange::between(4, 6).unwrap(), PageRange::between(6, 8).unwrap()];
    /// assert_eq!(*told.0.lock().unwrap(), halves.map(|half| (true, half)));
    /// // In the way of no conversion, and of everything else.
    /// assert!(memory.discard(pages, OnBusy::Wait).is_err());
    /// memory.convert(halves[0], Visibility::Private, Contents::Preserve, OnBusy::Wait)?;
    /// nic.detach()?;
    /// assert_eq!(told.0.lock().unwrap()[2..], halves.map(|half| (false, half)));
    /// # Ok(())
    /// # }
    /// ```
    pub fn attach_dma(
        &self,
        holder: Holder,
        granule: PageCount,
        dma: Arc<dyn Dma>,
    ) -> Result<Device<'_>, Error> {
        let id = self.driver.attach(holder, granule, dma)?;
        Ok(Device { driver: &self.driver, id })
    }

    /// Attaches a device of the simulated machine, page by page.
    ///
    /// # Errors
    /// [`Error::NotSimulated`] on another host; as [`Memory::attach_dma`].
    ///
    /// ```
    /// # use polder::{Holder, HostKind, Memory, units::{PageCount}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// let nic = memory.simulated_device(Holder::new("nic"))?;
    /// nic.write(0x3000, b"a packet")?;
    /// let mut bytes = [0; 8];
    /// memory.host_view().touch_read(0x3000, &mut bytes)?;
    /// assert_eq!(&bytes, b"a packet");
    /// nic.detach()?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn simulated_device(&self, holder: Holder) -> Result<SimulatedDevice<'_>, Error> {
        let dma = Arc::new(MachineDevice::new(&self.driver)?);
        let told = Arc::clone(&dma) as Arc<dyn Dma>;
        let device = self.attach_dma(holder, PageCount::ONE, told)?;
        Ok(SimulatedDevice { device, dma })
    }
}

impl Driver {
    fn attach(
        &self,
        holder: Holder,
        granule: PageCount,
        dma: Arc<dyn Dma>,
    ) -> Result<DeviceId, Error> {
        let (id, attaching) = self.claim(crate::OnBusy::Wait, |engine| engine.attach(granule))?;
        let mapped = Mutex::default();
        let entry = Entry { holder: holder.clone(), granule, dma, mapped };
        self.devices.0.lock().insert(id, Arc::new(entry));
        let attached = self
            .drain(attaching)
            .and_then(|(engine, attaching)| self.take_steps(engine, attaching))
            .inspect_err(|_| self.forget_told(id))?;
        let (mut engine, attached) = attached;
        engine.finish_attach((id, attached), holder, granule);
        drop(engine);
        self.released();
        Ok(id)
    }

    fn detach(&self, id: DeviceId) -> Result<(), Error> {
        let detaching = self.claim(crate::OnBusy::Wait, |engine| engine.detach(id))?;
        let (engine, detaching) = self.drain(detaching)?;
        let (mut engine, detached) = self.take_steps(engine, detaching)?;
        engine.finish_detach(id, detached);
        drop(engine);
        self.forget_told(id);
        self.released();
        Ok(())
    }

    /// Forgets a device that does not let go: it is told nothing any more.
    fn forget_device(&self, id: DeviceId) {
        self.forget_told(id);
        // With nobody to tell, this takes nothing and can't fail but for a broken engine.
        let _ = self.detach(id);
    }

    fn forget_told(&self, id: DeviceId) {
        let forgotten = self.devices.0.lock().remove(&id);
        let mapped = forgotten.map(|it| it.mapped.lock().runs().collect::<Vec<_>>());
        mapped.into_iter().flatten().for_each(|run| self.dirty.wrote_pages(run));
    }
}
