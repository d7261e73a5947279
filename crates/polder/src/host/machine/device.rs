//! A device of the machine: an IOMMU domain, in which what it is told is pinned and mapped.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use polder_machine::{DomainId, PinId, PinKind};
use polder_units::{GfnRange, Gpa, PageRange};

use super::{MachineHost, refused};
use crate::driver::Driver;
use crate::sync::Mutex;
use crate::{Dma, Error};

pub(crate) struct MachineDevice {
    driver: Weak<Driver>,
    domain: DomainId,
    /// By the first page of what each has.
    pins: Mutex<BTreeMap<u64, PinId>>,
}

/// Where a device sees pages of the object.
fn gfns(pages: PageRange) -> GfnRange {
    GfnRange::between(pages.start().get(), pages.end()).expect("pages of a small object")
}

impl MachineDevice {
    pub(crate) fn new(driver: &Arc<Driver>) -> Result<Self, Error> {
        let host = driver.host.machine().ok_or(Error::NotSimulated)?;
        let domain = host.lock().create_domain().map_err(refused)?;
        Ok(Self { driver: Arc::downgrade(driver), domain, pins: Mutex::default() })
    }

    fn on<T>(
        &self,
        call: impl FnOnce(&MachineHost) -> Result<T, polder_machine::Error>,
    ) -> Result<T, Error> {
        let driver = self.driver.upgrade().ok_or(Error::NotSimulated)?;
        let host = driver.host.machine().ok_or(Error::NotSimulated)?;
        call(host).map_err(refused)
    }

    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.on(|host| host.lock().device_read(self.domain, Gpa::new(offset), into))
    }

    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.on(|host| host.lock().device_write(self.domain, Gpa::new(offset), from))
    }
}

impl Dma for MachineDevice {
    fn map(&self, pages: PageRange) -> Result<(), Error> {
        let pin = self.on(|host| {
            let machine = &mut *host.lock();
            let kind = PinKind::LongTerm;
            let pin = machine.pin_object_pages(host.process, host.object, pages, kind)?;
            let mapped = machine.iommu_map(self.domain, gfns(pages).start(), pin);
            if mapped.is_err() {
                machine.unpin(pin)?;
            }
            mapped.map(|()| pin)
        })?;
        self.pins.lock().insert(pages.start().get(), pin);
        Ok(())
    }

    fn unmap(&self, pages: PageRange) -> Result<(), Error> {
        let pin = self.pins.lock().remove(&pages.start().get());
        self.on(|host| {
            let machine = &mut *host.lock();
            machine.iommu_unmap(self.domain, gfns(pages))?;
            machine.flush_iotlb(self.domain, gfns(pages))?;
            pin.map_or(Ok(()), |pin| machine.unpin(pin))
        })
    }
}

impl Drop for MachineDevice {
    fn drop(&mut self) {
        // The machine may be gone by then, and all with it.
        let _ = self.on(|host| {
            let machine = &mut *host.lock();
            machine.destroy_domain(self.domain)?;
            let pins = std::mem::take(&mut *self.pins.lock());
            pins.into_values().try_for_each(|pin| machine.unpin(pin))
        });
    }
}

impl fmt::Debug for MachineDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineDevice").field("domain", &self.domain).finish_non_exhaustive()
    }
}
