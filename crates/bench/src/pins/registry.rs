//! What one would write first: a lock over a tree of who has which page pinned.
//!
//! It does what Polder's pins do. A page is pinned if it is shared and whole, if no operation has
//! it claimed, and if nobody has it pinned exclusively; an operation finds the first pin of its
//! pages, and whose it is. The pages' facts are in the same map as Polder's.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use polder::{Holder, PinKind};
use polder_engine::{PageFacts, PageMap, Population, Visibility};
use polder_units::{Geometry, PageIndex, PageRange};

const SHARED: PageFacts =
    PageFacts { visibility: Visibility::Shared, population: Population::Whole };

/// All pins of an object, locked.
pub(super) struct Registry(Mutex<Inner>);

struct Inner {
    facts: PageMap,
    /// What operations have claimed.
    claims: Vec<PageRange>,
    holders: Vec<Holder>,
    /// By page, and then by number, so that the pins of a page are found together.
    pins: BTreeMap<(u64, u64), (usize, PinKind)>,
    last: u64,
}

/// Why a page could not be pinned, or converted.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Refused {
    Facts,
    Claimed,
    Pinned { page: u64, kind: PinKind, holder: Holder },
}

/// A pin, until it is dropped.
pub(super) struct Registered<'a> {
    registry: &'a Registry,
    key: (u64, u64),
}

impl Registry {
    /// Of an object of `pages` shared pages, but for some that are private.
    pub(super) fn new(pages: u32, private: impl IntoIterator<Item = u32>) -> Self {
        let mut facts = PageMap::new(pages.into(), Geometry::X86_64, SHARED);
        for page in private {
            facts.set_visibility(PageRange::one(page.into()), Visibility::Private);
        }
        Self(Mutex::new(Inner {
            facts,
            claims: Vec::new(),
            holders: Vec::new(),
            pins: BTreeMap::new(),
            last: 0,
        }))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a holder known.
    pub(super) fn add_holder(&self, holder: Holder) -> usize {
        let mut inner = self.inner();
        inner.holders.push(holder);
        inner.holders.len() - 1
    }

    /// Pins a page.
    #[inline]
    pub(super) fn pin(
        &self,
        holder: usize,
        kind: PinKind,
        page: PageIndex,
    ) -> Result<Registered<'_>, Refused> {
        let mut inner = self.inner();
        if inner.claims.iter().any(|claim| claim.contains(page)) {
            return Err(Refused::Claimed);
        }
        if inner.facts.get(page) != SHARED {
            return Err(Refused::Facts);
        }
        let excludes = |other| kind == PinKind::Exclusive || other == PinKind::Exclusive;
        inner.refuse(PageRange::one(page), excludes)?;
        inner.last += 1;
        let key = (page.get(), inner.last);
        inner.pins.insert(key, (holder, kind));
        Ok(Registered { registry: self, key })
    }

    /// Claims pages for an operation, which no pin may be in the way of.
    #[cfg(test)]
    pub(super) fn claim(&self, range: PageRange) -> Result<(), Refused> {
        let mut inner = self.inner();
        inner.refuse(range, |_| true)?;
        inner.claims.push(range);
        Ok(())
    }
}

impl Inner {
    /// Refuses for the first pin of a range that is in the way.
    fn refuse(&self, range: PageRange, is: impl Fn(PinKind) -> bool) -> Result<(), Refused> {
        let mut pins = self.pins.range((range.start().get(), 0)..(range.end(), 0));
        match pins.find(|(_, (_, kind))| is(*kind)) {
            Some((&(page, _), &(holder, kind))) => {
                Err(Refused::Pinned { page, kind, holder: self.holders[holder].clone() })
            }
            None => Ok(()),
        }
    }
}

impl Drop for Registered<'_> {
    #[inline]
    fn drop(&mut self) {
        self.registry.inner().pins.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_refuses_what_polders_pins_refuse() {
        let registry = Registry::new(16, [15]);
        let disk = registry.add_holder(Holder::new("disk"));
        let page = |page: u32| PageIndex::from(page);
        let pinned = |page, kind| Refused::Pinned { page, kind, holder: Holder::new("disk") };
        let pin = |kind, at| registry.pin(disk, kind, page(at));
        assert_eq!(pin(PinKind::Short, 15).err(), Some(Refused::Facts));
        let first = pin(PinKind::Short, 3).ok();
        let second = pin(PinKind::LongTerm, 3).ok();
        assert_eq!(pin(PinKind::Exclusive, 3).err(), Some(pinned(3, PinKind::Short)));
        drop((first, second));
        let exclusive = pin(PinKind::Exclusive, 3).ok();
        assert_eq!(pin(PinKind::Short, 3).err(), Some(pinned(3, PinKind::Exclusive)));
        let all = PageRange::between(0, 16).expect("not empty");
        assert_eq!(registry.claim(all), Err(pinned(3, PinKind::Exclusive)));
        drop(exclusive);
        assert_eq!(registry.claim(all), Ok(()));
        assert_eq!(pin(PinKind::Short, 4).err(), Some(Refused::Claimed));
    }
}
