//! Pins: a device or a thread says that it uses pages, and by which name it is to be asked.

use alloc::borrow::Cow;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;

use polder_units::{PageIndex, PageRange};

use crate::{Blocked, Engine, PageFacts, Pinned, Population, Refusal, Visibility};

/// How long a pin is meant to be held (Linux `Documentation/core-api/pin_user_pages.rst`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PinKind {
    /// For one transfer.
    Short,
    /// For as long as a device is set up (`FOLL_LONGTERM`).
    LongTerm,
}

impl fmt::Display for PinKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Short => "short",
            Self::LongTerm => "long-term",
        })
    }
}

/// Who holds a pin, in words for whoever is refused because of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Holder(Cow<'static, str>);

impl Holder {
    /// A holder with this name.
    pub fn new(name: impl Into<Cow<'static, str>>) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Names a pin; never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PinId(u64);

#[derive(Clone, Debug)]
#[cfg_attr(feature = "explore", derive(Hash))]
struct Pin {
    range: PageRange,
    kind: PinKind,
    holder: Holder,
}

/// All pins held.
#[derive(Clone, Default, Debug)]
pub(crate) struct Pins(BTreeMap<PinId, Pin>);

impl Pins {
    /// Those on a page.
    pub(crate) fn on(&self, page: PageIndex) -> Vec<Pinned> {
        let pins = self.0.values().filter(|pin| pin.range.contains(page));
        let told =
            |pin: &Pin| Pinned { range: pin.range, kind: pin.kind, holder: pin.holder.clone() };
        pins.map(told).collect()
    }
}

#[cfg(feature = "explore")]
impl Pins {
    pub(crate) fn place_of(&self, id: PinId) -> usize {
        self.0.keys().take_while(|&&other| other != id).count()
    }

    pub(crate) fn fingerprint<H: core::hash::Hasher>(&self, state: &mut H) {
        self.0.values().for_each(|pin| core::hash::Hash::hash(pin, state));
        core::hash::Hash::hash(&u64::MAX, state);
    }
}

impl Engine {
    /// Pins pages, which must be shared: they stay shared until [`Engine::unpin`].
    ///
    /// # Errors
    /// Refused beyond the object, for a page that is private, owed or in quarantine; busy where an
    /// operation holds a page.
    pub fn pin(
        &mut self,
        range: PageRange,
        kind: PinKind,
        holder: Holder,
    ) -> Result<PinId, Blocked> {
        self.check_host_access(range)?;
        let id = PinId(self.next_id());
        self.pins.0.insert(id, Pin { range, kind, holder });
        Ok(id)
    }

    /// Gives a pin back.
    ///
    /// # Errors
    /// [`Refusal::NoSuchPin`] if it was given back before.
    pub fn unpin(&mut self, id: PinId) -> Result<(), Refusal> {
        self.pins.0.remove(&id).map(|_| ()).ok_or(Refusal::NoSuchPin)
    }

    /// Refuses a range that holds a pinned page, naming the first.
    pub(crate) fn check_pins(&self, range: PageRange) -> Result<(), Refusal> {
        let held =
            self.pins.0.values().filter_map(|pin| Some((pin.range.intersection(range)?, pin)));
        match held.min_by_key(|(part, _)| part.start()) {
            Some((part, pin)) => Err(Refusal::Pinned {
                page: part.start(),
                kind: pin.kind,
                holder: pin.holder.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Refuses or blocks what the host may not touch, or not now.
    pub(crate) fn check_host_access(&mut self, range: PageRange) -> Result<(), Blocked> {
        self.check_bounds(range)?;
        self.check_quarantine(range)?;
        self.check_claims(range)?;
        let private = |facts: PageFacts| facts.visibility == Visibility::Private;
        if let Some(page) = self.first_page(range, private) {
            return Err(Refusal::Private { page }.into());
        }
        if let Some(page) = self.failed.first_in(range) {
            return Err(Refusal::SourceFailed { page }.into());
        }
        match self.first_page(range, |facts| facts.population == Population::Owed) {
            Some(page) => Err(Refusal::Owed { page }.into()),
            None => Ok(()),
        }
    }
}
