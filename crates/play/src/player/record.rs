//! Recording: plays a scenario whatever its steps come to, and notes that as what is expected.
//!
//! What can be done next depends on what came of the steps before, so the story is put right on the
//! way: an actor who is amid a step is resumed before he does another, and everybody at the end; a
//! step that nobody can do then is left out. So is one by which a second actor comes to wait: which
//! of two goes first, once they may, is chance. And one that changes slots while a guest waits: KVM
//! does not do that until its vCPU goes on ([`polder::Memory::unbind`]), and the machine does. And
//! a guest's access that waits while an operation is held: KVM asks nobody about it unless contents
//! are owed (`docs/memfd.md`).

use polder::HostKind;
use polder::units::PageRange;

use super::{Doing, Options, Player};
use crate::names::{Is, Kind};
use crate::outcome::Outcome;
use crate::report::{Played, Verdict};
use crate::scenario::{Expect, Look, Place, Scenario, Step, Verb};
use crate::state::states;

/// What was played, and what came of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recorded {
    /// The scenario as it was played, with what came of it as what is expected. It passes where it
    /// was recorded.
    pub scenario: Scenario,
    /// What was played, step by step: failed where it could not be played to its end, or where the
    /// machine's audit finds something then.
    pub played: Played,
}

/// Plays a scenario on a host whatever comes of its steps.
pub fn record(scenario: &Scenario, host: HostKind, options: Options<'_>) -> Recorded {
    let mut scenario = scenario.clone();
    loop {
        match once(&scenario, host, options) {
            Ok(recorded) => return recorded,
            Err(LeftOut(step)) => {
                scenario.steps.remove(step);
            }
        }
    }
}

/// This step comes to what differs from run to run, or from host to host.
struct LeftOut(usize);

fn once(scenario: &Scenario, host: HostKind, options: Options<'_>) -> Result<Recorded, LeftOut> {
    let mut noted = Noted {
        scenario: Scenario { steps: Vec::new(), expect: Vec::new(), ..scenario.clone() },
        played: Played::none(host, Verdict::Passed),
    };
    let mut player = match Player::new(scenario, host, options) {
        Ok(player) => player,
        Err(verdict) => {
            let played = Played::none(host, verdict);
            return Ok(Recorded { scenario: scenario.clone(), played });
        }
    };
    let mut told = player.note_all(&mut noted);
    if let Ok(None) = told {
        noted.scenario.expect = player.looks();
        told = player.audit_at_the_end().map(|()| None);
    }
    let ended = player.end();
    match told {
        Ok(Some(left_out)) => return Err(left_out),
        Ok(None) => noted.fail(ended),
        Err(why) => noted.fail(Err(why)),
    }
    let Noted { scenario, played } = noted;
    Ok(Recorded { scenario, played })
}

struct Noted {
    scenario: Scenario,
    played: Played,
}

impl Noted {
    fn fail(&mut self, ended: Result<(), String>) {
        if let Err(why) = ended {
            self.played.verdict = Verdict::Failed(why);
        }
    }
}

