//! The pager: has contents brought from the source that somebody waits for.
//!
//! ```text
//! touch --> demand --> window --> read --> claim --> write --> publish --> show, wake
//!                      no lock, no claim |  the pages are held only while their bytes are written
//! ```
//! A read holds nothing: while it lasts its pages can be converted, discarded, populated by
//! somebody else, or denied because it takes too long; what of its bytes nobody wants any more is
//! dropped when it comes. The claim begins when the bytes are there, so what a slow source holds up
//! is who waits for its bytes, and nobody else.
//!
//! Demands go before what is read ahead, and that before the filling of all that is owed. A batch
//! that can't be read is asked for page by page, so that exactly the pages fail that can't be had.

mod read;
mod state;
mod statistics;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use polder_engine::{Blocked, Engine};
use polder_units::{PageCount, PageIndex, PageRange};

use self::read::within;
use self::state::{Demand, Job, State, Why};
use self::statistics::Counters;
pub use self::statistics::SourceStatistics;
use crate::driver::Driver;
use crate::read_ahead::{ReadAhead, Windows};
use crate::source::{Extent, Source, SourceError, SourceFailure};
use crate::sync::Mutex;

/// The most pages that are read at once, however many come together; whoever waits for one waits
/// for all of them. What a CPU's own cache holds is copied on from there.
const AT_ONCE: u64 = 64;

/// How a [`Memory`](crate::Memory)'s contents are brought.
#[derive(Clone, Debug)]
pub(crate) struct Paging {
    pub(crate) source: Arc<dyn Source>,
    pub(crate) read_ahead: ReadAhead,
    pub(crate) deadline: Duration,
    /// The pages that come together, whatever the source would have.
    pub(crate) granule: PageCount,
}

pub(crate) struct Pager {
    source: Arc<dyn Source>,
    deadline: Duration,
    /// What is brought starts and ends at multiples of it, where pages are owed.
    granule: u64,
    state: Mutex<State>,
    buffers: Mutex<Vec<Vec<u8>>>,
    /// Whether the last read took [`SLOW`](read::SLOW).
    slow: AtomicBool,
    counters: Counters,
}

impl Pager {
    pub(crate) fn new(paging: Paging) -> Self {
        let granule = paging.granule.max(paging.source.granule()).get().max(1);
        let state = State {
            demands: BTreeMap::new(),
            reading: Vec::new(),
            ahead: VecDeque::new(),
            windows: Windows::new(paging.read_ahead, granule),
            filling: None,
            failures: Vec::new(),
            owed_from: PageIndex::from(0),
            let_go: false,
            last_id: 0,
        };
        Self {
            source: paging.source,
            deadline: paging.deadline,
            granule,
            state: Mutex::new(state),
            buffers: Mutex::default(),
            slow: AtomicBool::new(false),
            counters: Counters::default(),
        }
    }

    /// Notes that somebody waits for pages. With or without the engine locked.
    pub(crate) fn demand(&self, pages: impl IntoIterator<Item = PageIndex>) {
        let now = polder_linux::now();
        let mut state = self.state.lock();
        for page in pages {
            let demand = state.demands.entry(page).or_insert(Demand { since: now, pending: true });
            demand.pending = true;
        }
    }

    /// Whether there is something to bring that nobody is bringing.
    pub(crate) fn has_work(&self) -> bool {
        self.state.lock().has_work()
    }

    /// Whether all there is to bring is one window that somebody waits for, and reads have been
    /// short of late.
    pub(crate) fn has_one_demand(&self) -> bool {
        if self.granule > AT_ONCE || self.slow.load(Ordering::Relaxed) {
            return false;
        }
        let state = self.state.lock();
        state.ahead.is_empty() && state.filling.is_none() && {
            let mut pending = state.pending();
            pending.next().is_some() && pending.next().is_none()
        }
    }

    /// A read takes longer than the last ones did.
    pub(crate) fn note_slow(&self) {
        self.slow.store(true, Ordering::Relaxed);
    }

    /// Whether somebody waits for something: then the time is looked at now and then.
    pub(crate) fn is_awaited(&self) -> bool {
        !self.state.lock().demands.is_empty()
    }

    /// Begins to bring all that is owed.
    pub(crate) fn fill(&self) {
        let mut state = self.state.lock();
        state.filling.get_or_insert(PageIndex::from(0));
    }

    /// Nothing is owed for pages any more.
    pub(crate) fn forget(&self, driver: &Driver, pages: PageRange) {
        self.source.forget(pages);
        self.state.lock().demands.retain(|page, _| !pages.contains(*page));
        self.let_go(driver);
    }

    /// The first pages that could not be brought, [`FAILURES_KEPT`](read::FAILURES_KEPT) of them.
    pub(crate) fn failures(&self) -> Vec<SourceFailure> {
        self.state.lock().failures.clone()
    }

    /// Brings what there is to bring, until nothing is left or it is told to stop.
    pub(crate) fn work(&self, driver: &Driver, stop: impl Fn() -> bool) {
        while !stop()
            && let Some(job) = self.next_job(driver)
        {
            self.bring(driver, job);
        }
    }

    /// Brings what is next.
    pub(crate) fn bring_next(&self, driver: &Driver) {
        if let Some(job) = self.next_job(driver) {
            self.bring(driver, job);
        }
    }

    /// Brings a page that the calling thread's vCPU touched, with what its window has: on this
    /// thread, unless somebody else is at it. Returns what is whole, or being brought.
    pub(crate) fn bring_here(&self, driver: &Driver, page: PageIndex) -> PageRange {
        let since = polder_linux::now();
        let job = {
            let mut state = self.state.lock();
            state.demands.entry(page).or_insert(Demand { since, pending: true });
            if state.reading.iter().any(|it| it.range.contains(page)) {
                return PageRange::one(page);
            }
            let start = page.get() - page.get() % self.granule;
            let window = state.windows.window(page.get() / self.granule) * self.granule;
            let end = (start + window).min(driver.pages());
            let range = state.unread(page, (start, end));
            state.begin(range, Why::Demand(page))
        };
        self.bring(driver, job);
        job.range
    }

