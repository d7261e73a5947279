//! pKVM: a hypervisor at EL2 that keeps a table of its own for everybody who reaches memory, the
//! host among them.
//!
//! arch/arm64/kvm/hyp/nvhe/mem_protect.c, read as tables:
//!
//! | there | here |
//! |---|---|
//! | `enum pkvm_page_state` | [`PageState`] |
//! | `enum pkvm_component_id` | [`Component`] |
//! | `__pkvm_host_share_hyp()`, `..._donate_hyp()` and back | `pkvm/host.rs` |
//! | `__pkvm_host_donate_guest()`, `__pkvm_host_share_guest()`, reclaiming | `pkvm/host.rs` |
//! | `__pkvm_guest_share_host()`, `..._unshare_host()`, `..._relinquish_to_host()` | `pkvm/guest.rs` |
//! | `__pkvm_use_dma()`, `host_stage2_idmap_locked(.., update_iommu)` | `iommu.rs`, `Update::Iommu` |
//! | nothing: pages of a guest do not move | [`Machine::host_move_guest`] |
//!
//! # The rule
//! Each frame has one owner, in whose table it is OWNED, or SHARED_OWNED if somebody else has it
//! too, where it is SHARED_BORROWED. Everywhere else it is NOPAGE. The IOMMU lets the host's
//! devices reach what the host's stage 2 has, and nothing else. So four tables say one thing (the
//! host's stage 2, the hypervisor's own, the guests', the IOMMU's), and every hypercall changes
//! those that it has to *together or not at all*: it checks all of them, writes one after the
//! other, and writes back what it has written if the memory for a table runs out on the way
//! ([`Machine::fail_hypervisor`]).
//!
//! # The guest decides
//! A guest asks by a hypercall of its own ([`Vcpu::mem_share`], [`Vcpu::mem_unshare`],
//! [`Vcpu::mem_relinquish`]), and stops in the host, which prepares ([`Machine::answer_guest`] does
//! what was asked and nothing else; [`Machine::take_back_answer`] undoes that). A host that comes
//! without being asked is refused ([`PkvmFail::NotAsked`]). pKVM itself does what the guest asks at
//! once, and the host finds out by being cut off: that is `answer_guest` with nothing before it.
//!
//! # Not modelled
//! - Entries above 4K: a large folio is donated page by page.
//! - The hypervisor's own page-table pages, FF-A, MMIO guards, `pvmfw`.
//! - `mem_relinquish` of pages that are shared: the guest takes them back first.

mod audit;
mod guest;
mod host;

use alloc::collections::BTreeMap;
use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use polder_units::{Gfn, GfnRange, Level, Pfn};

#[cfg(doc)]
use crate::Vcpu;
use crate::vm::TdpEntry;
use crate::{AccessCheck, Error, Machine, Plant, Refused, VmId};

/// What a table says of a frame, as far as its owner goes: `enum pkvm_page_state`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PageState {
    /// It is not in this table.
    NoPage,
    /// It is this component's alone.
    Owned,
    /// It is this component's, which shares it with another.
    SharedOwned,
    /// It is another's, who shares it with this one.
    SharedBorrowed,
}

/// Who has a table: `enum pkvm_component_id`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Component {
    /// The host, with all of its processes.
    Host,
    /// The hypervisor at EL2.
    Hypervisor,
    /// A guest.
    Guest(VmId),
}

/// Why a hypercall did nothing, with the code that the kernel's has.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, thiserror::Error)]
pub enum PkvmFail {
    /// pKVM is not enabled, or the VM is not of the kind that the hypercall is about.
    #[error("EOPNOTSUPP: there is no pkvm here, or the vm is not of that kind")]
    Undefined,
    /// A table says otherwise than the hypercall needs it to: `EPERM`.
    #[error("EPERM: the page is not in the state that this takes it from")]
    Permission,
    /// The guest has no page there: `ENOENT`.
    #[error("ENOENT: the guest has no page there")]
    NotFound,
    /// A device has it mapped: `EBUSY`.
    #[error("EBUSY: the iommu still maps the page for a device; unmap it first")]
    Busy,
    /// The hypervisor has no memory for a table: `ENOMEM`.
    #[error("ENOMEM: the hypervisor has no memory for a table")]
    NoMemory,
    /// The guest has not asked for it: `EPERM`.
    #[error("EPERM: the guest has not asked for this")]
    NotAsked,
    /// There is no such frame: `EINVAL`.
    #[error("EINVAL: there is no such frame")]
    Input,
}

