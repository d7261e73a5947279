//! Moving folios, and what the firmware of SEV-SNP takes before a guest begins.

use polder_engine::{Holder, Refusal};
use polder_machine::{Backing, Machine};
use polder_units::{PageIndex, PageRange};

use super::{DRIVER, FREE_PAUSE, MachineHost, REFERENCE_RETRIES, refused};
use crate::Error;

impl MachineHost {
    /// Moves the folios of a range, which nobody has mapped.
    pub(super) fn move_folios(&self, range: PageRange) -> Result<(), Error> {
        let machine = self.lock();
        let folios = machine.folios(self.object, range).map_err(refused)?;
        let folios: Vec<(PageIndex, Backing)> = folios.collect();
        let geometry = machine.geometry();
        drop(machine);
        for &(first, Backing { level, .. }) in &folios {
            if !range.contains_range(PageRange::enclosing(first, level, geometry)) {
                let page = first.max(range.start());
                return Err(Refusal::FolioPart { page, level }.into());
            }
        }
        folios.into_iter().try_for_each(|(first, _)| self.move_folio(first))
    }

    /// Moves one. Who has it locked, or has mapped it again, may be done with it soon.
    fn move_folio(&self, page: PageIndex) -> Result<(), Error> {
        use polder_machine::Error::{Locked, Mapped, Referenced};
        let mut retries = REFERENCE_RETRIES;
        loop {
            match self.try_move(page) {
                Ok(()) => return Ok(()),
                Err(Locked { .. } | Mapped { .. } | Referenced { .. }) if retries > 0 => {}
                Err(Referenced { foreign: references, .. }) => {
                    let holder = Holder::new("somebody who came meanwhile");
                    return Err(Refusal::Referenced { page, references, holder }.into());
                }
                Err(polder_machine::Error::Pkvm(fail)) => return Err(Error::Pkvm { page, fail }),
                Err(error) => return Err(refused(error)),
            }
            retries -= 1;
            crate::sync::sleep(FREE_PAUSE);
            self.unmap_processes(PageRange::one(page))?;
        }
    }

    /// The whole of it under the folio's lock.
    fn try_move(&self, page: PageIndex) -> Result<(), polder_machine::Error> {
        let machine = &mut *self.lock();
        let Some(Backing { pfn, level, .. }) = machine.backing(self.object, page)? else {
            return Ok(());
        };
        machine.lock_folio(pfn, DRIVER)?;
        // The kernel copies by its direct map.
        let folio = PageRange::enclosing(page, level, machine.geometry());
        let migrate = |machine: &mut Machine| machine.migrate_folio(self.object, page, DRIVER);
        let moved = match self.by_direct_map(machine, folio, migrate) {
            Ok(moved) => moved,
            Err(other) => unreachable!("its folio has memory: {other}"),
        };
        machine.unlock_folio(moved.unwrap_or(pfn), DRIVER)?;
        moved.map(|_| ())
    }

    /// Makes pages that the host has written an SNP guest's, before it begins.
    pub(super) fn launch(&self, range: PageRange) -> Result<(), Error> {
        range.frames().try_for_each(|page| {
            let mut machine = self.lock();
            self.allocate(&mut machine, PageRange::one(page))?;
            drop(machine);
            self.launch_at(page)
        })
    }
}
