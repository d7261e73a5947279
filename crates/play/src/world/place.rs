//! Where the pages that a step names are: in the object, and in a VM.

use polder::units::{Gfn, GfnRange, Gpa, PAGE_SIZE, PageIndex, PageRange};

use super::{Vm, World};
use crate::names::Is;
use crate::outcome::Stop;
use crate::scenario::Place;

impl World {
    /// The pages of a place, as a VM sees it.
    pub(crate) fn pages(&self, place: Place, vm: usize) -> Result<Vec<PageRange>, Stop> {
        match place {
            Place::Pages(range) => Ok(vec![range]),
            Place::Gpa(gpa, count) => {
                let gfns = GfnRange::new(gpa.gfn(), count)
                    .map_err(|error| Stop::new(Is::Range, error.to_string()))?;
                match self.vms.get(vm).map(|vm| (vm.id, vm.machine)) {
                    Some((Some(id), _)) => Ok(self.memory.pages_of(id, gfns)?),
                    Some((None, Some(machine_vm))) => self.inside(|machine, _, _| {
                        let page = |gfn| Ok(PageRange::one(machine.bound(machine_vm, gfn)?.page));
                        gfns.frames().map(page).collect()
                    }),
                    _ => Err(Stop::new(Is::Unbound, "there is no such VM")),
                }
            }
        }
    }

    /// Where a VM sees a place: its first guest frame.
    pub(crate) fn gfn(&self, place: Place, vm: usize) -> Result<Gfn, Stop> {
        let page = match place {
            Place::Gpa(gpa, _) => return Ok(gpa.gfn()),
            Place::Pages(range) => range.start(),
        };
        let unbound = || Stop::new(Is::Unbound, format!("the VM does not see page {page}"));
        let Vm { id, machine, .. } = self.vms.get(vm).ok_or_else(unbound)?;
        if let Some(id) = *id {
            let bindings = self.memory.bindings();
            let of_vm = bindings.iter().filter(|(vm, ..)| *vm == id);
            let found = of_vm.filter_map(|(_, _, binding)| {
                let into = page.checked_sub(binding.pages().start())?;
                binding.gfns().start().checked_add(into).filter(|gfn| binding.gfns().contains(*gfn))
            });
            return found.into_iter().next().ok_or_else(unbound);
        }
        let machine_vm = machine.ok_or_else(unbound)?;
        self.inside(|machine, object, _| {
            let mut shown = machine.gfns_of(object, PageRange::one(page));
            let found = shown.find(|(id, _)| *id == machine_vm);
            found.map(|(_, gfns)| gfns.start()).ok_or_else(unbound)
        })
    }

    /// The guest-physical address of a byte.
    pub(crate) fn gpa(&self, place: Place, at: u64, vm: usize) -> Result<Gpa, Stop> {
        let gpa = self.gfn(place, vm)?.gpa().checked_add(at);
        gpa.ok_or_else(|| Stop::new(Is::Range, "past the last guest-physical address"))
    }

    /// The offset of a byte in the object.
    pub(crate) fn offset(&self, place: Place, at: u64, vm: usize) -> Result<u64, Stop> {
        let pages = self.pages(place, vm)?;
        let first = pages.first().map_or(0, |range| range.start().get());
        Ok(first * PAGE_SIZE + at)
    }
}

/// The first page of a place, if it names pages of the object.
pub(crate) fn first_page(pages: &[PageRange]) -> Result<PageIndex, Stop> {
    pages.first().map(|range| range.start()).ok_or_else(|| Stop::new(Is::Range, "no page"))
}
