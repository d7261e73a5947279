//! What the kernel that is the hypervisor does: steps and instructions of the machine.

use polder::machine::{LockOwner, Machine, ObjectId, RmpSize, RmpUpdate};
use polder::units::{Level, PageIndex, PageRange, Pfn};

use super::{Acted, Worker, nobodys};
use crate::names::Is;
use crate::outcome::{Outcome, Stop};
use crate::scenario::{Place, Verb};
use crate::world::{World, first_page};

impl Worker<'_> {
    /// What the machine's kernel does.
    pub(super) fn kernel(&mut self, verb: &Verb) -> Acted {
        let world = self.world;
        let by = LockOwner(100 + u32::try_from(self.number).unwrap_or(0));
        let pages = |place: Place| world.pages(place, self.actor.vm);
        match verb {
            Verb::Allocate { place, level } => {
                let pages = pages(*place)?;
                self.by_level(&pages, *level, |machine, object, page| {
                    machine.allocate(object, page, *level)?;
                    Ok(())
                })
            }
            Verb::NoMemory { after } => world.inside(|machine, _, _| {
                machine.fail_allocation(Some(*after));
                Ok(Outcome::done())
            }),
            Verb::Lock { place } => {
                world.add_locker(by);
                self.frame(&pages(*place)?, |machine, pfn| Ok(machine.lock_folio(pfn, by)?))
            }
            Verb::Unlock { place } => {
                self.frame(&pages(*place)?, |machine, pfn| Ok(machine.unlock_folio(pfn, by)?))
            }
            Verb::Split { place } => {
                let page = first_page(&pages(*place)?)?;
                world.inside(|machine, object, _| {
                    let level = machine.split_folio(object, page, by)?;
                    Ok(Outcome::new(Is::Ok, format!("into {level} folios")))
                })
            }
            Verb::Merge { place, level } => {
                let page = first_page(&pages(*place)?)?;
                world.inside(|machine, object, _| {
                    machine.merge_folios(object, page, *level, by)?;
                    Ok(Outcome::done())
                })
            }
            Verb::Map { place, vm, level } => self.map(*place, *vm, *level),
            Verb::Zap { place, vm } => self.zap(*place, *vm),
            Verb::Rmpupdate { place, vm, size, assign, immutable } => {
                self.rmpupdate(*place, *vm, (*size, *assign, *immutable))
            }
            Verb::Psmash { place } => {
                self.frame(&pages(*place)?, |machine, pfn| Ok(machine.psmash(pfn)?))
            }
            Verb::Unsmash { place } => {
                self.frame(&pages(*place)?, |machine, pfn| Ok(machine.page_unsmash(pfn)?))
            }
            Verb::Reclaim { place, size } => {
                let pages = pages(*place)?;
                self.by_level(&pages, size.level(), |machine, object, page| {
                    Ok(machine.page_reclaim(frame(machine, object, page)?, *size)?)
                })
            }
            Verb::RmpHold { place, size } => {
                self.frame(&pages(*place)?, |machine, pfn| Ok(machine.rmp_hold(pfn, *size, by)?))
            }
            Verb::RmpRelease { place } => {
                self.frame(&pages(*place)?, |machine, pfn| Ok(machine.rmp_release(pfn, by)?))
            }
            _ => Err(Stop::new(Is::Failed, "this is no step of the kernel's")),
        }
    }

    fn map(&self, place: Place, vm: usize, level: Level) -> Acted {
        let (gfn, vm) = (self.world.gfn(place, vm)?, machine_vm(self.world, vm)?);
        self.world.inside(|machine, _, _| {
            let resolved = machine.tdp_resolve(vm, gfn)?;
            let level = machine.tdp_map(&resolved, level, true)?;
            Ok(Outcome::new(Is::Ok, format!("at {level}")))
        })
    }

    fn zap(&self, place: Place, vm: usize) -> Acted {
        let (pages, vm) = (self.world.pages(place, vm)?, machine_vm(self.world, vm)?);
        self.world.inside(|machine, object, _| {
            for range in pages {
                let shown: Vec<_> = machine.gfns_of(object, range).collect();
                for (_, gfns) in shown.into_iter().filter(|(id, _)| *id == vm) {
                    machine.tdp_zap(vm, gfns)?;
                }
            }
            Ok(Outcome::done())
        })
    }

    fn rmpupdate(&self, place: Place, vm: usize, how: (RmpSize, bool, bool)) -> Acted {
        let (size, assign, immutable) = how;
        let pages = self.world.pages(place, vm)?;
        let (asid, id) = (self.world.vms[vm].asid, machine_vm(self.world, vm)?);
        self.by_level(&pages, size.level(), |machine, object, page| {
            let pfn = frame(machine, object, page)?;
            let update = if assign {
                let mut shown = machine.gfns_of(object, PageRange::one(page));
                let gfns = shown.find(|(shown, _)| *shown == id).map(|(_, gfns)| gfns);
                let unseen = || Stop::new(Is::Unbound, format!("the VM does not see page {page}"));
                let gfn = gfns.ok_or_else(unseen)?.start();
                RmpUpdate { assigned: true, size, immutable, gfn, asid }
            } else {
                RmpUpdate { immutable, ..RmpUpdate::shared(size) }
            };
            Ok(machine.rmpupdate(pfn, update)?)
        })
    }

    /// Does something to the frame of a place's first page.
    fn frame(
        &self,
        pages: &[PageRange],
        act: impl FnOnce(&mut Machine, Pfn) -> Acted<()>,
    ) -> Acted {
        let page = first_page(pages)?;
        self.world.inside(|machine, object, _| {
            let pfn = frame(machine, object, page)?;
            act(machine, pfn)?;
            Ok(Outcome::done())
        })
    }

    /// Does something to each page of a level, from the place's first page on.
    fn by_level(
        &self,
        pages: &[PageRange],
        level: Level,
        mut act: impl FnMut(&mut Machine, ObjectId, PageIndex) -> Acted<()>,
    ) -> Acted {
        self.world.inside(|machine, object, _| {
            let step = usize::try_from(machine.geometry().pages(level).get()).unwrap_or(usize::MAX);
            for page in pages.iter().flat_map(|range| range.frames().step_by(step)) {
                act(machine, object, page)?;
            }
            Ok(Outcome::done())
        })
    }
}

fn frame(machine: &Machine, object: ObjectId, page: PageIndex) -> Acted<Pfn> {
    let backing = machine.backing(object, page)?;
    let hole = || Stop::new(Is::Hole, format!("there is no memory behind page {page}"));
    Ok(backing.ok_or_else(hole)?.pfn)
}

fn machine_vm(world: &World, vm: usize) -> Acted<polder::machine::VmId> {
    world.vms[vm].machine.ok_or_else(nobodys)
}
