//! Moving pages, and bytes for private pages before the guest begins.

use polder_units::PageRange;

use crate::driver::Driver;
use crate::watch::{Moment, Reached};
use crate::{Error, Memory, OnBusy};

impl Memory {
    /// Moves pages to other memory (compaction, NUMA): private and shared ones, with all that is in
    /// them. Guest and host go on with the new place; who touches the pages meanwhile waits. Private
    /// pages of pKVM's are moved by its hypervisor, which leaves nothing behind.
    ///
    /// # Errors
    /// [`Refusal::Pinned`](crate::Refusal::Pinned) by a pin or a device, by name;
    /// [`Refusal::Referenced`](crate::Refusal::Referenced);
    /// [`Refusal::Unmovable`](crate::Refusal::Unmovable) for an SNP guest's private pages;
    /// [`Refusal::FolioPart`](crate::Refusal::FolioPart); [`Error::NotOffered`] on a host where the
    /// kernel alone decides where pages are. If memory runs out in the middle, pages before are
    /// moved, which nobody sees.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, OnBusy, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// memory.host_view().touch_write(0x3000, b"hello")?;
    /// memory.move_pages(PageRange::between(3, 4).unwrap(), OnBusy::Wait)?;
    /// let mut bytes = [0; 5];
    /// memory.host_view().touch_read(0x3000, &mut bytes)?;
    /// assert_eq!(&bytes, b"hello");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn move_pages(&self, range: PageRange, on_busy: OnBusy) -> Result<(), Error> {
        if self.driver.host.machine().is_none() {
            return Err(Error::NotOffered {
                what: "where pages lie is the kernel's affair on this host: it offers no way to \
                       move some of them with everybody cut off",
                way_out: "use --host machine, or leave compaction to the kernel",
            });
        }
        self.driver.move_pages(range, on_busy)
    }

    /// Puts bytes onto private pages that the guest is to begin with; what they do not reach of the
    /// pages stays what it was. Whoever touches the pages meanwhile waits, and sees them whole.
    ///
    /// pKVM's hypervisor is donated them so, at the guest's first touch; an SNP guest's are
    /// encrypted in place by the firmware and validated: the guest has to see the pages by then.
    ///
    /// # Errors
    /// [`Refusal::Launched`](crate::Refusal::Launched) once the guest has begun;
    /// [`Refusal::NotPrivate`](crate::Refusal::NotPrivate); [`Refusal::Owed`](crate::Refusal::Owed),
    /// of pages to populate; [`Error::NotOffered`] on host `guest_memfd`, whose private pages the
    /// host can't write; [`Error::TooManyBytes`]. If the host fails in the middle the pages are
    /// zeros.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// memory.preload(PageRange::between(0, 1).unwrap(), b"the firmware")?;
    /// memory.launch();
    /// let mut bytes = [0; 12];
    /// memory.machine_vcpu(vm)?.read(Gpa::new(0x10_0000), Visibility::Private, &mut bytes).unwrap();
    /// assert_eq!(&bytes, b"the firmware");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn preload(&self, range: PageRange, bytes: &[u8]) -> Result<(), Error> {
        if range.count().bytes().is_none_or(|size| size < bytes.len() as u64) {
            return Err(Error::TooManyBytes { range, bytes: bytes.len() });
        }
        if !self.is_in_place() {
            return Err(Error::NotOffered {
                what: "the host can't write private pages of a guest_memfd, and a conversion loses \
                       what is in them",
                way_out: "write the bytes to shared pages, and have the guest copy them; or use \
                          --host memfd",
            });
        }
        self.driver.preload(range, bytes)
    }

    /// Says that the guest begins: nobody but the guest puts anything onto its private pages any
    /// more. On the simulated machine its first fault says so, too.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// memory.launch();
    /// assert!(memory.preload(PageRange::between(0, 1).unwrap(), b"too late").is_err());
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn launch(&self) {
        self.driver.engine().launch();
    }
}

impl Driver {
    fn move_pages(&self, range: PageRange, on_busy: OnBusy) -> Result<(), Error> {
        let moving = self.claim(on_busy, |engine| engine.move_pages(range))?;
        let (engine, moving) = self.drain(moving)?;
        let (engine, unmapped) = self.perform(engine, moving, Reached::Unmapped)?;
        let (engine, unpinned) = self.perform(engine, unmapped, Reached::Unpinned)?;
        let (mut engine, moved) = self.perform(engine, unpinned, Reached::Moved)?;
        engine.finish_move(moved);
        drop(engine);
        self.released();
        Ok(())
    }

    fn preload(&self, range: PageRange, bytes: &[u8]) -> Result<(), Error> {
        let preparing = self.claim(OnBusy::Wait, |engine| engine.preload(range))?;
        let (engine, preparing) = self.drain(preparing)?;
        let (engine, filling) = self.take_steps(engine, preparing)?;
        drop(engine);
        if let Err(error) = self.host.views().write(range.start().offset(), bytes) {
            return Err(self.fail(filling, error));
        }
        self.tell(Moment::Reached(Reached::Written));
        let (mut engine, preloaded) = self.perform(self.engine(), filling, Reached::Published)?;
        engine.finish_preload(preloaded);
        drop(engine);
        self.released();
        Ok(())
    }
}