    /// Denies pages that somebody has waited for too long.
    pub(crate) fn expire(&self, driver: &Driver) {
        let now = polder_linux::now();
        let late: Vec<PageIndex> = {
            let state = self.state.lock();
            let is_late = |demand: &Demand| now.duration_since(demand.since) >= self.deadline;
            state.demands.iter().filter(|(_, it)| is_late(it)).map(|(page, _)| *page).collect()
        };
        for page in late {
            // Where an operation holds it, it is being shown, or the next look finds it free.
            let why = SourceError::Late(self.deadline);
            if self.deny(&mut driver.engine(), page, why).is_ok() {
                driver.released();
            }
        }
    }

    /// Has the engine deny a page, unless it has come. With the engine locked: nobody is denied who
    /// can't be told why.
    fn deny(&self, engine: &mut Engine, page: PageIndex, why: SourceError) -> Result<(), Blocked> {
        if let Some(late) = engine.fail_late(page)? {
            self.note_failure(late, why);
        }
        self.state.lock().demands.remove(&page);
        Ok(())
    }

    fn next_job(&self, driver: &Driver) -> Option<Job> {
        let pages = driver.pages();
        let granule = self.granule;
        let mut state = self.state.lock();
        if let Some(page) = state.next_demand() {
            let start = page.get() - page.get() % granule;
            let window = state.windows.window(page.get() / granule) * granule;
            let end = (start + window).min(pages);
            let now = end.min(start + AT_ONCE.max(granule));
            let range = state.unread(page, (start, now));
            let rest = PageRange::between(now, end);
            state.ahead.extend(rest);
            let job = state.begin(range, Why::Demand(page));
            drop(state);
            if let Some(rest) = rest.filter(|_| self.slow.load(Ordering::Relaxed)) {
                self.source.will_need(rest);
            }
            return Some(job);
        }
        if let Some(range) = state.next_ahead(AT_ONCE.max(granule)) {
            return Some(state.begin(range, Why::Ahead));
        }
        let from = state.filling?;
        // The lock of the pager is never waited for with the engine's held, but the other way round
        // it is: the engine is asked without it.
        drop(state);
        let rest = PageRange::between(from.get(), pages)?;
        let owed = driver.engine().first_owed(rest);
        let mut state = self.state.lock();
        let Some(owed) = owed else {
            state.filling = None;
            return None;
        };
        let most = AT_ONCE.max(granule);
        let end = owed.end().min(owed.start().get() + most);
        state.filling = PageIndex::new(end);
        let range = PageRange::between(owed.start().get(), end)?;
        Some(state.begin(range, Why::Fill))
    }

    /// Brings the pages of a job that are owed.
    fn bring(&self, driver: &Driver, job: Job) {
        // Should this thread die, nobody takes the pages for being read.
        let _ended = Ended { pager: self, job };
        let mut left = Some(job.range);
        while let Some(rest) = left {
            let Some(owed) = driver.engine().first_owed(rest) else { break };
            let done = match self.source.extent(owed) {
                Extent::Zeros(zeros) => self.zeros(driver, within(zeros, owed), job),
                Extent::Bytes(bytes) => self.read(driver, within(bytes, owed), job),
            };
            left = PageRange::between(done, rest.end());
            let demanded = || self.state.lock().next_demand().is_some();
            if let (Some(rest), true) = (left, job.why == Why::Ahead && demanded()) {
                self.state.lock().ahead.push_front(rest);
                break;
            }
        }
        self.meet(driver, job.range);
        self.let_go(driver);
    }

    /// Forgets the demands for pages that are there, or will not come. What is left was held by an
    /// operation, and is asked for again when that has ended.
    fn meet(&self, driver: &Driver, range: PageRange) {
        let demands: Vec<PageIndex> = {
            let state = self.state.lock();
            let demands = state.demands.range(range.start()..);
            demands.map(|(page, _)| *page).take_while(|page| range.contains(*page)).collect()
        };
        let owed = {
            let engine = driver.engine();
            demands.iter().map(|&page| engine.is_owed_page(page)).collect::<Vec<_>>()
        };
        let mut state = self.state.lock();
        for (page, owed) in demands.iter().zip(owed) {
            if !owed {
                state.demands.remove(page);
            } else if let Some(demand) = state.demands.get_mut(page) {
                demand.pending = false;
            }
        }
    }

    /// Has the host stop watching the guest view, once nothing is owed any more: faults are plain
    /// from then on.
    fn let_go(&self, driver: &Driver) {
        let mut from = {
            let state = self.state.lock();
            if state.let_go {
                return;
            }
            state.owed_from
        };
        let failed = {
            let engine = driver.engine();
            let owed = engine.is_owed(&mut from);
            (!owed).then(|| engine.failed().runs().collect::<Vec<_>>())
        };
        let first = {
            let mut state = self.state.lock();
            state.owed_from = state.owed_from.max(from);
            failed.is_some() && !std::mem::replace(&mut state.let_go, true)
        };
        if let Some(failed) = failed.filter(|_| first) {
            // That it goes on watching costs time, and is no error.
            let _ = driver.host.settle(&failed);
        }
    }
}

/// Ends a job, also if its thread dies in it.
struct Ended<'a> {
    pager: &'a Pager,
    job: Job,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut state = self.pager.state.lock();
        state.reading.retain(|it| it.id != self.job.id);
    }
}
