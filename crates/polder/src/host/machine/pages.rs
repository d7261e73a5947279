//! Memory of pages, and their mappings: had and given back.

use polder_machine::Machine;
use polder_units::{Level, PageRange};

use super::{FREE_PAUSE, MachineHost, REFERENCE_RETRIES, refused};
use crate::Error;

impl MachineHost {
    /// Gives memory to the pages of a range that have none.
    pub(super) fn allocate(&self, machine: &mut Machine, range: PageRange) -> Result<(), Error> {
        for page in range.frames() {
            if machine.backing(self.object, page).map_err(refused)?.is_some() {
                continue;
            }
            if self.huge.is_some() {
                self.allocate_huge(machine, page)?;
            } else {
                machine.allocate(self.object, page, Level::Size4K).map_err(refused)?;
            }
        }
        Ok(())
    }

    pub(super) fn map_host(&self, range: PageRange) -> Result<(), Error> {
        let mut machine = self.lock();
        self.allocate(&mut machine, range)?;
        self.hide(&mut machine, range)?;
        machine.host_map_range(self.process, Self::vpns(range)).map(|_| ()).map_err(refused)
    }

    pub(super) fn poison(&self, range: PageRange) -> Result<(), Error> {
        match self.lock().host_poison(self.process, Self::vpns(range)) {
            // Somebody else's answer mapped it: not what is asked for, but an answer.
            Ok(()) | Err(polder_machine::Error::Exists { .. }) => Ok(()),
            Err(error) => Err(refused(error)),
        }
    }

    /// Takes the pages out of the host view, with its markers, and out of other processes'
    /// mappings.
    pub(super) fn unmap_host(&self, range: PageRange) -> Result<(), Error> {
        self.lock().host_unmap(self.process, Self::vpns(range)).map_err(refused)?;
        self.unmap_processes(range)
    }

    /// Takes the pages out of every process's mappings; markers stay.
    pub(super) fn unmap_processes(&self, range: PageRange) -> Result<(), Error> {
        let mut machine = self.lock();
        machine.zap_object(self.object, range).map_err(refused)?;
        machine.flush_object(self.object, range).map_err(refused)
    }

    /// Takes the pages out of stage 2 of every VM.
    /// There is nothing that the host could take out where a hypervisor keeps it.
    pub(super) fn unmap_guest(&self, range: PageRange) -> Result<(), Error> {
        if self.is_pkvm() {
            return Ok(());
        }
        let mut machine = self.lock();
        let gfns: Vec<_> = machine.gfns_of(self.object, range).collect();
        gfns.into_iter()
            .try_for_each(|(vm, gfns)| machine.tdp_zap(vm, gfns).map(|_| ()).map_err(refused))
    }

    /// Drops the memory of pages. Nobody has them mapped after that, and no marker is left.
    pub(super) fn free(&self, range: PageRange) -> Result<(), Error> {
        self.take_relinquished(range)?;
        self.unmap_guest(range)?;
        self.unmap_host(range)?;
        let folios: Vec<_> = {
            let machine = self.lock();
            let geometry = machine.geometry();
            let folios = machine.folios(self.object, range).map_err(refused)?;
            folios
                .map(|(page, backing)| PageRange::enclosing(page, backing.level, geometry))
                .collect()
        };
        let freed = self.free_huge(range)?;
        let left = |part: &PageRange| !freed.iter().any(|whole| whole.contains_range(*part));
        let parts = folios.into_iter().filter_map(|folio| folio.intersection(range));
        let mut parts = parts.filter(left);
        if self.huge.is_some() {
            // A part of a huge page goes with the whole of it.
            return parts.try_for_each(|part| self.zero(part));
        }
        parts.try_for_each(|part| self.punch(part))
    }

    /// Frees a folio, or makes a part of one zeros, which can't be freed. Who has it locked, or
    /// has mapped it again, may be done with it soon.
    pub(super) fn punch(&self, part: PageRange) -> Result<(), Error> {
        use polder_machine::Error::{Locked, Mapped, Part};
        let mut retries = REFERENCE_RETRIES;
        loop {
            let punch = |machine: &mut Machine| machine.punch(self.object, part, None);
            let punched = self.by_direct_map(&mut self.lock(), part, punch)?;
            match punched {
                Err(Locked { .. } | Mapped { .. }) if retries > 0 => {}
                Err(Part { .. }) => return self.zero(part),
                punched => return punched.map(drop).map_err(refused),
            }
            retries -= 1;
            crate::sync::sleep(FREE_PAUSE);
            self.unmap_host(part)?;
        }
    }

    fn zero(&self, part: PageRange) -> Result<(), Error> {
        let zero = |machine: &mut Machine| machine.zero(self.object, part);
        self.by_direct_map(&mut self.lock(), part, zero)?.map_err(refused)
    }
}
