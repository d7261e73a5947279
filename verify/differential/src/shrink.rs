//! Shrinking: the smallest program that differs in the same way.
//!
//! Steps are taken out, many at a time and then one by one, and what is left is made simpler, as
//! long as the same kind of step comes to the same two outcomes.

use polder::Contents;
use polder::units::{PageCount, PageRange};
use polder_play::{Place, Scenario, Verb};

use crate::compare::{Came, Difference, Side, compare};

/// Tries that shrinking may take: a try is a program on two hosts.
const TRIES: usize = 600;

/// The smallest program that is found to differ as this one does. `go_on` is asked before each try.
pub fn shrink(found: Difference, sides: &[Side; 2], mut go_on: impl FnMut() -> bool) -> Difference {
    let mut shrinking = Shrinking { kind: found.kind(), best: found, sides, tries: 0 };
    // What comes after the difference does not matter.
    if let Some(step) = shrinking.best.step {
        let mut cut = shrinking.best.scenario.clone();
        cut.steps.truncate(step + 1);
        shrinking.attempt(cut, &mut go_on);
    }
    loop {
        let before = shrinking.best.scenario.clone();
        shrinking.steps(&mut go_on);
        shrinking.simpler(&mut go_on);
        if shrinking.best.scenario == before || shrinking.tries >= TRIES {
            return shrinking.best;
        }
    }
}

struct Shrinking<'s> {
    best: Difference,
    kind: (&'static str, [&'static str; 2]),
    sides: &'s [Side; 2],
    tries: usize,
}

impl Shrinking<'_> {
    /// Whether a program differs in the same way; then it is the best.
    fn attempt(&mut self, mut program: Scenario, go_on: &mut impl FnMut() -> bool) -> bool {
        if self.tries >= TRIES || !go_on() {
            return false;
        }
        self.tries += 1;
        program.expect.clear();
        match compare(&program, self.sides) {
            Came::Differs(found) if found.kind() == self.kind => {
                // The recorder adds what has to be there: it may be no smaller.
                let smaller = weight(&found.scenario) < weight(&self.best.scenario);
                if smaller {
                    self.best = *found;
                }
                smaller
            }
            _ => false,
        }
    }

    /// Takes out steps: halves, quarters, and so on, from the end.
    fn steps(&mut self, go_on: &mut impl FnMut() -> bool) {
        let mut chunk = self.best.scenario.steps.len().div_ceil(2);
        while chunk > 0 {
            let mut end = self.best.scenario.steps.len();
            while end > 0 {
                let start = end.saturating_sub(chunk);
                let mut program = self.best.scenario.clone();
                program.steps.drain(start..end);
                self.attempt(program, go_on);
                end = start.min(self.best.scenario.steps.len());
            }
            chunk /= 2;
        }
    }

    /// Makes what is left simpler.
    fn simpler(&mut self, go_on: &mut impl FnMut() -> bool) {
        let mut at = 0;
        while let Some(step) = self.best.scenario.steps.get(at).cloned() {
            let mut simpler = Vec::new();
            if step.hold.is_some() {
                simpler.push(polder_play::Step { hold: None, ..step.clone() });
            }
            simpler.extend(
                verbs(&step.verb)
                    .into_iter()
                    .map(|verb| polder_play::Step { verb, ..step.clone() }),
            );
            for step in simpler {
                let mut program = self.best.scenario.clone();
                if let Some(place) = program.steps.get_mut(at) {
                    *place = step;
                }
                self.attempt(program, go_on);
            }
            at += 1;
        }
        for program in smaller_worlds(&self.best.scenario) {
            self.attempt(program, go_on);
        }
    }
}

