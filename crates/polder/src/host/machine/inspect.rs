//! What the machine has of the object, for those who ask.

use polder_engine::{FolioCounts, VmId};
use polder_units::{Level, PageIndex, PageRange, PfnRange};

use super::{MachineHost, refused};
use crate::Error;
use crate::explain::HostFacts;

impl MachineHost {
    pub(super) fn facts(&self, page: PageIndex) -> Result<HostFacts, Error> {
        let vms: Vec<(VmId, polder_machine::VmId)> =
            self.vms.lock().iter().map(|(id, attached)| (*id, attached.vm)).collect();
        let machine = self.lock();
        let one = PageRange::one(page);
        let mut stage2 = Vec::new();
        for (vm, gfns) in machine.gfns_of(self.object, one) {
            let Some((id, _)) = vms.iter().find(|(_, known)| *known == vm) else { continue };
            let spte = machine.spte(vm, gfns.start()).map_err(refused)?;
            stage2.extend(spte.map(|spte| (*id, spte.level)));
        }
        let Some(backing) = machine.backing(self.object, page).map_err(refused)? else {
            return Ok(HostFacts { stage2, ..HostFacts::default() });
        };
        let holders = machine.holders_of(PfnRange::one(backing.pfn));
        let references = holders.map(|holder| format!("{} of {}", holder.pin, holder.process));
        Ok(HostFacts {
            memory: true,
            folio: Some(backing.level),
            rmp: machine.rmp_entry(backing.pfn).filter(|_| self.is_snp()),
            stage2,
            references: references.collect(),
            logs: false,
        })
    }

    pub(super) fn runs_with_memory(&self) -> Result<Vec<PageRange>, Error> {
        let all = PageRange::between(0, self.pages.get()).expect("an object has pages");
        let machine = self.lock();
        let mut runs: Vec<PageRange> = Vec::new();
        for (page, backing) in machine.folios(self.object, all).map_err(refused)? {
            let pages = machine.config().geometry.pages(backing.level);
            let run = PageRange::new(page, pages).expect("a folio lies in its object");
            match runs.last_mut().and_then(|last| Some((last.append(run)?, last))) {
                Some((longer, last)) => *last = longer,
                None => runs.push(run),
            }
        }
        Ok(runs)
    }

    pub(super) fn folio_counts(&self) -> Option<FolioCounts> {
        // The engine knows what it has had split.
        if self.huge.is_some() {
            return None;
        }
        let all = PageRange::between(0, self.pages.get()).expect("an object has pages");
        let machine = self.lock();
        let mut counts = FolioCounts::default();
        for (_, backing) in machine.folios(self.object, all).ok()? {
            match backing.level {
                Level::Size4K => {}
                Level::Size2M => counts.size_2m += 1,
                Level::Size1G => counts.size_1g += 1,
            }
        }
        let pages = |level| machine.geometry().pages(level).get();
        let large = counts.size_2m * pages(Level::Size2M) + counts.size_1g * pages(Level::Size1G);
        counts.size_4k = self.pages.get() - large;
        Some(counts)
    }
}
