//! [`Explanation`]: why a page is as it is.

use std::fmt::{self, Write};

use polder_engine::{Came, Clause, LevelLimit, Population, View, Visibility, VmId};
use polder_units::{Gpa, Level, PageIndex};
use serde::{Deserialize, Serialize};

use crate::{Error, HostKind, Memory};

/// All that is known of one page: what it is, who sees it, who holds it, what limits the size of its
/// mappings, and what was done to it last. As text by [`Display`](fmt::Display), as data by `serde`;
/// `docs/explain.md` has every field.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// The page, by its index in the object.
    pub page: u64,
    /// Its offset in the object, in bytes.
    pub offset: u64,
    /// What it is: `private` or `shared`.
    pub granted: String,
    /// Whether its contents are there: `whole` or `owed`.
    pub population: String,
    /// Its contents were to come, and did not.
    pub source_failed: bool,
    /// It is out of use, for good.
    pub quarantined: bool,
    /// The views that have a marker in its place, by which the next touch is a SIGBUS: `host`,
    /// `guest`.
    pub denied_in: Vec<String>,
    /// Who sees it.
    pub bindings: Vec<BindingOf>,
    /// How large the host view can map it.
    pub host_view: Limit,
    /// The operation that holds it.
    pub claim: Option<ClaimOf>,
    /// How many answers to faults and copies are in flight on it.
    pub in_flight: u64,
    /// Who has it pinned by Polder.
    pub pins: Vec<PinOf>,
    /// What the host has of it.
    pub host: HostState,
    /// The last operations on it, the last of them last.
    pub last_operations: Vec<PastOf>,
}

/// Where a VM sees a page.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BindingOf {
    /// The VM, by its number in this memory.
    pub vm: u32,
    /// The slot.
    pub slot: u32,
    /// Where: guest-physical.
    pub gpa: u64,
    /// What the binding wishes it to be.
    pub wanted: String,
    /// How large it can be mapped there.
    pub limit: Limit,
    /// At which level stage 2 has it, where that is known.
    pub mapped_at: Option<String>,
}

/// The largest level at which a page can be mapped, and what keeps it from the next.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Limit {
    /// The level: `4K`, `2M` or `1G`.
    pub level: String,
    /// Which clause limits it: `alignment`, `fit`, `view`, `visibility`, `population`, `claim`,
    /// `quarantine`, `folio` or `rmp`; none for the largest level.
    pub clause: Option<String>,
    /// The clause in full.
    pub why: Option<String>,
}

/// An operation that holds a page.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClaimOf {
    /// What it does.
    pub by: String,
    /// The run of pages that it holds.
    pub pages: String,
    /// Whether it is being undone.
    pub undoing: bool,
    /// Whether its thread died: the next who meets it undoes it.
    pub abandoned: bool,
}

/// A pin.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PinOf {
    /// What kind.
    pub kind: String,
    /// Who holds it.
    pub holder: String,
    /// The pages that are pinned with it.
    pub pages: String,
}

/// What the host has of a page.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostState {
    /// Which host.
    pub name: String,
    /// Whether the page takes up memory.
    pub memory: bool,
    /// The level of its folio, where that is known.
    pub folio: Option<String>,
    /// Its entry in the RMP, where there is one.
    pub rmp: Option<RmpOf>,
    /// Who refers to it that Polder does not know of, where that is to be seen.
    pub references: Vec<String>,
}

/// An entry of the RMP.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RmpOf {
    /// Whether it is assigned.
    pub assigned: bool,
    /// Its size.
    pub level: String,
    /// Whether the guest has validated it.
    pub validated: bool,
    /// The guest frame that it is.
    pub gfn: u64,
}

/// An operation that is over.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PastOf {
    /// Its number, by which it is after those with smaller ones.
    pub sequence: u64,
    /// What it was.
    pub did: String,
    /// Its run of pages.
    pub pages: String,
    /// What came of it: `done`, `undone`, `quarantined` or `refused`.
    pub came: String,
    /// Why, if it failed and that is known.
    pub why: Option<String>,
}

/// What a host tells of a page.
#[derive(Default)]
pub(crate) struct HostFacts {
    pub(crate) memory: bool,
    pub(crate) folio: Option<Level>,
    pub(crate) rmp: Option<polder_machine::RmpEntry>,
    pub(crate) stage2: Vec<(VmId, Level)>,
    pub(crate) references: Vec<String>,
}