/// The same with less in it.
fn verbs(verb: &Verb) -> Vec<Verb> {
    let places = |place: Place| match place {
        Place::Pages(range) if range.count().get() > 1 => {
            let (start, end) = (range.start().get(), range.end());
            let parts = [(start, start + 1), (end - 1, end), (start, end - 1), (start + 1, end)];
            let parts = parts.into_iter().filter_map(|(start, end)| PageRange::between(start, end));
            parts.map(Place::Pages).collect()
        }
        Place::Gpa(gpa, count) if count.get() > 1 => {
            PageCount::new(1).map(|one| Place::Gpa(gpa, one)).into_iter().collect()
        }
        _ => Vec::new(),
    };
    match verb.clone() {
        Verb::Convert { place, to, contents, wait } => {
            let with = |place| Verb::Convert { place, to, contents, wait };
            let mut verbs: Vec<_> = places(place).into_iter().map(with).collect();
            if contents != Contents::Unspecified {
                verbs.push(Verb::Convert { place, to, contents: Contents::Unspecified, wait });
            }
            if !wait {
                verbs.push(Verb::Convert { place, to, contents, wait: true });
            }
            verbs
        }
        Verb::Discard { place } => {
            places(place).into_iter().map(|place| Verb::Discard { place }).collect()
        }
        Verb::Fail { place } => {
            places(place).into_iter().map(|place| Verb::Fail { place }).collect()
        }
        Verb::Populate { place, bytes } => {
            let with = |place| Verb::Populate { place, bytes: bytes.clone() };
            places(place).into_iter().map(with).collect()
        }
        Verb::Pin { place, kind, name } => {
            let with = |place| Verb::Pin { place, kind, name: name.clone() };
            places(place).into_iter().map(with).collect()
        }
        _ => Vec::new(),
    }
}

/// The same steps on less: without what nobody names.
fn smaller_worlds(scenario: &Scenario) -> Vec<Scenario> {
    let mut worlds = Vec::new();
    let mut push = |change: &dyn Fn(&mut Scenario)| {
        let mut world = scenario.clone();
        change(&mut world);
        if world != *scenario {
            worlds.push(world);
        }
    };
    push(&|world| {
        let names =
            |name: &str| scenario.steps.iter().any(|step| step.actor.as_deref() == Some(name));
        world.actors.retain(|name, actor| !actor.declared || names(name));
    });
    let last = scenario.vms.len() - 1;
    let named = scenario.actors.iter().any(|(name, actor)| {
        actor.vm == last && scenario.steps.iter().any(|step| step.actor.as_ref() == Some(name))
    });
    let meant = scenario.steps.iter().any(|step| match &step.verb {
        Verb::Want { vm, .. } | Verb::Bind { vm, .. } | Verb::Unbind { vm, .. } => *vm == last,
        _ => false,
    });
    if last > 0 && !named && !meant {
        push(&|world| {
            world.vms.pop();
            world.actors.retain(|_, actor| actor.vm != last);
        });
    }
    for (vm, spec) in scenario.vms.iter().enumerate() {
        for slot in 0..spec.slots.len() {
            push(&|world| {
                world.vms[vm].slots.remove(slot);
            });
        }
    }
    push(&|world| world.memory.owed = false);
    for pages in [2, 4, 8] {
        push(&|world| {
            let fits = |slot: &polder_play::SlotSpec| slot.pages.end() <= pages;
            if pages < world.memory.pages.get() {
                world.memory.pages = PageCount::new(pages).unwrap_or(world.memory.pages);
                for vm in &mut world.vms {
                    for slot in &mut vm.slots {
                        let start = slot.pages.start().get();
                        let cut = PageRange::between(start, slot.pages.end().min(pages));
                        slot.pages = cut.unwrap_or(slot.pages);
                    }
                    vm.slots.retain(fits);
                }
            }
        });
    }
    worlds
}

/// How much there is to read in a scenario.
fn weight(scenario: &Scenario) -> (usize, u64) {
    let place = |place: &Place| match place {
        Place::Pages(range) => range.count().get(),
        Place::Gpa(_, count) => count.get(),
    };
    let step = |step: &polder_play::Step| {
        u64::from(step.hold.is_some())
            + match &step.verb {
                Verb::Convert { place: it, contents, wait, .. } => {
                    place(it) + u64::from(*contents != Contents::Unspecified) + u64::from(!wait)
                }
                Verb::Discard { place: it }
                | Verb::Fail { place: it }
                | Verb::Populate { place: it, .. }
                | Verb::Pin { place: it, .. } => place(it),
                _ => 0,
            }
    };
    let slots: usize = scenario.vms.iter().map(|vm| vm.slots.len() + 1).sum();
    let declared = scenario.actors.values().filter(|actor| actor.declared).count();
    let world =
        scenario.memory.pages.get() + (slots + declared) as u64 + u64::from(scenario.memory.owed);
    (scenario.steps.len(), scenario.steps.iter().map(step).sum::<u64>() + world)
}
