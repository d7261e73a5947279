//! `memory`: how much, of what, and how it starts.

use polder::units::{ByteSize, Geometry, PageCount};
use polder::{PageSize, Platform, Visibility};

use super::Reader;
use super::table::{Parsed, Table};
use crate::limits::PAGES_MAX;
use crate::scenario::MemorySpec;

impl<'t> Reader<'t> {
    pub(super) fn memory(&self, root: &Table<'t>) -> Parsed<MemorySpec> {
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
        let huge = size.reserved().map(|level| Geometry::X86_64.pages(level).get());
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

    pub(super) fn visibility(&self, table: &Table<'t>, key: &str) -> Parsed<Option<Visibility>> {
        table.get(key).map(|key| key.word(&[Visibility::Private, Visibility::Shared])).transpose()
    }
}
