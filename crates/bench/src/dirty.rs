//! `polder bench dirty`: what the dirty log costs whoever takes it, and whoever writes while it is on.
//!
//! The baseline is a slot of KVM's that logs, on a memfd, without Polder: the same system calls on a
//! slot of the same size, of which the same guest writes the same pages. That of the host's writes is
//! the same write with the log off.

mod host;

use std::time::Duration;

use polder::Memory;
use polder::units::{Gpa, PAGE_SIZE, PageCount, PageRange};
use polder_linux::KvmSlot;

use crate::apart::Apart;
use crate::bare::Bare;
use crate::guest::{BARE, Guest, POLDER};
use crate::turns::{alternate, now};
use crate::{Bench, BenchError, Measured, Progress, Row};

pub(crate) const BENCH: Bench = Bench {
    name: "dirty",
    about: "the dirty log, next to a slot of KVM's that logs",
    run: |progress| run(&Extent::FULL, progress),
};

/// How much is measured.
struct Extent {
    /// The guest's memory.
    pages: u32,
    /// Passes over all of it that a guest makes while its log is taken.
    passes: usize,
    /// A turn of the host's writes.
    turn: Duration,
}

impl Extent {
    const FULL: Self = Self { pages: 16 << 8, passes: 2, turn: Duration::from_millis(20) };
}

/// Which pages are dirty when the log is taken: one of so many.
const TAKEN: [(&str, u32); 2] = [("take, 1 of 64 pages dirty", 64), ("take, all dirty", 1)];

/// How often it is taken while the guest writes, in milliseconds.
const EACH: [u64; 2] = [10, 50];

const BARE_SLOT: &str = "bare KVM slot";

fn run(extent: &Extent, progress: &mut dyn FnMut(Progress)) -> Measured {
    let of = TAKEN.len() + EACH.len() + 1;
    let mut done = 0;
    let mut tell = |doing: &str| {
        progress(Progress { done, of, doing: doing.to_owned() });
        done += 1;
    };
    let mut rows = Vec::new();
    {
        let logged = Logged::new(extent)?;
        for (case, one_of) in TAKEN {
            tell(case);
            rows.push(logged.take(case, one_of)?);
        }
        for milliseconds in EACH {
            let case = format!("guest writes, log taken each {milliseconds} ms");
            tell(&case);
            let each = Duration::from_millis(milliseconds);
            rows.push(logged.written_meanwhile(case, each, extent.passes)?);
        }
    }
    tell("64-byte writes of the host");
    rows.extend(host::rows(extent.turn)?);
    Ok(rows)
}

/// A guest with memory of Polder's and bare memory, both logged.
struct Logged {
    // Before the VM and the bare memory that it shows.
    slot: KvmSlot,
    _bare: Bare,
    memory: Memory,
    guest: Guest,
    pages: u32,
}

impl Logged {
    fn new(extent: &Extent) -> Result<Self, BenchError> {
        let pages = extent.pages;
        let guest = Guest::new()?;
        let memory = Memory::builder(PageCount::from(pages)).shared().build()?;
        guest.bind(&memory)?;
        let bare = Bare::new(pages, false)?;
        let all = PageRange::between(0, pages.into()).expect("memory has pages");
        let mut slot = guest.bind_bare(&bare, all)?;
        slot.log_dirty(true)?;
        memory.start_dirty_log()?;
        Ok(Self { slot, _bare: bare, memory, guest, pages })
    }

    /// Takes what KVM has, as a loop without Polder does. Returns how many pages.
    fn take_bare(&self) -> Result<u64, BenchError> {
        let mut taken = 0;
        self.slot.take_dirty(|words| {
            taken = words.iter().map(|word| u64::from(word.count_ones())).sum();
        })?;
        Ok(taken)
    }

    fn take_polder(&self) -> Result<u64, BenchError> {
        Ok(self.memory.take_dirty_log()?.count().get())
    }