/// What a hypercall came to.
pub type PkvmResult<T = ()> = Result<T, PkvmFail>;

/// What a guest has asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Ask {
    /// That the host may reach a page of its own.
    Share,
    /// That the host may no longer.
    Unshare,
    /// That the host has a page back.
    Relinquish,
}

/// A page in a guest's table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct GuestPage {
    pub(crate) pfn: Pfn,
    pub(crate) state: PageState,
}

/// What the host's stage 2 says of a frame; where it has no page, it notes whose the frame is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct HostPage {
    pub(crate) state: PageState,
    pub(crate) owner: Component,
}

impl HostPage {
    pub(crate) const OWNED: Self = Self { state: PageState::Owned, owner: Component::Host };

    pub(crate) const fn gone_to(owner: Component) -> Self {
        Self { state: PageState::NoPage, owner }
    }
}

/// One entry of one table, as it is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Update {
    Host(Pfn, HostPage),
    Hypervisor(Pfn, PageState),
    /// Whether devices of the host reach the frame.
    Iommu(Pfn, bool),
    Guest(VmId, Gfn, Option<GuestPage>),
}

/// The hypervisor's tables. What a new machine has is left out of each: everything is the host's.
#[derive(Clone, Default, Hash)]
pub(crate) struct Pkvm {
    pub(crate) host: BTreeMap<u64, HostPage>,
    pub(crate) hypervisor: BTreeMap<u64, PageState>,
    /// By VM and guest frame; what they map stands in the VM's stage 2, too.
    pub(crate) guests: BTreeMap<(VmId, u64), GuestPage>,
    /// The frames that the IOMMU keeps from the host's devices.
    pub(crate) closed: BTreeSet<u64>,
    /// How often domains map each frame.
    pub(crate) dma: BTreeMap<u64, u32>,
    /// What guests have asked for, and whether it was done.
    pub(crate) asked: BTreeMap<(VmId, u64), (Ask, bool)>,
    /// How many more table entries can be written before one fails.
    memory: Option<u64>,
}

impl Pkvm {
    pub(crate) fn host(&self, pfn: Pfn) -> HostPage {
        self.host.get(&pfn.get()).copied().unwrap_or(HostPage::OWNED)
    }

    pub(crate) fn hypervisor(&self, pfn: Pfn) -> PageState {
        self.hypervisor.get(&pfn.get()).copied().unwrap_or(PageState::NoPage)
    }

    pub(crate) fn guest(&self, vm: VmId, gfn: Gfn) -> Option<GuestPage> {
        self.guests.get(&(vm, gfn.get())).copied()
    }

    /// Why somebody of the host's can't reach a frame: a CPU, by stage 2, or a device.
    pub(crate) fn refuses(&self, pfn: Pfn, device: bool) -> Option<AccessCheck> {
        if device {
            return self.closed.contains(&pfn.get()).then_some(AccessCheck::Iommu);
        }
        (self.host(pfn).state == PageState::NoPage).then_some(AccessCheck::HostStage2)
    }

    /// The first of some frames that the host has no page for.
    pub(crate) fn first_gone(&self, start: u64, end: u64) -> Option<u64> {
        let mut known = self.host.range(start..end);
        known.find(|(_, page)| page.state == PageState::NoPage).map(|(pfn, _)| *pfn)
    }

    /// Writes an entry. Returns what it was.
    fn write(&mut self, update: Update) -> Update {
        let undo = match update {
            Update::Host(pfn, _) => Update::Host(pfn, self.host(pfn)),
            Update::Hypervisor(pfn, _) => Update::Hypervisor(pfn, self.hypervisor(pfn)),
            Update::Iommu(pfn, _) => Update::Iommu(pfn, !self.closed.contains(&pfn.get())),
            Update::Guest(vm, gfn, _) => Update::Guest(vm, gfn, self.guest(vm, gfn)),
        };
        match update {
            Update::Host(pfn, HostPage::OWNED) => drop(self.host.remove(&pfn.get())),
            Update::Host(pfn, page) => drop(self.host.insert(pfn.get(), page)),
            Update::Hypervisor(pfn, PageState::NoPage) => drop(self.hypervisor.remove(&pfn.get())),
            Update::Hypervisor(pfn, state) => drop(self.hypervisor.insert(pfn.get(), state)),
            Update::Iommu(pfn, true) => drop(self.closed.remove(&pfn.get())),
            Update::Iommu(pfn, false) => drop(self.closed.insert(pfn.get())),
            Update::Guest(vm, gfn, None) => drop(self.guests.remove(&(vm, gfn.get()))),
            Update::Guest(vm, gfn, Some(page)) => drop(self.guests.insert((vm, gfn.get()), page)),
        }
        undo
    }

