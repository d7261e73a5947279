//! What is private is not in the kernel's direct map, where that was asked for
//! ([`Builder::off_direct_map`](crate::Builder::off_direct_map)).
//!
//! A page goes in the hold of the machine's lock that gives it memory, so that no way of populating
//! it can forget to; one that has memory already goes with its conversion. Whatever the kernel itself
//! has to do to such a page (write what is populated, copy what moves) it does by a mapping for just
//! that, in one hold of the lock. What is shared is in the direct map, and what is freed is put back
//! before.

use polder_engine::{RangeSet, Visibility};
use polder_machine::Machine;
use polder_units::{PageRange, PfnRange};

use super::MachineHost;
use crate::sync::Mutex;

/// The pages that are private.
pub(super) struct DirectMap(Mutex<RangeSet>);

impl MachineHost {
    /// The same, with what is private off the direct map, from these pages on.
    pub(crate) fn off_direct_map(self, private: Option<PageRange>) -> Self {
        let mut pages = RangeSet::default();
        private.into_iter().for_each(|range| pages.insert(range));
        Self { direct_map: Some(DirectMap(Mutex::new(pages))), ..self }
    }

    /// Takes those of the pages out of the direct map that are private and have memory.
    pub(super) fn take_off(&self, machine: &mut Machine, range: PageRange) {
        let Some(DirectMap(private)) = &self.direct_map else { return };
        for run in private.lock().within(range) {
            for frame in self.frames(machine, run) {
                machine.direct_map_remove(frame).expect("the frame is the object's");
            }
        }
    }

    /// Puts the memory of pages back into it.
    fn put_back(&self, machine: &mut Machine, range: PageRange) {
        if self.direct_map.is_some() {
            let frames = self.frames(machine, range);
            frames.into_iter().for_each(|frame| machine.direct_map_restore(frame));
        }
    }

    /// The frames of those of the pages that have memory, one by one.
    fn frames(&self, machine: &Machine, range: PageRange) -> Vec<PfnRange> {
        let backing = |page| machine.backing(self.object, page).expect("the object is ours");
        range.frames().filter_map(backing).map(|backing| PfnRange::one(backing.pfn)).collect()
    }

    /// Does something to pages that the kernel needs its direct map for.
    pub(super) fn mapped_directly<T>(
        &self,
        machine: &mut Machine,
        range: PageRange,
        act: impl FnOnce(&mut Machine) -> T,
    ) -> T {
        self.put_back(machine, range);
        let done = act(machine);
        self.take_off(machine, range);
        done
    }

    /// Notes what pages become.
    pub(super) fn follow(&self, range: PageRange, to: Visibility) {
        let Some(DirectMap(private)) = &self.direct_map else { return };
        let machine = &mut *self.lock();
        match to {
            Visibility::Private => {
                private.lock().insert(range);
                self.take_off(machine, range);
            }
            Visibility::Shared => {
                private.lock().remove(range);
                self.put_back(machine, range);
            }
        }
    }
}
