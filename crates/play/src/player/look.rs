//! What is so: of the pages that a step is about, of the pool, and of the machine as a whole.

use std::collections::VecDeque;

use polder::units::{PAGE_SIZE, PageCount, PageRange};
use polder::{PoolCounts, View};

use super::Player;
use crate::limits::LOOKED_MAX;
use crate::names::{Is, Kind};
use crate::outcome::{Outcome, Stop};
use crate::scenario::{Actor, Look, Place, Step, Verb};
use crate::state::{PageState, states};

impl Player<'_> {
    pub(super) fn audit_at_the_end(&self) -> Result<(), String> {
        let found = match self.world.memory.simulated(|machine, _, _| machine.audit()) {
            // Nobody can audit a real kernel.
            Err(_) | Ok(Ok(())) => None,
            Ok(Err(found)) => Some(found.to_string()),
        };
        match (&self.scenario.discrepancy, found) {
            (None, None) => Ok(()),
            (Some(says), Some(found)) if found.contains(says.as_str()) => Ok(()),
            (None, Some(found)) => Err(format!("the machine's audit: {found}")),
            (Some(says), Some(found)) => {
                Err(format!("the machine's audit: {found}; \"{says}\" was expected"))
            }
            (Some(says), None) => {
                Err(format!("the machine's audit is clean; \"{says}\" was expected"))
            }
        }
    }

    /// The pages that a step is about, as far as they can be told.
    pub(super) fn pages_of(&self, step: &Step, number: Option<usize>) -> Vec<PageRange> {
        if let (Verb::Resume { .. }, Some(number)) = (&step.verb, number) {
            return self.actors[number].pages.clone();
        }
        let actor = step.actor.as_ref().and_then(|name| self.scenario.actors.get(name));
        let Some(place) = step.verb.place() else { return Vec::new() };
        let vm = step.verb.vm().unwrap_or(actor.map_or(0, |actor| actor.vm));
        let Some(bytes) = step.verb.length() else {
            return self.world.pages(place, vm).unwrap_or_default();
        };
        // Those that it touches, whatever else the place has.
        let count = PageCount::new(bytes.div_ceil(PAGE_SIZE).max(1));
        let of = |count| match place {
            Place::Gpa(gpa, _) => self.world.pages(Place::Gpa(gpa, count), vm),
            Place::Pages(range) => {
                Ok(PageRange::new(range.start(), count).into_iter().collect::<Vec<_>>())
            }
        };
        let pages = count.and_then(|count| of(count).ok());
        pages.or_else(|| of(PageCount::ONE).ok()).unwrap_or_default()
    }

    /// Through which view a step touches its pages.
    pub(super) fn touches(
        &self,
        step: &Step,
        pages: &[PageRange],
    ) -> Option<(View, Vec<PageRange>)> {
        let actor: &Actor = self.scenario.actors.get(step.actor.as_ref()?)?;
        let view = match (&step.verb, actor.kind) {
            (Verb::Read { .. } | Verb::Write { .. }, Kind::Device) => View::Host,
            (Verb::Read { .. } | Verb::Write { .. }, Kind::Guest) => View::Guest,
            _ => return None,
        };
        Some((view, pages.to_vec()))
    }

    pub(super) fn states(&self, pages: &[PageRange]) -> Vec<(u64, PageState)> {
        let mut left = LOOKED_MAX;
        let vms = self.world.names();
        let mut found = Vec::new();
        for range in pages {
            let count = range.count().get().min(left);
            let Some(part) =
                PageCount::new(count).and_then(|count| PageRange::new(range.start(), count).ok())
            else {
                break;
            };
            left -= count;
            found.extend(states(&self.world.memory, (&vms, &self.names), part));
        }
        found
    }

    /// Checks what is so of pages.
    pub(super) fn look(&self, look: &Look) -> Result<(), Stop> {
        let mut pages: VecDeque<PageRange> = self.world.pages(look.place, look.vm)?.into();
        let vms = self.world.names();
        while let Some(range) = pages.pop_front() {
            // A piece at a time: what is looked at is kept.
            let end = range.end().min(range.start().get() + LOOKED_MAX);
            let Some(now) = PageRange::between(range.start().get(), end) else { break };
            pages.extend(PageRange::between(end, range.end()));
            for (page, state) in states(&self.world.memory, (&vms, &self.names), now) {
                if let Some(why) = look.unmet(&state) {
                    return Err(Stop::new(Is::Differs, format!("page {page}: {why}")));
                }
            }
        }
        Ok(())
    }

    pub(super) fn explain(&self, place: Place) -> Result<Outcome, Stop> {
        let pages = self.world.pages(place, 0)?;
        let Some(first) = pages.first() else { return Ok(Outcome::done()) };
        let explanation = self.world.memory.explain(first.start())?;
        // As it stands in what is told of a step.
        let text = explanation.to_string().trim_end().replace('\n', "\n          ");
        Ok(Outcome::new(Is::Ok, text))
    }

    pub(super) fn pool(&self) -> Outcome {
        match self.world.memory.pool() {
            Some(PoolCounts { total, free, reserved, pending }) => {
                let text =
                    format!("total {total}, free {free}, reserved {reserved}, pending {pending}");
                Outcome::new(Is::Ok, text)
            }
            None => Outcome::new(Is::NotOffered, "this memory is of no pool"),
        }
    }

    pub(super) fn audit(&self) -> Outcome {
        match self.world.memory.simulated(|machine, _, _| machine.audit()) {
            Ok(Ok(())) => Outcome::done(),
            Ok(Err(found)) => found.into(),
            Err(error) => error.into(),
        }
    }
}
