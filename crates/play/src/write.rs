//! A scenario as text, which [`parse()`](crate::parse()) reads as the same scenario.

use std::fmt;

use polder::machine::RmpSize;
use polder::{Contents, PageSize, PinKind, Population, Visibility};

use crate::scenario::{
    Actor, By, Bytes, Expect, Hold, Look, Place, Scenario, SlotSpec, Step, Verb, VmSpec, root_name,
};

/// A text in quotes.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for c in self.0.chars() {
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                c if c.is_control() => write!(f, "\\u{:04X}", u32::from(c))?,
                c => write!(f, "{c}")?,
            }
        }
        f.write_str("\"")
    }
}

/// Keys and values, each on a line of its own or all in one.
#[derive(Default)]
struct Keys(Vec<(&'static str, String)>);

impl Keys {
    fn raw(&mut self, key: &'static str, value: impl fmt::Display) -> &mut Self {
        self.0.push((key, value.to_string()));
        self
    }

    fn text(&mut self, key: &'static str, value: impl fmt::Display) -> &mut Self {
        let text = value.to_string();
        self.raw(key, Quoted(&text))
    }

    fn some<T: fmt::Display>(&mut self, key: &'static str, value: Option<T>) -> &mut Self {
        if let Some(value) = value {
            self.text(key, value);
        }
        self
    }

    /// A value that need not be said where it is `default`.
    fn unless<T>(&mut self, key: &'static str, value: T, default: T) -> &mut Self
    where
        T: fmt::Display + PartialEq,
    {
        self.some(key, Some(value).filter(|value| *value != default))
    }

    fn number_unless(&mut self, key: &'static str, value: u64, default: u64) -> &mut Self {
        self.number(key, Some(value).filter(|value| *value != default))
    }

    fn number(&mut self, key: &'static str, value: Option<u64>) -> &mut Self {
        if let Some(value) = value {
            // TOML's numbers are signed.
            if i64::try_from(value).is_ok() {
                self.raw(key, value)
            } else {
                self.text(key, value)
            };
        }
        self
    }

    fn flag(&mut self, key: &'static str, value: bool, default: bool) -> &mut Self {
        if value != default {
            self.raw(key, value);
        }
        self
    }

    fn place(&mut self, place: Place) -> &mut Self {
        match place {
            Place::Pages(range) if range.count().get() == 1 => {
                self.number("page", Some(range.start().get()))
            }
            Place::Pages(range) => {
                self.text("pages", format_args!("{}..{}", range.start().get(), range.end()))
            }
            Place::Gpa(gpa, count) => self.text("gpa", gpa).number_unless("count", count.get(), 1),
        }
    }

    fn hold(&mut self, hold: Option<Hold>) -> &mut Self {
        match hold {
            None => self,
            Some(Hold::At(stage)) => self.text("hold", stage),
            Some(Hold::BeforeStep(step)) => self.raw("hold", step),
        }
    }

    fn size(&mut self, size: RmpSize) -> &mut Self {
        self.some("size", Some(size.level()).filter(|_| size != RmpSize::Size4K))
    }

    /// All in one line.
    fn inline(&self) -> String {
        let pairs: Vec<String> =
            self.0.iter().map(|(key, value)| format!("{key} = {value}")).collect();
        format!("{{ {} }}", pairs.join(", "))
    }

    /// Each on its line.
    fn lines(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(key, value)| writeln!(f, "{key} = {value}"))
    }
}

fn list(items: impl IntoIterator<Item = String>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| Quoted(&item).to_string()).collect();
    format!("[{}]", items.join(", "))
}

fn slot(slot: &SlotSpec) -> Keys {
    let mut keys = Keys::default();
    let pages = slot.pages;
    keys.raw("slot", slot.slot)
        .text("pages", format_args!("{}..{}", pages.start().get(), pages.end()))
        .text("gpa", slot.gpa);
    keys
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut head = Keys::default();
        head.text("about", &self.about).number("thread", self.thread);
        if !self.invariants.is_empty() {
            head.raw("invariant", list(self.invariants.iter().cloned()));
        }
        head.raw("hosts", list(self.hosts.iter().map(ToString::to_string)));
        head.some("discrepancy", self.discrepancy.as_ref()).lines(f)?;
        let memory = &self.memory;
        writeln!(f, "\n[memory]")?;
        Keys::default()
            .raw("pages", memory.pages.get())
            .text("platform", memory.platform)
            .text("starts", memory.starts)
            .flag("owed", memory.owed, false)
            .unless("page-size", memory.page_size, PageSize::Small)
            .number("pool", memory.pool)
            .lines(f)?;
        self.vms.iter().try_for_each(|vm| write_vm(f, vm))?;
        for (name, Actor { kind, vm, declared }) in &self.actors {
            if *declared {
                writeln!(f, "\n[[actor]]")?;
                let mut keys = Keys::default();
                keys.text("name", name).text("is", kind).text("vm", self.vm_name(*vm)).lines(f)?;
            }
        }
        for step in &self.steps {
            writeln!(f, "\n[[step]]")?;
            self.step(step).lines(f)?;
        }
        for look in &self.expect {
            writeln!(f, "\n[[expect]]")?;
            let mut keys = Keys::default();
            self.look(&mut keys, look);
            keys.lines(f)?;
        }
        Ok(())
    }
}

fn write_vm(f: &mut fmt::Formatter<'_>, vm: &VmSpec) -> fmt::Result {
    writeln!(f, "\n[[vm]]")?;
    let slots: Vec<String> = vm.slots.iter().map(|it| slot(it).inline()).collect();
    let mut keys = Keys::default();
    keys.text("name", &vm.name).number("asid", vm.asid.map(u64::from));
    if let Some(tables) = vm.tables {
        keys.text("root", root_name(tables.root)).raw("tables", tables.first);
    }
    keys.raw("slots", format_args!("[{}]", slots.join(", "))).lines(f)
}

