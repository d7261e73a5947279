//! What a VMM or guest asks of pages: conversion, discard, merge, each to its end or undone.

use polder_engine::{
    Activity, Contents, ConversionRequest, Converted, Engine, Refusal, Slot, Start, Visibility,
    VmId,
};
use polder_units::{PageCount, PageRange};

use super::Driver;
use crate::watch::Reached;
use crate::{Error, OnBusy};

impl Driver {
    /// Converts pages, as [`Self::convert_now`]; where pins are in the way and are to be waited
    /// for, once they are gone.
    pub(crate) fn convert(
        &self,
        find: impl Fn(&Engine) -> Result<Vec<PageRange>, Refusal>,
        (to, contents): (Visibility, Contents),
        (by, by_guest): (Option<VmId>, bool),
        on_busy: OnBusy,
    ) -> Result<Option<Converted>, Error> {
        let activity = Activity::Conversion { to, contents, by };
        self.unpinned(on_busy, activity, &find, || {
            self.convert_now(&find, (to, contents), (by, by_guest), on_busy)
        })
    }

    /// Converts pages: all of them, or none. The pages are found and claimed in one hold of the
    /// lock, so that no slot can move under the request.
    fn convert_now(
        &self,
        find: impl Fn(&Engine) -> Result<Vec<PageRange>, Refusal>,
        (to, contents): (Visibility, Contents),
        (by, by_guest): (Option<VmId>, bool),
        on_busy: OnBusy,
    ) -> Result<Option<Converted>, Error> {
        let claim = |engine: &mut Engine| {
            let ranges = find(engine)?;
            engine.convert(&ConversionRequest { ranges, to, contents, by, by_guest })
        };
        let conversion = match self.claim(on_busy, claim)? {
            Start::AlreadySo => return Ok(None),
            Start::Claimed(conversion) => conversion,
        };
        let (engine, conversion) = self.drain(conversion)?;
        let (engine, unmapped) = self.perform(engine, conversion, Reached::Unmapped)?;
        let (engine, unpinned) = self.perform(engine, unmapped, Reached::Unpinned)?;
        let (engine, reshaped) = self.perform(engine, unpinned, Reached::Reshaped)?;
        let (engine, protected) = self.perform(engine, reshaped, Reached::Protected)?;
        let (mut engine, settled) = self.perform(engine, protected, Reached::Settled)?;
        let converted = engine.finish_conversion(settled);
        drop(engine);
        self.released();
        Ok(Some(converted))
    }

    /// The same, counted. How many pages changed.
    pub(crate) fn convert_counted(
        &self,
        find: impl Fn(&Engine) -> Result<Vec<PageRange>, Refusal>,
        (to, contents): (Visibility, Contents),
        by: (Option<VmId>, bool),
        on_busy: OnBusy,
    ) -> Result<PageCount, Error> {
        match self.convert(find, (to, contents), by, on_busy) {
            Ok(converted) => {
                let pages = converted.map_or(PageCount::ZERO, |converted| converted.pages);
                self.counters.converted(to, pages);
                Ok(pages)
            }
            Err(error) => {
                self.counters.refused();
                Err(error)
            }
        }
    }

    /// Takes a slot away, from the host first: that may take long, and fail, and until it is done
    /// the slot is there, its faults are answered, and what is granted meets its wishes. No other
    /// slot may change meanwhile.
    ///
    /// In between, a fault is answered for a slot that the host has no more. It finds that it has
    /// moved, and the guest faults again; KVM, which maps by itself, is not asked to.
    pub(crate) fn unbind(&self, vm: VmId, slot: Slot) -> Result<(), Error> {
        let binding = self.ask(|engine| engine.binding(vm, slot))?;
        self.host.unbind(vm, slot)?;
        // The slot's log has gone with it.
        self.dirty.wrote_pages(binding.pages());
        let unbound = self.engine().unbind(vm, slot);
        assert!(unbound.is_ok(), "no slot changes meanwhile: {unbound:?}");
        Ok(())
    }

    /// Drops the contents of pages, by the guest's own wish or the VMM's; where pins are in the way
    /// and are to be waited for, once they are gone.
    pub(crate) fn discard(
        &self,
        range: PageRange,
        by_guest: bool,
        on_busy: OnBusy,
    ) -> Result<(), Error> {
        let find = |_: &Engine| Ok(vec![range]);
        let discard = || self.discard_now(range, by_guest, on_busy);
        self.unpinned(on_busy, Activity::Discard, find, discard)
    }

    fn discard_now(&self, range: PageRange, by_guest: bool, on_busy: OnBusy) -> Result<(), Error> {
        let discard = self.claim(on_busy, |engine| match by_guest {
            true => engine.discard_for_guest(range),
            false => engine.discard(range),
        })?;
        let (engine, discard) = self.drain(discard)?;
        let (mut engine, cleared) = self.perform(engine, discard, Reached::Cleared)?;
        engine.finish_discard(cleared);
        drop(engine);
        self.released();
        if let Some(pager) = &self.pager {
            pager.forget(self, range);
        }
        Ok(())
    }

    /// Merges the RMP entries of private 2M pages, one after the other: nobody waits for more than
    /// the one that he is about.
    pub(crate) fn merge(&self, range: PageRange, on_busy: OnBusy) -> Result<(), Error> {
        self.ask(|engine| engine.check_bounds(range))?;
        let pages = self.engine().mergeable(range);
        pages.into_iter().try_for_each(|page| {
            let merge = self.claim(on_busy, |engine| engine.merge(page))?;
            let (engine, merge) = self.drain(merge)?;
            let (mut engine, merged) = self.take_steps(engine, merge)?;
            engine.finish_merge(merged);
            drop(engine);
            self.released();
            Ok(())
        })
    }
}
