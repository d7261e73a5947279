//! From text to [`Scenario`]: the one place that refuses what is none, with the line and what was
//! meant.
//!
//! Keys are looked at before values, so that a key that is misspelt is called that, and not missing.

mod table;

use std::collections::BTreeMap;

use polder::machine::RmpSize;
use polder::units::{ByteSize, Gpa, Level, PAGE_SIZE, PageCount, PageIndex, PageRange};
use polder::{Contents, HostKind, PageSize, PinKind, Platform, Population, Visibility};
use toml::de::{DeTable, DeValue};

use crate::ScenarioError;
use crate::limits::{
    ACTORS_MAX, BYTES_MAX, LENGTH_MAX, NAMED_MAX, PAGES_MAX, SLOTS_MAX, STEPS_MAX, VMS_MAX,
};
use crate::names::{Is, Kind, LOOK_KEYS, PLACE_KEYS, STEP_KEYS, VERBS, VerbEntry};
use crate::scenario::{
    Actor, Bytes, Expect, HostView, Look, MemorySpec, Place, Scenario, SlotSpec, Step, Verb, VmSpec,
};

use self::table::{Key, Parsed, Table, place_in, short, slot_number, words, wrong};

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
    Reader { text, vms: Vec::new(), actors: BTreeMap::new(), pages: PageCount::ZERO, named: 0 }
        .scenario(root)
}

