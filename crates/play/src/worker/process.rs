//! A process of the machine's: its mapping, and the references that it takes by that.

use polder::machine::{
    GupFast, GupStep, Hva, PinId, PinKind as GupKind, ProcessId, Thread, View as Vma, VpnRange,
};
use polder::units::{PAGE_SIZE, PageIndex, PageRange};
use polder::{KernelPin, PinKind};

use super::{Acted, Worker, nobodys};
use crate::names::{Is, Kind};
use crate::outcome::{Outcome, Stop};
use crate::scenario::{Bytes, Place};

/// Where another process maps the memory: aligned to every level.
const PROCESS_VIEW: u64 = 1 << 18;

/// What `refer` and `gup-fast` take.
pub(super) enum Reference {
    Pin(PinId),
    /// Of another memory.
    Outlives(KernelPin),
}

impl Worker<'_> {
    /// The actor's own mapping, made when he first needs it.
    fn mapping(&mut self) -> Acted<(ProcessId, VpnRange)> {
        if let Some(mapping) = self.process {
            return Ok(mapping);
        }
        let pages = self.world.memory.pages();
        let mapping = match self.actor.kind {
            Kind::Process => self.world.inside(|machine, object, _| {
                let process = machine.create_process()?;
                let all = VpnRange::between(PROCESS_VIEW, PROCESS_VIEW + pages.get());
                let all = all.ok_or_else(|| Stop::new(Is::Range, "too large to be mapped"))?;
                machine.mmap(process, all, object, PageIndex::from(0), Vma::PLAIN)?;
                Ok((process, all))
            })?,
            _ => self.world.inside(|machine, object, process| {
                let all = PageRange::between(0, pages.get());
                let mut views = machine.views_of(object, all.ok_or_else(nobodys)?);
                let view = views.find(|(id, _)| *id == process);
                view.ok_or_else(|| Stop::new(Is::Failed, "there is no host view"))
            })?,
        };
        self.process = Some(mapping);
        Ok(mapping)
    }

    /// Where a byte is in the actor's mapping.
    pub(super) fn process_at(&mut self, bytes: &Bytes) -> Acted<(Thread, Hva)> {
        let (process, all) = self.mapping()?;
        let offset = self.world.offset(bytes.place, bytes.at, self.actor.vm)?;
        Ok((Thread { process, index: 0 }, Hva::new(all.start().get() * PAGE_SIZE + offset)))
    }

    /// Where a page is in the actor's mapping.
    fn vpns(&mut self, place: Place) -> Acted<(ProcessId, VpnRange)> {
        let (process, all) = self.mapping()?;
        let range = self.run(place)?;
        let vpns = VpnRange::between(
            all.start().get() + range.start().get(),
            all.start().get() + range.end(),
        );
        let vpns = vpns.filter(|vpns| all.contains_range(*vpns));
        let beyond = || Stop::new(Is::Beyond, format!("pages {range} are beyond the memory"));
        Ok((process, vpns.ok_or_else(beyond)?))
    }

    pub(super) fn refer(&mut self, place: Place, kind: PinKind, name: &str) -> Acted {
        self.check_free(name)?;
        let (process, vpns) = self.vpns(place)?;
        let kind = match kind {
            PinKind::Short => GupKind::Short,
            PinKind::LongTerm => GupKind::LongTerm,
            PinKind::Exclusive => GupKind::Exclusive,
        };
        let pin = self
            .world
            .inside(|machine, _, _| Ok(machine.pin_user_pages(process, vpns, true, kind)?))?;
        self.references.insert(name.to_owned(), Reference::Pin(pin));
        Ok(Outcome::done())
    }

    /// Has the kernel pin pages of another memory, which they outlive.
    pub(super) fn refer_to(&mut self, place: Place, of: &str, name: &str) -> Acted {
        self.check_free(name)?;
        let range = self.run(place)?;
        let pin = self.world.pin_other(of, range)?;
        self.references.insert(name.to_owned(), Reference::Outlives(pin));
        Ok(Outcome::done())
    }

    fn check_free(&self, name: &str) -> Acted<()> {
        match self.references.contains_key(name) {
            false => Ok(()),
            true => {
                Err(Stop::new(Is::Exists, format!("{} refers as \"{name}\" already", self.name)))
            }
        }
    }

    pub(super) fn release(&mut self, name: &str) -> Acted {
        match self.references.remove(name) {
            Some(Reference::Pin(pin)) => {
                self.world.inside(|machine, _, _| Ok(machine.unpin(pin)?))?;
            }
            Some(Reference::Outlives(pin)) => drop(pin),
            None => {
                let nothing = format!("{} refers to nothing as \"{name}\"", self.name);
                return Err(Stop::new(Is::NotPinned, nothing));
            }
        }
        Ok(Outcome::done())
    }

    pub(super) fn gup_fast(&mut self, place: Place, name: &str) -> Acted {
        let (step, what) = match self.gups.remove(name) {
            Some(gup) => (gup, "it has looked again"),
            None => {
                self.check_free(name)?;
                let (process, vpns) = self.vpns(place)?;
                let gup = GupFast::new(process, vpns.start(), true, GupKind::Short);
                (gup, "it has read the entry")
            }
        };
        match self.world.inside(|machine, _, _| Ok(step.step(machine)?))? {
            GupStep::Again(gup) => {
                let again = what == "it has looked again";
                self.gups.insert(name.to_owned(), gup);
                let what = if again { "it has a reference, and will look again" } else { what };
                Ok(Outcome::new(Is::Ok, what))
            }
            GupStep::Pinned(pin) => {
                self.references.insert(name.to_owned(), Reference::Pin(pin));
                Ok(Outcome::new(Is::Ok, "the page is pinned"))
            }
            GupStep::Fallback => {
                Err(Stop::new(Is::NotPinned, "the entry is gone; nothing is held"))
            }
        }
    }
}
