//! The machine's pKVM, for the memory of a protected VM.
//!
//! ```text
//!                              host's stage 2, IOMMU   guest's stage 2
//! private, never touched       the host's              nothing
//! private, from its first      no page, closed         the guest's
//! touch on: donated
//! shared by the guest          borrowed, open          the guest's
//! ```
//! A page is the host's until its guest first touches it: then it is donated, with what is in it,
//! and what the guest shares and takes back is the guest's own. Every change is a hypercall that
//! the hypervisor refuses unless the guest has asked for it. A page at a time: the hypervisor's
//! entries are of 4K.

use polder_engine::{Refusal, Visibility, VmId};
use polder_machine::{Ask, Component, Machine, PageState, PkvmFail};
use polder_units::{Gfn, GfnRange, Level, PageIndex, PageRange};

use super::stage2::Tried;
use super::{MachineHost, REFERENCE_RETRIES, refused};
use crate::Error;
use crate::sync::Mutex;

/// What is kept about pKVM.
#[derive(Default)]
pub(super) struct Pkvm {
    /// The VM that the memory's pages are donated to: the first that it was bound to.
    owner: Mutex<Option<(VmId, polder_machine::VmId)>>,
}

/// Whether the host reaches what a guest has at a frame.
fn is_shared(machine: &Machine, gfn: Gfn, vm: polder_machine::VmId) -> bool {
    let spte = machine.spte(vm, gfn).ok().flatten();
    let state = spte.map(|spte| machine.page_state(Component::Host, spte.pfn));
    matches!(state, Some(Ok((state, _))) if state != PageState::NoPage)
}

impl MachineHost {
    /// Whether the memory is a protected VM's of pKVM.
    pub(super) const fn is_pkvm(&self) -> bool {
        self.pkvm.is_some()
    }

    fn pkvm_owner(&self) -> Option<(VmId, polder_machine::VmId)> {
        self.pkvm.as_ref().and_then(|pkvm| *pkvm.owner.lock())
    }

    /// Refuses a VM other than the first that the memory was bound to, and notes the first.
    pub(super) fn own_by_pkvm(&self, id: VmId, vm: polder_machine::VmId) -> Result<(), Error> {
        let Some(pkvm) = &self.pkvm else { return Ok(()) };
        let (owner, _) = *pkvm.owner.lock().get_or_insert((id, vm));
        if owner == id { Ok(()) } else { Err(Error::OneVm { owner, vm: id }) }
    }

    /// Where the owner sees a page.
    fn gfn_of(&self, machine: &Machine, page: PageIndex) -> Option<Gfn> {
        let (_, owner) = self.pkvm_owner()?;
        let mut shown = machine.gfns_of(self.object, PageRange::one(page));
        shown.find(|(vm, _)| *vm == owner).map(|(_, gfns)| gfns.start())
    }

    /// Gives a page to its guest, which has touched it: cut off from every process and looked at
    /// for references under the folio's lock, for no claim keeps another process from touching it.
    pub(super) fn donate(
        &self,
        vm: polder_machine::VmId,
        gfn: Gfn,
        page: PageIndex,
    ) -> Result<Tried, Error> {
        let mut retries = REFERENCE_RETRIES;
        loop {
            let machine = &mut *self.lock();
            if machine.spte(vm, gfn).map_err(refused)?.is_some() {
                return Ok(Tried::Mapped(Level::Size4K));
            }
            let one = PageRange::one(page);
            machine.zap_object(self.object, one).map_err(refused)?;
            machine.flush_object(self.object, one).map_err(refused)?;
            match self.referenced_on(machine, one)? {
                None => {
                    let backing = machine.backing(self.object, page).map_err(refused)?;
                    let Some(backing) = backing else { return Ok(Tried::Moved) };
                    let donated = machine.host_donate_guest(vm, gfn, backing.pfn);
                    donated.map_err(|fail| Error::Pkvm { page, fail })?;
                    return Ok(Tried::Mapped(Level::Size4K));
                }
                // Whoever has the folio locked, or refers to it in passing, is soon done.
                Some(_) if retries > 0 => retries -= 1,
                Some(Refusal::Referenced { references: 0, .. }) => return Ok(Tried::Later),
                Some(refusal) => return Err(refusal.into()),
            }
            crate::sync::yield_now();
        }
    }

    /// Has the hypervisor do, or take back, what the guest asked for, so that pages are `to`.
    pub(super) fn answer_guest(&self, range: PageRange, to: Visibility) -> Result<(), Error> {
        use Visibility::{Private, Shared};
        let Some((_, vm)) = self.pkvm_owner() else { return Ok(()) };
        range.frames().try_for_each(|page| {
            let machine = &mut *self.lock();
            let fail = |fail| Error::Pkvm { page, fail };
            let gfn = self.gfn_of(machine, page).ok_or(fail(PkvmFail::NotFound))?;
            let answered = match (machine.asked_by_guest(vm, gfn), to) {
                (Some((Ask::Share, false)), Shared) | (Some((Ask::Unshare, false)), Private) => {
                    machine.answer_guest(vm, gfn)
                }
                (Some((Ask::Share, true)), Private) | (Some((Ask::Unshare, true)), Shared) => {
                    machine.take_back_answer(vm, gfn)
                }
                // Done already, or on a way back that had not come so far.
                (Some((Ask::Share | Ask::Unshare, _)), _) => Ok(()),
                // Nothing was done about it, and on a way back nothing is to be undone.
                (Some((Ask::Relinquish, _)) | None, to) => match is_shared(machine, gfn, vm) {
                    shared if shared == (to == Shared) => Ok(()),
                    _ => Err(PkvmFail::NotAsked),
                },
            };
            answered.map_err(fail)
        })
    }

    /// Has the hypervisor give back the pages of a range that the guest relinquishes.
    pub(super) fn take_relinquished(&self, range: PageRange) -> Result<(), Error> {
        let Some((_, vm)) = self.pkvm_owner() else { return Ok(()) };
        range.frames().try_for_each(|page| {
            let machine = &mut *self.lock();
            let Some(gfn) = self.gfn_of(machine, page) else { return Ok(()) };
            match machine.asked_by_guest(vm, gfn) {
                Some((Ask::Relinquish, false)) => {
                    machine.answer_guest(vm, gfn).map_err(|fail| Error::Pkvm { page, fail })
                }
                _ => Ok(()),
            }
        })
    }

    /// Refuses to take a slot away in which the guest has pages: only it, or its end, gives them
    /// back.
    pub(super) fn check_none_donated(
        &self,
        vm: polder_machine::VmId,
        gfns: GfnRange,
    ) -> Result<(), Error> {
        let machine = self.lock();
        let has = |gfn| matches!(machine.spte(vm, gfn), Ok(Some(_)));
        if !self.is_pkvm() || !gfns.frames().any(has) {
            return Ok(());
        }
        Err(Error::NotOffered {
            what: "a protected VM has pages in this slot, and pKVM's hypervisor leaves them to it \
                   until it gives them back or is destroyed",
            way_out: "have the guest relinquish them first, or drop the memory",
        })
    }
}
