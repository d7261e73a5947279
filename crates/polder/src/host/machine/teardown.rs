//! What outlives a memory: pins of the kernel's, which keep huge pages from their pool until the
//! last of them goes.

use std::fmt;
use std::sync::Arc;

use polder_engine::Refusal;
use polder_machine::{Machine, PinId, PinKind};
use polder_units::PageRange;

use super::{MachineHost, refused};
use crate::huge_pool::HugePool;
use crate::sync::Mutex;
use crate::{Error, Memory};

/// Pages that the simulated machine's kernel has pinned without Polder's knowledge, as direct I/O
/// in flight does; until dropped, also where the memory is gone by then.
pub struct KernelPin {
    machine: Arc<Mutex<Machine>>,
    pin: PinId,
    pool: Option<HugePool>,
}

impl Memory {
    /// Has the simulated machine's kernel pin pages for long, by the object itself
    /// (`memfd_pin_folios()`, Linux `mm/gup.c`): what has no memory gets some.
    ///
    /// # Errors
    /// [`Error::NotSimulated`] on another host; [`Refusal::Beyond`] the end; [`Error::Machine`]
    /// beside an exclusive pin.
    ///
    /// ```
    /// # use polder::{HostKind, HugePool, Memory, PageSize, units::{Level, PageCount, PageRange}};
    /// let pool = HugePool::new(Level::Size2M, 1);
    /// let memory = Memory::builder(PageCount::from(512u32)).host(HostKind::Machine);
    /// let memory = memory.page_size(PageSize::Huge2M).pool(&pool).build()?;
    /// let transfer = memory.simulated_pin(PageRange::between(3, 4).unwrap())?;
    /// drop(memory);
    /// assert_eq!((pool.counts().free, pool.counts().pending), (0, 1));
    /// drop(transfer);
    /// assert_eq!((pool.counts().free, pool.counts().pending), (1, 0));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn simulated_pin(&self, pages: PageRange) -> Result<KernelPin, Error> {
        self.driver.host.machine().ok_or(Error::NotSimulated)?.pin_by_kernel(pages)
    }
}

impl Drop for KernelPin {
    fn drop(&mut self) {
        let unpinned = self.machine.lock().unpin(self.pin);
        assert!(unpinned.is_ok(), "a pin is released once: {unpinned:?}");
        if let Some(pool) = &self.pool {
            pool.look_again(&self.machine);
        }
    }
}

impl fmt::Debug for KernelPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelPin").field("pin", &self.pin).finish_non_exhaustive()
    }
}

impl MachineHost {
    fn pin_by_kernel(&self, pages: PageRange) -> Result<KernelPin, Error> {
        if pages.end() > self.pages.get() {
            return Err(Refusal::Beyond { range: pages, pages: self.pages }.into());
        }
        let pin = {
            let mut machine = self.lock();
            self.allocate(&mut machine, pages)?;
            machine.pin_object_pages(self.process, self.object, pages, PinKind::LongTerm)
        };
        let pool = self.huge.as_ref().map(super::huge::Huge::pool);
        Ok(KernelPin { machine: Arc::clone(&self.machine), pin: pin.map_err(refused)?, pool })
    }
}

impl Drop for MachineHost {
    fn drop(&mut self) {
        // Where nobody else has the machine it goes, and all pins with it.
        let Some(huge) = self.huge.as_ref().filter(|_| Arc::strong_count(&self.machine) > 1) else {
            return;
        };
        let mut machine = self.lock();
        for attached in self.vms.lock().values() {
            let _ = machine.destroy_vm(attached.vm);
        }
        let _ = machine.exit_process(self.process);
        // An SNP guest's frames stay assigned, and its memory is not given back to this machine:
        // what is pinned of it does not count.
        let _ = machine.destroy_object(self.object);
        let pending = machine.pool_counts(huge.level).pending;
        drop(machine);
        huge.leave(&self.machine, pending);
    }
}
