//! References that the engine has not given: found under the folio's lock, with who holds them.

use polder_engine::{Holder, Refusal};
use polder_machine::{Backing, Machine};
use polder_units::{PageIndex, PageRange, Pfn, PfnRange};

use super::{DRIVER, MachineHost, REFERENCE_RETRIES, refused};
use crate::Error;

impl MachineHost {
    /// Finds the first page of a range that somebody refers to, under its folio's lock.
    pub(super) fn check_references(&self, range: PageRange) -> Result<(), Error> {
        let mut retries = REFERENCE_RETRIES;
        loop {
            match self.referenced(range)? {
                Some(_) if retries > 0 => {
                    retries -= 1;
                    crate::sync::yield_now();
                }
                Some(refusal) => return Err(refusal.into()),
                None => return Ok(()),
            }
        }
    }

    /// Looks for references folio by folio: a folio's count is of all of its pages, also of those
    /// that are not in the range.
    fn referenced(&self, range: PageRange) -> Result<Option<Refusal>, Error> {
        self.referenced_on(&mut self.lock(), range)
    }

    pub(super) fn referenced_on(
        &self,
        machine: &mut Machine,
        range: PageRange,
    ) -> Result<Option<Refusal>, Error> {
        let folios = machine.folios(self.object, range).map_err(refused)?;
        let folios: Vec<(PageIndex, Backing)> = folios.collect();
        for (first, backing) in folios {
            let pfn = backing.pfn;
            match machine.lock_folio(pfn, DRIVER) {
                Ok(()) => {}
                // Whoever holds the lock may be about to refer to it.
                Err(polder_machine::Error::Locked { .. }) => {
                    let page = first.max(range.start());
                    let holder = Holder::new("somebody with the folio locked");
                    return Ok(Some(Refusal::Referenced { page, references: 0, holder }));
                }
                Err(error) => return Err(refused(error)),
            }
            let counts = machine.locked_counts(pfn, DRIVER);
            machine.unlock_folio(pfn, DRIVER).map_err(refused)?;
            let references = counts.map_err(refused)?.foreign();
            if references > 0 {
                let (page, holder) = holder(machine, (first, backing), range);
                return Ok(Some(Refusal::Referenced { page, references, holder }));
            }
        }
        Ok(None)
    }
}

/// Who refers to a folio, and which page of `range` that keeps: the page that is pinned, if it is
/// one of them.
fn holder(
    machine: &Machine,
    (first, backing): (PageIndex, Backing),
    range: PageRange,
) -> (PageIndex, Holder) {
    let count = machine.geometry().pages(backing.level);
    let frames = PfnRange::new(backing.pfn, count).expect("a folio's frames");
    let page_of = |pfn: Pfn| {
        let into = pfn.checked_sub(backing.pfn).expect("one of those frames");
        first.checked_add(into).expect("a page of the object")
    };
    let pinned = machine.holders_of(frames).map(|holder| (page_of(holder.pfn), holder));
    let in_range = first.max(range.start());
    match pinned.min_by_key(|&(page, _)| (!range.contains(page), page)) {
        Some((page, holder)) if range.contains(page) => {
            (page, Holder::new(format!("{} of {}", holder.pin, holder.process)))
        }
        Some((page, holder)) => {
            let (pin, process) = (holder.pin, holder.process);
            let other = format!("{pin} of {process}, which is of page {page} of the same folio");
            (in_range, Holder::new(other))
        }
        None => (in_range, Holder::new("somebody unknown")),
    }
}
