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

    fn flag(&mut self, key: &'static str, value: bool, unless: bool) -> &mut Self {
        if value != unless {
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
            Place::Gpa(gpa, count) => {
                self.text("gpa", gpa).number("count", Some(count.get()).filter(|count| *count != 1))
            }
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
            .some("page-size", Some(memory.page_size).filter(|size| *size != PageSize::Small))
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

    fn bytes<'k>(&self, keys: &'k mut Keys, step: &Bytes) -> &'k mut Keys {
        keys.place(step.place)
            .number("at", Some(step.at).filter(|at| *at != 0))
            .some("as", Some(step.side).filter(|side| *side != Visibility::Private))
    }

    fn verb(&self, keys: &mut Keys, verb: &Verb) {
        match verb {
            Verb::Convert { place, to, contents, wait } => keys
                .place(*place)
                .text("to", to)
                .some("contents", Some(contents).filter(|how| **how != Contents::Unspecified))
                .flag("wait", *wait, true),
            Verb::Want { place, vm, to } => {
                keys.place(*place).text("vm", self.vm_name(*vm)).text("to", to)
            }
            Verb::Populate { place, bytes } | Verb::Preload { place, bytes } => {
                keys.place(*place).text("bytes", bytes)
            }
            Verb::Discard { place }
            | Verb::Move { place }
            | Verb::Relinquish { place }
            | Verb::Fail { place }
            | Verb::Lock { place }
            | Verb::Unlock { place }
            | Verb::Split { place }
            | Verb::Psmash { place }
            | Verb::Unsmash { place }
            | Verb::Explain { place }
            | Verb::RmpRelease { place } => keys.place(*place),
            Verb::Settle | Verb::Pool | Verb::Audit => keys,
            Verb::Create { huge_pages, name } => {
                keys.raw("huge-pages", huge_pages).text("name", name)
            }
            Verb::Bind { vm, slot: it } => {
                keys.text("vm", self.vm_name(*vm)).0.extend(slot(it).0);
                keys
            }
            Verb::Unbind { vm, slot } => keys.text("vm", self.vm_name(*vm)).raw("slot", slot),
            Verb::Prefault { place, vm, by } => keys
                .place(*place)
                .text("vm", self.vm_name(*vm))
                .some("by", Some(by).filter(|by| **by != By::Root)),
            Verb::Pte { place, present, used } => {
                keys.place(*place).flag("present", *present, true).flag("used", *used, true)
            }
            Verb::Read { from, length } => {
                self.bytes(keys, from).number("length", Some(*length).filter(|it| *it != 8))
            }
            Verb::Write { to, bytes } => self.bytes(keys, to).text("bytes", bytes),
            Verb::Pin { place, kind, name } | Verb::Refer { place, kind, name, of: None } => keys
                .place(*place)
                .some("kind", Some(kind).filter(|kind| **kind != PinKind::LongTerm))
                .text("name", name),
            Verb::Refer { place, name, of: Some(of), .. } => {
                keys.place(*place).text("name", name).text("of", of)
            }
            Verb::GupFast { place, name } => keys.place(*place).text("name", name),
            Verb::Unpin { name } | Verb::Release { name } | Verb::Drop { name } => {
                keys.text("name", name)
            }
            Verb::Pvalidate { place, size, validate } => {
                keys.place(*place).size(*size).flag("validate", *validate, true)
            }
            Verb::Allocate { place, level } | Verb::Merge { place, level } => {
                keys.place(*place).text("level", level)
            }
            Verb::NoMemory { after } => keys.number("after", Some(*after)),
            Verb::Map { place, vm, level } => {
                keys.place(*place).text("vm", self.vm_name(*vm)).text("level", level)
            }
            Verb::Zap { place, vm } => keys.place(*place).text("vm", self.vm_name(*vm)),
            Verb::Rmpupdate { place, vm, size, assign, immutable } => keys
                .place(*place)
                .text("vm", self.vm_name(*vm))
                .size(*size)
                .raw("assign", assign)
                .flag("immutable", *immutable, false),
            Verb::Reclaim { place, size } | Verb::RmpHold { place, size } => {
                keys.place(*place).size(*size)
            }
            Verb::Resume { hold } => keys.hold(*hold),
            Verb::Look(look) => self.look(keys, look),
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
