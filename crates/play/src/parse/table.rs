//! Tables, keys and values of a scenario's text, each of which knows its line.

use std::ops::Range;

use polder::Reached;
use polder::machine::RmpSize;
use polder::units::{Gpa, Level, PAGE_SIZE, PageRange};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::ScenarioError;
use crate::names::nearest;
use crate::scenario::{Hold, Mapped};

pub(super) type Parsed<T> = Result<T, ScenarioError>;
pub(super) type Value<'a> = Spanned<DeValue<'a>>;

/// Line and column of a byte, each from 1.
pub(super) fn place_in(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.rfind('\n').map_or(before, |end| &before[end + 1..]);
    (before.matches('\n').count() + 1, line.chars().count() + 1)
}

/// A table of the text, and where it stands.
#[derive(Clone)]
pub(super) struct Table<'t> {
    pub(super) text: &'t str,
    pub(super) span: Range<usize>,
    pub(super) table: &'t DeTable<'t>,
}

impl<'t> Table<'t> {
    pub(super) fn of(text: &'t str, value: &'t Value<'t>, what: &str) -> Parsed<Self> {
        match value.get_ref() {
            DeValue::Table(table) => Ok(Self { text, span: value.span(), table }),
            other => Err(wrong(
                text,
                value.span(),
                format!("{what} is a table, not a {}", other.type_str()),
            )),
        }
    }

    /// Refuses keys that are not known here.
    pub(super) fn check_keys(&self, known: &[&str], what: &str) -> Parsed<()> {
        for key in self.table.keys() {
            let name = key.get_ref().as_ref();
            if known.contains(&name) {
                continue;
            }
            let meant = match nearest(name, known.iter().copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known here: {}", known.join(", ")),
            };
            let what = format!("{what} has no key `{}`", short(name));
            return Err(ScenarioError { meant: Some(meant), ..wrong(self.text, key.span(), what) });
        }
        Ok(())
    }

    pub(super) fn get(&self, key: &str) -> Option<Key<'t>> {
        let value = self.table.get(key)?;
        Some(Key { text: self.text, key: key.to_owned(), value })
    }

    pub(super) fn need(&self, key: &str, what: &str) -> Parsed<Key<'t>> {
        let missing =
            || wrong(self.text, self.span.clone(), format!("{what} needs the key `{key}`"));
        self.get(key).ok_or_else(missing)
    }

    /// The tables of an array of tables.
    pub(super) fn tables(&self, key: &str, most: usize) -> Parsed<Vec<Table<'t>>> {
        let Some(found) = self.get(key) else { return Ok(Vec::new()) };
        let what = format!("`{key}`");
        let items: Vec<&Value<'t>> = match found.value.get_ref() {
            DeValue::Array(items) => items.iter().collect(),
            _ => return Err(found.wrong(format!("{what} is a list of tables: write `[[{key}]]`"))),
        };
        if let Some(first) = items.get(most) {
            let what = format!("{} times {what}; {most} are the most", items.len());
            return Err(wrong(self.text, first.span(), what));
        }
        items.into_iter().map(|item| Table::of(self.text, item, &what)).collect()
    }

    pub(super) fn line(&self) -> usize {
        place_in(self.text, self.span.start).0
    }
}

pub(super) fn wrong(text: &str, span: Range<usize>, what: impl Into<String>) -> ScenarioError {
    let (line, column) = place_in(text, span.start);
    ScenarioError { line, column, what: what.into(), meant: None }
}

/// A name as far as it is worth repeating.
pub(super) fn short(name: &str) -> String {
    let mut short: String = name.chars().take(40).collect();
    if short.len() < name.len() {
        short.push('…');
    }
    short
}

/// A key and its value.
pub(super) struct Key<'t> {
    pub(super) text: &'t str,
    pub(super) key: String,
    pub(super) value: &'t Value<'t>,
}

impl<'t> Key<'t> {
    pub(super) fn wrong(&self, what: impl Into<String>) -> ScenarioError {
        wrong(self.text, self.value.span(), what)
    }

    pub(super) fn is(&self, should: &str) -> ScenarioError {
        self.wrong(format!("`{}` is {should}, not a {}", self.key, self.value.get_ref().type_str()))
    }

