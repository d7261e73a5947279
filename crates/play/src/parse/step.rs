//! `[[step]]`: what is done, by whom, and where it is held.

use super::Reader;
use super::table::{Parsed, Table};
use super::verb::Keys;
use crate::names::{PLACE_KEYS, STEP_KEYS, VERBS, VerbEntry};
use crate::scenario::{Expect, Step, Verb};

impl<'t> Reader<'t> {
    pub(super) fn step(&self, table: &Table<'t>) -> Parsed<Step> {
        let key = table.need("do", "a step")?;
        let known: Vec<_> = VERBS.iter().map(|verb| (verb.name.to_owned(), verb)).collect();
        let verb: &VerbEntry = key.one_of(key.text()?, &known)?;
        let what = format!("the step `{}`", verb.name);
        let has_place = [verb.needs, verb.may_have].iter().any(|keys| keys.contains(&"page"));
        let mut keys = [&STEP_KEYS[..], verb.needs, verb.may_have].concat();
        if has_place {
            keys.extend(PLACE_KEYS);
        }
        table.check_keys(&keys, &what)?;
        for need in verb.needs.iter().filter(|need| **need != "page") {
            table.need(need, &what)?;
        }
        let actor = self.actor(table, verb)?;
        let keys = Keys { reader: self, table, what: &what, actor: actor.as_deref() };
        let verb = keys.verb(verb.name)?;
        let hold = match &verb {
            Verb::Resume { .. } => None,
            _ => table.get("hold").map(|key| key.hold()).transpose()?,
        };
        let expect = match table.get("expect") {
            None => Expect::default(),
            Some(key) => self.expect(&key)?,
        };
        Ok(Step { line: table.line(), actor, verb, hold, expect })
    }
}