struct Reader<'t> {
    text: &'t str,
    vms: Vec<VmSpec>,
    actors: BTreeMap<String, Actor>,
    pages: PageCount,
    /// The pages that steps have named so far.
    named: u64,
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
        let hosts = match root.get("hosts") {
            None => vec![HostKind::Machine],
            Some(key) => {
                let mut hosts = Vec::new();
                for (item, _) in words(&key)? {
                    let host = item.word(&HostKind::ALL)?;
                    if !hosts.contains(&host) {
                        hosts.push(host);
                    }
                }
                hosts
            }
        };
        if hosts.is_empty() {
            return Err(root.need("hosts", "")?.wrong("a scenario is played on one host at least"));
        }
        let discrepancy =
            root.get("discrepancy").map(|key| key.text().map(str::to_owned)).transpose()?;
        let memory = self.memory(&root)?;
        self.pages = memory.pages;
        self.read_vms(&root)?;
        self.read_actors(&root)?;
        let mut steps = Vec::new();
        for table in root.tables("step", STEPS_MAX)? {
            let step = self.step(&table)?;
            self.check_hosts(&table, &step, &hosts)?;
            steps.push(step);
        }
        self.check_order(&steps, &root)?;
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

    fn memory(&self, root: &Table<'t>) -> Parsed<MemorySpec> {
        let key = root.need("memory", "a scenario")?;
        let table = Table::of(self.text, key.value, "`memory`")?;
        let keys = ["pages", "size", "platform", "starts", "owed", "page-size", "pool"];
        table.check_keys(&keys, "`memory`")?;
        let (said, pages) = match (table.get("pages"), table.get("size")) {
            (Some(_), Some(size)) => {
                return Err(size.wrong("`size` says what `pages` says already"));
            }
            (Some(pages), None) => {
                let count = PageCount::new(pages.number()?);
                let count = count.ok_or_else(|| pages.wrong("`pages` is too large a number"))?;
                (pages, count)
            }
            (None, Some(size)) => {
                let bytes: ByteSize = size
                    .text()?
                    .parse()
                    .map_err(|_| size.wrong("`size` is a size such as \"4M\""))?;
                let count =
                    bytes.pages().map_err(|error| size.wrong(format!("`size`: {error}")))?;
                (size, count)
            }
            (None, None) => table.need("pages", "`memory`").map(|key| (key, PageCount::ZERO))?,
        };
        if !(1..=PAGES_MAX).contains(&pages.get()) {
            return Err(
                said.wrong(format!("memory has 1 to {PAGES_MAX} pages, not {}", pages.get()))
            );
        }
        let platform = match table.get("platform") {
            None => Platform::Plain,
            Some(key) => key.word(&crate::PLATFORMS)?,
        };
        let starts = self.visibility(&table, "starts")?.unwrap_or(Visibility::Private);
        let owed = table.get("owed");
        let is_owed = owed.as_ref().map(|key| key.flag()).transpose()?.unwrap_or(false);
        if let Some(key) = owed.filter(|_| is_owed)
            && starts == Visibility::Private
            && !platform.host_fills_private()
        {
            let why = format!(
                "private pages of {platform} can't be owed, for the guest alone can fill them: \
                 add `starts = \"shared\"`"
            );
            return Err(key.wrong(why));
        }
        let (page_size, pool) = self.page_size(&table, pages)?;
        Ok(MemorySpec { pages, platform, starts, owed: is_owed, page_size, pool })
    }

    /// What memory is made of, and how large the pool is that it draws from.
    fn page_size(&self, table: &Table<'t>, pages: PageCount) -> Parsed<(PageSize, Option<u64>)> {
        let size = match table.get("page-size") {
            None => PageSize::Small,
            Some(key) => key.word(&PageSize::ALL)?,
        };
        let huge = size.reserved().map(|level| polder::units::Geometry::X86_64.pages(level).get());
        if let (Some(key), Some(huge)) = (table.get("page-size"), huge)
            && !pages.get().is_multiple_of(huge)
        {
            let what =
                format!("memory of {size} pages has a multiple of {huge} pages, not {pages}");
            return Err(key.wrong(what));
        }
        let Some(key) = table.get("pool") else { return Ok((size, None)) };
        let count = key.number()?;
        match huge {
            None => Err(key.wrong("`pool` is of memory with page-size = \"2m\" or \"1g\"")),
            Some(huge) if count > PAGES_MAX / huge => {
                Err(key.wrong(format!("`pool` has {} huge pages at most", PAGES_MAX / huge)))
            }
            Some(_) => Ok((size, Some(count))),
        }
    }

    fn visibility(&self, table: &Table<'t>, key: &str) -> Parsed<Option<Visibility>> {
        table.get(key).map(|key| key.word(&[Visibility::Private, Visibility::Shared])).transpose()
    }

    fn read_vms(&mut self, root: &Table<'t>) -> Parsed<()> {
        let whole = SlotSpec { slot: 0, pages: self.all(), gpa: DEFAULT_GPA };
        for table in root.tables("vm", VMS_MAX)? {
            table.check_keys(&["name", "asid", "slots"], "`[[vm]]`")?;
            let key = table.need("name", "`[[vm]]`")?;
            let name = key.text()?.to_owned();
            if self.vms.iter().any(|vm| vm.name == name) {
                return Err(key.wrong(format!("there is a VM \"{}\" already", short(&name))));
            }
            let asid = match table.get("asid") {
                None => None,
                Some(key) => {
                    let asid = u16::try_from(key.number()?).ok();
                    let asid = asid.filter(|asid| polder::machine::Asid::new(*asid).is_some());
                    Some(asid.ok_or_else(|| key.wrong("`asid` is a number from 1 to 0x3fe"))?)
                }
            };
            let slots = match table.get("slots") {
                None => vec![whole],
                Some(_) => {
                    let tables = table.tables("slots", SLOTS_MAX)?;
                    tables.iter().map(|table| self.slot(table)).collect::<Parsed<_>>()?
                }
            };
            self.vms.push(VmSpec { name, asid, slots });
        }
        if self.vms.is_empty() {
            self.vms.push(VmSpec { name: "vm".into(), asid: None, slots: vec![whole] });
        }
        Ok(())
    }

    fn all(&self) -> PageRange {
        PageRange::between(0, self.pages.get()).expect("memory has pages")
    }

    fn slot(&self, table: &Table<'t>) -> Parsed<SlotSpec> {
        table.check_keys(&["slot", "pages", "gpa"], "a slot")?;
        Ok(SlotSpec {
            slot: slot_number(&table.need("slot", "a slot")?)?,
            pages: table.need("pages", "a slot")?.pages()?,
            gpa: table.need("gpa", "a slot")?.gpa()?,
        })
    }

    /// The actors that are declared, beside those that need not be.
    fn read_actors(&mut self, root: &Table<'t>) -> Parsed<()> {
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

    /// The VM that a table names, or the first.
    fn vm(&self, table: &Table<'t>) -> Parsed<usize> {
        let known = || self.vms.iter().enumerate().map(|(at, vm)| (vm.name.clone(), at));
        match table.get("vm") {
            None => Ok(0),
            Some(key) => key.one_of(key.text()?, &known().collect::<Vec<_>>()),
        }
    }

    fn step(&mut self, table: &Table<'t>) -> Parsed<Step> {
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
        let verb = self.verb(table, verb, &what, actor.as_deref())?;
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

    fn actor(&self, table: &Table<'t>, verb: &VerbEntry) -> Parsed<Option<String>> {
        if verb.who.is_empty() {
            return match table.get("actor") {
                None => Ok(None),
                Some(key) => Err(key.wrong(format!("nobody in particular does `{}`", verb.name))),
            };
        }
        let key = table.need("actor", &format!("the step `{}`", verb.name))?;
        let known: Vec<_> = self.actors.iter().map(|(name, actor)| (name.clone(), actor)).collect();
        let actor = key.one_of(key.text()?, &known)?;
        if verb.who.contains(&actor.kind) {
            return Ok(Some(key.text()?.to_owned()));
        }
        let can: Vec<_> = verb.who.iter().map(|kind| kind.name()).collect();
        let what = format!("a {} can't `{}`", actor.kind, verb.name);
        let meant = Some(format!("it is done by: {}", can.join(", ")));
        Err(ScenarioError { meant, ..key.wrong(what) })
    }

    fn verb(
        &mut self,
        table: &Table<'t>,
        verb: &VerbEntry,
        what: &str,
        actor: Option<&str>,
    ) -> Parsed<Verb> {
        let name = || match table.get("name") {
            None => Ok(actor.unwrap_or_default().to_owned()),
            Some(key) => key.text().map(str::to_owned),
        };
        let flag = |key: &str, unless: bool| table.get(key).map_or(Ok(unless), |key| key.flag());
        let level = |key: &str| table.get(key).map_or(Ok(Level::Size4K), |key| key.level());
        let size = || table.get("size").map_or(Ok(RmpSize::Size4K), |key| key.rmp_size());
        let pin_kind = || match table.get("kind") {
            None => Ok(PinKind::LongTerm),
            Some(key) => key.word(&[PinKind::Short, PinKind::LongTerm, PinKind::Exclusive]),
        };
        let need = |key: &str| table.need(key, what);
        Ok(match verb.name {
            "convert" => Verb::Convert {
                place: self.place(table, what)?,
                to: need("to")?.word(&[Visibility::Private, Visibility::Shared])?,
                contents: match table.get("contents") {
                    None => Contents::Unspecified,
                    Some(key) => {
                        key.word(&[Contents::Preserve, Contents::Zero, Contents::Unspecified])?
                    }
                },
                wait: flag("wait", true)?,
            },
            "want" => Verb::Want {
                place: self.place(table, what)?,
                vm: self.vm(table)?,
                to: need("to")?.word(&[Visibility::Private, Visibility::Shared])?,
            },
            "discard" => Verb::Discard { place: self.place(table, what)? },
            "move" => Verb::Move { place: self.place(table, what)? },
            "relinquish" => Verb::Relinquish { place: self.place(table, what)? },
            "populate" => Verb::Populate {
                place: self.place(table, what)?,
                bytes: self.bytes(&need("bytes")?)?,
            },
            "preload" => Verb::Preload {
                place: self.place(table, what)?,
                bytes: self.bytes(&need("bytes")?)?,
            },
            "fail" => Verb::Fail { place: self.place(table, what)? },
            "settle" => Verb::Settle,
            "create" => {
                let key = need("huge-pages")?;
                let huge_pages = key.number()?;
                if !(1..=PAGES_MAX / 512).contains(&huge_pages) {
                    let what = format!("`huge-pages` is 1 to {}", PAGES_MAX / 512);
                    return Err(key.wrong(what));
                }
                Verb::Create { huge_pages, name: name()? }
            }
            "drop" => Verb::Drop { name: name()? },
            "bind" => {
                let (slot, pages, gpa) = (need("slot")?, need("pages")?, need("gpa")?);
                let slot =
                    SlotSpec { slot: slot_number(&slot)?, pages: pages.pages()?, gpa: gpa.gpa()? };
                Verb::Bind { vm: self.vm(table)?, slot }
            }
            "unbind" => Verb::Unbind { vm: self.vm(table)?, slot: slot_number(&need("slot")?)? },
            "read" => {
                let length = table.get("length");
                let number = length.as_ref().map_or(Ok(8), Key::number)?;
                if let Some(length) = length.filter(|_| !(1..=LENGTH_MAX).contains(&number)) {
                    return Err(length.wrong(format!("`length` is 1 to {LENGTH_MAX} bytes")));
                }
                Verb::Read { from: self.bytes_at(table, what, actor)?, length: number }
            }
            "write" => Verb::Write {
                to: self.bytes_at(table, what, actor)?,
                bytes: self.bytes(&need("bytes")?)?,
            },
            "pin" => {
                Verb::Pin { place: self.place(table, what)?, kind: pin_kind()?, name: name()? }
            }
            "unpin" => Verb::Unpin { name: name()? },
            "refer" => {
                Verb::Refer { place: self.place(table, what)?, kind: pin_kind()?, name: name()? }
            }
            "release" => Verb::Release { name: name()? },
            "gup-fast" => Verb::GupFast { place: self.place(table, what)?, name: name()? },
            "pvalidate" => Verb::Pvalidate {
                place: self.place(table, what)?,
                size: size()?,
                validate: flag("validate", true)?,
            },
            "allocate" => {
                Verb::Allocate { place: self.place(table, what)?, level: level("level")? }
            }
            "no-memory" => {
                Verb::NoMemory { after: table.get("after").map_or(Ok(0), |key| key.number())? }
            }
            "lock" => Verb::Lock { place: self.place(table, what)? },
            "unlock" => Verb::Unlock { place: self.place(table, what)? },
            "split" => Verb::Split { place: self.place(table, what)? },
            "merge" => Verb::Merge { place: self.place(table, what)?, level: level("level")? },
            "map" => Verb::Map {
                place: self.place(table, what)?,
                vm: self.vm(table)?,
                level: level("level")?,
            },
            "zap" => Verb::Zap { place: self.place(table, what)?, vm: self.vm(table)? },
            "rmpupdate" => Verb::Rmpupdate {
                place: self.place(table, what)?,
                vm: self.vm(table)?,
                size: size()?,
                assign: need("assign")?.flag()?,
                immutable: flag("immutable", false)?,
            },
            "psmash" => Verb::Psmash { place: self.place(table, what)? },
            "unsmash" => Verb::Unsmash { place: self.place(table, what)? },
            "reclaim" => Verb::Reclaim { place: self.place(table, what)?, size: size()? },
            "rmp-hold" => Verb::RmpHold { place: self.place(table, what)?, size: size()? },
            "rmp-release" => Verb::RmpRelease { place: self.place(table, what)? },
            "resume" => Verb::Resume { hold: table.get("hold").map(|key| key.hold()).transpose()? },
            "look" => Verb::Look(self.look(table, what)?),
            "explain" => Verb::Explain { place: self.place(table, what)? },
            "pool" => Verb::Pool,
            "audit" => Verb::Audit,
            other => unreachable!("the table of verbs has {other}, and nothing reads it"),
        })
    }

    /// The pages that a table names.
    fn place(&mut self, table: &Table<'t>, what: &str) -> Parsed<Place> {
        let keys = ["page", "pages", "gpa"].map(|key| table.get(key));
        let (key, place) = match keys {
            [Some(page), None, None] => {
                let index = PageIndex::new(page.number()?);
                let index = index.ok_or_else(|| page.wrong("`page` is too large a number"))?;
                (page, Place::Pages(PageRange::one(index)))
            }
            [None, Some(pages), None] => {
                let range = pages.pages()?;
                (pages, Place::Pages(range))
            }
            [None, None, Some(gpa)] => {
                let count = table.get("count");
                let number = count.as_ref().map_or(Ok(1), Key::number)?;
                let pages = PageCount::new(number).filter(|pages| !pages.is_zero());
                let place = Place::Gpa(
                    gpa.gpa()?,
                    pages.ok_or_else(|| {
                        count.as_ref().unwrap_or(&gpa).wrong("`count` is 1 or more")
                    })?,
                );
                (gpa, place)
            }
            _ => {
                let what = format!("{what} names pages by one of `page`, `pages` and `gpa`");
                return Err(wrong(self.text, table.span.clone(), what));
            }
        };
        if let (Place::Pages(_), Some(count)) = (place, table.get("count")) {
            return Err(count.wrong("`count` goes with `gpa`; a range of pages is `pages`"));
        }
        self.named = self.named.saturating_add(match place {
            Place::Pages(range) => range.count().get(),
            Place::Gpa(_, count) => count.get(),
        });
        if self.named > NAMED_MAX {
            let what = format!("the steps name {} pages; {NAMED_MAX} are the most", self.named);
            return Err(key.wrong(what));
        }
        Ok(place)
    }

    fn bytes_at(&mut self, table: &Table<'t>, what: &str, actor: Option<&str>) -> Parsed<Bytes> {
        let at = match table.get("at") {
            None => 0,
            Some(key) => match key.number()? {
                at if at < PAGE_SIZE => at,
                _ => return Err(key.wrong("`at` is an offset in a page, less than 0x1000")),
            },
        };
        let kind = actor.and_then(|name| self.actors.get(name)).map(|actor| actor.kind);
        if let Some(key) = table.get("as").filter(|_| kind != Some(Kind::Guest)) {
            return Err(key.wrong("only a guest's access says `as` what it means the page"));
        }
        let side = self.visibility(table, "as")?.unwrap_or(Visibility::Private);
        Ok(Bytes { place: self.place(table, what)?, at, side })
    }

    fn bytes(&self, key: &Key<'t>) -> Parsed<String> {
        let bytes = key.text()?;
        let most = usize::try_from(LENGTH_MAX).unwrap_or(usize::MAX);
        if bytes.is_empty() || bytes.len() > most {
            return Err(key.wrong(format!("`{}` is 1 to {LENGTH_MAX} bytes", key.key)));
        }
        Ok(bytes.to_owned())
    }

    fn expect(&self, key: &Key<'t>) -> Parsed<Expect> {
        if let DeValue::String(_) = key.value.get_ref() {
            return Ok(Expect { is: Some(outcome(key)?), ..Expect::default() });
        }
        let table = Table::of(self.text, key.value, "`expect`")?;
        let keys = ["is", "page", "holder", "errno", "bytes", "not", "zeros", "converted", "says"];
        table.check_keys(&keys, "`expect`")?;
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
            says: text("says")?,
        })
    }

    fn look(&mut self, table: &Table<'t>, what: &str) -> Parsed<Look> {
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

    /// Refuses steps that only the simulated machine has, where others are to play it too.
    fn check_hosts(&self, table: &Table<'t>, step: &Step, hosts: &[HostKind]) -> Parsed<()> {
        let Some(host) = hosts.iter().find(|host| **host != HostKind::Machine) else {
            return Ok(());
        };
        let kind =
            step.actor.as_ref().and_then(|name| self.actors.get(name)).map(|actor| actor.kind);
        let simulated = kind.is_some_and(Kind::is_simulated)
            || match &step.verb {
                Verb::Refer { .. } | Verb::Release { .. } | Verb::GupFast { .. } => true,
                Verb::Pvalidate { .. } | Verb::Audit => true,
                Verb::Create { .. } | Verb::Drop { .. } => true,
                Verb::Look(look) => look.is_simulated(),
                _ => false,
            };
        if !simulated {
            return Ok(());
        }
        let what = format!("host {host} can't do this step: the simulated machine alone can");
        let meant = Some("leave it out, or say hosts = [\"machine\"]".to_owned());
        Err(ScenarioError { meant, ..wrong(self.text, table.span.clone(), what) })
    }

    /// Refuses an actor who does something while he is held, or goes on where he never was. What he
    /// may wait for can't be known here, but for what is expected.
    fn check_order(&self, steps: &[Step], root: &Table<'t>) -> Parsed<()> {
        let tables = root.tables("step", STEPS_MAX)?;
        let mut amid: BTreeMap<&str, usize> = BTreeMap::new();
        for (step, table) in steps.iter().zip(&tables) {
            let Some(actor) = step.actor.as_deref() else { continue };
            let stays = match (&step.verb, step.hold) {
                (Verb::Resume { hold: Some(_) }, _) | (_, Some(_)) => {
                    matches!(step.expect.is, None | Some(Is::Held | Is::Waits))
                }
                _ => matches!(step.expect.is, Some(Is::Held | Is::Waits)),
            };
            let wrong = |what: String, meant: &str| {
                let error = wrong(self.text, table.span.clone(), what);
                Err(ScenarioError { meant: Some(meant.to_owned()), ..error })
            };
            match (&step.verb, amid.get(actor)) {
                (Verb::Resume { .. }, None) => {
                    let what = format!("\"{actor}\" is amid nothing that could be resumed");
                    return wrong(what, "hold a step of his first, or expect that it waits");
                }
                (Verb::Resume { .. }, Some(_)) => {}
                (_, Some(line)) => {
                    let what = format!("\"{actor}\" is still amid his step of line {line}");
                    return wrong(what, "resume it first, or have another actor do this");
                }
                (_, None) => {}
            }
            if stays {
                amid.insert(actor, step.line);
            } else {
                amid.remove(actor);
            }
        }
        let Some((actor, line)) = amid.into_iter().next() else { return Ok(()) };
        let what = format!("the scenario ends, and \"{actor}\" is amid this step");
        let meant = Some("resume it, and say what comes of it".to_owned());
        let at = steps.iter().zip(&tables).find(|(step, _)| step.line == line);
        let span = at.map_or(0..0, |(_, table)| table.span.clone());
        Err(ScenarioError { meant, ..wrong(self.text, span, what) })
    }
}

fn outcome(key: &Key<'_>) -> Parsed<Is> {
    let known: Vec<_> = Is::ALL.iter().map(|(is, name, _)| ((*name).to_owned(), *is)).collect();
    key.one_of(key.text()?, &known)
}