    pub(super) fn text(&self) -> Parsed<&'t str> {
        self.value.get_ref().as_str().ok_or_else(|| self.is("a text in quotes"))
    }

    pub(super) fn flag(&self) -> Parsed<bool> {
        self.value.get_ref().as_bool().ok_or_else(|| self.is("true or false"))
    }

    /// A number, plain or in quotes, decimal or `0x`.
    pub(super) fn number(&self) -> Parsed<u64> {
        let number = match self.value.get_ref() {
            DeValue::Integer(number) => u64::from_str_radix(number.as_str(), number.radix()).ok(),
            DeValue::String(text) => number(text),
            _ => return Err(self.is("a number")),
        };
        number.ok_or_else(|| self.wrong(format!("`{}` is a number from 0 to 2^64 - 1", self.key)))
    }

    pub(super) fn level(&self) -> Parsed<Level> {
        let text = self.text()?;
        self.one_of(text, &Level::ALL.map(|level| (level.to_string(), level)))
    }

    /// The value that a word names.
    pub(super) fn one_of<T: Copy>(&self, text: &str, known: &[(String, T)]) -> Parsed<T> {
        if let Some((_, value)) = known.iter().find(|(name, _)| name == text) {
            return Ok(*value);
        }
        let names = || known.iter().map(|(name, _)| name.as_str());
        let meant = match nearest(text, names()) {
            Some(near) => format!("did you mean \"{near}\"?"),
            None => format!("known here: {}", names().collect::<Vec<_>>().join(", ")),
        };
        let what = format!("`{}` can't be \"{}\"", self.key, short(text));
        Err(ScenarioError { meant: Some(meant), ..self.wrong(what) })
    }

    pub(super) fn word<T: Copy + ToString>(&self, known: &[T]) -> Parsed<T> {
        let known: Vec<_> = known.iter().map(|value| (value.to_string(), *value)).collect();
        self.one_of(self.text()?, &known)
    }

    pub(super) fn mapped(&self) -> Parsed<Mapped> {
        let mut known = vec![("none".to_owned(), Mapped::No)];
        known.extend(Level::ALL.map(|level| (level.to_string(), Mapped::At(level))));
        self.one_of(self.text()?, &known)
    }

    pub(super) fn rmp_size(&self) -> Parsed<RmpSize> {
        RmpSize::of(self.level()?)
            .ok_or_else(|| self.wrong("there is no 1G RMP entry: the size is \"4K\" or \"2M\""))
    }

    pub(super) fn gpa(&self) -> Parsed<Gpa> {
        let gpa = self.number()?;
        if gpa.is_multiple_of(PAGE_SIZE) {
            return Ok(Gpa::new(gpa));
        }
        let meant = Some("say where in the page by `at`".to_owned());
        let what = format!("`{}` is the address of a page, a multiple of 0x1000", self.key);
        Err(ScenarioError { meant, ..self.wrong(what) })
    }

    /// `"2..6"`: from page 2 to before page 6.
    pub(super) fn pages(&self) -> Parsed<PageRange> {
        let form = || {
            let what = format!("`{}` is a range such as \"2..6\", its end left out", self.key);
            self.wrong(what)
        };
        let (start, end) = self.text()?.split_once("..").ok_or_else(form)?;
        let (start, end) = number(start).zip(number(end)).ok_or_else(form)?;
        PageRange::between(start, end)
            .ok_or_else(|| self.wrong(format!("`{}`: no page lies in {start}..{end}", self.key)))
    }

    pub(super) fn hold(&self) -> Parsed<Hold> {
        match self.value.get_ref() {
            DeValue::Integer(_) => match self.number()? {
                0 => Err(self.wrong("`hold` counts steps from 1")),
                step => Ok(Hold::BeforeStep(step)),
            },
            _ => Ok(Hold::At(self.word(&Reached::ALL)?)),
        }
    }
}

pub(super) fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match text.strip_prefix("0x") {
        Some(hex) => digits(hex).then(|| u64::from_str_radix(hex, 16).ok())?,
        None => digits(text).then(|| text.parse().ok())?,
    }
}

pub(super) fn slot_number(key: &Key<'_>) -> Parsed<u32> {
    let slot = u32::try_from(key.number()?).ok().filter(|slot| *slot < 0x1_0000);
    slot.ok_or_else(|| key.wrong("a slot's number is less than 0x10000"))
}

/// One word, or a list of them.
pub(super) fn words<'t>(key: &Key<'t>) -> Parsed<Vec<(Key<'t>, &'t str)>> {
    let item = |value: &'t Value<'t>| Key { text: key.text, key: key.key.clone(), value };
    let items: Vec<_> = match key.value.get_ref() {
        DeValue::Array(items) => items.iter().map(item).collect(),
        _ => vec![item(key.value)],
    };
    items.into_iter().map(|item| item.text().map(|text| (item, text))).collect()
}
