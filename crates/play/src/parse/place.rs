//! The pages that a step or a look names: by `page`, `pages` or `gpa`.

use polder::units::{PageCount, PageIndex, PageRange};

use super::Reader;
use super::table::{Key, Parsed, Table, wrong};
use crate::limits::NAMED_MAX;
use crate::scenario::Place;

impl<'t> Reader<'t> {
    /// The pages that a table names.
    pub(super) fn place(&self, table: &Table<'t>, what: &str) -> Parsed<Place> {
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
        let count = match place {
            Place::Pages(range) => range.count().get(),
            Place::Gpa(_, count) => count.get(),
        };
        let named = self.named.get().saturating_add(count);
        self.named.set(named);
        if named > NAMED_MAX {
            let what = format!("the steps name {named} pages; {NAMED_MAX} are the most");
            return Err(key.wrong(what));
        }
        Ok(place)
    }
}
