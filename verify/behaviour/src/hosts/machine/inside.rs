//! What can be done and seen inside the simulated machine.

use polder::Memory;
use polder::machine::{
    Component, GupFast, GupStep, HostExit, Hva, LockOwner, PinId, PinKind, RmpEntry, RmpSize,
    Thread, VpnRange,
};
use polder::units::{Level, PAGE_SIZE, PageIndex, PageRange};

use super::{HOST_VIEW, Machine, vpn};
use crate::host::Inside;

/// Another processor, or the kernel on it.
const OTHER: LockOwner = LockOwner(7);

impl Inside for Machine {
    fn refer<'a>(&self, memory: &'a Memory, page: PageIndex) -> Box<dyn Send + 'a> {
        touch(memory, page);
        let pin = memory.simulated(|machine, _, process| {
            machine.pin_user_pages(process, VpnRange::one(vpn(page)), true, PinKind::LongTerm)
        });
        let pin = pin.expect("memory of this host").expect("a page that is mapped");
        Box::new(Reference { memory, pin })
    }

    fn fail(&self, _: &Memory, _: PageIndex) {
        panic!("memory that fails is not applicable to the machine, and declared so");
    }

    fn touch_in_child(&self, memory: &Memory, page: PageIndex) -> Option<u8> {
        let read = memory.simulated(|machine, _, process| {
            let child = machine.fork(process).expect("a process");
            let mut byte = [0];
            let thread = Thread { process: child, index: 0 };
            let read = machine.host_read(thread, hva(page), &mut byte);
            machine.exit_process(child).expect("the child");
            read.is_ok().then_some(byte[0])
        });
        read.expect("memory of this host")
    }

    fn touch_in_other(&self, _: &Memory, _: PageIndex) -> Option<u8> {
        panic!("another process's mapping is not applicable to the machine, and declared so");
    }

    fn stray_touch_ends(&self, memory: &Memory, page: PageIndex) -> bool {
        // The first touch waits for its answer; the pointer meets what that left behind.
        let _ = memory.host_view().touch_read(page.offset(), &mut [0]);
        let exit = memory.simulated(|machine, _, process| {
            let thread = Thread { process, index: 0 };
            machine.host_read(thread, hva(page), &mut [0])
        });
        matches!(exit.expect("memory of this host"), Err(HostExit::Sigbus { .. }))
    }

    fn gup_fast_across(&self, memory: &Memory, page: PageIndex, between: &mut dyn FnMut()) -> bool {
        touch(memory, page);
        let pinned = memory.simulated(|machine, _, process| {
            let begun = GupFast::new(process, vpn(page), true, PinKind::Short);
            match begun.step(machine) {
                Ok(GupStep::Again(begun)) => begun,
                other => panic!("the page is mapped: {other:?}"),
            }
        });
        let mut gup = pinned.expect("memory of this host");
        between();
        loop {
            let step = memory.simulated(|machine, _, _| gup.step(machine));
            match step.expect("memory of this host").expect("nobody else releases its pin") {
                GupStep::Again(next) => gup = next,
                GupStep::Pinned(pin) => {
                    drop(Reference { memory, pin });
                    return true;
                }
                GupStep::Fallback => return false,
            }
        }
    }

    fn rmp(&self, memory: &Memory, page: PageIndex) -> (bool, bool) {
        let entry = memory.simulated(|machine, object, _| {
            let backing = machine.backing(object, page).expect("the object")?;
            machine.rmp_entry(backing.pfn)
        });
        let entry = entry.expect("memory of this host");
        let is_large = |entry: RmpEntry| entry.size == RmpSize::Size2M;
        entry.map_or((false, false), |entry| (entry.assigned, is_large(entry)))
    }

    fn mapped_at(&self, memory: &Memory, page: PageIndex) -> Option<Level> {
        let level = memory.simulated(|machine, object, _| {
            let (vm, gfns) = machine.gfns_of(object, PageRange::one(page)).next()?;
            machine.spte(vm, gfns.start()).expect("its VM").map(|spte| spte.level)
        });
        level.expect("memory of this host")
    }

    fn huge_folio(&self, memory: &Memory, page: PageIndex) {
        let made =
            memory.simulated(|machine, object, _| machine.allocate(object, page, Level::Size2M));
        made.expect("memory of this host").expect("a free block of 2M");
    }

    fn gigabyte_folio(&self, memory: &Memory) {
        let first = PageIndex::from(0);
        let made =
            memory.simulated(|machine, object, _| machine.allocate(object, first, Level::Size1G));
        made.expect("memory of this host").expect("a free block of 1G");
    }

    fn split(&self, memory: &Memory, page: PageIndex) {
        let split = memory.simulated(|machine, object, _| {
            let backing = machine.backing(object, page)?.expect("a page with memory");
            machine.lock_folio(backing.pfn, OTHER)?;
            let gfns: Vec<_> = machine.gfns_of(object, PageRange::one(page)).collect();
            gfns.into_iter().try_for_each(|(vm, gfns)| machine.tdp_zap(vm, gfns).map(|_| ()))?;
            machine.split_folio(object, page, OTHER)?;
            machine.unlock_folio(backing.pfn, OTHER)
        });
        split.expect("memory of this host").expect("nobody refers to it");
    }

    fn collapse(&self, memory: &Memory, page: PageIndex) {
        let collapsed = memory.simulated(|machine, object, _| {
            let range = PageRange::enclosing(page, Level::Size2M, machine.geometry());
            let gfns: Vec<_> = machine.gfns_of(object, range).collect();
            gfns.into_iter().try_for_each(|(vm, gfns)| machine.tdp_zap(vm, gfns).map(|_| ()))?;
            machine.merge_folios(object, page, Level::Size2M, OTHER)
        });
        collapsed.expect("memory of this host").expect("one block of frames");
    }

    fn while_in_use(&self, memory: &Memory, page: PageIndex, run: &mut dyn FnMut()) {
        let at = |machine: &polder::machine::Machine, object| {
            machine.backing(object, page).expect("the object").expect("a page with memory").pfn
        };
        let held = memory.simulated(|machine, object, _| {
            machine.rmp_hold(at(machine, object), RmpSize::Size4K, OTHER)
        });
        held.expect("memory of this host").expect("nobody else has it in use");
        run();
        let released =
            memory.simulated(|machine, object, _| machine.rmp_release(at(machine, object), OTHER));
        released.expect("memory of this host").expect("it is held");
    }

    fn while_locked(&self, memory: &Memory, page: PageIndex, run: &mut dyn FnMut()) {
        let locked = memory.simulated(|machine, object, _| {
            let backing = machine.backing(object, page).expect("the object");
            let pfn = backing.expect("a page with memory").pfn;
            machine.lock_folio(pfn, OTHER).map(|()| pfn)
        });
        let pfn = locked.expect("memory of this host").expect("nobody else has it locked");
        run();
        let unlocked = memory.simulated(|machine, _, _| machine.unlock_folio(pfn, OTHER));
        unlocked.expect("memory of this host").expect("it is locked");
    }

    fn frames(&self, memory: &Memory, range: PageRange) -> Vec<u64> {
        let frames = memory.simulated(|machine, object, _| {
            let folios = machine.folios(object, range).expect("the object");
            folios.map(|(_, backing)| backing.pfn.get()).collect()
        });
        frames.expect("memory of this host")
    }

    fn is_donated(&self, memory: &Memory, page: PageIndex) -> Option<bool> {
        let donated = memory.simulated(|machine, object, _| {
            let backing = machine.backing(object, page).expect("the object")?;
            let owner = machine.owner_of(backing.pfn).expect("a machine with pKVM");
            Some(matches!(owner, Component::Guest(_)))
        });
        donated.expect("memory of this host")
    }

    fn fail_hypervisor(&self, memory: &Memory, nth: u64) {
        let failing = memory.simulated(|machine, _, _| machine.fail_hypervisor(Some(nth)));
        failing.expect("memory of this host");
    }

    fn refer_to_file<'a>(&self, memory: &'a Memory, page: PageIndex) -> Box<dyn Send + 'a> {
        let pin = memory.simulated(|machine, object, process| {
            let kind = PinKind::LongTerm;
            machine.pin_object_pages(process, object, PageRange::one(page), kind)
        });
        let pin = pin.expect("memory of this host").expect("a page of the object");
        Box::new(Reference { memory, pin })
    }

    fn off_direct_map(&self, memory: &Memory, range: PageRange) -> Vec<u64> {
        let off = memory.simulated(|machine, object, _| {
            let is_off = |page: &PageIndex| {
                let backing = machine.backing(object, *page).expect("the object");
                backing.is_some_and(|backing| !machine.is_in_direct_map(backing.pfn))
            };
            range.frames().filter(is_off).map(PageIndex::get).collect()
        });
        off.expect("memory of this host")
    }

    fn audit(&self, memory: &Memory) -> Result<(), String> {
        let audit = memory.simulated(|machine, _, _| machine.audit());
        audit.expect("memory of this host").map_err(|wrong| wrong.to_string())
    }
}

/// Has a shared page mapped in the host view.
fn touch(memory: &Memory, page: PageIndex) {
    memory.host_view().touch_read(page.offset(), &mut [0]).expect("a shared page");
}

fn hva(page: PageIndex) -> Hva {
    Hva::new(HOST_VIEW * PAGE_SIZE + page.offset())
}

/// A pin that Polder knows nothing of.
struct Reference<'a> {
    memory: &'a Memory,
    pin: PinId,
}

impl Drop for Reference<'_> {
    fn drop(&mut self) {
        let unpinned = self.memory.simulated(|machine, _, _| machine.unpin(self.pin));
        assert!(matches!(unpinned, Ok(Ok(()))), "a pin is released once: {unpinned:?}");
    }
}