    /// One taking of pages that the guest has written, one of `one_of`.
    fn take(&self, case: &str, one_of: u32) -> Result<Row, BenchError> {
        let dirty = self.pages / one_of;
        let turn = |base: Gpa, take: &dyn Fn() -> Result<u64, BenchError>| {
            take()?;
            let page = |at: u32| on(base, u64::from(at * one_of) * PAGE_SIZE);
            match one_of {
                1 => self.guest.fill(&[base], u64::from(dirty) * PAGE_SIZE)?,
                _ => self.guest.fill(&(0..dirty).map(page).collect::<Vec<_>>(), 8)?,
            }
            let start = now();
            let taken = take()?;
            let took = start.elapsed().as_secs_f64() * 1e6;
            check(taken, dirty.into())?;
            Ok::<f64, BenchError>(took)
        };
        let costs = alternate(
            || turn(BARE, &|| self.take_bare()),
            || turn(POLDER, &|| self.take_polder()),
        )?;
        let mut row = Row::of_costs(case.to_owned(), BARE_SLOT, "us", costs);
        row.note = format!("{dirty} of {} pages dirty", self.pages);
        Ok(row)
    }

    /// How long a guest takes to write all pages while the log is taken each so often.
    fn written_meanwhile(
        &self,
        case: String,
        each: Duration,
        passes: usize,
    ) -> Result<Row, BenchError> {
        let mut taken = [Vec::new(), Vec::new()];
        let [of_bare, of_polder] = &mut taken;
        let costs = alternate(
            || self.pass(BARE, passes, each, of_bare, &|| self.take_bare()),
            || self.pass(POLDER, passes, each, of_polder, &|| self.take_polder()),
        )?;
        let [bare, polder] = taken.map(|taken| taken.iter().sum::<u64>() / taken.len() as u64);
        let mut row = Row::of_costs(case, BARE_SLOT, "ms a pass", costs);
        let megabytes = (u64::from(self.pages) * PAGE_SIZE) >> 20;
        row.note = format!("{megabytes}M a pass; {polder} pages taken in all, its {bare}");
        Ok(row)
    }

    /// A turn of so many passes, while the log is taken; the milliseconds of one.
    fn pass(
        &self,
        base: Gpa,
        passes: usize,
        each: Duration,
        pages: &mut Vec<u64>,
        take: &dyn Fn() -> Result<u64, BenchError>,
    ) -> Result<f64, BenchError> {
        take()?;
        let apart = Apart::new();
        let bytes = u64::from(self.pages) * PAGE_SIZE;
        let (mut taken, took) = std::thread::scope(|scope| {
            let (guest, apart) = (&self.guest, &apart);
            let guest = scope.spawn(move || {
                apart.iter().for_each(Apart::elsewhere);
                let start = now();
                guest.fill(&vec![base; passes], bytes)?;
                Ok::<_, BenchError>(start.elapsed())
            });
            let mut taken = 0;
            while !guest.is_finished() {
                std::thread::sleep(each);
                taken += take()?;
            }
            let took = guest.join().expect("a guest's thread does not panic")?;
            Ok::<_, BenchError>((taken, took))
        })?;
        taken += take()?;
        check(taken, self.pages.into())?;
        pages.push(taken);
        Ok(took.as_secs_f64() * 1e3 / passes as f64)
    }
}

fn on(base: Gpa, bytes: u64) -> Gpa {
    Gpa::new(base.get() + bytes)
}

/// Refuses a log that lacks pages.
fn check(taken: u64, written: u64) -> Result<(), BenchError> {
    if taken < written {
        return Err(BenchError::Guest(format!("{taken} pages logged of {written} written")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Facility, found};

    #[test]
    fn every_case_of_the_log_has_figures_or_says_why_not() {
        let few = Extent { pages: 1024, passes: 1, turn: Duration::from_micros(10) };
        let Some(rows) = found(Facility::Kvm, run(&few, &mut |_| ())) else { return };
        assert_eq!(rows.len(), TAKEN.len() + EACH.len() + 3);
        for row in &rows {
            assert!(row.polder_value > 0.0 && row.baseline_value > 0.0, "{row:?}");
        }
    }

    #[test]
    fn a_log_that_lacks_a_page_is_no_figure() {
        assert!(check(7, 7).is_ok() && check(6, 7).is_err());
    }
}
