//! `[[step]]`: what is done, by whom, and where it is held.

use polder::machine::RmpSize;
use polder::units::{Level, PAGE_SIZE};
use polder::{Contents, PinKind, Visibility};

use super::Reader;
use super::table::{Key, Parsed, Table, slot_number};
use crate::limits::{LENGTH_MAX, PAGES_MAX};
use crate::names::{Kind, PLACE_KEYS, STEP_KEYS, VERBS, VerbEntry};
use crate::scenario::{Bytes, Expect, SlotSpec, Step, Verb};
use crate::tables::By;

impl<'t> Reader<'t> {
    pub(super) fn step(&mut self, table: &Table<'t>) -> Parsed<Step> {
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
            "prefault" => Verb::Prefault {
                place: self.place(table, what)?,
                vm: self.vm(table)?,
                by: table.get("by").map_or(Ok(By::Root), |key| key.word(&By::ALL))?,
            },
            "pte" => Verb::Pte {
                place: self.place(table, what)?,
                present: flag("present", true)?,
                used: flag("used", true)?,
            },
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
}
