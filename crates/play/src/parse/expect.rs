//! `expect` and `look`: what a step comes to, and what is so of pages.

use polder::Population;
use toml::de::DeValue;

use super::Reader;
use super::table::{Key, Parsed, Table, wrong};
use crate::ScenarioError;
use crate::names::{Is, LOOK_KEYS};
use crate::scenario::{Expect, HostView, Look, Place};

impl<'t> Reader<'t> {
    pub(super) fn expect(&self, key: &Key<'t>) -> Parsed<Expect> {
        if let DeValue::String(_) = key.value.get_ref() {
            return Ok(Expect { is: Some(outcome(key)?), ..Expect::default() });
        }
        let table = Table::of(self.text, key.value, "`expect`")?;
        let said = ["is", "page", "holder", "errno", "bytes", "not", "zeros", "says"];
        let counts = ["converted", "done", "skipped", "left"];
        table.check_keys(&[&said[..], &counts[..]].concat(), "`expect`")?;
        let number = |key: &str| table.get(key).map(|key| key.number()).transpose();
        let text = |key: &str| table.get(key).map(|key| key.text().map(str::to_owned)).transpose();
        Ok(Expect {
            is: table.get("is").map(|key| outcome(&key)).transpose()?,
            page: number("page")?,
            holder: text("holder")?,
            errno: text("errno")?,
            bytes: text("bytes")?,
            not: text("not")?,
            zeros: table.get("zeros").map(|key| key.flag()).transpose()?.unwrap_or(false),
            converted: number("converted")?,
            done: number("done")?,
            skipped: number("skipped")?,
            left: number("left")?,
            says: text("says")?,
        })
    }

    pub(super) fn look(&self, table: &Table<'t>, what: &str) -> Parsed<Look> {
        let place = self.place(table, what)?;
        if let (Place::Pages(range), Some(key)) = (place, table.get("page").or(table.get("pages")))
            && range.end() > self.pages.get()
        {
            return Err(key.wrong(format!("the memory has {}", self.pages)));
        }
        let look = Look {
            line: table.line(),
            place,
            vm: self.vm(table)?,
            visibility: self.visibility(table, "visibility")?,
            population: match table.get("population") {
                None => None,
                Some(key) => Some(key.one_of(
                    key.text()?,
                    &[("owed".into(), Population::Owed), ("whole".into(), Population::Whole)],
                )?),
            },
            wanted: self.visibility(table, "wanted")?,
            host_view: match table.get("host-view") {
                None => None,
                Some(key) => Some(key.word(&HostView::ALL)?),
            },
            stage2: table.get("stage2").map(|key| key.mapped()).transpose()?,
            accessed: table.get("accessed").map(|key| key.flag()).transpose()?,
            folio: table.get("folio").map(|key| key.mapped()).transpose()?,
            rmp: table.get("rmp").map(|key| key.mapped()).transpose()?,
            validated: table.get("validated").map(|key| key.flag()).transpose()?,
        };
        if look.is_empty() {
            let what = format!("{what} says nothing of the pages");
            let meant = Some(format!("say one of: {}", LOOK_KEYS[1..].join(", ")));
            return Err(ScenarioError { meant, ..wrong(self.text, table.span.clone(), what) });
        }
        Ok(look)
    }
}

fn outcome(key: &Key<'_>) -> Parsed<Is> {
    let known: Vec<_> = Is::ALL.iter().map(|(is, name, _)| ((*name).to_owned(), *is)).collect();
    key.one_of(key.text()?, &known)
}