impl Memory {
    /// Tells all that is known of a page of the object, and why it is so.
    ///
    /// # Errors
    /// [`Refusal::Beyond`](crate::Refusal::Beyond); [`Error::Host`] where the host can't be asked.
    ///
    /// ```
    /// use polder::{HostKind, Memory, units::PageCount};
    ///
    /// let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// let page = memory.explain(5u32.into())?;
    /// assert_eq!((page.granted.as_str(), page.pins.len()), ("private", 0));
    /// println!("{page}");
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn explain(&self, page: PageIndex) -> Result<Explanation, Error> {
        let (config, known) = self.driver.ask(|engine| {
            engine.check_bounds(polder_units::PageRange::one(page))?;
            Ok((*engine.config(), engine.explain(page)))
        })?;
        let facts = self.driver.host.explain(page)?;
        let rmp = facts.rmp.map(|entry| RmpOf {
            assigned: entry.assigned,
            level: level_of(entry).to_string(),
            validated: entry.validated,
            gfn: entry.gfn.get(),
        });
        let bindings = known.shown.iter().map(|shown| BindingOf {
            vm: shown.vm.0,
            slot: shown.slot.0,
            gpa: shown.gfn.gpa().get(),
            wanted: shown.wanted.to_string(),
            limit: limit(shown.limit, &facts),
            mapped_at: facts
                .stage2
                .iter()
                .find(|(vm, _)| *vm == shown.vm)
                .map(|(_, level)| level.to_string()),
        });
        let past = known.past.iter().map(|past| PastOf {
            sequence: past.sequence,
            did: past.activity.to_string(),
            pages: past.range.to_string(),
            came: came(&past.came).to_owned(),
            why: match &past.came {
                Came::Undone(why) => why.as_ref().map(ToString::to_string),
                Came::Refused(why) => Some(why.to_string()),
                Came::Done | Came::Quarantined => None,
            },
        });
        Ok(Explanation {
            page: page.get(),
            offset: page.offset(),
            granted: known.facts.visibility.to_string(),
            population: known.facts.population.to_string(),
            source_failed: known.failed,
            quarantined: known.quarantined,
            denied_in: known.markers.iter().map(|view| view_name(*view).to_owned()).collect(),
            bindings: bindings.collect(),
            host_view: limit(known.host_view, &HostFacts::default()),
            claim: known.held.map(|held| ClaimOf {
                by: held.by.to_string(),
                pages: held.range.to_string(),
                undoing: held.undoing,
                abandoned: held.abandoned,
            }),
            in_flight: known.in_flight as u64,
            pins: known
                .pins
                .iter()
                .map(|pin| PinOf {
                    kind: pin.kind.to_string(),
                    holder: pin.holder.to_string(),
                    pages: pin.range.to_string(),
                })
                .collect(),
            host: HostState {
                name: self.host_name(config.in_place),
                memory: facts.memory,
                folio: facts.folio.map(|level| level.to_string()),
                rmp,
                references: facts.references,
            },
            last_operations: past.collect(),
        })
    }

    /// [`Memory::explain`] of the page that a VM sees at a guest-physical address.
    ///
    /// # Errors
    /// [`Refusal::Unbound`](crate::Refusal::Unbound) where no slot is.
    pub fn explain_gpa(&self, vm: VmId, gpa: Gpa) -> Result<Explanation, Error> {
        let runs = self.pages_of(vm, polder_units::GfnRange::one(gpa.gfn()))?;
        let page = runs.first().map(|run| run.start()).expect("one frame is one page");
        self.explain(page)
    }

    fn host_name(&self, in_place: bool) -> String {
        let host = match (self.driver.host.machine(), in_place) {
            (Some(_), _) => HostKind::Machine,
            (None, true) => HostKind::Memfd,
            (None, false) => HostKind::GuestMemfd,
        };
        host.to_string()
    }
}

fn view_name(view: View) -> &'static str {
    match view {
        View::Host => "host",
        View::Guest => "guest",
    }
}

fn came(came: &Came) -> &'static str {
    match came {
        Came::Done => "done",
        Came::Undone(_) => "undone",
        Came::Quarantined => "quarantined",
        Came::Refused(_) => "refused",
    }
}

fn level_of(entry: polder_machine::RmpEntry) -> Level {
    match entry.size {
        polder_machine::RmpSize::Size4K => Level::Size4K,
        polder_machine::RmpSize::Size2M => Level::Size2M,
    }
}

/// The engine's limit, or the host's where that is lower.
fn limit(limit: LevelLimit, facts: &HostFacts) -> Limit {
    let LevelLimit { level, by } = limit;
    let folio = facts.folio.filter(|folio| *folio < level);
    let rmp = facts.rmp.filter(|entry| entry.assigned).map(level_of);
    let rmp = rmp.filter(|rmp| *rmp < folio.unwrap_or(level));
    let (level, clause, why) = match (rmp, folio) {
        (Some(rmp), _) => (rmp, Some("rmp"), Some(format!("its rmp entry is of {rmp}"))),
        (None, Some(folio)) => (folio, Some("folio"), Some(format!("its folio is of {folio}"))),
        (None, None) => (level, by.map(Clause::name), by.map(|clause| clause.to_string())),
    };
    Limit { level: level.to_string(), clause: clause.map(ToOwned::to_owned), why }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at most", self.level)?;
        match (&self.clause, &self.why) {
            (Some(clause), Some(why)) => write!(f, " ({clause}: {why})"),
            _ => Ok(()),
        }
    }
}

