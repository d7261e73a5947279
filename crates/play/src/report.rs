//! What came of a scenario, and how it is told.

use std::fmt;

use polder::HostKind;
use polder::units::PAGE_SIZE;

use crate::outcome::Outcome;
use crate::scenario::{Bytes, Hold, Place, Scenario, SlotSpec, Verb};
use crate::state::PageState;
use crate::tables::By;

/// How a scenario ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// All was as expected.
    Passed,
    /// Something was not, and why.
    Failed(String),
    /// It could not be played here, and why.
    Skipped(String),
}

/// A scenario that was played on a host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Played {
    /// The host.
    pub host: HostKind,
    /// How it ended.
    pub verdict: Verdict,
    /// The steps that were played: all of them, or up to the first that was not as expected.
    pub steps: Vec<PlayedStep>,
}

impl Played {
    pub(crate) fn none(host: HostKind, verdict: Verdict) -> Self {
        Self { host, verdict, steps: Vec::new() }
    }
}

/// A step that was played.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlayedStep {
    /// Its line.
    pub line: usize,
    /// Who did it.
    pub actor: String,
    /// What was done, in words.
    pub did: String,
    /// What came of it.
    pub outcome: Outcome,
    /// Why that was not as expected, if it was not.
    pub unmet: Option<String>,
    /// The pages that it was about.
    pub pages: Vec<Change>,
    /// What happened on the way, in order.
    pub trace: Vec<String>,
}

/// A run of pages, alike before and alike after a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// The first page.
    pub start: u64,
    /// The page behind the last.
    pub end: u64,
    /// What was so of each before.
    pub before: PageState,
    /// And after.
    pub after: PageState,
}

impl Change {
    pub(crate) fn between(before: &[(u64, PageState)], after: &[(u64, PageState)]) -> Vec<Self> {
        let mut changes: Vec<Self> = Vec::new();
        for ((page, before), (_, after)) in before.iter().zip(after) {
            match changes.last_mut() {
                Some(last)
                    if last.end == *page && last.before == *before && last.after == *after =>
                {
                    last.end = page + 1;
                }
                _ => changes.push(Self {
                    start: *page,
                    end: page + 1,
                    before: before.clone(),
                    after: after.clone(),
                }),
            }
        }
        changes
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, end, before, after } = self;
        match end - start {
            1 => write!(f, "page {start}: ")?,
            _ => write!(f, "pages {start}..{end}: ")?,
        }
        match before == after {
            true => write!(f, "{after}"),
            false => write!(f, "{before}  ->  {after}"),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pages(range) if range.count().get() == 1 => {
                write!(f, "page {}", range.start().get())
            }
            Self::Pages(range) => write!(f, "pages {}..{}", range.start().get(), range.end()),
            Self::Gpa(gpa, count) if count.get() == 1 => write!(f, "gpa {gpa}"),
            Self::Gpa(gpa, count) => write!(f, "{count} at gpa {gpa}"),
        }
    }
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(stage) => write!(f, "once {stage}"),
            Self::BeforeStep(step) => write!(f, "before its step {step}"),
        }
    }
}

