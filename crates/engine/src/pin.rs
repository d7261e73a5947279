//! Pins: a device or a thread says that it uses pages, and by which name it is to be asked.
//!
//! A holder pins without the engine's lock ([`Pinner`]): it counts the pin first, and looks
//! afterwards whether the pages may be pinned. An operation does it the other way round: it claims
//! its pages, which closes the [gate](gate) for them, and looks for pins afterwards
//! ([`Engine::look_for_pins`]). So one of the two always sees the other. Each holder counts for
//! itself: that is how a refusal can name it, and why two holders share no counter.
//!
//! | file | what |
//! |---|---|
//! | `gate` | which pages can't be pinned without asking |
//! | `counts` | how many pins a holder has of each page |
//! | `local` | pins that stay with their thread, which cost no atomic instruction |
//! | `pinner` | how a holder pins |
//! | `exclusive` | pins that exclude every other, and waiting for pins to go |

mod counts;
mod exclusive;
mod gate;
mod local;
mod pinner;

use alloc::borrow::Cow;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use polder_units::{PageCount, PageIndex, PageRange};

use self::counts::Counts;
use self::exclusive::{Exclusive, Waiter};
use self::gate::Gate;
use self::local::Places;
use self::pinner::{Held, Shared};
use crate::operation::Record;
use crate::plant::Bug;
use crate::sync::{AtomicU32, Ordering, fence};
use crate::{
    Activity, Blocked, Engine, OpId, Operation, PageFacts, Pinned, Population, Refusal, Stage,
    Visibility,
};

pub use exclusive::{WaitFor, Waiting};
pub use local::Local;
pub use pinner::{AskEngine, Pinner};

/// How long a pin is meant to be held (Linux `Documentation/core-api/pin_user_pages.rst`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PinKind {
    /// For one transfer.
    Short,
    /// For as long as a device is set up (`FOLL_LONGTERM`).
    LongTerm,
    /// With no other pin of any kind beside it, for as long as it is held (`FOLL_EXCLUSIVE`, as
    /// it was proposed).
    Exclusive,
}

impl fmt::Display for PinKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Short => "short",
            Self::LongTerm => "long-term",
            Self::Exclusive => "exclusive",
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

/// Pins that a [`Holder`] has taken by [`Engine::pin`]; to be given back by [`Engine::unpin`],
/// once.
#[must_use = "the pages stay pinned until it is given back"]
#[derive(PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "explore", derive(Clone, Copy))]
pub struct PinId {
    /// Whose it is; of an exclusive pin, its own id.
    holder: u64,
    range: PageRange,
}

impl PinId {
    /// The pages.
    pub fn range(&self) -> PageRange {
        self.range
    }
}

/// How far a holder's pages are followed around one that is asked about.
const FOLLOWED: u64 = 1024;

/// All pins held.
pub(crate) struct Pins {
    shared: Arc<Shared>,
    /// By whom, in the order in which they came. Who has no pin and no [`Pinner`] is forgotten when
    /// the next one comes.
    holders: Vec<(u64, Arc<Held>)>,
    /// Whether some of them have ever counted on a barrier.
    barrier: bool,
    exclusive: Vec<Exclusive>,
    waiting: Vec<Waiter>,
    /// The pages of the object.
    pages: u64,
}

impl Pins {
    pub(crate) fn new(pages: PageCount) -> Self {
        let shared = Shared { gate: Gate::new(), waiting: AtomicU32::new(0) };
        Self {
            shared: Arc::new(shared),
            holders: Vec::new(),
            barrier: false,
            exclusive: Vec::new(),
            waiting: Vec::new(),
            pages: pages.get(),
        }
    }

    /// Nobody pins these pages without asking, from here on. Pins are to be looked for after it.
    pub(crate) fn close(&self, range: PageRange) {
        self.shared.gate.close(range);
    }

    /// To open what was closed, by whoever has the engine.
    pub(crate) fn gate(&self) -> PinGate {
        PinGate(Arc::clone(&self.shared))
    }

    /// Those on a page, a holder's together: with the run of pages around it that he has pinned, as
    /// far as it is followed.
    pub(crate) fn on(&self, page: PageIndex) -> Vec<Pinned> {
        let counted = self.holders.iter().filter_map(|(_, held)| {
            let pinned = |page: u64| {
                let one = PageRange::between(page, page + 1)?;
                held.first_in(one)
            };
            pinned(page.get())?;
            let mut run = [page.get(), page.get() + 1];
            while run[0] > 0 && run[1] - run[0] < FOLLOWED && pinned(run[0] - 1).is_some() {
                run[0] -= 1;
            }
            while run[1] < self.pages && run[1] - run[0] < FOLLOWED && pinned(run[1]).is_some() {
                run[1] += 1;
            }
            let range = PageRange::between(run[0], run[1])?;
            Some(Pinned { range, kind: held.kind, holder: held.holder.clone() })
        });
        let exclusive = self.exclusive.iter().filter(|pin| pin.range.contains(page));
        let exclusive = exclusive.map(|pin| Pinned {
            range: pin.range,
            kind: PinKind::Exclusive,
            holder: pin.holder.clone(),
        });
        counted.chain(exclusive).collect()
    }

