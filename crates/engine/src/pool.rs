//! The huge-page pool: which huge pages are free, held and promised.
//!
//! ```text
//! total = free + held            held = in use + pending
//! free >= reserved               available = free - reserved
//! ```
//! What is **reserved** was promised to an object at its creation, or to a subpool as its minimum:
//! a page that is taken on a reservation is there. A **subpool** has a minimum, which is reserved
//! at its birth, and a maximum, which its objects do not exceed together; a request tells how many
//! pages must come from the pool beside what the subpool has reserved already (Linux
//! `Documentation/mm/hugetlbfs_reserv.rst`).
//!
//! A huge page is given back as a whole, and once. One of which some 4K pages are still pinned when
//! its object goes is **pending**: the last unpin gives it back. Who waits for pages can see them
//! coming ([`Pool::pending`]).
//!
//! Nothing is half-done: what is refused has changed nothing.

use alloc::collections::{BTreeMap, BTreeSet};

use crate::plant::{Bug, Plants};

/// Names a subpool of a [`Pool`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SubpoolId(u64);

/// Names what an object has of a [`Pool`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ReservationId(u64);

/// Names a huge page of a [`Pool`], as long as it is held.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HugePage(u64);

/// Why a pool refuses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum PoolError {
    /// `ENOMEM`: too few pages are neither in use nor promised to others.
    #[error(
        "{asked} huge pages were asked for, and {available} of the pool are available\
         {}", coming(*.pending)
    )]
    TooFew {
        /// How many must come from the pool.
        asked: u64,
        /// How many are available.
        available: u64,
        /// How many come back when their last pin is released.
        pending: u64,
    },
    /// `ENOMEM`: more than the subpool's maximum.
    #[error("{asked} huge pages were asked for, and its subpool has {left} of {max} left")]
    Subpool {
        /// How many.
        asked: u64,
        /// How many the subpool may give yet.
        left: u64,
        /// Its maximum.
        max: u64,
    },
    /// `EINVAL`: a subpool whose minimum is above its maximum.
    #[error("a subpool of at least {min} and at most {max} huge pages")]
    Bounds {
        /// The minimum.
        min: u64,
        /// The maximum.
        max: u64,
    },
    /// `EBUSY`: a subpool that objects still draw from.
    #[error("the subpool is in use")]
    InUse,
}

fn coming(pending: u64) -> impl core::fmt::Display {
    struct Coming(u64);
    impl core::fmt::Display for Coming {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            match self.0 {
                0 => Ok(()),
                pending => write!(f, "; {pending} more are pending: their last unpin frees them"),
            }
        }
    }
    Coming(pending)
}

/// What a pool has.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub struct PoolCounts {
    /// All huge pages.
    pub total: u64,
    /// Those that nobody has.
    pub free: u64,
    /// Those of the free ones that are promised.
    pub reserved: u64,
    /// Those that nobody uses, and that come back when their last 4K page is unpinned.
    pub pending: u64,
}

