//! The dirty log, on and off.

use polder_units::PageRange;

#[cfg(doc)]
use crate::Refusal;
use crate::{DirtyPages, Error, Memory};

impl Memory {
    /// Has it logged which pages are written from now on, by guests, devices and calls: for an
    /// incremental snapshot, or a migration. What was written before has to be copied once, after
    /// this call. `docs/dirty-log.md` has who writes what, and a migration in full.
    ///
    /// It costs each vCPU a fault at its first write to a page after the log was taken, and guests
    /// are mapped by 4K meanwhile. KVM waits until no vCPU is in the middle of an access to a slot, as
    /// [`Memory::unbind`] does.
    ///
    /// # Errors
    /// [`Error::DirtyLog`] if it is on; [`Error::NotOffered`] on host `guest_memfd`, of an SNP
    /// guest's memory and under pKVM; [`Error::Missing`] without `membarrier(2)`; [`Error::Host`].
    /// It is off then.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, Gpa, PageCount}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), memory.all_pages())?;
    /// # let vcpu = memory.machine_vcpu(vm)?;
    /// memory.start_dirty_log()?;
    /// vcpu.write(Gpa::new(0x10_3000), Visibility::Shared, b"the guest").unwrap();
    /// memory.write(vm, Gpa::new(0x10_5000), b"a device")?;
    /// let dirty = memory.take_dirty_log()?;
    /// assert_eq!(dirty.runs().map(|run| run.start().get()).collect::<Vec<_>>(), [3, 5]);
    /// memory.stop_dirty_log()?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn start_dirty_log(&self) -> Result<(), Error> {
        let _no_slot_changes = self.slots.change(&self.driver);
        let dirty = &self.driver.dirty;
        if dirty.is_on() {
            return Err(Error::DirtyLog { on: true });
        }
        if !polder_linux::can_barrier() {
            return Err(Error::Missing {
                what: "the dirty log needs membarrier(2), which is not to be had",
                way_out: "allow it in the filter of system calls (seccomp)",
                source: polder_linux::Error {
                    call: "membarrier",
                    range: None,
                    errno: polder_linux::Errno::NOSYS,
                },
            });
        }
        dirty.start(self.pages());
        self.driver.host.log_dirty(true).inspect_err(|_| dirty.stop())
    }

    /// The pages that were written since the log was started or last taken, which are in it no
    /// more. Copy them after this call: who writes to one meanwhile has it in the log again. A copy
    /// that fails is tried again, or [marked](Memory::mark_dirty): nobody else remembers the page.
    ///
    /// A page is in it when its bytes may have changed, or can be had now and could not before (it
    /// was private, or owed): never too few, sometimes too many.
    ///
    /// # Errors
    /// [`Error::DirtyLog`] if it is off; [`Error::Host`]: nothing is lost then, and all of it comes
    /// the next time.
    pub fn take_dirty_log(&self) -> Result<DirtyPages, Error> {
        let _no_slot_changes = self.slots.keep(&self.driver);
        let dirty = &self.driver.dirty;
        if !dirty.is_on() {
            return Err(Error::DirtyLog { on: false });
        }
        self.driver.host.take_dirty(dirty)?;
        self.driver.devices.mapped().into_iter().for_each(|run| dirty.wrote_pages(run));
        Ok(dirty.take())
    }

    /// Notes that pages were written by who is not seen: through a raw pointer into the
    /// [host view](crate::HostView), by vhost or another process. After they were written, and
    /// before the log is taken for the last time. Does nothing while the log is off.
    ///
    /// # Errors
    /// [`Refusal::Beyond`].
    ///
    /// ```
    /// # use polder::{HostKind, Memory, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// memory.start_dirty_log()?;
    /// memory.mark_dirty(PageRange::between(4, 6).unwrap())?;
    /// assert_eq!(memory.take_dirty_log()?.count().get(), 2);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn mark_dirty(&self, pages: PageRange) -> Result<(), Error> {
        self.driver.ask(|engine| engine.check_bounds(pages))?;
        self.driver.dirty.wrote_pages(pages);
        Ok(())
    }

    /// Has nothing logged any more; what was not taken is forgotten. Guests are mapped as large as
    /// fits again. Waits for vCPUs as [`Memory::start_dirty_log`] does.
    ///
    /// # Errors
    /// [`Error::Host`]: the log is off, but KVM goes on with it for a slot, which costs time; it may
    /// be stopped once more.
    pub fn stop_dirty_log(&self) -> Result<(), Error> {
        let _no_slot_changes = self.slots.change(&self.driver);
        self.driver.dirty.stop();
        self.driver.host.log_dirty(false)
    }
}
