//! `do`, and the keys that each verb has.

use polder::machine::RmpSize;
use polder::units::{Level, PAGE_SIZE};
use polder::{Contents, PinKind, Visibility};

use super::Reader;
use super::table::{Key, Parsed, Table, slot_number};
use crate::limits::{LENGTH_MAX, PAGES_MAX};
use crate::names::Kind;
use crate::scenario::{By, Bytes, Place, Verb};

/// The keys of a step, and what they are where it does not say.
pub(super) struct Keys<'r, 't> {
    pub(super) reader: &'r Reader<'t>,
    pub(super) table: &'r Table<'t>,
    /// The step, as an error names it.
    pub(super) what: &'r str,
    pub(super) actor: Option<&'r str>,
}

impl<'t> Keys<'_, 't> {
    /// The verb of this name.
    pub(super) fn verb(&self, name: &str) -> Parsed<Verb> {
        Ok(match name {
            "convert" => Verb::Convert {
                place: self.place()?,
                to: self.to()?,
                contents: self.contents()?,
                wait: self.flag("wait", true)?,
            },
            "want" => Verb::Want { place: self.place()?, vm: self.vm()?, to: self.to()? },
            "discard" => Verb::Discard { place: self.place()? },
            "move" => Verb::Move { place: self.place()? },
            "relinquish" => Verb::Relinquish { place: self.place()? },
            "populate" => Verb::Populate { place: self.place()?, bytes: self.bytes()? },
            "preload" => Verb::Preload { place: self.place()?, bytes: self.bytes()? },
            "fail" => Verb::Fail { place: self.place()? },
            "settle" => Verb::Settle,
            "create" => Verb::Create { huge_pages: self.huge_pages()?, name: self.name()? },
            "drop" => Verb::Drop { name: self.name()? },
            "bind" => {
                let slot = self.reader.slot(self.table, self.what)?;
                Verb::Bind { vm: self.vm()?, slot }
            }
            "unbind" => Verb::Unbind { vm: self.vm()?, slot: slot_number(&self.need("slot")?)? },
            "prefault" => Verb::Prefault { place: self.place()?, vm: self.vm()?, by: self.by()? },
            "pin" => Verb::Pin { place: self.place()?, kind: self.pin_kind()?, name: self.name()? },
            "unpin" => Verb::Unpin { name: self.name()? },
            "resume" => {
                let hold = self.table.get("hold").map(|key| key.hold()).transpose()?;
                Verb::Resume { hold }
            }
            "look" => Verb::Look(self.reader.look(self.table, self.what)?),
            "explain" => Verb::Explain { place: self.place()? },
            "pool" => Verb::Pool,
            "audit" => Verb::Audit,
            name => return self.access(name),
        })
    }

    /// What guests, devices and processes do to bytes, entries and references.
    fn access(&self, name: &str) -> Parsed<Verb> {
        Ok(match name {
            "read" => {
                let length = self.length()?;
                Verb::Read { from: self.bytes_at()?, length }
            }
            "write" => Verb::Write { to: self.bytes_at()?, bytes: self.bytes()? },
            "pte" => Verb::Pte {
                place: self.place()?,
                present: self.flag("present", true)?,
                used: self.flag("used", true)?,
            },
            "pvalidate" => Verb::Pvalidate {
                place: self.place()?,
                size: self.size()?,
                validate: self.flag("validate", true)?,
            },
            "refer" => Verb::Refer {
                place: self.place()?,
                kind: self.pin_kind()?,
                name: self.name()?,
                of: self.table.get("of").map(|key| key.text().map(str::to_owned)).transpose()?,
            },
            "release" => Verb::Release { name: self.name()? },
            "gup-fast" => Verb::GupFast { place: self.place()?, name: self.name()? },
            name => return self.kernel(name),
        })
    }

    /// What the machine's kernel does.
    fn kernel(&self, name: &str) -> Parsed<Verb> {
        Ok(match name {
            "allocate" => Verb::Allocate { place: self.place()?, level: self.level()? },
            "no-memory" => {
                let after = self.table.get("after").map_or(Ok(0), |key| key.number())?;
                Verb::NoMemory { after }
            }
            "lock" => Verb::Lock { place: self.place()? },
            "unlock" => Verb::Unlock { place: self.place()? },
            "split" => Verb::Split { place: self.place()? },
            "merge" => Verb::Merge { place: self.place()?, level: self.level()? },
            "map" => Verb::Map { place: self.place()?, vm: self.vm()?, level: self.level()? },
            "zap" => Verb::Zap { place: self.place()?, vm: self.vm()? },
            "rmpupdate" => Verb::Rmpupdate {
                place: self.place()?,
                vm: self.vm()?,
                size: self.size()?,
                assign: self.need("assign")?.flag()?,
                immutable: self.flag("immutable", false)?,
            },
            "psmash" => Verb::Psmash { place: self.place()? },
            "unsmash" => Verb::Unsmash { place: self.place()? },
            "reclaim" => Verb::Reclaim { place: self.place()?, size: self.size()? },
            "rmp-hold" => Verb::RmpHold { place: self.place()?, size: self.size()? },
            "rmp-release" => Verb::RmpRelease { place: self.place()? },
            other => unreachable!("the table of verbs has {other}, and nothing reads it"),
        })
    }

    fn need(&self, key: &str) -> Parsed<Key<'t>> {
        self.table.need(key, self.what)
    }

    fn place(&self) -> Parsed<Place> {
        self.reader.place(self.table, self.what)
    }

    fn vm(&self) -> Parsed<usize> {
        self.reader.vm(self.table)
    }

    fn to(&self) -> Parsed<Visibility> {
        self.need("to")?.word(&[Visibility::Private, Visibility::Shared])
    }

    fn contents(&self) -> Parsed<Contents> {
        let known = [Contents::Preserve, Contents::Zero, Contents::Unspecified];
        self.table.get("contents").map_or(Ok(Contents::Unspecified), |key| key.word(&known))
    }

    fn huge_pages(&self) -> Parsed<u64> {
        let key = self.need("huge-pages")?;
        let count = key.number()?;
        if !(1..=PAGES_MAX / 512).contains(&count) {
            return Err(key.wrong(format!("`huge-pages` is 1 to {}", PAGES_MAX / 512)));
        }
        Ok(count)
    }

    /// What the actor calls it; his own name, where he gives it none.
    fn name(&self) -> Parsed<String> {
        match self.table.get("name") {
            None => Ok(self.actor.unwrap_or_default().to_owned()),
            Some(key) => key.text().map(str::to_owned),
        }
    }

    fn by(&self) -> Parsed<By> {
        self.table.get("by").map_or(Ok(By::Root), |key| key.word(&By::ALL))
    }

    fn flag(&self, key: &str, unless: bool) -> Parsed<bool> {
        self.table.get(key).map_or(Ok(unless), |key| key.flag())
    }

    fn level(&self) -> Parsed<Level> {
        self.table.get("level").map_or(Ok(Level::Size4K), |key| key.level())
    }

    fn size(&self) -> Parsed<RmpSize> {
        self.table.get("size").map_or(Ok(RmpSize::Size4K), |key| key.rmp_size())
    }

    fn pin_kind(&self) -> Parsed<PinKind> {
        let known = [PinKind::Short, PinKind::LongTerm, PinKind::Exclusive];
        self.table.get("kind").map_or(Ok(PinKind::LongTerm), |key| key.word(&known))
    }

    fn length(&self) -> Parsed<u64> {
        let Some(key) = self.table.get("length") else { return Ok(8) };
        let length = key.number()?;
        if !(1..=LENGTH_MAX).contains(&length) {
            return Err(key.wrong(format!("`length` is 1 to {LENGTH_MAX} bytes")));
        }
        Ok(length)
    }

    fn bytes(&self) -> Parsed<String> {
        let key = self.need("bytes")?;
        let bytes = key.text()?;
        let most = usize::try_from(LENGTH_MAX).unwrap_or(usize::MAX);
        if bytes.is_empty() || bytes.len() > most {
            return Err(key.wrong(format!("`bytes` is 1 to {LENGTH_MAX} bytes")));
        }
        Ok(bytes.to_owned())
    }

    /// Where bytes are read or written.
    fn bytes_at(&self) -> Parsed<Bytes> {
        let at = match self.table.get("at") {
            None => 0,
            Some(key) => match key.number()? {
                at if at < PAGE_SIZE => at,
                _ => return Err(key.wrong("`at` is an offset in a page, less than 0x1000")),
            },
        };
        let actor = self.actor.and_then(|name| self.reader.actors.get(name));
        let is_guest = actor.is_some_and(|actor| actor.kind == Kind::Guest);
        if let Some(key) = self.table.get("as").filter(|_| !is_guest) {
            return Err(key.wrong("only a guest's access says `as` what it means the page"));
        }
        let side = self.reader.visibility(self.table, "as")?.unwrap_or(Visibility::Private);
        Ok(Bytes { place: self.place()?, at, side })
    }
}