impl PoolCounts {
    /// How many can be promised yet.
    pub const fn available(&self) -> u64 {
        self.free - self.reserved
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Subpool {
    min: u64,
    max: Option<u64>,
    /// What its objects have reserved or hold.
    used: u64,
    /// What is left of the minimum.
    reserve: u64,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Reservation {
    subpool: Option<SubpoolId>,
    /// Promised, and not taken yet.
    reserved: u64,
    held: BTreeSet<HugePage>,
}

/// A pool of huge pages of one size.
#[derive(Clone, Default, PartialEq, Eq, Hash, Debug)]
pub struct Pool {
    total: u64,
    free: u64,
    reserved: u64,
    /// Held by no object any more; each with the subpool that it still counts for.
    pending: BTreeMap<HugePage, Option<SubpoolId>>,
    subpools: BTreeMap<SubpoolId, Subpool>,
    reservations: BTreeMap<ReservationId, Reservation>,
    last_id: u64,
    plants: Plants,
}

impl Pool {
    /// A pool of `total` free huge pages.
    pub fn new(total: u64) -> Self {
        Self { total, free: total, ..Self::default() }
    }

    #[cfg(feature = "plant")]
    /// Plants a bug.
    pub fn plant(&mut self, bug: Bug) {
        self.plants = Plants::of(bug);
    }

    /// What it has.
    pub fn counts(&self) -> PoolCounts {
        let &Self { total, free, reserved, .. } = self;
        PoolCounts { total, free, reserved, pending: self.pending.len() as u64 }
    }

    /// How many huge pages come back when their last pin is released.
    pub fn pending(&self) -> u64 {
        self.pending.len() as u64
    }

    fn id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// Adds free pages.
    pub fn grow(&mut self, count: u64) {
        self.total += count;
        self.free += count;
    }

    /// Takes up to `count` pages away, of those that are neither in use nor promised. How many.
    pub fn shrink(&mut self, count: u64) -> u64 {
        let gone = count.min(self.counts().available());
        self.total -= gone;
        self.free -= gone;
        gone
    }

    /// Promises pages that nobody else has been promised.
    fn promise(&mut self, count: u64) -> Result<(), PoolError> {
        let PoolCounts { pending, .. } = self.counts();
        let available = self.counts().available();
        if count > available {
            return Err(PoolError::TooFew { asked: count, available, pending });
        }
        self.reserved += count;
        Ok(())
    }

    /// A subpool of `min` pages, which are reserved now, and `max` at most.
    ///
    /// # Errors
    /// [`PoolError::Bounds`], [`PoolError::TooFew`].
    pub fn create_subpool(&mut self, min: u64, max: Option<u64>) -> Result<SubpoolId, PoolError> {
        if let Some(max) = max.filter(|&max| max < min) {
            return Err(PoolError::Bounds { min, max });
        }
        self.promise(min)?;
        let id = SubpoolId(self.id());
        self.subpools.insert(id, Subpool { min, max, used: 0, reserve: min });
        Ok(id)
    }

    /// Removes a subpool that nothing is drawn from any more, and gives its minimum up.
    ///
    /// # Errors
    /// [`PoolError::InUse`] while an object, or a page that is pending, counts for it.
    pub fn remove_subpool(&mut self, id: SubpoolId) -> Result<(), PoolError> {
        let in_use = self.reservations.values().any(|it| it.subpool == Some(id))
            || self.pending.values().any(|&subpool| subpool == Some(id));
        if in_use {
            return Err(PoolError::InUse);
        }
        let Some(gone) = self.subpools.remove(&id) else { return Err(PoolError::InUse) };
        self.reserved -= gone.reserve;
        Ok(())
    }

    /// Counts pages for a subpool. Returns how many of them must come from the pool, beside what
    /// the subpool has reserved (`hugepage_subpool_get_pages()`).
    fn get(&mut self, subpool: Option<SubpoolId>, count: u64) -> Result<u64, PoolError> {
        let Some(id) = subpool else { return Ok(count) };
        let subpool = self.subpools.get_mut(&id).expect("a subpool outlives its objects");
        if let Some(max) = subpool.max {
            let left = max.saturating_sub(subpool.used);
            if count > left {
                return Err(PoolError::Subpool { asked: count, left, max });
            }
        }
        let own = count.min(subpool.reserve);
        subpool.used += count;
        subpool.reserve -= own;
        Ok(count - own)
    }

    /// Counts pages for a subpool no more. Returns how many go back to the pool; the others are of
    /// the minimum, and stay reserved (`hugepage_subpool_put_pages()`).
    fn put(&mut self, subpool: Option<SubpoolId>, count: u64) -> u64 {
        let Some(id) = subpool else { return count };
        let subpool = self.subpools.get_mut(&id).expect("a subpool outlives its objects");
        subpool.used -= count;
        let kept = subpool.min.saturating_sub(subpool.used) - subpool.reserve;
        subpool.reserve += kept;
        count - kept
    }

    /// Promises `count` pages to a new object.
    ///
    /// # Errors
    /// [`PoolError::Subpool`], [`PoolError::TooFew`].
    pub fn reserve(
        &mut self,
        subpool: Option<SubpoolId>,
        count: u64,
    ) -> Result<ReservationId, PoolError> {
        let global = self.get(subpool, count)?;
        if let Err(error) = self.promise(global) {
            // What was the subpool's own was reserved before, and is again.
            let back = self.put(subpool, count);
            assert_eq!(back, global, "a refused reservation gives back what it got");
            return Err(error);
        }
        let id = ReservationId(self.id());
        let reservation = Reservation { subpool, reserved: count, held: BTreeSet::new() };
        self.reservations.insert(id, reservation);
        Ok(id)
    }

    fn reservation(&mut self, id: ReservationId) -> &mut Reservation {
        self.reservations.get_mut(&id).expect("a reservation is used until it is released")
    }

    /// How many pages an object is promised yet, and how many it holds.
    pub fn of(&self, id: ReservationId) -> (u64, u64) {
        let it = self.reservations.get(&id);
        it.map_or((0, 0), |it| (it.reserved, it.held.len() as u64))
    }

    /// Takes a page on a reservation: it is there. `None` if all that was promised is held.
    pub fn take(&mut self, id: ReservationId) -> Option<HugePage> {
        let page = HugePage(self.last_id + 1);
        let reservation = self.reservation(id);
        reservation.reserved = reservation.reserved.checked_sub(1)?;
        reservation.held.insert(page);
        self.last_id += 1;
        self.reserved -= 1;
        self.free -= 1;
        Some(page)
    }

    /// Takes a page back that was taken and not used: the promise stands as before.
    pub fn untake(&mut self, id: ReservationId, page: HugePage) {
        self.discard(id, page);
        if self.plants.has(Bug::ReservationLost) {
            self.reservation(id).reserved -= 1;
            self.reserved -= 1;
        }
    }

    /// Takes a page back that its object has discarded as a whole; it stays promised to it.
    ///
    /// # Panics
    /// If the object does not hold it.
    pub fn discard(&mut self, id: ReservationId, page: HugePage) {
        let reservation = self.reservation(id);
        assert!(reservation.held.remove(&page), "{page:?} is given back once, by its object");
        reservation.reserved += 1;
        self.free += 1;
        self.reserved += 1;
    }

    /// Ends an object: what it was promised is so no more. Those of its pages of which a part
    /// `is_pinned` are pending from now on, the others free.
    pub fn release(&mut self, id: ReservationId, mut is_pinned: impl FnMut(HugePage) -> bool) {
        let gone = self.reservations.remove(&id).expect("a reservation is released once");
        let (pinned, whole): (BTreeSet<_>, BTreeSet<_>) =
            gone.held.iter().partition(|&&page| is_pinned(page));
        let back = gone.reserved + whole.len() as u64;
        self.free += whole.len() as u64;
        self.reserved += whole.len() as u64;
        let unpromised = self.put(gone.subpool, back);
        self.reserved -= unpromised;
        self.pending.extend(pinned.into_iter().map(|page| (page, gone.subpool)));
    }

    /// Notes that the last 4K page of a pending huge page was unpinned: it is whole again, and
    /// free.
    ///
    /// # Panics
    /// If it is not pending: a huge page is given back once.
    pub fn returned(&mut self, page: HugePage) {
        let subpool = self.pending.get(&page).copied();
        let subpool = subpool.expect("a pending huge page is given back once");
        if !self.plants.has(Bug::ReturnedTwice) {
            self.pending.remove(&page);
        }
        self.free += 1;
        self.reserved += 1;
        self.reserved -= self.put(subpool, 1);
    }

    /// Whether all that there is adds up (INV-6).
    pub fn audit(&self) -> Result<(), &'static str> {
        let held = self.reservations.values().map(|it| it.held.len() as u64).sum::<u64>();
        let promised = self.reservations.values().map(|it| it.reserved).sum::<u64>();
        let minimum = self.subpools.values().map(|it| it.reserve).sum::<u64>();
        let claims = [
            (self.total == self.free + held + self.pending(), "total = free + held"),
            (self.free >= self.reserved, "free >= reserved"),
            (self.reserved == promised + minimum, "reserved = what is promised"),
            (
                self.subpools.values().all(|it| it.max.is_none_or(|max| it.used <= max)),
                "no subpool above its maximum",
            ),
            (
                self.subpools.iter().all(|(&id, it)| it.used == self.used_of(id)),
                "a subpool's objects add up",
            ),
        ];
        claims.into_iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, what)| Err(what))
    }

    fn used_of(&self, id: SubpoolId) -> u64 {
        let objects = self.reservations.values().filter(|it| it.subpool == Some(id));
        let objects = objects.map(|it| it.reserved + it.held.len() as u64).sum::<u64>();
        objects + self.pending.values().filter(|&&subpool| subpool == Some(id)).count() as u64
    }
}

#[cfg(test)]
mod tests;
