//! Wanted: what each binding wishes its pages to be (`MEMORY_ATTRIBUTE_PRIVATE` of
//! `KVM_SET_MEMORY_ATTRIBUTES`), next to what is granted, which is a fact of the page.
//!
//! A wish changes nothing. Where the VMM decides, a conversion is the wish and the grant in one: by
//! the VMM for all bindings, or for those of the one VM whose guest asked. What is granted so
//! overrides no other binding's wish: it stays, and is reported as unmet. Bindings that disagree
//! about a page show as such: one of them is unmet.
//!
//! Where the guest decides (pKVM), a wish stays one until the guest has asked.
//!
//! Kept is where a wish differs from what is granted, which is nowhere as a rule.

use alloc::collections::BTreeMap;
use alloc::collections::btree_map::Entry;
use alloc::vec::Vec;

use polder_units::{GfnRange, PageRange};

use crate::plant::Bug;
use crate::{Blocked, Engine, RangeSet, Refusal, Slot, Visibility, VmId};

/// What a binding wishes a run of its pages to be, and what they are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Wish {
    /// The pages.
    pub pages: PageRange,
    /// What they are.
    pub granted: Visibility,
    /// What the binding wishes.
    pub wanted: Visibility,
}

/// For each binding with an unmet wish, the pages where it differs from what is granted.
#[derive(Clone, Default, Hash, Debug)]
pub(crate) struct Wishes(BTreeMap<(VmId, Slot), RangeSet>);

impl Wishes {
    pub(crate) fn forget(&mut self, vm: VmId, slot: Slot) {
        self.0.remove(&(vm, slot));
    }

    fn differs(&self, vm: VmId, slot: Slot, range: PageRange) -> Vec<PageRange> {
        let set = self.0.get(&(vm, slot));
        set.into_iter().flat_map(|set| set.within(range)).collect()
    }

    /// Notes whether the wishes for a range differ from what is granted.
    fn note(&mut self, vm: VmId, slot: Slot, range: PageRange, differ: bool) {
        if differ {
            self.0.entry((vm, slot)).or_default().insert(range);
        } else if let Entry::Occupied(mut set) = self.0.entry((vm, slot)) {
            set.get_mut().remove(range);
            if set.get().is_empty() {
                set.remove();
            }
        }
    }
}

impl Engine {
    /// Notes what a VM wishes pages to be. A new binding wishes for what is granted.
    ///
    /// # Errors
    /// [`Refusal::Unbound`] unless every frame is bound. Busy where an operation holds one of the
    /// pages: a conversion grants what was wished when it was asked for, and may not take a later
    /// wish for met.
    pub fn want(&mut self, vm: VmId, gfns: GfnRange, to: Visibility) -> Result<(), Blocked> {
        let runs = self.pages_of(vm, gfns)?;
        for &run in &runs {
            self.check_claims(run)?;
        }
        for run in runs {
            if self.plants.has(Bug::WantedIsGranted) {
                self.pages.set_visibility(run, to);
            }
            let shown: Vec<_> = self.shown(vm, run).collect();
            shown.into_iter().for_each(|(slot, pages)| self.wish(vm, slot, pages, to));
        }
        Ok(())
    }

    /// Notes what a binding wishes some of its pages to be.
    pub(crate) fn wish(&mut self, vm: VmId, slot: Slot, range: PageRange, to: Visibility) {
        for (run, facts) in self.pages.runs(range) {
            self.wishes.note(vm, slot, run, facts.visibility != to);
        }
    }

    /// What a VM wishes its pages to be, and what they are, in runs.
    ///
    /// # Errors
    /// [`Refusal::Unbound`] unless every frame is bound.
    pub fn wanted(&self, vm: VmId, gfns: GfnRange) -> Result<Vec<Wish>, Refusal> {
        let mut wishes = Vec::new();
        for run in self.pages_of(vm, gfns)? {
            let mut shown: Vec<_> = self.shown(vm, run).collect();
            shown.sort_by_key(|(_, pages)| pages.start());
            for (slot, pages) in shown {
                wishes.extend(self.wishes_of(vm, slot, pages));
            }
        }
        Ok(wishes)
    }

    /// What a binding wishes some of its pages to be, in runs.
    pub(crate) fn wishes_of(&self, vm: VmId, slot: Slot, range: PageRange) -> Vec<Wish> {
        let mut wishes = Vec::new();
        for (pages, facts) in self.pages.runs(range) {
            let granted = facts.visibility;
            let mut rest = Some(pages);
            for differs in self.wishes.differs(vm, slot, pages) {
                let before = rest
                    .and_then(|rest| PageRange::between(rest.start().get(), differs.start().get()));
                wishes.extend(before.map(|pages| Wish { pages, granted, wanted: granted }));
                wishes.push(Wish { pages: differs, granted, wanted: granted.other() });
                rest = PageRange::between(differs.end(), pages.end());
            }
            wishes.extend(rest.map(|pages| Wish { pages, granted, wanted: granted }));
        }
        wishes
    }

    /// Every wish that is not what is granted, by the binding whose it is.
    pub fn unmet(&self) -> impl Iterator<Item = (VmId, Slot, Wish)> {
        self.wishes.0.iter().flat_map(move |(&(vm, slot), set)| {
            set.runs().flat_map(|run| self.pages.runs(run)).map(move |(pages, facts)| {
                let granted = facts.visibility;
                (vm, slot, Wish { pages, granted, wanted: granted.other() })
            })
        })
    }

    /// Notes that pages are granted as `by` asked, or the VMM for all: those of `asked` are as
    /// wished; the others' wishes stay what they were, while `changed` became the other kind.
    pub(crate) fn grant(&mut self, by: Option<VmId>, asked: &[PageRange], changed: &[PageRange]) {
        if let Some(by) = by {
            let others: Vec<_> = self
                .bindings()
                .filter(|(vm, ..)| *vm != by)
                .map(|(vm, slot, _)| (vm, slot))
                .collect();
            for (vm, slot) in others {
                let shown: Vec<PageRange> = changed
                    .iter()
                    .flat_map(|&run| self.shown(vm, run))
                    .filter_map(|(of, pages)| (of == slot).then_some(pages))
                    .collect();
                for pages in shown {
                    let met = self.wishes.differs(vm, slot, pages);
                    self.wishes.note(vm, slot, pages, true);
                    met.into_iter().for_each(|run| self.wishes.note(vm, slot, run, false));
                }
            }
        }
        asked.iter().for_each(|&run| self.note_wish(by, run, false));
    }

    /// Notes whether the wishes of a VM's bindings, or of all, differ from what is granted.
    fn note_wish(&mut self, of: Option<VmId>, range: PageRange, differ: bool) {
        if !differ && self.wishes.0.is_empty() {
            // As a rule: every conversion comes by here.
            return;
        }
        let bindings: Vec<_> = self
            .bindings()
            .filter(|(vm, ..)| of.is_none_or(|of| of == *vm))
            .filter_map(|(vm, slot, it)| Some((vm, slot, it.pages().intersection(range)?)))
            .collect();
        for (vm, slot, pages) in bindings {
            self.wishes.note(vm, slot, pages, differ);
        }
    }

    /// The slots of a VM that show pages of a range, and which.
    fn shown(&self, of: VmId, range: PageRange) -> impl Iterator<Item = (Slot, PageRange)> {
        self.bindings()
            .filter(move |(vm, ..)| *vm == of)
            .filter_map(move |(_, slot, it)| Some((slot, it.pages().intersection(range)?)))
    }
}