impl Explanation {
    /// What keeps a device model from touching it now, in a sentence; nothing, if it may.
    pub fn host_access(&self) -> Option<String> {
        let granted = (self.granted == Visibility::Private.to_string())
            .then(|| "it is private to the guest".to_owned());
        let owed = (self.population == Population::Owed.to_string())
            .then(|| "its contents have not arrived".to_owned());
        let quarantined = self.quarantined.then(|| "it is in quarantine".to_owned());
        let failed = self.source_failed.then(|| "its contents could not be brought".to_owned());
        let claim = self.claim.as_ref().map(|claim| format!("a {} holds it", claim.by));
        quarantined.or(granted).or(failed).or(owed).or(claim)
    }

    /// What keeps it from becoming private, or from being discarded, now.
    pub fn in_use(&self) -> Option<String> {
        if let Some(pin) = self.pins.first() {
            return Some(format!("it is pinned ({}) by {}", pin.kind, pin.holder));
        }
        self.host.references.first().map(|who| format!("{who} refers to it"))
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "page {:#x} (offset {:#x}), on host {}",
            self.page, self.offset, self.host.name
        )?;
        let mut line = |name: &str, text: &str| writeln!(f, "  {name:<11} {text}");
        let mut state = format!("{}, {}", self.granted, self.population);
        for (is, word) in [
            (self.source_failed, ", its source failed"),
            (self.quarantined, ", IN QUARANTINE: out of use for good"),
        ] {
            state.push_str(if is { word } else { "" });
        }
        line("state", &state)?;
        match self.host_access() {
            Some(why) => line("host access", &format!("refused: {why}"))?,
            None => line("host access", "allowed")?,
        }
        match self.in_use() {
            Some(why) => line("conversion", &format!("to private is refused: {why}"))?,
            None => line("conversion", "nothing that Polder knows of is in the way")?,
        }
        for binding in &self.bindings {
            let mut text = format!(
                "slot {} at gpa {:#x}; wants {}; {}",
                binding.slot, binding.gpa, binding.wanted, binding.limit
            );
            if binding.wanted != self.granted {
                text.push_str("; its wish is unmet");
            }
            if let Some(level) = &binding.mapped_at {
                let _ = write!(text, "; stage 2 has it at {level}");
            }
            line(&format!("VM {}", binding.vm), &text)?;
        }
        if self.bindings.is_empty() {
            line("VM", "no VM sees it")?;
        }
        let denied = if self.denied_in.is_empty() {
            String::new()
        } else {
            format!("; a marker denies it in the {} view", self.denied_in.join(" and the "))
        };
        line("host view", &format!("{}{denied}", self.host_view))?;
        let mut memory = if self.host.memory { "yes" } else { "none yet" }.to_owned();
        if let Some(folio) = &self.host.folio {
            let _ = write!(memory, ", in a folio of {folio}");
        }
        line("memory", &memory)?;
        if let Some(rmp) = &self.host.rmp {
            let text = match rmp.assigned {
                true => format!(
                    "assigned, {}, gfn {:#x}, {}",
                    rmp.level,
                    rmp.gfn,
                    if rmp.validated { "validated" } else { "not validated" }
                ),
                false => "not assigned".to_owned(),
            };
            line("rmp entry", &text)?;
        }
        if let Some(claim) = &self.claim {
            let how = match (claim.abandoned, claim.undoing) {
                (true, _) => ", abandoned: the next who meets it undoes it",
                (false, true) => ", being undone",
                (false, false) => "",
            };
            line("claim", &format!("{} of pages {}{how}", claim.by, claim.pages))?;
        }
        if self.in_flight > 0 {
            line("in flight", &format!("{} answers and copies", self.in_flight))?;
        }
        for pin in &self.pins {
            line("pin", &format!("{}, by {}, of pages {}", pin.kind, pin.holder, pin.pages))?;
        }
        for who in &self.host.references {
            line("reference", who)?;
        }
        for past in &self.last_operations {
            let why = past.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
            let PastOf { sequence, did, pages, came, .. } = past;
            line("last", &format!("#{sequence} {did} of pages {pages}: {came}{why}"))?;
        }
        Ok(())
    }
}
