//! The hypercalls of the host.

use polder_units::{Gfn, Pfn};

use crate::pkvm::{Component, GuestPage, HostPage, PageState, PkvmFail, PkvmResult, Update};
use crate::{Machine, VmId};

use PageState::{NoPage, Owned, SharedBorrowed, SharedOwned};

impl Machine {
    /// `__pkvm_host_share_hyp()`: the hypervisor may reach a page of the host's, too.
    ///
    /// # Errors
    /// [`PkvmFail::Permission`] unless it is the host's alone.
    pub fn host_share_hyp(&mut self, pfn: Pfn) -> PkvmResult {
        self.expect_host(pfn, Owned)?;
        self.change(&[
            Update::Host(pfn, HostPage { state: SharedOwned, owner: Component::Host }),
            Update::Hypervisor(pfn, SharedBorrowed),
        ])
    }

    /// `__pkvm_host_unshare_hyp()`.
    ///
    /// # Errors
    /// [`PkvmFail::Permission`] unless it is shared so.
    pub fn host_unshare_hyp(&mut self, pfn: Pfn) -> PkvmResult {
        self.expect_host(pfn, SharedOwned)?;
        if self.pkvm()?.hypervisor(pfn) != SharedBorrowed {
            return Err(PkvmFail::Permission);
        }
        self.change(&[Update::Hypervisor(pfn, NoPage), Update::Host(pfn, HostPage::OWNED)])
    }

    /// `__pkvm_host_donate_hyp()`: the hypervisor has the page from now on.
    ///
    /// # Errors
    /// [`PkvmFail::Permission`] unless it is the host's alone; [`PkvmFail::Busy`] while a device
    /// has it mapped; [`PkvmFail::NoMemory`].
    pub fn host_donate_hyp(&mut self, pfn: Pfn) -> PkvmResult {
        self.expect_host(pfn, Owned)?;
        self.expect_no_dma(pfn)?;
        self.change(&[
            Update::Host(pfn, HostPage::gone_to(Component::Hypervisor)),
            Update::Iommu(pfn, false),
            Update::Hypervisor(pfn, Owned),
        ])
    }

    /// `__pkvm_hyp_donate_host()`: the hypervisor gives a page of its own to the host, scrubbed.
    ///
    /// # Errors
    /// [`PkvmFail::Permission`] unless it is the hypervisor's.
    pub fn hyp_donate_host(&mut self, pfn: Pfn) -> PkvmResult {
        self.in_machine(pfn)?;
        if self.pkvm()?.hypervisor(pfn) != Owned {
            return Err(PkvmFail::Permission);
        }
        self.change(&[
            Update::Hypervisor(pfn, NoPage),
            Update::Iommu(pfn, true),
            Update::Host(pfn, HostPage::OWNED),
        ])?;
        self.scrub(pfn);
        Ok(())
    }

    /// `__pkvm_host_share_guest()`: shows a page of the host's to a guest that is not protected.
    ///
    /// # Errors
    /// [`PkvmFail::Undefined`] for a protected VM; [`PkvmFail::Permission`] unless the page is the
    /// host's, and no other component but guests has it, and nothing is at `gfn`.
    pub fn host_share_guest(&mut self, vm: VmId, gfn: Gfn, pfn: Pfn) -> PkvmResult {
        self.in_machine(pfn)?;
        let pkvm = self.pkvm_for(vm, false)?;
        let host = pkvm.host(pfn).state;
        let may = host == Owned || host == SharedOwned && pkvm.hypervisor(pfn) == NoPage;
        if !may || pkvm.guest(vm, gfn).is_some() {
            return Err(PkvmFail::Permission);
        }
        self.change(&[
            Update::Host(pfn, HostPage { state: SharedOwned, owner: Component::Host }),
            Update::Guest(vm, gfn, Some(GuestPage { pfn, state: SharedBorrowed })),
        ])
    }

    /// `__pkvm_host_unshare_guest()`: takes it away. It is the host's alone again once no guest has
    /// it.
    ///
    /// # Errors
    /// [`PkvmFail::NotFound`]; [`PkvmFail::Undefined`] for a protected VM.
    pub fn host_unshare_guest(&mut self, vm: VmId, gfn: Gfn) -> PkvmResult {
        let pkvm = self.pkvm_for(vm, false)?;
        let GuestPage { pfn, .. } = pkvm.guest(vm, gfn).ok_or(PkvmFail::NotFound)?;
        let last = pkvm.guests.values().filter(|page| page.pfn == pfn).count() == 1;
        let state = if last { Owned } else { SharedOwned };
        let host = HostPage { state, owner: Component::Host };
        self.change(&[Update::Guest(vm, gfn, None), Update::Host(pfn, host)])
    }

