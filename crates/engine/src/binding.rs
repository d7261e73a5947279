//! Bindings: which pages of the object a VM sees at which guest frames.
//!
//! The level at which a binding can map a page is decided by two things that never change while it
//! stands: whether gfn and page index are congruent modulo the level, and whether the whole huge
//! page lies in the binding. Thread 1 asks "what keeps the offset and the gfn aligned?": the first
//! is computed once, when the binding is made, and is a part of it.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;

use polder_units::{Geometry, Gfn, GfnRange, Level, PageCount, PageIndex, PageRange};

use crate::plant::Bug;
use crate::range_set::push_run;
use crate::{Engine, Refusal};

/// Names a VM among those that share the object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VmId(pub u32);

/// A memory slot's number, by which KVM names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(pub u32);

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A run of pages bound at a run of guest frames. It never changes: to move it, unbind and bind.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Binding {
    gfn: Gfn,
    pages: PageRange,
    /// The largest level at which gfns and page indices are congruent.
    congruent: Level,
}

impl Binding {
    fn new(gfn: Gfn, pages: PageRange, geometry: Geometry) -> Self {
        let offset = gfn.get().abs_diff(pages.start().get());
        let congruent = Level::ALL
            .into_iter()
            .rfind(|&level| offset.is_multiple_of(geometry.pages(level).get()))
            .unwrap_or(Level::Size4K);
        Self { gfn, pages, congruent }
    }

    /// Its pages of the object.
    pub const fn pages(&self) -> PageRange {
        self.pages
    }

    /// The largest level at which gfns and page indices are congruent.
    pub(crate) const fn congruent(&self) -> Level {
        self.congruent
    }

    /// Its guest frames.
    pub fn gfns(&self) -> GfnRange {
        GfnRange::new(self.gfn, self.pages.count()).expect("checked when it was bound")
    }

    /// The page behind a guest frame.
    pub(crate) fn page(&self, gfn: Gfn) -> Option<PageIndex> {
        let into = gfn.checked_sub(self.gfn)?;
        self.pages.start().checked_add(into).filter(|&page| self.pages.contains(page))
    }

    /// The largest level at which the page around `page` can be mapped through it.
    pub fn level(&self, page: PageIndex, geometry: Geometry) -> Level {
        let fits = |&level: &Level| {
            level <= self.congruent
                && self.pages.contains_range(PageRange::enclosing(page, level, geometry))
        };
        Level::ALL.into_iter().rfind(fits).unwrap_or(Level::Size4K)
    }
}

/// All bindings of an object.
#[derive(Clone, Default, Debug)]
pub(crate) struct Bindings(BTreeMap<(VmId, Slot), Binding>);

impl Bindings {
    pub(crate) fn of(&self, vm: VmId) -> impl Iterator<Item = (Slot, &Binding)> {
        let slots = (vm, Slot(0))..=(vm, Slot(u32::MAX));
        self.0.range(slots).map(|(&(_, slot), binding)| (slot, binding))
    }

    /// The page behind a guest frame and the largest level at which its binding can map it.
    pub(crate) fn page_of(
        &self,
        vm: VmId,
        gfn: Gfn,
        geometry: Geometry,
    ) -> Option<(PageIndex, Level)> {
        let (page, binding) =
            self.of(vm).find_map(|(_, binding)| Some((binding.page(gfn)?, binding)))?;
        Some((page, binding.level(page, geometry)))
    }
}

impl Engine {
    /// Binds `pages` of the object at `gfn` of a VM.
    ///
    /// # Errors
    /// [`Refusal::Beyond`], [`Refusal::Range`] past the last guest frame, [`Refusal::SlotTaken`],
    /// [`Refusal::GfnsTaken`] and [`Refusal::PagesTaken`] for an overlap within the VM.
    pub fn bind(
        &mut self,
        vm: VmId,
        slot: Slot,
        gfn: Gfn,
        pages: PageRange,
    ) -> Result<Binding, Refusal> {
        self.check_bounds(pages)?;
        let gfns = GfnRange::new(gfn, pages.count())?;
        if self.bindings.0.contains_key(&(vm, slot)) {
            return Err(Refusal::SlotTaken { slot });
        }
        for (slot, other) in self.bindings.of(vm) {
            if other.gfns().overlaps(gfns) {
                return Err(Refusal::GfnsTaken { gfns, slot });
            }
            if other.pages.overlaps(pages) {
                return Err(Refusal::PagesTaken { range: pages, slot });
            }
        }
        let mut binding = Binding::new(gfn, pages, self.config.geometry);
        if self.plants.has(Bug::NoCongruence) {
            binding.congruent = Level::Size1G;
        }
        self.bindings.0.insert((vm, slot), binding);
        Ok(binding)
    }

    /// A binding, by its slot.
    ///
    /// # Errors
    /// [`Refusal::NoSuchSlot`].
    pub fn binding(&self, vm: VmId, slot: Slot) -> Result<Binding, Refusal> {
        self.bindings.0.get(&(vm, slot)).copied().ok_or(Refusal::NoSuchSlot { slot })
    }

    /// Removes a binding, and what it wished; no page is freed.
    ///
    /// # Errors
    /// [`Refusal::NoSuchSlot`].
    pub fn unbind(&mut self, vm: VmId, slot: Slot) -> Result<(), Refusal> {
        self.binding(vm, slot)?;
        self.bindings.0.remove(&(vm, slot));
        self.wishes.forget(vm, slot);
        Ok(())
    }

    /// The pages behind guest frames of a VM, in runs.
    ///
    /// # Errors
    /// [`Refusal::Unbound`] unless every frame is bound.
    pub fn pages_of(&self, vm: VmId, gfns: GfnRange) -> Result<Vec<PageRange>, Refusal> {
        let unbound = Refusal::Unbound { gfns };
        let mut runs: Vec<PageRange> = Vec::new();
        let mut next = gfns.start().get();
        while next < gfns.end() {
            let gfn = Gfn::new(next).ok_or_else(|| unbound.clone())?;
            let binding = self.bindings.of(vm).find(|(_, binding)| binding.gfns().contains(gfn));
            let (_, binding) = binding.ok_or_else(|| unbound.clone())?;
            let end = binding.gfns().end().min(gfns.end());
            let count = PageCount::new(end - next).expect("shorter than the range");
            let page = binding.page(gfn).expect("the binding contains it");
            let run = PageRange::new(page, count).expect("within the binding");
            push_run(&mut runs, run);
            next = end;
        }
        Ok(runs)
    }

    /// Every binding, with its VM and slot.
    pub fn bindings(&self) -> impl Iterator<Item = (VmId, Slot, &Binding)> {
        self.bindings.0.iter().map(|(&(vm, slot), binding)| (vm, slot, binding))
    }
}
