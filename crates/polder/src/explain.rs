//! [`Explanation`]: why a page is as it is.

mod text;

#[cfg(doc)]
use std::fmt;

use polder_engine::{Came, Clause, Held, LevelLimit, Past, Pinned, Shown, View, VmId};
use polder_units::{GfnRange, Gpa, Level, PageIndex, PageRange};
use serde::{Deserialize, Serialize};

use crate::{Error, HostKind, Memory};

/// All that is known of one page: what it is, who sees it, who holds it, what limits the size of
/// its mappings, and what was done to it last. As text by [`Display`](fmt::Display), as data by
/// `serde`; `docs/explain.md` has every field.
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
    pub bindings: Vec<BindingFacts>,
    /// How large the host view can map it.
    pub host_view: MappingLimit,
    /// The operation that holds it.
    pub claim: Option<ClaimFacts>,
    /// How many answers to faults and copies are in flight on it.
    pub in_flight: u64,
    /// Who has it pinned by Polder.
    pub pins: Vec<PinFacts>,
    /// What the host has of it.
    pub host: HostState,
    /// The last operations on it, the last of them last.
    pub last_operations: Vec<PastOperation>,
}

/// Where a VM sees a page.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BindingFacts {
    /// The VM, by its number in this memory.
    pub vm: u32,
    /// The slot.
    pub slot: u32,
    /// Where: guest-physical.
    pub gpa: u64,
    /// What the binding wishes it to be.
    pub wanted: String,
    /// How large it can be mapped there.
    pub limit: MappingLimit,
    /// At which level stage 2 has it, where that is known.
    pub mapped_at: Option<String>,
}

/// The largest level at which a page can be mapped, and what keeps it from the next.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MappingLimit {
    /// The level: `4K`, `2M` or `1G`.
    pub level: String,
    /// Which [limit](crate::Limit) it is; none for the largest level.
    pub clause: Option<String>,
    /// The clause in full.
    pub why: Option<String>,
}

/// An operation that holds a page.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClaimFacts {
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
pub struct PinFacts {
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
    pub rmp: Option<RmpFacts>,
    /// Who refers to it that Polder does not know of, where that is to be seen.
    pub references: Vec<String>,
}

/// An entry of the RMP.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RmpFacts {
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
pub struct PastOperation {
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
    /// What guests write is logged.
    pub(crate) logs: bool,
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
        let (in_place, known) = self.driver.ask(|engine| {
            engine.check_bounds(PageRange::one(page))?;
            Ok((engine.config().in_place, engine.explain(page)))
        })?;
        let logs = self.driver.dirty.is_on();
        let facts = HostFacts { logs, ..self.driver.host.explain(page)? };
        let markers = known.markers.iter().map(|view| view_name(*view).to_owned());
        Ok(Explanation {
            page: page.get(),
            offset: page.offset(),
            granted: known.facts.visibility.to_string(),
            population: known.facts.population.to_string(),
            source_failed: known.failed,
            quarantined: known.quarantined,
            denied_in: markers.collect(),
            bindings: known.shown.iter().map(|shown| BindingFacts::new(shown, &facts)).collect(),
            host_view: limit(known.host_view, &HostFacts::default()),
            claim: known.held.map(ClaimFacts::from),
            in_flight: known.in_flight as u64,
            pins: known.pins.iter().map(PinFacts::from).collect(),
            host: HostState::new(self.host_name(in_place), facts),
            last_operations: known.past.iter().map(PastOperation::from).collect(),
        })
    }

    /// [`Memory::explain`] of the page that a VM sees at a guest-physical address.
    ///
    /// # Errors
    /// [`Refusal::Unbound`](crate::Refusal::Unbound) where no slot is.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Vm, units::{Gfn, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// assert_eq!(memory.explain_gpa(vm, Gpa::new(0x10_3000))?.page, 3);
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn explain_gpa(&self, vm: VmId, gpa: Gpa) -> Result<Explanation, Error> {
        let runs = self.pages_of(vm, GfnRange::one(gpa.gfn()))?;
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

impl BindingFacts {
    fn new(shown: &Shown, facts: &HostFacts) -> Self {
        let stage2 = facts.stage2.iter().find(|(vm, _)| *vm == shown.vm);
        Self {
            vm: shown.vm.0,
            slot: shown.slot.0,
            gpa: shown.gfn.gpa().get(),
            wanted: shown.wanted.to_string(),
            limit: limit(shown.limit, facts),
            mapped_at: stage2.map(|(_, level)| level.to_string()),
        }
    }
}

impl From<Held> for ClaimFacts {
    fn from(held: Held) -> Self {
        let Held { by, range, undoing, abandoned } = held;
        Self { by: by.to_string(), pages: range.to_string(), undoing, abandoned }
    }
}

impl From<&Pinned> for PinFacts {
    fn from(pin: &Pinned) -> Self {
        Self {
            kind: pin.kind.to_string(),
            holder: pin.holder.to_string(),
            pages: pin.range.to_string(),
        }
    }
}

impl HostState {
    fn new(name: String, facts: HostFacts) -> Self {
        Self {
            name,
            memory: facts.memory,
            folio: facts.folio.map(|level| level.to_string()),
            rmp: facts.rmp.map(|entry| RmpFacts {
                assigned: entry.assigned,
                level: level_of(entry).to_string(),
                validated: entry.validated,
                gfn: entry.gfn.get(),
            }),
            references: facts.references,
        }
    }
}

impl From<&Past> for PastOperation {
    fn from(past: &Past) -> Self {
        let (came, why) = match &past.came {
            Came::Done => ("done", None),
            Came::Undone(why) => ("undone", why.as_ref()),
            Came::Quarantined => ("quarantined", None),
            Came::Refused(why) => ("refused", Some(why)),
        };
        Self {
            sequence: past.sequence,
            did: past.activity.to_string(),
            pages: past.range.to_string(),
            came: came.to_owned(),
            why: why.map(ToString::to_string),
        }
    }
}

fn view_name(view: View) -> &'static str {
    match view {
        View::Host => "host",
        View::Guest => "guest",
    }
}

fn level_of(entry: polder_machine::RmpEntry) -> Level {
    match entry.size {
        polder_machine::RmpSize::Size4K => Level::Size4K,
        polder_machine::RmpSize::Size2M => Level::Size2M,
    }
}

/// The engine's limit, or the host's where that is lower.
fn limit(limit: LevelLimit, facts: &HostFacts) -> MappingLimit {
    let entry = facts.rmp.filter(|entry| entry.assigned).map(level_of).map(Clause::HardwareEntry);
    let folio = facts.folio.map(Clause::Folio);
    let log = facts.logs.then_some(Clause::DirtyLog);
    let LevelLimit { mut level, mut by } = limit;
    for clause in [folio, entry, log].into_iter().flatten() {
        let most = match clause {
            Clause::Folio(most) | Clause::HardwareEntry(most) => most,
            _ => Level::Size4K,
        };
        if most < level {
            (level, by) = (most, Some(clause));
        }
    }
    MappingLimit {
        level: level.to_string(),
        clause: by.map(|clause| clause.limit().to_string()),
        why: by.map(|clause| clause.to_string()),
    }
}
