//! Page tables that a VM's guest has in its own memory, to itself or to its guest: for stories
//! about other roots than TDP.
//!
//! They map linear addresses, or L2's guest-physical ones, to the guest frames of the same numbers:
//! a page has the same address whatever root translates it.

use polder::machine::{Intercept, L2, Pte};
use polder::units::{Gfn, GfnRange, Gpa, PageRange};
use polder::{Error, MachineVcpu, Memory, Prefaulted, Vcpu, Visibility, VmId};
use polder_vmm::GuestRoot;

use crate::names::Is;
use crate::outcome::Stop;
use crate::scenario::{By, Tables};

/// How many pages they take: one a level.
pub(crate) const TABLES: u64 = 4;
/// What one of the last level maps.
const MAPPED: u64 = 512;

/// The tables as the guest knows them: at which frames.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    root: GuestRoot,
    top: Gfn,
}

impl Placed {
    /// Has a guest make the tables, for the frames of a slot, all but those from the tables on.
    pub(crate) fn new(
        (memory, id): (&Memory, VmId),
        tables: Tables,
        slot: (Gfn, PageRange),
    ) -> Result<Self, Stop> {
        let (first, pages) = slot;
        let at = tables.first.checked_sub(pages.start().get());
        let top = at.and_then(|at| first.checked_add(polder::units::PageCount::new(at)?));
        let fits = tables.first.checked_add(TABLES).is_some_and(|end| end <= pages.end());
        let last = first.get() + pages.count().get() - 1;
        let top = top.filter(|_| fits && first.get() / MAPPED == last / MAPPED);
        let top = top.ok_or_else(|| {
            Stop::new(
                Is::Range,
                "the VM's first slot has the tables, and lies in one 2M of its own",
            )
        })?;
        let placed = Self { root: tables.root, top };
        // Before it has turned paging on.
        let vcpu = memory.machine_vcpu(id)?;
        for level in (2..=4u8).rev() {
            let table = frame(top, u64::from(4 - level));
            placed.entry(&vcpu, table, index(first, level), frame(table, 1), Pte::ALL)?;
        }
        for gfn in first.get()..top.get() {
            let gfn = Gfn::new(gfn).expect("below the slot's end");
            placed.set(&vcpu, gfn, Pte::ALL)?;
        }
        Ok(placed)
    }

    /// Has a guest write the entry for a frame; the frame's own table is known to be there.
    pub(crate) fn set(&self, vcpu: &MachineVcpu, gfn: Gfn, bits: u64) -> Result<(), Stop> {
        self.entry(vcpu, frame(self.top, 3), index(gfn, 1), gfn, bits)
    }

    /// Whether the tables have an entry for a frame.
    pub(crate) fn covers(&self, gfn: Gfn) -> bool {
        gfn.get() / MAPPED == self.top.get() / MAPPED
    }

    fn entry(
        &self,
        vcpu: &MachineVcpu,
        table: Gfn,
        index: u64,
        to: Gfn,
        bits: u64,
    ) -> Result<(), Stop> {
        let at = Gpa::new(table.gpa().get() + index * 8);
        let entry = Pte::new(to, bits).0.to_le_bytes();
        Ok(vcpu.write(at, Visibility::Private, &entry)?)
    }

    /// Has a vCPU run on them.
    pub(crate) fn load(&self, vcpu: &MachineVcpu) -> Result<(), Error> {
        match self.root {
            GuestRoot::Tdp => Ok(()),
            GuestRoot::Shadow => vcpu.carry_out(Intercept::Cr3(Some(self.top))),
            GuestRoot::Nested => {
                vcpu.carry_out(Intercept::Vmrun(L2 { ncr3: Some(self.top), cr3: None }))
            }
        }
    }
}

fn frame(first: Gfn, number: u64) -> Gfn {
    Gfn::new(first.get() + number).expect("a frame of the slot")
}

/// Which entry of a table of a level is for a frame.
fn index(gfn: Gfn, level: u8) -> u64 {
    gfn.get() >> (9 * (u64::from(level) - 1)) & (MAPPED - 1)
}

/// Prefaults what a story names, by `by`.
pub(crate) fn prefault<'a>(
    (memory, id): (&Memory, VmId),
    vcpu: impl Into<Vcpu<'a>>,
    root: GuestRoot,
    gfns: GfnRange,
    by: By,
) -> Result<Prefaulted, Error> {
    match by {
        By::Root => root.prefault((memory, id), vcpu, gfns),
        By::Gpa => memory.prefault(id, vcpu, gfns),
        By::Reverse => memory.prefault_reverse(id, vcpu, gfns),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_found_by_nine_bits_a_level() {
        let gfn = Gfn::new((3 << 27) | (5 << 18) | (7 << 9) | 11).expect("a frame");
        assert_eq!([4, 3, 2, 1].map(|level| index(gfn, level)), [3, 5, 7, 11]);
    }
}
