//! Reading the source, and what comes of a page that can't be read.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Duration;

use polder_engine::Engine;
use polder_units::{PAGE_BYTES, PageCount, PageIndex, PageRange};

use super::state::{Job, Why};
use super::statistics::add;
use super::{AT_ONCE, Pager};
use crate::OnBusy;
use crate::driver::Driver;
use crate::source::{SourceError, SourceFailure};

/// A read that takes as long has gone to a disk or further: what comes next is told ahead.
const SLOW: Duration = Duration::from_millis(1);

/// How many failures are remembered.
pub(super) const FAILURES_KEPT: usize = 1024;

impl Pager {
    /// Makes pages zeros without reading anything. Returns the number of the page to go on at.
    pub(super) fn zeros(&self, driver: &Driver, range: PageRange, job: Job) -> u64 {
        let shown = match job.why {
            Why::Demand(page) => PageRange::one(page),
            // Zeros that nobody asked for take up memory once somebody does.
            Why::Ahead | Why::Fill => PageRange::one(range.start()),
        };
        driver.land(range, None, shown, |run| add(&self.counters.zeros, run.count().get()));
        range.end()
    }

    /// Reads pages and makes them whole. Returns the number of the page to go on at.
    pub(super) fn read(&self, driver: &Driver, range: PageRange, job: Job) -> u64 {
        let mut buffer = self.buffers.lock().pop().unwrap_or_default();
        let end = range.end().min(range.start().get() + AT_ONCE);
        let range = PageRange::between(range.start().get(), end).unwrap_or(range);
        let came = self.read_into(range, &mut buffer);
        let next = match came {
            Ok(came) => {
                let got = came.and_then(|end| PageRange::between(range.start().get(), end));
                if let Some(got) = got {
                    let length = usize::try_from(got.count().get()).unwrap_or(0) * PAGE_BYTES;
                    driver.land(got, Some(&buffer[..length]), got, |run| self.count(run, job));
                }
                got.map_or(range.end(), PageRange::end)
            }
            Err(why) if range.count() == PageCount::ONE => {
                self.failed(driver, range.start(), why, job);
                range.end()
            }
            Err(_) => self.one_by_one(driver, range, job, &mut buffer),
        };
        self.buffers.lock().push(buffer);
        next
    }

    /// Reads pages of which some can't be read.
    fn one_by_one(&self, driver: &Driver, range: PageRange, job: Job, buffer: &mut Vec<u8>) -> u64 {
        // First the one that somebody waits for.
        let wanted = match job.why {
            Why::Demand(page) if range.contains(page) => Some(page),
            _ => None,
        };
        let others = range.frames().filter(|page| Some(*page) != wanted);
        for page in wanted.into_iter().chain(others) {
            let one = PageRange::one(page);
            match self.read_into(one, buffer) {
                Ok(_) => {
                    let bytes = &buffer[..PAGE_BYTES];
                    driver.land(one, Some(bytes), one, |run| self.count(run, job));
                }
                Err(why) => self.failed(driver, page, why, job),
            }
        }
        range.end()
    }

    /// One read. Returns the number of the page at which it stopped.
    fn read_into(
        &self,
        range: PageRange,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<u64>, SourceError> {
        let asked =
            usize::try_from(range.count().get()).unwrap_or(usize::MAX / PAGE_BYTES) * PAGE_BYTES;
        if buffer.len() < asked {
            buffer.resize(asked, 0);
        }
        let into = &mut buffer[..asked];
        add(&self.counters.reads, 1);
        let start = polder_linux::now();
        let read = catch_unwind(AssertUnwindSafe(|| self.source.read(range, into)));
        self.slow.store(start.elapsed() >= SLOW, Ordering::Relaxed);
        let came = read.map_err(|_| SourceError::Panicked)??;
        add(&self.counters.bytes, came as u64);
        match came {
            0 => Err(SourceError::Ended(range.start().offset())),
            _ if came > asked || !came.is_multiple_of(PAGE_BYTES) => {
                Err(SourceError::WrongLength { asked, came })
            }
            _ => Ok(Some(range.start().get() + (came / PAGE_BYTES) as u64)),
        }
    }

    /// Counts pages that are whole now.
    fn count(&self, run: PageRange, job: Job) {
        let demanded = u64::from(matches!(job.why, Why::Demand(page) if run.contains(page)));
        add(&self.counters.demanded, demanded);
        add(&self.counters.ahead, run.count().get() - demanded);
    }

    /// A page can't be read. What nobody waits for, and nobody has asked to be filled, may be read
    /// another time.
    fn failed(&self, driver: &Driver, page: PageIndex, why: SourceError, job: Job) {
        // Who waits for another page of a huge one that is shown as a whole waits for this one,
        // too.
        let around = driver.engine().shown_with(page);
        let by_job = matches!(job.why, Why::Demand(page) if around.contains(page));
        let waited_for = by_job || {
            let state = self.state.lock();
            let mut from = state.demands.range(around.start()..);
            from.next().is_some_and(|(page, _)| around.contains(*page))
        };
        if !waited_for && job.why != Why::Fill {
            return;
        }
        let deny = |engine: &mut Engine| self.deny(engine, page, why.clone());
        // Nothing refuses it.
        let _ = driver.claim(OnBusy::Wait, deny);
        driver.released();
    }

    pub(super) fn note_failure(&self, page: PageIndex, why: SourceError) {
        add(&self.counters.failed, 1);
        let mut state = self.state.lock();
        let source_name = self.source.name();
        if let Some(last) = state.failures.last_mut()
            && last.why == why
            && let Some(longer) = last.pages.append(PageRange::one(page))
        {
            last.pages = longer;
        } else if state.failures.len() < FAILURES_KEPT {
            state.failures.push(SourceFailure { pages: PageRange::one(page), source_name, why });
        }
    }
}

/// A part of `whole`, whatever a source says.
pub(super) fn within(part: PageRange, whole: PageRange) -> PageRange {
    let end = part.end().clamp(whole.start().get() + 1, whole.end());
    PageRange::between(whole.start().get(), end).unwrap_or(whole)
}
