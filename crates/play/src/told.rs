//! What a step does, in words.

use std::fmt;

use polder::units::PAGE_SIZE;

use crate::scenario::{By, Bytes, Hold, Place, Scenario, SlotSpec, Verb};

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

impl fmt::Display for SlotSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { slot, pages, gpa } = self;
        write!(f, "slot {slot}: pages {}..{} at gpa {gpa}", pages.start().get(), pages.end())
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.at {
            0 => self.place.fmt(f),
            at => write!(f, "{} at {at:#x}", self.place),
        }
    }
}

impl Verb {
    /// What is done, in words.
    pub(crate) fn told(&self, scenario: &Scenario) -> String {
        let vm = |vm: &usize| of_vm(scenario, *vm);
        match self {
            Self::Convert { place, to, contents, .. } => {
                format!("convert {place} to {to}, contents {contents}")
            }
            Self::Want { place, to, vm: of } => format!("wish {place}{} {to}", vm(of)),
            Self::Preload { place, bytes } => format!("preload {place} with {bytes:?}"),
            Self::Populate { place, bytes } => {
                format!("populate {place} with \"{}\"", short(bytes))
            }
            Self::Create { huge_pages, name } => {
                format!("make memory \"{}\" of {huge_pages} huge pages", short(name))
            }
            Self::Drop { name } => format!("drop memory \"{}\"", short(name)),
            Self::Bind { vm: of, slot } => format!("bind{} {slot}", vm(of)),
            Self::Unbind { vm: of, slot } => format!("unbind{} slot {slot}", vm(of)),
            Self::Prefault { place, vm: of, by } => {
                let by = match by {
                    By::Root => "",
                    By::Gpa => ", by guest-physical addresses",
                    By::Reverse => ", wherever the guest's tables show it",
                };
                format!("prefault {place}{}{by}", vm(of))
            }
            Self::Pin { place, name, .. } => format!("pin {place} as \"{}\"", short(name)),
            Self::Unpin { name } => format!("unpin \"{}\"", short(name)),
            Self::Resume { hold: Some(hold) } => format!("resume, to be held {hold}"),
            Self::Look(look) => format!("look at {}", look.place),
            Self::Pool => "look at the pool".into(),
            other => other.access_told(scenario),
        }
    }

    /// What guests, devices and processes do to bytes, entries and references.
    fn access_told(&self, scenario: &Scenario) -> String {
        match self {
            Self::Read { from, length: PAGE_SIZE } => format!("read {from}"),
            Self::Read { from, length } => format!("read {length} bytes of {from}"),
            Self::Write { to, bytes } => format!("write \"{}\" to {to}", short(bytes)),
            Self::Pte { place, present: false, .. } => format!("unmap {place} by its own tables"),
            Self::Pte { place, used, .. } => {
                let used = if *used { "" } else { ", as never used" };
                format!("map {place} by its own tables{used}")
            }
            Self::Pvalidate { place, size, validate } => {
                let validate = if *validate { "" } else { ": no longer" };
                format!("pvalidate {place} by {}{validate}", size.level())
            }
            Self::Refer { place, name, of: None, .. } => {
                format!("refer to {place} as \"{}\"", short(name))
            }
            Self::Refer { place, name, of: Some(of), .. } => {
                format!("refer to {place} of \"{}\" as \"{}\"", short(of), short(name))
            }
            Self::Release { name } => format!("release \"{}\"", short(name)),
            Self::GupFast { place, .. } => format!("gup-fast {place}: next step"),
            other => other.kernel_told(scenario),
        }
    }

    /// What the machine's kernel does, and what its name says already.
    fn kernel_told(&self, scenario: &Scenario) -> String {
        let vm = |vm: &usize| of_vm(scenario, *vm);
        match self {
            Self::Allocate { place, level } => format!("allocate {place} by {level}"),
            Self::NoMemory { after } => format!("no memory after {after} allocations"),
            Self::Lock { place } => format!("lock the folio of {place}"),
            Self::Unlock { place } => format!("unlock the folio of {place}"),
            Self::Split { place } => format!("split the folio of {place}"),
            Self::Merge { place, level } => format!("merge folios at {place} into {level}"),
            Self::Map { place, vm: of, level } => format!("map {place}{} at {level}", vm(of)),
            Self::Zap { place, vm: of } => format!("zap {place}{}", vm(of)),
            Self::Rmpupdate { place, size, assign, immutable, vm: of } => {
                let what = if *assign { format!("assign{}", vm(of)) } else { "take back".into() };
                let immutable = if *immutable { ", immutable" } else { "" };
                format!("rmpupdate {place} by {}: {what}{immutable}", size.level())
            }
            Self::Reclaim { place, size } => format!("reclaim {place} by {}", size.level()),
            Self::RmpHold { place, size } => {
                format!("have the RMP entry of {place} in use, by {}", size.level())
            }
            Self::RmpRelease { place } => format!("use the RMP entry of {place} no longer"),
            other => match other.place() {
                Some(place) => format!("{} {place}", other.name()),
                None => other.name().to_owned(),
            },
        }
    }
}

/// Whose it is, where there are several.
fn of_vm(scenario: &Scenario, vm: usize) -> String {
    match scenario.vms.len() {
        1 => String::new(),
        _ => format!(" of {}", scenario.vms.get(vm).map_or("", |vm| vm.name.as_str())),
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