    fn held(&self, id: u64) -> &Held {
        let found = self.holders.iter().find(|(other, _)| *other == id);
        &found.expect("who holds a pin is known").1
    }

    #[cfg(feature = "explore")]
    pub(crate) fn place_of(&self, pin: PinId) -> (usize, PageRange) {
        let before = self.holders.iter().take_while(|(id, _)| *id != pin.holder);
        let pinning = before.filter(|(_, held)| !held.counts.pinned().is_empty());
        (pinning.count(), pin.range)
    }

    #[cfg(feature = "explore")]
    pub(crate) fn place_of_wait(&self, waiting: Waiting) -> usize {
        self.waiting.iter().take_while(|waiter| !waiter.is(&waiting)).count()
    }

    #[cfg(feature = "explore")]
    pub(crate) fn may_stay(&self, reader: &crate::PageReader, range: PageRange) -> bool {
        self.shared.may_stay(reader, range)
    }

    #[cfg(feature = "explore")]
    pub(crate) fn is_awaited(&self, range: PageRange) -> bool {
        self.waiting.iter().any(|waiter| waiter.first_in(range).is_some())
    }

    #[cfg(feature = "explore")]
    pub(crate) fn fingerprint<H: core::hash::Hasher>(&self, state: &mut H) {
        use core::hash::Hash;
        // Who has no pin is as good as not there.
        for (_, held) in &self.holders {
            let pinned = held.counts.pinned();
            if !pinned.is_empty() {
                (&held.holder, held.kind, pinned).hash(state);
            }
        }
        u64::MAX.hash(state);
        for pin in &self.exclusive {
            (pin.range, &pin.holder).hash(state);
        }
        u64::MAX.hash(state);
        self.waiting.iter().for_each(|waiter| waiter.fingerprint(state));
        u64::MAX.hash(state);
    }
}

/// What pages can be pinned without asking.
pub(crate) struct PinGate(Arc<Shared>);

impl PinGate {
    /// What was closed may be pinned again.
    pub(crate) fn open(&self, range: PageRange) {
        self.0.gate.open(range);
    }
}

/// A copy of its own, for a search; pinners stay with the original.
impl Clone for Pins {
    fn clone(&self) -> Self {
        let waiting = AtomicU32::new(0);
        let shared = Shared { gate: self.shared.gate.clone(), waiting };
        let copy = |held: &Held| Held {
            holder: held.holder.clone(),
            kind: held.kind,
            counts: held.counts.clone(),
            places: None,
        };
        let holders = self.holders.iter().map(|(id, held)| (*id, Arc::new(copy(held))));
        Self {
            shared: Arc::new(shared),
            holders: holders.collect(),
            barrier: false,
            exclusive: self.exclusive.clone(),
            waiting: self.waiting.clone(),
            pages: self.pages,
        }
    }
}

impl fmt::Debug for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let holders = self.holders.iter().map(|(_, held)| (&held.holder, held.kind));
        f.debug_list().entries(holders).finish()
    }
}

impl Engine {
    /// A holder that pins without the engine's lock.
    pub fn pinner(&mut self, holder: Holder, kind: PinKind) -> Pinner {
        let held = self.add_holder(holder, kind, None).1;
        Pinner {
            shared: Arc::clone(&self.pins.shared),
            reader: self.reader(),
            held,
            barrier: false,
        }
    }

    /// A holder that pins by [`Pinner::pin_here`], and never for long. `barrier`: every operation
    /// that may meet a pin passes one before it looks ([`Engine::needs_barrier`]); a pin is cheaper
    /// then.
    pub fn pinner_here(&mut self, holder: Holder, barrier: bool) -> Pinner {
        self.pins.barrier |= barrier;
        let held = self.add_holder(holder, PinKind::Short, Some(Places::new())).1;
        Pinner { shared: Arc::clone(&self.pins.shared), reader: self.reader(), held, barrier }
    }

    fn add_holder(
        &mut self,
        holder: Holder,
        kind: PinKind,
        places: Option<Places>,
    ) -> (u64, Arc<Held>) {
        let all = self.all();
        let gone = |held: &Arc<Held>| Arc::strong_count(held) == 1 && held.first_in(all).is_none();
        self.pins.holders.retain(|(_, held)| !gone(held));
        let counts = Counts::new(self.config.pages, self.config.geometry);
        let held = Arc::new(Held { holder, kind, counts, places });
        let id = self.next_id();
        self.pins.holders.push((id, Arc::clone(&held)));
        (id, held)
    }

    #[cfg(feature = "explore")]
    pub(crate) fn count_pin_of(&mut self, range: PageRange, holder: Holder) -> PinId {
        let (holder, held) = self.add_holder(holder, PinKind::Short, None);
        held.counts.add(range);
        PinId { holder, range }
    }