impl Verb {
    /// What is done, in words.
    pub(crate) fn told(&self, scenario: &Scenario) -> String {
        let vm = |vm: usize| match scenario.vms.len() {
            1 => String::new(),
            _ => format!(" of {}", scenario.vms.get(vm).map_or("", |vm| vm.name.as_str())),
        };
        let bytes = |bytes: &Bytes| match bytes.at {
            0 => bytes.place.to_string(),
            at => format!("{} at {at:#x}", bytes.place),
        };
        let slot_of = |slot: &SlotSpec| {
            format!(
                "slot {}: pages {}..{} at gpa {}",
                slot.slot,
                slot.pages.start().get(),
                slot.pages.end(),
                slot.gpa
            )
        };
        let size = |size: &polder::machine::RmpSize| size.level().to_string();
        match self {
            Self::Convert { place, to, contents, .. } => {
                format!("convert {place} to {to}, contents {contents}")
            }
            Self::Want { place, to, vm: number } => format!("wish {place}{} {to}", vm(*number)),
            Self::Discard { place } => format!("discard {place}"),
            Self::Move { place } => format!("move {place}"),
            Self::Relinquish { place } => format!("relinquish {place}"),
            Self::Preload { place, bytes } => format!("preload {place} with {bytes:?}"),
            Self::Populate { place, bytes } => {
                format!("populate {place} with \"{}\"", short(bytes))
            }
            Self::Fail { place } => format!("fail {place}"),
            Self::Settle => "settle".into(),
            Self::Bind { vm: number, slot } => format!("bind{} {}", vm(*number), slot_of(slot)),
            Self::Unbind { vm: number, slot } => format!("unbind{} slot {slot}", vm(*number)),
            Self::Prefault { place, vm: number, by } => {
                let by = match by {
                    By::Root => "",
                    By::Gpa => ", by guest-physical addresses",
                    By::Reverse => ", wherever the guest's tables show it",
                };
                format!("prefault {place}{}{by}", vm(*number))
            }
            Self::Pte { place, present: false, .. } => format!("unmap {place} by its own tables"),
            Self::Pte { place, used, .. } => {
                let used = if *used { "" } else { ", as never used" };
                format!("map {place} by its own tables{used}")
            }
            Self::Read { from, length } => match length {
                &PAGE_SIZE => format!("read {}", bytes(from)),
                _ => format!("read {length} bytes of {}", bytes(from)),
            },
            Self::Write { to, bytes: text } => {
                format!("write \"{}\" to {}", short(text), bytes(to))
            }
            Self::Pin { place, name, .. } => format!("pin {place} as \"{}\"", short(name)),
            Self::Unpin { name } => format!("unpin \"{}\"", short(name)),
            Self::Refer { place, name, of: None, .. } => {
                format!("refer to {place} as \"{}\"", short(name))
            }
            Self::Refer { place, name, of: Some(of), .. } => {
                format!("refer to {place} of \"{}\" as \"{}\"", short(of), short(name))
            }
            Self::Release { name } => format!("release \"{}\"", short(name)),
            Self::GupFast { place, .. } => format!("gup-fast {place}: next step"),
            Self::Pvalidate { place, size: how, validate: true } => {
                format!("pvalidate {place} by {}", size(how))
            }
            Self::Pvalidate { place, size: how, .. } => {
                format!("pvalidate {place} by {}: no longer", size(how))
            }
            Self::Allocate { place, level } => format!("allocate {place} by {level}"),
            Self::NoMemory { after } => format!("no memory after {after} allocations"),
            Self::Lock { place } => format!("lock the folio of {place}"),
            Self::Unlock { place } => format!("unlock the folio of {place}"),
            Self::Split { place } => format!("split the folio of {place}"),
            Self::Merge { place, level } => format!("merge folios at {place} into {level}"),
            Self::Map { place, vm: number, level } => {
                format!("map {place}{} at {level}", vm(*number))
            }
            Self::Zap { place, vm: number } => format!("zap {place}{}", vm(*number)),
            Self::Rmpupdate { place, size: how, assign, immutable, vm: number } => {
                let what =
                    if *assign { format!("assign{}", vm(*number)) } else { "take back".into() };
                let immutable = if *immutable { ", immutable" } else { "" };
                format!("rmpupdate {place} by {}: {what}{immutable}", size(how))
            }
            Self::Psmash { place } => format!("psmash {place}"),
            Self::Unsmash { place } => format!("unsmash {place}"),
            Self::Reclaim { place, size: how } => format!("reclaim {place} by {}", size(how)),
            Self::RmpHold { place, size: how } => {
                format!("have the RMP entry of {place} in use, by {}", size(how))
            }
            Self::RmpRelease { place } => format!("use the RMP entry of {place} no longer"),
            Self::Resume { hold: None } => "resume".into(),
            Self::Resume { hold: Some(hold) } => format!("resume, to be held {hold}"),
            Self::Look(look) => format!("look at {}", look.place),
            Self::Explain { place } => format!("explain {place}"),
            Self::Create { huge_pages, name } => {
                format!("make memory \"{}\" of {huge_pages} huge pages", short(name))
            }
            Self::Drop { name } => format!("drop memory \"{}\"", short(name)),
            Self::Pool => "look at the pool".into(),
            Self::Audit => "audit".into(),
        }
    }
}

/// A text as far as it is worth repeating, on one line.
fn short(text: &str) -> String {
    let mut short: String = text.chars().take(32).flat_map(char::escape_debug).collect();
    if text.chars().count() > 32 {
        short.push('…');
    }
    short
}