impl Scenario {
    fn vm_name(&self, vm: usize) -> &str {
        self.vms.get(vm).map_or("", |vm| vm.name.as_str())
    }

    fn step(&self, step: &Step) -> Keys {
        let mut keys = Keys::default();
        keys.some("actor", step.actor.as_ref()).text("do", step.verb.name());
        self.verb(&mut keys, &step.verb);
        keys.hold(step.hold);
        if step.expect != Expect::default() {
            keys.raw("expect", expect(&step.expect).inline());
        }
        keys
    }

    fn verb(&self, keys: &mut Keys, verb: &Verb) {
        // Those two say in their own way where it is.
        if !matches!(verb, Verb::Bind { .. } | Verb::Look(_)) {
            if let Some(place) = verb.place() {
                keys.place(place);
            }
            if let Some(vm) = verb.vm() {
                keys.text("vm", self.vm_name(vm));
            }
        }
        self.own(keys, verb);
    }

    /// What is a verb's own, besides pages and VM.
    fn own(&self, keys: &mut Keys, verb: &Verb) {
        match verb {
            Verb::Convert { to, contents, wait, .. } => keys
                .text("to", to)
                .unless("contents", *contents, Contents::Unspecified)
                .flag("wait", *wait, true),
            Verb::Want { to, .. } => keys.text("to", to),
            Verb::Populate { bytes, .. } | Verb::Preload { bytes, .. } => keys.text("bytes", bytes),
            Verb::Create { huge_pages, name } => {
                keys.raw("huge-pages", huge_pages).text("name", name)
            }
            Verb::Unbind { slot, .. } => keys.raw("slot", slot),
            Verb::Prefault { by, .. } => keys.unless("by", *by, By::Root),
            Verb::Pte { present, used, .. } => {
                keys.flag("present", *present, true).flag("used", *used, true)
            }
            Verb::Read { from, length } => {
                write_bytes(keys, from).number_unless("length", *length, 8)
            }
            Verb::Write { to, bytes } => write_bytes(keys, to).text("bytes", bytes),
            Verb::Pin { kind, name, .. } | Verb::Refer { kind, name, of: None, .. } => {
                keys.unless("kind", *kind, PinKind::LongTerm).text("name", name)
            }
            Verb::Refer { place, name, of: Some(of), .. } => {
                keys.place(*place).text("name", name).text("of", of)
            }
            Verb::GupFast { name, .. }
            | Verb::Unpin { name }
            | Verb::Release { name }
            | Verb::Drop { name } => keys.text("name", name),
            Verb::Pvalidate { size, validate, .. } => {
                keys.size(*size).flag("validate", *validate, true)
            }
            Verb::Allocate { level, .. } | Verb::Merge { level, .. } | Verb::Map { level, .. } => {
                keys.text("level", level)
            }
            Verb::NoMemory { after } => keys.number("after", Some(*after)),
            Verb::Rmpupdate { size, assign, immutable, .. } => {
                keys.size(*size).raw("assign", assign).flag("immutable", *immutable, false)
            }
            Verb::Reclaim { size, .. } | Verb::RmpHold { size, .. } => keys.size(*size),
            Verb::Resume { hold } => keys.hold(*hold),
            Verb::Bind { vm, slot: it } => {
                keys.text("vm", self.vm_name(*vm)).0.extend(slot(it).0);
                keys
            }
            Verb::Look(look) => self.look(keys, look),
            Verb::Discard { .. }
            | Verb::Move { .. }
            | Verb::Relinquish { .. }
            | Verb::Fail { .. }
            | Verb::Lock { .. }
            | Verb::Unlock { .. }
            | Verb::Split { .. }
            | Verb::Psmash { .. }
            | Verb::Unsmash { .. }
            | Verb::Explain { .. }
            | Verb::RmpRelease { .. }
            | Verb::Zap { .. }
            | Verb::Settle
            | Verb::Pool
            | Verb::Audit => keys,
        };
    }

    fn look<'k>(&self, keys: &'k mut Keys, look: &Look) -> &'k mut Keys {
        let population = |population| match population {
            Population::Owed => "owed",
            Population::Whole => "whole",
        };
        keys.place(look.place)
            .text("vm", self.vm_name(look.vm))
            .some("visibility", look.visibility)
            .some("population", look.population.map(population))
            .some("wanted", look.wanted)
            .some("host-view", look.host_view)
            .some("stage2", look.stage2)
            .some("folio", look.folio)
            .some("rmp", look.rmp);
        if let Some(accessed) = look.accessed {
            keys.raw("accessed", accessed);
        }
        if let Some(validated) = look.validated {
            keys.raw("validated", validated);
        }
        keys
    }
}

fn write_bytes<'k>(keys: &'k mut Keys, bytes: &Bytes) -> &'k mut Keys {
    keys.number_unless("at", bytes.at, 0).unless("as", bytes.side, Visibility::Private)
}

fn expect(expect: &Expect) -> Keys {
    let mut keys = Keys::default();
    keys.some("is", expect.is)
        .number("page", expect.page)
        .some("holder", expect.holder.as_ref())
        .some("errno", expect.errno.as_ref())
        .some("bytes", expect.bytes.as_ref())
        .some("not", expect.not.as_ref())
        .flag("zeros", expect.zeros, false)
        .number("converted", expect.converted)
        .number("done", expect.done)
        .number("skipped", expect.skipped)
        .number("left", expect.left)
        .some("says", expect.says.as_ref());
    keys
}