    /// Pins pages, which must be shared: they stay shared until [`Engine::unpin`]. Exclusive pins
    /// are taken by [`Engine::pin_exclusive`].
    ///
    /// # Errors
    /// Refused beyond the object, for a page that is private, owed or in quarantine, and by an
    /// exclusive pin; busy where an operation holds a page, or somebody waits for its pins to go.
    ///
    /// # Panics
    /// For [`PinKind::Exclusive`].
    pub fn pin(
        &mut self,
        range: PageRange,
        kind: PinKind,
        holder: Holder,
    ) -> Result<PinId, Blocked> {
        assert_ne!(kind, PinKind::Exclusive, "that takes a look for other pins");
        self.check_host_access(range)?;
        self.check_waiting(range)?;
        let same = |held: &Held| held.kind == kind && held.holder == holder;
        let known = self.pins.holders.iter().find(|(_, held)| same(held));
        let (id, held) = match known {
            Some((id, held)) => (*id, Arc::clone(held)),
            None => self.add_holder(holder, kind, None),
        };
        held.counts.add(range);
        Ok(PinId { holder: id, range })
    }

    /// Gives a pin back.
    pub fn unpin(&mut self, pin: PinId) {
        let pins = &mut self.pins;
        match pins.exclusive.iter().position(|exclusive| exclusive.id == pin.holder) {
            Some(at) => {
                pins.exclusive.swap_remove(at);
                pins.gate().open(pin.range);
            }
            None => pins.held(pin.holder).counts.remove(pin.range),
        }
    }

    /// Pins pages for a holder that could not do so by itself.
    ///
    /// # Errors
    /// As [`Engine::pin`].
    pub fn pin_as(&mut self, pinner: &Pinner, range: PageRange) -> Result<(), Blocked> {
        self.check_host_access(range)?;
        self.check_waiting(range)?;
        pinner.held.counts.add(range);
        Ok(())
    }

    /// [`Engine::pin_as`] for [`Pinner::pin_here`].
    ///
    /// # Errors
    /// As [`Engine::pin`].
    pub fn pin_here_as<'a>(
        &mut self,
        pinner: &'a Pinner,
        thread: usize,
        range: PageRange,
    ) -> Result<Local<'a>, Blocked> {
        self.check_host_access(range)?;
        self.check_waiting(range)?;
        Ok(pinner.note(thread, range))
    }

    /// Whether somebody pins counting on it that between claiming pages and looking for pins of
    /// them ([`Engine::look_for_pins`]) every processor passes a barrier (`membarrier(2)`).
    pub fn needs_barrier(&self) -> bool {
        self.pins.barrier
    }

    /// Notes that somebody waits for pins to go, and is to be told of each that does; or that he
    /// does no more.
    fn wait_for_unpin(&mut self, waits: bool) {
        let waiting = &self.pins.shared.waiting;
        match waits {
            true => waiting.fetch_add(1, Ordering::SeqCst),
            false => waiting.fetch_sub(1, Ordering::SeqCst),
        };
        fence(Ordering::SeqCst);
    }

    /// Looks for pins of what the operation changes, which it has claimed: none comes any more, so
    /// where there is none now, there will be none. To be asked before its first step, and after a
    /// barrier where one is needed ([`Engine::needs_barrier`]).
    ///
    /// # Errors
    /// [`Refusal::Pinned`], naming the first page. It may be somebody who finds that the pages are
    /// claimed and goes: asking a few times more is worth the while.
    pub fn look_for_pins<S: Stage>(&mut self, operation: &Operation<S>) -> Result<(), Refusal> {
        self.find_pins(operation.id())?;
        self.record_mut(operation.id()).unpinned = true;
        Ok(())
    }

    /// Refuses for a pin of what an operation changes.
    pub(crate) fn find_pins(&self, id: OpId) -> Result<(), Refusal> {
        if self.plants.has(Bug::PinsForgotten) {
            return Ok(());
        }
        let Record { activity, parts, reshape, .. } = self.record(id);
        match activity {
            Activity::Discard | Activity::Move => {
                parts.iter().try_for_each(|&part| self.check_pins(part))
            }
            activity if activity.needs_unpinned() => self.check_pins_around(parts, reshape),
            _ => Ok(()),
        }
    }

    /// Refuses a range that holds a pinned page, naming the first.
    pub(crate) fn check_pins(&self, range: PageRange) -> Result<(), Refusal> {
        let holders = self.pins.holders.iter();
        let first = holders.filter_map(|(_, held)| Some((held.first_in(range)?, held)));
        let counted = first.map(|(page, held)| (page, held.kind, &held.holder));
        let exclusive = self.pins.exclusive.iter().filter_map(|pin| {
            Some((pin.range.intersection(range)?.start(), PinKind::Exclusive, &pin.holder))
        });
        match counted.chain(exclusive).min_by_key(|&(page, ..)| page) {
            Some((page, kind, holder)) => {
                Err(Refusal::Pinned { page, kind, holder: holder.clone() })
            }
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
