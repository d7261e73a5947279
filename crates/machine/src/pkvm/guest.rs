//! The hypercalls of a guest, and what the host may do about them.

use polder_units::Gfn;

use crate::pkvm::{Ask, Component, GuestPage, HostPage, PageState, PkvmFail, PkvmResult, Update};
use crate::{Exit, GuestFault, Machine, Side, Vcpu, VmId};

impl Vcpu<'_> {
    /// The guest asks that the host may reach a page of its own (`ARM_SMCCC_KVM_FUNC_MEM_SHARE`).
    /// It stops in the host, which answers.
    ///
    /// # Errors
    /// [`Exit::Fault`] where it has no page yet: the host gives it one first.
    /// [`PkvmFail::Permission`] for a page that is not its alone.
    pub fn mem_share(&mut self, gfn: Gfn) -> Result<PkvmResult, Exit> {
        self.ask(gfn, Ask::Share, PageState::Owned)
    }

    /// The guest asks that the host may reach a page no longer
    /// (`ARM_SMCCC_KVM_FUNC_MEM_UNSHARE`).
    ///
    /// # Errors
    /// As [`Vcpu::mem_share`], of a page that it does not share.
    pub fn mem_unshare(&mut self, gfn: Gfn) -> Result<PkvmResult, Exit> {
        self.ask(gfn, Ask::Unshare, PageState::SharedOwned)
    }

    /// The guest asks that the host has a page back (`ARM_SMCCC_KVM_FUNC_MEM_RELINQUISH`), as a
    /// balloon does.
    ///
    /// # Errors
    /// As [`Vcpu::mem_share`].
    pub fn mem_relinquish(&mut self, gfn: Gfn) -> Result<PkvmResult, Exit> {
        self.ask(gfn, Ask::Relinquish, PageState::Owned)
    }

    fn ask(&mut self, gfn: Gfn, ask: Ask, from: PageState) -> Result<PkvmResult, Exit> {
        let Some(pkvm) = &mut self.protection.pkvm else {
            return Ok(Err(PkvmFail::Undefined));
        };
        let Some(page) = pkvm.guest(self.vm, gfn) else {
            let (page, side) = (gfn.get(), Side::Private);
            return Err(Exit::Fault(GuestFault { gfn, page, write: false, side }));
        };
        if page.state != from {
            return Ok(Err(PkvmFail::Permission));
        }
        pkvm.asked.insert((self.vm, gfn.get()), (ask, false));
        Ok(Ok(()))
    }
}

impl Machine {
    /// Does what the guest has asked for at a frame, and nothing else.
    ///
    /// # Errors
    /// [`PkvmFail::NotAsked`]; [`PkvmFail::Busy`] of an unshare while a device has the page mapped;
    /// [`PkvmFail::NoMemory`]. Nothing was changed then.
    pub fn answer_guest(&mut self, vm: VmId, gfn: Gfn) -> PkvmResult {
        let ask = self.asked(vm, gfn, false)?;
        match ask {
            Ask::Share => self.guest_share_host(vm, gfn)?,
            Ask::Unshare => self.guest_unshare_host(vm, gfn)?,
            Ask::Relinquish => self.guest_relinquish(vm, gfn)?,
        }
        self.note(vm, gfn, (ask, true))
    }

    /// Undoes what was done so, as long as the guest has not been told.
    ///
    /// # Errors
    /// [`PkvmFail::NotAsked`] if nothing was done; [`PkvmFail::Permission`] of what a guest has
    /// given away for good; as [`Machine::answer_guest`].
    pub fn take_back_answer(&mut self, vm: VmId, gfn: Gfn) -> PkvmResult {
        let ask = self.asked(vm, gfn, true)?;
        match ask {
            Ask::Share => self.guest_unshare_host(vm, gfn)?,
            Ask::Unshare => self.guest_share_host(vm, gfn)?,
            Ask::Relinquish => return Err(PkvmFail::Permission),
        }
        self.note(vm, gfn, (ask, false))
    }

    /// The guest goes on: what it has asked for at a frame is over. Whether it was done.
    ///
    /// # Errors
    /// [`PkvmFail::Undefined`] without pKVM.
    pub fn resume_guest(&mut self, vm: VmId, gfn: Gfn) -> PkvmResult<bool> {
        let asked = self.pkvm()?.asked.remove(&(vm, gfn.get()));
        Ok(asked.is_some_and(|(_, done)| done))
    }

    /// What a guest has asked for at a frame, and whether that was done.
    pub fn asked_by_guest(&self, vm: VmId, gfn: Gfn) -> Option<(Ask, bool)> {
        self.protection.pkvm.as_ref()?.asked.get(&(vm, gfn.get())).copied()
    }

    fn asked(&mut self, vm: VmId, gfn: Gfn, done: bool) -> PkvmResult<Ask> {
        match self.pkvm_for(vm, true)?.asked.get(&(vm, gfn.get())) {
            Some(&(ask, is)) if is == done => Ok(ask),
            _ => Err(PkvmFail::NotAsked),
        }
    }

    fn note(&mut self, vm: VmId, gfn: Gfn, ask: (Ask, bool)) -> PkvmResult {
        self.pkvm()?.asked.insert((vm, gfn.get()), ask);
        Ok(())
    }

    /// `__pkvm_guest_share_host()`.
    fn guest_share_host(&mut self, vm: VmId, gfn: Gfn) -> PkvmResult {
        let pfn = self.guest_page(vm, gfn, PageState::Owned)?;
        let owner = Component::Guest(vm);
        self.change(&[
            Update::Guest(vm, gfn, Some(GuestPage { pfn, state: PageState::SharedOwned })),
            Update::Host(pfn, HostPage { state: PageState::SharedBorrowed, owner }),
            Update::Iommu(pfn, true),
        ])
    }

    /// `__pkvm_guest_unshare_host()`.
    fn guest_unshare_host(&mut self, vm: VmId, gfn: Gfn) -> PkvmResult {
        let pfn = self.guest_page(vm, gfn, PageState::SharedOwned)?;
        self.expect_no_dma(pfn)?;
        self.change(&[
            Update::Host(pfn, HostPage::gone_to(Component::Guest(vm))),
            Update::Iommu(pfn, false),
            Update::Guest(vm, gfn, Some(GuestPage { pfn, state: PageState::Owned })),
        ])
    }

    /// `__pkvm_guest_relinquish_to_host()`: the host has the page back, scrubbed.
    fn guest_relinquish(&mut self, vm: VmId, gfn: Gfn) -> PkvmResult {
        let pfn = self.guest_page(vm, gfn, PageState::Owned)?;
        self.change(&[
            Update::Guest(vm, gfn, None),
            Update::Iommu(pfn, true),
            Update::Host(pfn, HostPage::OWNED),
        ])?;
        self.scrub(pfn);
        Ok(())
    }

    fn guest_page(
        &mut self,
        vm: VmId,
        gfn: Gfn,
        state: PageState,
    ) -> PkvmResult<polder_units::Pfn> {
        let page = self.pkvm_for(vm, true)?.guest(vm, gfn).ok_or(PkvmFail::NotFound)?;
        if page.state == state { Ok(page.pfn) } else { Err(PkvmFail::Permission) }
    }
}