impl Player<'_> {
    /// Plays all steps, as far as they can be, and has everybody end his.
    fn note_all(&mut self, noted: &mut Noted) -> Result<Option<LeftOut>, String> {
        for (at, step) in self.scenario.steps.iter().enumerate() {
            let is_resume = matches!(step.verb, Verb::Resume { .. });
            let actor = step.actor.as_deref().unwrap_or_default();
            match (is_resume, self.is_amid(actor)) {
                (true, false) => continue,
                (false, true) => {
                    self.note(&resume(actor), noted)?;
                    if self.is_amid(actor) {
                        continue;
                    }
                }
                (true, true) | (false, false) => {}
            }
            let slots = matches!(step.verb, Verb::Bind { .. } | Verb::Unbind { .. });
            if slots && self.a_guest_waits() {
                continue;
            }
            self.note(step, noted)?;
            let held = self.actors.iter().any(|hand| matches!(hand.doing, Doing::Held(_)));
            if self.waiting() > 1 || held && self.a_guest_waits() {
                return Ok(Some(LeftOut(at)));
            }
        }
        self.note_ends(noted)?;
        let last = self.scenario.steps.len().saturating_sub(1);
        Ok((self.waiting() > 1).then_some(LeftOut(last)))
    }

    /// Has everybody end his step.
    fn note_ends(&mut self, noted: &mut Noted) -> Result<(), String> {
        let mut is_settled = false;
        while let Some(actor) = self.next_to_end() {
            self.note(&resume(&actor), noted)?;
            if !self.is_waiting(&actor) || self.next_to_end() != Some(actor.clone()) {
                continue;
            }
            // What he waits for is held by nobody, and so is owed.
            let vmm = self
                .scenario
                .actors
                .iter()
                .find(|(name, who)| who.kind == Kind::Vmm && !self.is_amid(name));
            let Some((vmm, _)) = vmm.filter(|_| !is_settled) else {
                return Err(format!("nobody can let \"{actor}\" go on"));
            };
            is_settled = true;
            self.note(&step(vmm, Verb::Settle), noted)?;
        }
        Ok(())
    }

    /// Who is to be resumed next: those who wait come last, for the others may be in their way.
    fn next_to_end(&self) -> Option<String> {
        let amid = |waits: bool| {
            self.numbers.iter().find(|(name, _)| {
                self.is_amid(name.as_str()) && self.is_waiting(name.as_str()) == waits
            })
        };
        amid(false).or_else(|| amid(true)).map(|(name, _)| name.clone())
    }

    fn is_amid(&self, actor: &str) -> bool {
        let number = self.numbers.get(actor);
        number.is_some_and(|number| self.actors[*number].doing != Doing::Nothing)
    }

    fn is_waiting(&self, actor: &str) -> bool {
        let number = self.numbers.get(actor);
        number.is_some_and(|number| self.actors[*number].doing == Doing::Waiting)
    }

    fn a_guest_waits(&self) -> bool {
        self.scenario
            .actors
            .iter()
            .any(|(name, who)| who.kind == Kind::Guest && self.is_waiting(name))
    }

    fn waiting(&self) -> usize {
        self.actors.iter().filter(|hand| hand.doing == Doing::Waiting).count()
    }

    /// Plays a step, and notes it with what it comes to.
    fn note(&mut self, step: &Step, noted: &mut Noted) -> Result<(), String> {
        let line = noted.scenario.steps.len() + 1;
        let mut step = Step { line, expect: Expect::default(), ..step.clone() };
        let played = self.step(&step);
        if let Ok(played) = &played {
            step.expect = expected(&step, &played.outcome);
        }
        noted.scenario.steps.push(step);
        noted.played.steps.push(super::PlayedStep { unmet: None, ..played? });
        Ok(())
    }

    /// What is so of all pages, run by run.
    fn looks(&self) -> Vec<Look> {
        let vms = self.world.names();
        let Some(all) = PageRange::between(0, self.world.memory.pages().get()) else {
            return Vec::new();
        };
        let mut looks: Vec<Look> = Vec::new();
        let states = states(&self.world.memory, (&vms, &self.names), all);
        for vm in 0..vms.len() {
            let first = looks.len();
            for (page, state) in &states {
                let wish = match state.unmet.contains(&vm) {
                    true => state.visibility.other(),
                    false => state.visibility,
                };
                let now = |place| Look {
                    line: 0,
                    place,
                    vm,
                    visibility: Some(state.visibility),
                    population: Some(state.population),
                    wanted: Some(wish),
                    host_view: None,
                    stage2: None,
                    accessed: None,
                    folio: None,
                    rmp: None,
                    validated: None,
                };
                let run = looks.get_mut(first..).and_then(<[Look]>::last_mut);
                if let Some(run) = run
                    && let Place::Pages(pages) = run.place
                    && now(run.place) == *run
                {
                    let longer = PageRange::between(pages.start().get(), page + 1);
                    run.place = Place::Pages(longer.unwrap_or(pages));
                } else if let Some(one) = PageRange::between(*page, page + 1) {
                    looks.push(now(Place::Pages(one)));
                }
            }
        }
        looks
    }
}

fn step(actor: &str, verb: Verb) -> Step {
    Step { line: 0, actor: Some(actor.to_owned()), verb, hold: None, expect: Expect::default() }
}

fn resume(actor: &str) -> Step {
    step(actor, Verb::Resume { hold: None })
}

/// What came of a step, as what is expected of it.
fn expected(step: &Step, outcome: &Outcome) -> Expect {
    let held = step.hold.is_some() || matches!(step.verb, Verb::Resume { hold: Some(_) });
    let usual = if held { Is::Held } else { Is::Ok };
    let bytes = outcome.bytes.clone().unwrap_or_default();
    let zeros = !bytes.is_empty() && bytes.iter().all(|byte| *byte == 0);
    Expect {
        is: Some(outcome.is).filter(|is| *is != usual),
        page: outcome.page,
        holder: outcome.holder.clone(),
        errno: outcome.errno.clone(),
        bytes: String::from_utf8(bytes).ok().filter(|text| !zeros && !text.is_empty()),
        zeros,
        converted: outcome.converted,
        done: outcome.prefaulted.map(|[done, ..]| done),
        skipped: outcome.prefaulted.map(|[_, skipped, _]| skipped),
        left: outcome.prefaulted.map(|[.., left]| left),
        ..Expect::default()
    }
}
