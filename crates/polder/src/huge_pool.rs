//! [`HugePool`]: huge pages of the simulated machine that several memories draw from.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use polder_engine::pool::{HugePage, Pool, PoolCounts, PoolError, ReservationId};
use polder_machine::Machine;
use polder_units::Level;

use crate::Error;
use crate::sync::{Condvar, Mutex};

/// A pool of huge pages for memories on the simulated machine, which has no other to draw from:
/// each of them reserves its pages when it is made, and is refused where too few are left. On a
/// memfd the kernel's pool is what counts.
///
/// A memory that is not told of one has a pool of its own, which is just enough.
///
/// ```
/// # use polder::{Error, HostKind, HugePool, Memory, PageSize, units::{Level, PageCount}};
/// let pool = HugePool::new(Level::Size2M, 3);
/// let builder = Memory::builder(PageCount::from(1024u32)); // two pages of 2M
/// let builder = builder.host(HostKind::Machine).page_size(PageSize::Huge2M).pool(&pool);
/// let memory = builder.clone().build()?;
/// assert_eq!(pool.counts().available(), 1);
/// assert!(matches!(builder.clone().build(), Err(Error::HugePages { available: 1, .. })));
/// drop(memory);
/// builder.build()?;
/// # Ok::<_, polder::Error>(())
/// ```
#[derive(Clone)]
pub struct HugePool(Arc<Inner>);

struct Inner {
    level: Level,
    pool: Mutex<Pool>,
    gone: Mutex<Vec<Gone>>,
    changed: Condvar,
}

/// Huge pages of a memory that is gone, which pins on its machine keep.
struct Gone {
    machine: Arc<Mutex<Machine>>,
    pages: Vec<HugePage>,
}

impl HugePool {
    /// A pool of `total` huge pages of `level`.
    ///
    /// ```
    /// # use polder::{HugePool, units::Level};
    /// let pool = HugePool::new(Level::Size2M, 4);
    /// assert_eq!((pool.level(), pool.counts().total), (Level::Size2M, 4));
    /// ```
    pub fn new(level: Level, total: u64) -> Self {
        let pool = Mutex::new(Pool::new(total));
        Self(Arc::new(Inner { level, pool, gone: Mutex::default(), changed: Condvar::new() }))
    }

    /// The size of its pages.
    pub fn level(&self) -> Level {
        self.0.level
    }

    /// What it has.
    pub fn counts(&self) -> PoolCounts {
        self.0.pool.lock().counts()
    }

    /// Waits until `count` pages can be reserved, for `at_most` at most: those of a memory that is
    /// going come one by one, and pinned ones last. Whether they can.
    ///
    /// ```
    /// # use polder::{HugePool, units::Level};
    /// use std::time::Duration;
    ///
    /// let pool = HugePool::new(Level::Size2M, 4);
    /// assert!(pool.wait_for(4, Duration::ZERO) && !pool.wait_for(5, Duration::from_millis(20)));
    /// ```
    pub fn wait_for(&self, count: u64, at_most: Duration) -> bool {
        let mut pool = self.0.pool.lock();
        let mut left = at_most;
        const PAUSE: Duration = Duration::from_millis(10);
        while pool.counts().available() < count {
            let Some(rest) = left.checked_sub(PAUSE) else { return false };
            left = rest;
            self.0.changed.wait_for(&mut pool, PAUSE);
        }
        true
    }

    pub(crate) fn reserve(&self, level: Level, count: u64) -> Result<Reserved, Error> {
        if level != self.0.level {
            return Err(Error::NotOffered {
                what: "the pool's huge pages are of another size than the memory's",
                way_out: "make the memory of pages of the pool's size",
            });
        }
        let reserved = self.0.pool.lock().reserve(None, count);
        let id = reserved.map_err(|error| match error {
            PoolError::TooFew { asked, available, pending } => {
                Error::HugePages { level, asked, available, pending }
            }
            other => unreachable!("no subpool was named: {other}"),
        })?;
        Ok(Reserved { pool: self.clone(), id, left: None })
    }

    /// Takes those pages back that no pin on a machine keeps any more, of a memory that is gone.
    pub(crate) fn look_again(&self, machine: &Arc<Mutex<Machine>>) {
        let pinned = machine.lock().pool_counts(self.0.level).pending;
        let mut gone = self.0.gone.lock();
        let Some(at) = gone.iter().position(|it| Arc::ptr_eq(&it.machine, machine)) else { return };
        while gone[at].pages.len() as u64 > pinned
            && let Some(page) = gone[at].pages.pop()
        {
            self.0.pool.lock().returned(page);
        }
        if gone[at].pages.is_empty() {
            gone.swap_remove(at);
        }
        self.0.changed.notify_all();
    }
}

impl fmt::Debug for HugePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (level, counts) = (self.0.level, self.counts());
        f.debug_struct("HugePool").field("level", &level).field("counts", &counts).finish()
    }
}

/// What a memory has reserved of a pool; given back with it.
pub(crate) struct Reserved {
    pool: HugePool,
    id: ReservationId,
    /// What pins keep of it.
    left: Option<Gone>,
}

impl Reserved {
    pub(crate) fn pool(&self) -> &HugePool {
        &self.pool
    }

    pub(crate) fn take(&self) -> Option<HugePage> {
        self.pool.0.pool.lock().take(self.id)
    }

    pub(crate) fn untake(&self, page: HugePage) {
        self.pool.0.pool.lock().untake(self.id, page);
    }

    pub(crate) fn discard(&self, page: HugePage) {
        self.pool.0.pool.lock().discard(self.id, page);
    }

    /// Notes which of the pages are pinned as the memory goes.
    pub(crate) fn leave(&mut self, machine: &Arc<Mutex<Machine>>, pages: Vec<HugePage>) {
        self.left = Some(Gone { machine: Arc::clone(machine), pages });
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let left = self.left.take();
        let is_pinned = |page| left.as_ref().is_some_and(|left| left.pages.contains(&page));
        self.pool.0.pool.lock().release(self.id, is_pinned);
        self.pool.0.changed.notify_all();
        if let Some(left) = left {
            let machine = Arc::clone(&left.machine);
            self.pool.0.gone.lock().push(left);
            // A pin may have gone meanwhile.
            self.pool.look_again(&machine);
        }
    }
}