    /// Takes memory for one entry.
    fn has_memory(&mut self) -> bool {
        match self.memory {
            Some(0) => {
                self.memory = None;
                false
            }
            Some(left) => {
                self.memory = Some(left - 1);
                true
            }
            None => true,
        }
    }
}

impl Machine {
    /// Puts the hypervisor under the host: every frame is the host's. Nothing takes it away.
    pub fn enable_pkvm(&mut self) {
        self.protection.pkvm.get_or_insert_default();
    }

    /// Creates a protected VM, without pages of its own.
    ///
    /// # Errors
    /// [`Error::NoPkvm`]; [`Error::TooMany`].
    ///
    /// ```
    /// use polder_machine::{Config, Machine, Side};
    /// use polder_units::{Gfn, Level, PageCount, PageIndex};
    ///
    /// let mut machine = Machine::new(Config::x86_64(PageCount::from(16)))?;
    /// machine.enable_pkvm();
    /// let vm = machine.create_pkvm_vm()?;
    /// let vcpu = machine.add_vcpu(vm)?;
    /// let object = machine.create_object(PageCount::from(1))?;
    /// let pfn = machine.allocate(object, PageIndex::from(0), Level::Size4K)?;
    ///
    /// // The host writes what the guest is to start with, and gives the page away.
    /// machine.object_write(object, 0, b"firmware")?;
    /// let gfn = Gfn::from(3);
    /// machine.host_donate_guest(vm, gfn, pfn)?;
    /// let mut bytes = [0; 8];
    /// machine.vcpu(vcpu)?.read(gfn.gpa(), Side::Private, &mut bytes)?;
    /// assert_eq!(&bytes, b"firmware");
    /// assert!(machine.object_read(object, 0, &mut bytes).is_err(), "the host has no page there");
    ///
    /// // Nobody but the guest shares it.
    /// assert!(machine.answer_guest(vm, gfn).is_err());
    /// machine.vcpu(vcpu)?.mem_share(gfn)??;
    /// machine.answer_guest(vm, gfn)?;
    /// machine.object_read(object, 0, &mut bytes)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn create_pkvm_vm(&mut self) -> Result<VmId, Error> {
        if self.protection.pkvm.is_none() {
            return Err(Error::NoPkvm);
        }
        let vm = self.create_vm()?;
        self.vms.get_mut(vm)?.protected = true;
        Ok(vm)
    }

    /// Makes the hypervisor run out of memory for its tables once: at the entry after `nth` more;
    /// `None` calls it off.
    pub fn fail_hypervisor(&mut self, nth: Option<u64>) {
        if let Some(pkvm) = &mut self.protection.pkvm {
            pkvm.memory = nth;
        }
    }

    /// What a component's table says of a frame: of a guest's, at which guest frame it has it too.
    ///
    /// # Errors
    /// [`PkvmFail::Undefined`] without pKVM.
    pub fn page_state(
        &self,
        component: Component,
        pfn: Pfn,
    ) -> PkvmResult<(PageState, Option<Gfn>)> {
        let pkvm = self.protection.pkvm.as_ref().ok_or(PkvmFail::Undefined)?;
        Ok(match component {
            Component::Host => (pkvm.host(pfn).state, None),
            Component::Hypervisor => (pkvm.hypervisor(pfn), None),
            Component::Guest(vm) => {
                let mut of_vm = pkvm.guests.range((vm, 0)..=(vm, u64::MAX));
                let found = of_vm.find(|(_, page)| page.pfn == pfn);
                found.map_or((PageState::NoPage, None), |((_, gfn), page)| {
                    (page.state, Gfn::new(*gfn))
                })
            }
        })
    }

    /// Whose a frame is.
    ///
    /// # Errors
    /// [`PkvmFail::Undefined`] without pKVM.
    pub fn owner_of(&self, pfn: Pfn) -> PkvmResult<Component> {
        let pkvm = self.protection.pkvm.as_ref().ok_or(PkvmFail::Undefined)?;
        Ok(pkvm.host(pfn).owner)
    }

    /// Whether the IOMMU lets devices of the host reach a frame.
    ///
    /// # Errors
    /// [`PkvmFail::Undefined`] without pKVM.
    pub fn is_open_to_devices(&self, pfn: Pfn) -> PkvmResult<bool> {
        let pkvm = self.protection.pkvm.as_ref().ok_or(PkvmFail::Undefined)?;
        Ok(!pkvm.closed.contains(&pfn.get()))
    }

    pub(crate) fn pkvm(&mut self) -> PkvmResult<&mut Pkvm> {
        self.protection.pkvm.as_deref_mut().ok_or(PkvmFail::Undefined)
    }

    /// The hypervisor, of a hypercall about a VM that is protected, or one that is not.
    pub(crate) fn pkvm_for(&mut self, vm: VmId, protected: bool) -> PkvmResult<&mut Pkvm> {
        let is = self.vms.get(vm).map_err(|_| PkvmFail::Undefined)?.protected;
        if is == protected { self.pkvm() } else { Err(PkvmFail::Undefined) }
    }

    /// Refuses a change of stage 2 by the host, where the hypervisor keeps it.
    pub(crate) fn check_stage2_is_ours(&self, vm: VmId) -> Result<(), Error> {
        if self.protection.pkvm.is_some() { Err(Error::Protected { vm }) } else { Ok(()) }
    }

    /// Changes tables together or not at all, and flushes who has lost something.
    pub(crate) fn change(&mut self, updates: &[Update]) -> PkvmResult {
        let (half, forgets) =
            (self.plants.has(Plant::HalfDonation), self.plants.has(Plant::IommuForgotten));
        let mut undo = Vec::with_capacity(updates.len());
        for &update in updates {
            if forgets && matches!(update, Update::Iommu(_, false)) {
                continue;
            }
            let pkvm = self.pkvm()?;
            if !pkvm.has_memory() {
                if !half {
                    for update in undo.into_iter().rev() {
                        pkvm.write(update);
                    }
                }
                return Err(PkvmFail::NoMemory);
            }
            undo.push(pkvm.write(update));
        }
        updates.iter().for_each(|update| self.take_effect(*update));
        Ok(())
    }

    /// What hardware has of an entry that was written: stage 2 and the TLBs.
    fn take_effect(&mut self, update: Update) {
        let skip = self.plants.has(Plant::SkipFlush);
        match update {
            Update::Host(pfn, HostPage { state: PageState::NoPage, .. }) if !skip => {
                let tlbs = self.processes.iter_mut().flat_map(|process| &mut process.threads);
                tlbs.for_each(|tlb| tlb.forget_frame(pfn));
            }
            Update::Iommu(pfn, false) if !skip => {
                self.domains.iter_mut().for_each(|domain| domain.iotlb.forget_frame(pfn));
            }
            Update::Host(..) | Update::Hypervisor(..) | Update::Iommu(..) => {}
            Update::Guest(vm, gfn, page) => {
                let Ok(state) = self.vms.get_mut(vm) else { return };
                let there = state.table.get(gfn.get()).map(|found| found.entry.pfn);
                let wanted = page.map(|page| page.pfn);
                if there == wanted {
                    return;
                }
                state.table.drain(gfn.get(), gfn.get() + 1, |_| ());
                if let Some(pfn) = wanted {
                    let entry = TdpEntry { pfn, writable: true, accessed: true, dirty: true };
                    let added = state.table.insert(gfn.get(), Level::Size4K, entry);
                    assert!(added.is_ok(), "stage 2 at gfn {gfn} was just emptied");
                }
                let flushed = self.flush_vm(vm, GfnRange::one(gfn));
                assert!(flushed.is_ok(), "{vm} was there a moment ago");
            }
        }
    }

    /// Fills a frame with zeros, unless that is forgotten (`hyp_poison_page()`).
    pub(crate) fn scrub(&mut self, pfn: Pfn) {
        if !self.plants.has(Plant::NotScrubbed) {
            self.frames.zero(pfn, crate::frames::page_count(1));
        }
    }
}

/// What a host's access of a frame meets.
pub(crate) fn check(pkvm: &Pkvm, access: &crate::access::Access) -> Result<(), Refused> {
    let device = match access.path {
        crate::Path::Host => false,
        crate::Path::Device => true,
        // Stage 2 of a guest is the hypervisor's: what it maps, the guest may reach.
        crate::Path::GuestPrivate | crate::Path::GuestShared => return Ok(()),
    };
    pkvm.refuses(access.pfn, device).map_or(Ok(()), |check| Err(access.refused(check)))
}
