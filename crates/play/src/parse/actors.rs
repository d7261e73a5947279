//! `[[actor]]`: who there is, and who does a step.

use super::Reader;
use super::table::{Parsed, Table, short};
use crate::ScenarioError;
use crate::limits::ACTORS_MAX;
use crate::names::{Kind, VerbEntry};
use crate::scenario::Actor;

impl<'t> Reader<'t> {
    /// The actors that are declared, beside those that need not be.
    pub(super) fn read_actors(&mut self, root: &Table<'t>) -> Parsed<()> {
        let given = |kind: Kind| (kind.name().to_owned(), Actor { kind, vm: 0, declared: false });
        self.actors = Kind::ALL.map(given).into();
        for table in root.tables("actor", ACTORS_MAX)? {
            table.check_keys(&["name", "is", "vm"], "`[[actor]]`")?;
            let key = table.need("name", "`[[actor]]`")?;
            let name = key.text()?.to_owned();
            if self.actors.contains_key(&name) {
                return Err(key.wrong(format!("there is an actor \"{}\" already", short(&name))));
            }
            let kind = table.need("is", "`[[actor]]`")?.word(&Kind::ALL)?;
            let vm = self.vm(&table)?;
            self.actors.insert(name, Actor { kind, vm, declared: true });
        }
        Ok(())
    }

    pub(super) fn actor(&self, table: &Table<'t>, verb: &VerbEntry) -> Parsed<Option<String>> {
        if verb.who.is_empty() {
            return match table.get("actor") {
                None => Ok(None),
                Some(key) => Err(key.wrong(format!("nobody in particular does `{}`", verb.name))),
            };
        }
        let key = table.need("actor", &format!("the step `{}`", verb.name))?;
        let known: Vec<_> = self.actors.iter().map(|(name, actor)| (name.clone(), actor)).collect();
        let name = key.text()?;
        let actor = key.one_of(name, &known).map_err(|error| match error.meant {
            Some(meant) if meant.starts_with("known") => {
                let others = "others are declared, by [[actor]] with `name` and `is`";
                ScenarioError { meant: Some(format!("{meant}; {others}")), ..error }
            }
            _ => error,
        })?;
        if verb.who.contains(&actor.kind) {
            return Ok(Some(name.to_owned()));
        }
        let can: Vec<_> = verb.who.iter().map(|kind| kind.name()).collect();
        let what = format!("a {} can't `{}`", actor.kind, verb.name);
        let meant = Some(format!("it is done by: {}", can.join(", ")));
        Err(ScenarioError { meant, ..key.wrong(what) })
    }
}
