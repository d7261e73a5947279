//! From text to [`Scenario`]: the one place that refuses what is none, with the line and what was
//! meant.
//!
//! Keys are looked at before values, so that a key that is misspelt is called that, and not
//! missing.

mod actors;
mod check;
mod expect;
mod memory;
mod place;
mod step;
mod table;
mod verb;
mod vms;

use std::cell::Cell;
use std::collections::BTreeMap;

use polder::HostKind;
use polder::units::{Gpa, PageCount};
use toml::de::DeTable;

use self::table::{Parsed, Table, place_in, words, wrong};
use crate::ScenarioError;
use crate::limits::{BYTES_MAX, STEPS_MAX};
use crate::names::{LOOK_KEYS, PLACE_KEYS};
use crate::scenario::{Actor, Scenario, Step, VmSpec};

/// Where the pages are in a VM that does not say: at 1 GiB, a multiple of every page size.
pub const DEFAULT_GPA: Gpa = Gpa::new(1 << 30);

/// Reads a scenario.
///
/// # Errors
/// What is wrong first, with its line.
pub fn parse(text: &str) -> Result<Scenario, ScenarioError> {
    if text.len() > BYTES_MAX {
        let what = format!("a scenario of {} bytes; {BYTES_MAX} are the most", text.len());
        return Err(ScenarioError::whole(what, Some("tell a shorter story".into())));
    }
    let table = DeTable::parse(text).map_err(|error| {
        let (line, column) = place_in(text, error.span().map_or(0, |span| span.start));
        ScenarioError { line, column, what: error.message().trim().to_owned(), meant: None }
    })?;
    let root = Table { text, span: table.span(), table: table.get_ref() };
    Reader {
        text,
        vms: Vec::new(),
        actors: BTreeMap::new(),
        pages: PageCount::ZERO,
        named: Cell::new(0),
    }
    .scenario(root)
}

struct Reader<'t> {
    text: &'t str,
    vms: Vec<VmSpec>,
    actors: BTreeMap<String, Actor>,
    pages: PageCount,
    /// The pages that steps have named so far.
    named: Cell<u64>,
}

const ROOT_KEYS: [&str; 10] = [
    "about",
    "thread",
    "invariant",
    "hosts",
    "discrepancy",
    "memory",
    "vm",
    "actor",
    "step",
    "expect",
];

impl<'t> Reader<'t> {
    fn scenario(mut self, root: Table<'t>) -> Parsed<Scenario> {
        root.check_keys(&ROOT_KEYS, "a scenario")?;
        let about = root.need("about", "a scenario")?.text()?.to_owned();
        let thread = root.get("thread").map(|key| key.number()).transpose()?;
        let invariants = match root.get("invariant") {
            None => Vec::new(),
            Some(key) => words(&key)?.into_iter().map(|(_, text)| text.to_owned()).collect(),
        };
        let hosts = hosts(&root)?;
        let discrepancy =
            root.get("discrepancy").map(|key| key.text().map(str::to_owned)).transpose()?;
        let memory = self.memory(&root)?;
        self.pages = memory.pages;
        self.read_vms(&root, &memory)?;
        let other = hosts.iter().find(|host| **host != HostKind::Machine);
        if let Some(host) = other.filter(|_| self.vms.iter().any(|vm| vm.tables.is_some())) {
            let what = format!("host {host} can't play guests with page tables of their own");
            let meant = Some("say hosts = [\"machine\"]".to_owned());
            return Err(ScenarioError { meant, ..root.need("hosts", "")?.wrong(what) });
        }
        self.read_actors(&root)?;
        let steps = self.steps(&root, &hosts)?;
        let mut expect = Vec::new();
        for table in root.tables("expect", STEPS_MAX)? {
            table.check_keys(&[&LOOK_KEYS[..], &PLACE_KEYS[..]].concat(), "`[[expect]]`")?;
            expect.push(self.look(&table, "`[[expect]]`")?);
        }
        if steps.is_empty() {
            return Err(wrong(self.text, root.span, "a scenario needs a `[[step]]`"));
        }
        let Self { vms, actors, .. } = self;
        Ok(Scenario {
            about,
            thread,
            invariants,
            hosts,
            discrepancy,
            memory,
            vms,
            actors,
            steps,
            expect,
        })
    }
    fn steps(&self, root: &Table<'t>, hosts: &[HostKind]) -> Parsed<Vec<Step>> {
        let mut steps = Vec::new();
        for table in root.tables("step", STEPS_MAX)? {
            let step = self.step(&table)?;
            self.check_hosts(&table, &step, hosts)?;
            steps.push(step);
        }
        self.check_order(&steps, root)?;
        Ok(steps)
    }
}

/// Where it is to be played, each host once.
fn hosts(root: &Table<'_>) -> Parsed<Vec<HostKind>> {
    let Some(key) = root.get("hosts") else { return Ok(vec![HostKind::Machine]) };
    let mut hosts = Vec::new();
    for (item, _) in words(&key)? {
        let host = item.word(&HostKind::ALL)?;
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    match hosts.is_empty() {
        true => Err(key.wrong("a scenario is played on one host at least")),
        false => Ok(hosts),
    }
}
