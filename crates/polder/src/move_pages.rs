//! Moving pages, and bytes for private pages before the guest begins.

use polder_engine::{Activity, Engine};
use polder_units::{Geometry, Level, PageCount, PageIndex, PageRange};

use crate::driver::Driver;
use crate::watch::{Moment, Reached};
use crate::{Error, Memory, OnBusy, PageSize};

impl Memory {
    /// Moves pages to other memory (compaction, NUMA): private and shared ones, with all that is in
    /// them. Guest and host go on with the new place; who touches the pages meanwhile waits.
    /// Private pages of pKVM's are moved by its hypervisor, which leaves nothing behind.
    ///
    /// # Errors
    /// [`Refusal::Pinned`](crate::Refusal::Pinned) by a pin or a device, by name;
    /// [`Refusal::Referenced`](crate::Refusal::Referenced);
    /// [`Refusal::Unmovable`](crate::Refusal::Unmovable) for an SNP guest's private pages;
    /// [`Refusal::FolioPart`](crate::Refusal::FolioPart); [`Error::NotOffered`] on a host where the
    /// kernel alone decides where pages are. If memory runs out in the middle, pages before are
    /// moved, which nobody sees.
    ///
    /// On host `memfd` the one move that there is brings the 4K pages of a transparent huge page
    /// together again: [`Memory::collapse`].
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
                way_out: "use HostKind::Machine, or leave compaction to the kernel; transparent huge \
                          pages are put together again by Memory::collapse",
            });
        }
        self.driver.move_pages(range, on_busy)
    }

    /// Has the 2M page around `page` made one transparent huge page again, and mapped so for the
    /// guest: after a page was brought in alone, or the kernel had no huge page at the time. It is
    /// a move, by the kernel (`MADV_COLLAPSE`): who touches the pages meanwhile waits, what is in
    /// them stays, and what is pinned does not move.
    ///
    /// # Errors
    /// [`Refusal::Pinned`](crate::Refusal::Pinned) by a pin or a device, by name;
    /// [`Refusal::Beyond`](crate::Refusal::Beyond) where the 2M page is not all there;
    /// [`Error::NotOffered`] for memory that is not of transparent huge pages; [`Error::Host`]
    /// where the kernel has no huge page to give, knows of a reference that Polder does not (both
    /// may pass), or where contents are owed yet (`EBUSY`). It is as it was then.
    ///
    /// ```no_run
    /// # use polder::{Error, Memory, OnBusy, units::PageIndex};
    /// # fn regain(memory: &Memory, page: PageIndex) -> Result<(), Error> {
    /// match memory.collapse(page, OnBusy::Refuse) {
    ///     Err(Error::Refused(busy)) => println!("later: {busy}"), // says by whom it is pinned
    ///     other => other?,
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn collapse(&self, page: PageIndex, on_busy: OnBusy) -> Result<(), Error> {
        if self.page_size() != PageSize::Thp {
            return Err(Error::NotOffered {
                what: "this memory is not made of transparent huge pages",
                way_out: "make it so (PageSize::Thp) where the machine's settings allow for it",
            });
        }
        let page = PageRange::enclosing(page, Level::Size2M, Geometry::X86_64);
        self.driver.move_pages(page, on_busy)
    }

    /// [`Memory::collapse`] for all that exists of the memory, but for what is in use.
    /// Nothing is done while contents are owed; [`Memory::settle`] does it, then. Returns how many
    /// pages the guest has mapped so.
    ///
    /// # Errors
    /// [`Error::Host`] where the kernel can't say what exists.
    ///
    /// ```
    /// # use polder::{Memory, PageSize};
    /// # fn idle(memory: &Memory) -> Result<(), polder::Error> {
    /// if memory.page_size() == PageSize::Thp {
    ///     println!("{} mapped by 2M", memory.collapse_all()?);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn collapse_all(&self) -> Result<PageCount, Error> {
        self.driver.collapse_all()?;
        let mapped = self.driver.host.levels().map_or(0, |levels| levels.size_2m);
        let pages = mapped * Geometry::X86_64.pages(Level::Size2M).get();
        Ok(PageCount::new(pages).unwrap_or(PageCount::ZERO))
    }

    /// Puts bytes onto private pages that the guest is to begin with; what they do not reach of the
    /// pages stays what it was. Whoever touches the pages meanwhile waits, and sees them whole.
    ///
    /// pKVM's hypervisor is donated them so, at the guest's first touch; an SNP guest's are
    /// encrypted in place by the firmware and validated: the guest has to see the pages by then.
    ///
    /// # Errors
    /// [`Refusal::Launched`](crate::Refusal::Launched) once the guest has begun;
    /// [`Refusal::NotPrivate`](crate::Refusal::NotPrivate);
    /// [`Refusal::Owed`](crate::Refusal::Owed), of pages to populate; [`Error::NotOffered`] on host
    /// `guest_memfd`, whose private pages the host can't write; [`Error::TooManyBytes`]. If the
    /// host fails in the middle the pages are zeros.
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
                          HostKind::Memfd",
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
        let find = |_: &Engine| Ok(vec![range]);
        self.unpinned(on_busy, Activity::Move, find, || self.move_now(range, on_busy))
    }

    /// Moves each 2M page of transparent huge pages together, but for those that are in use, or for
    /// which the kernel has no memory.
    pub(crate) fn collapse_all(&self) -> Result<(), Error> {
        for page in self.host.in_pieces()? {
            let _ = self.move_pages(page, OnBusy::Refuse);
        }
        Ok(())
    }

    fn move_now(&self, range: PageRange, on_busy: OnBusy) -> Result<(), Error> {
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
        let written = self.host.views().write(range.start().offset(), bytes);
        self.dirty.wrote_pages(range);
        if let Err(error) = written {
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
