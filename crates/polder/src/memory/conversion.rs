//! What pages are: conversion, wishes, discard, merge.

use polder_engine::{Contents, Engine, Refusal, Slot, Visibility, VmId, Wish};
use polder_units::{GfnRange, PageCount, PageRange};

#[cfg(doc)]
use crate::Statistics;
use crate::{Error, Memory, OnBusy};

impl Memory {
    /// Makes pages private or shared: all of them, or none. Returns how many changed.
    ///
    /// # Errors
    /// A [`Refusal`] naming the first page in the way and its holder, or [`Error::Host`]; nothing
    /// has changed then. [`Error::Quarantined`] if something had and could not be undone.
    ///
    /// ```
    /// # use polder::{Contents, Error, Holder, HostKind, Memory, OnBusy, PinKind, Refusal, Visibility, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// let all = PageRange::between(0, 16).unwrap();
    /// let private = || memory.convert(all, Visibility::Private, Contents::Preserve, OnBusy::Wait);
    /// let pin = memory.pin(PageRange::between(3, 4).unwrap(), PinKind::Short, Holder::new("disk"))?;
    /// let Err(Error::Refused(Refusal::Pinned { page, holder, .. })) = private() else { panic!() };
    /// assert_eq!((page.get(), holder.to_string()), (3, "disk".into()));
    /// drop(pin);
    /// assert_eq!(private()?.get(), 16);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn convert(
        &self,
        range: PageRange,
        to: Visibility,
        contents: Contents,
        on_busy: OnBusy,
    ) -> Result<PageCount, Error> {
        self.convert_found(|_| Ok(vec![range]), (to, contents), None, on_busy)
    }

    /// [`Memory::convert`] by guest frames. It also becomes what this VM [wants](Self::want) these
    /// frames to be; what other VMs want of the same pages stays as it is.
    ///
    /// # Errors
    /// As [`Memory::convert`], and [`Refusal::Unbound`].
    ///
    /// ```
    /// # use polder::{Contents, HostKind, Memory, OnBusy, Slot, Visibility, Vm, units::{Gfn, GfnRange, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let frame = GfnRange::one(Gfn::from(0x102));
    /// memory.convert_gfns(vm, frame, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
    /// memory.write(vm, frame.start().gpa(), b"hello")?;
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn convert_gfns(
        &self,
        vm: VmId,
        gfns: GfnRange,
        to: Visibility,
        contents: Contents,
        on_busy: OnBusy,
    ) -> Result<PageCount, Error> {
        let find = |engine: &Engine| engine.pages_of(vm, gfns);
        self.convert_found(find, (to, contents), Some(vm), on_busy)
    }

    fn convert_found(
        &self,
        find: impl Fn(&Engine) -> Result<Vec<PageRange>, Refusal>,
        (to, contents): (Visibility, Contents),
        by: Option<VmId>,
        on_busy: OnBusy,
    ) -> Result<PageCount, Error> {
        self.driver.convert_counted(find, (to, contents), (by, false), on_busy)
    }

    /// Notes what a VM wants its pages to be (`KVM_MEMORY_ATTRIBUTE_PRIVATE`). Nothing changes by
    /// that until a conversion grants it. Waits for operations on these pages: of a wish and a
    /// conversion, the later one counts.
    ///
    /// # Errors
    /// [`Refusal::Unbound`] unless every frame is bound.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, GfnRange, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let frame = GfnRange::one(Gfn::from(0x102));
    /// memory.want(vm, frame, Visibility::Shared)?;
    /// let wish = memory.wanted(vm, frame)?[0];
    /// assert_eq!((wish.wanted, wish.granted), (Visibility::Shared, Visibility::Private));
    /// assert_eq!(memory.unmet().len(), 1);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn want(&self, vm: VmId, gfns: GfnRange, to: Visibility) -> Result<(), Error> {
        self.driver.claim(OnBusy::Wait, |engine| engine.want(vm, gfns, to))
    }

    /// What a VM wants its pages to be, and what they are, in runs.
    ///
    /// # Errors
    /// [`Refusal::Unbound`] unless every frame is bound.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, GfnRange, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let frames = GfnRange::between(0x100, 0x110).unwrap();
    /// let [wish] = memory.wanted(vm, frames)?[..] else { panic!("all are alike") };
    /// assert_eq!(wish.wanted, Visibility::Private);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn wanted(&self, vm: VmId, gfns: GfnRange) -> Result<Vec<Wish>, Error> {
        self.driver.ask(|engine| engine.wanted(vm, gfns))
    }

    /// Every wish that is not granted, with the binding that has it. Where VMs disagree about a
    /// page, it shows here.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, GfnRange, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// assert!(memory.unmet().is_empty());
    /// memory.want(vm, GfnRange::one(Gfn::from(0x102)), Visibility::Shared)?;
    /// let (of, slot, wish) = &memory.unmet()[0];
    /// assert_eq!((*of, *slot, wish.granted), (vm, Slot(0), Visibility::Private));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn unmet(&self) -> Vec<(VmId, Slot, Wish)> {
        self.driver.engine().unmet().collect()
    }

    /// Drops the contents of pages: they read as zeros, and take up no memory. Visibility stays. An
    /// SNP guest has to validate its private pages anew, and finds garbage in them (zeros,
    /// deciphered): it clears what it validates. None finds what was there.
    ///
    /// # Errors
    /// As [`Memory::convert`].
    ///
    /// ```
    /// # use polder::{HostKind, Memory, OnBusy, units::{PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).shared().build()?;
    /// memory.host_view().touch_write(0, b"hello")?;
    /// memory.discard(PageRange::between(0, 1).unwrap(), OnBusy::Wait)?;
    /// let mut bytes = [1; 5];
    /// memory.host_view().touch_read(0, &mut bytes)?;
    /// assert_eq!(bytes, [0; 5]);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn discard(&self, range: PageRange, on_busy: OnBusy) -> Result<(), Error> {
        self.driver.discard(range, false, on_busy)
    }

    /// Merges the 4K RMP entries of each 2M page in `range` that is private as a whole, where they
    /// agree: an SNP guest's memory is mapped at 2M again. Conversions do not do it.
    /// [`Statistics::rmp`] says how many were merged, and how many left as they are, and mapped.
    /// Nothing is done for another platform. One 2M page is held at a time; those in quarantine are
    /// left out.
    ///
    /// # Errors
    /// [`Refusal::Beyond`]; for a 2M page as [`Memory::convert`]: those before it are merged then,
    /// which nobody sees but by its speed.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, OnBusy, Platform, units::{PageCount, PageRange}};
    /// let memory = Memory::builder(PageCount::from(512u32)).host(HostKind::Machine);
    /// let memory = memory.platform(Platform::Snp).build()?;
    /// memory.merge(PageRange::between(0, 512).unwrap(), OnBusy::Wait)?; // after the guest's conversions
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn merge(&self, range: PageRange, on_busy: OnBusy) -> Result<(), Error> {
        self.driver.merge(range, on_busy)
    }
}
