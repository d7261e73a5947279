//! What can be refused of the steps as a whole: what a host can't do, and what an actor can't yet.

use std::collections::BTreeMap;

use polder::HostKind;

use super::Reader;
use super::table::{Parsed, Table, wrong};
use crate::ScenarioError;
use crate::limits::STEPS_MAX;
use crate::names::{Is, Kind};
use crate::scenario::{By, Step, Verb};

impl<'t> Reader<'t> {
    /// Refuses steps that only the simulated machine has, where others are to play it too.
    pub(super) fn check_hosts(
        &self,
        table: &Table<'t>,
        step: &Step,
        hosts: &[HostKind],
    ) -> Parsed<()> {
        let Some(host) = hosts.iter().find(|host| **host != HostKind::Machine) else {
            return Ok(());
        };
        let kind =
            step.actor.as_ref().and_then(|name| self.actors.get(name)).map(|actor| actor.kind);
        let simulated = kind.is_some_and(Kind::is_simulated)
            || match &step.verb {
                Verb::Refer { .. } | Verb::Release { .. } | Verb::GupFast { .. } => true,
                Verb::Pvalidate { .. } | Verb::Pte { .. } | Verb::Audit => true,
                Verb::Prefault { by, .. } => *by == By::Reverse,
                Verb::Create { .. } | Verb::Drop { .. } => true,
                Verb::Look(look) => look.is_simulated(),
                _ => false,
            };
        if !simulated {
            return Ok(());
        }
        let what = format!("host {host} can't do this step: the simulated machine alone can");
        let meant = Some("leave it out, or say hosts = [\"machine\"]".to_owned());
        Err(ScenarioError { meant, ..wrong(self.text, table.span.clone(), what) })
    }

    /// Refuses an actor who does something while he is held, or goes on where he never was. What he
    /// may wait for can't be known here, but for what is expected.
    pub(super) fn check_order(&self, steps: &[Step], root: &Table<'t>) -> Parsed<()> {
        let tables = root.tables("step", STEPS_MAX)?;
        let mut amid: BTreeMap<&str, usize> = BTreeMap::new();
        for (step, table) in steps.iter().zip(&tables) {
            let Some(actor) = step.actor.as_deref() else { continue };
            let stays = match (&step.verb, step.hold) {
                (Verb::Resume { hold: Some(_) }, _) | (_, Some(_)) => {
                    matches!(step.expect.is, None | Some(Is::Held | Is::Waits))
                }
                _ => matches!(step.expect.is, Some(Is::Held | Is::Waits)),
            };
            let wrong = |what: String, meant: &str| {
                let error = wrong(self.text, table.span.clone(), what);
                Err(ScenarioError { meant: Some(meant.to_owned()), ..error })
            };
            match (&step.verb, amid.get(actor)) {
                (Verb::Resume { .. }, None) => {
                    let what = format!("\"{actor}\" is amid nothing that could be resumed");
                    return wrong(what, "hold a step of his first, or expect that it waits");
                }
                (Verb::Resume { .. }, Some(_)) => {}
                (_, Some(line)) => {
                    let what = format!("\"{actor}\" is still amid his step of line {line}");
                    return wrong(what, "resume it first, or have another actor do this");
                }
                (_, None) => {}
            }
            if stays {
                amid.insert(actor, step.line);
            } else {
                amid.remove(actor);
            }
        }
        let Some((actor, line)) = amid.into_iter().next() else { return Ok(()) };
        let what = format!("the scenario ends, and \"{actor}\" is amid this step");
        let meant = Some("resume it, and say what comes of it".to_owned());
        let at = steps.iter().zip(&tables).find(|(step, _)| step.line == line);
        let span = at.map_or(0..0, |(_, table)| table.span.clone());
        Err(ScenarioError { meant, ..wrong(self.text, span, what) })
    }
}