    /// `__pkvm_host_donate_guest()`: a page of the host's is a protected guest's from now on, with
    /// what is in it. The host's stage 2, the IOMMU and the guest's stage 2 change together.
    ///
    /// # Errors
    /// [`PkvmFail::Permission`] unless it is the host's alone, and nothing is at `gfn`;
    /// [`PkvmFail::Busy`] while a device has it mapped; [`PkvmFail::NoMemory`];
    /// [`PkvmFail::Undefined`] for a VM that is not protected. Nothing was changed then.
    pub fn host_donate_guest(&mut self, vm: VmId, gfn: Gfn, pfn: Pfn) -> PkvmResult {
        self.expect_host(pfn, Owned)?;
        if self.pkvm_for(vm, true)?.guest(vm, gfn).is_some() {
            return Err(PkvmFail::Permission);
        }
        self.expect_no_dma(pfn)?;
        self.change(&[
            Update::Host(pfn, HostPage::gone_to(Component::Guest(vm))),
            Update::Iommu(pfn, false),
            Update::Guest(vm, gfn, Some(GuestPage { pfn, state: Owned })),
        ])
    }

    /// Moves a page of a protected guest to another frame, which is the host's alone: the guest's
    /// entry is taken away (who touches it waits), the hypervisor copies, all four tables change
    /// together, and the source goes back to the host scrubbed. **Ours**: pKVM has no such call.
    ///
    /// # Errors
    /// [`PkvmFail::NotFound`]; [`PkvmFail::Permission`] unless `to` is the host's alone;
    /// [`PkvmFail::Busy`] while a device has either mapped; [`PkvmFail::NoMemory`]. Nothing was
    /// changed then.
    pub fn host_move_guest(&mut self, vm: VmId, gfn: Gfn, to: Pfn) -> PkvmResult {
        self.expect_host(to, Owned)?;
        let pkvm = self.pkvm_for(vm, true)?;
        let GuestPage { pfn: from, state } = pkvm.guest(vm, gfn).ok_or(PkvmFail::NotFound)?;
        let host = pkvm.host(from);
        self.expect_no_dma(from)?;
        self.expect_no_dma(to)?;
        let open = host.state != NoPage;
        self.change(&[
            Update::Host(to, host),
            Update::Iommu(to, open),
            Update::Guest(vm, gfn, Some(GuestPage { pfn: to, state })),
            Update::Iommu(from, true),
            Update::Host(from, HostPage::OWNED),
        ])?;
        // In one call at EL2, with the components locked: nobody sees it half made.
        self.frames.copy(from, to);
        self.scrub(from);
        Ok(())
    }

    /// Takes a page back from a VM that is being torn down (`__pkvm_reclaim_dying_guest_page()`):
    /// scrubbed, unless the guest had it shared.
    pub(crate) fn reclaim_all(&mut self, vm: VmId) {
        let Ok(pkvm) = self.pkvm() else { return };
        pkvm.memory = None;
        let of_vm = pkvm.guests.range((vm, 0)..=(vm, u64::MAX));
        let pages: alloc::vec::Vec<_> = of_vm.map(|((_, gfn), page)| (*gfn, *page)).collect();
        pkvm.asked.retain(|(of, _), _| *of != vm);
        for (gfn, GuestPage { pfn, state }) in pages {
            let Some(gfn) = Gfn::new(gfn) else { continue };
            let done = match state {
                SharedBorrowed => self.host_unshare_guest(vm, gfn),
                _ => self.change(&[
                    Update::Guest(vm, gfn, None),
                    Update::Iommu(pfn, true),
                    Update::Host(pfn, HostPage::OWNED),
                ]),
            };
            assert!(done.is_ok(), "a page of {vm} can't be had back: {done:?}");
            if state == Owned {
                self.scrub(pfn);
            }
        }
    }

    /// Refuses a frame that the host's stage 2 has in another state.
    fn expect_host(&mut self, pfn: Pfn, state: PageState) -> PkvmResult {
        self.in_machine(pfn)?;
        let is = self.pkvm()?.host(pfn).state;
        if is == state { Ok(()) } else { Err(PkvmFail::Permission) }
    }

    /// Refuses a frame that a device has mapped.
    pub(crate) fn expect_no_dma(&mut self, pfn: Pfn) -> PkvmResult {
        let mapped = self.pkvm()?.dma.contains_key(&pfn.get());
        if mapped { Err(PkvmFail::Busy) } else { Ok(()) }
    }

    fn in_machine(&self, pfn: Pfn) -> PkvmResult {
        if pfn.get() < self.config.frames.get() { Ok(()) } else { Err(PkvmFail::Input) }
    }
}
