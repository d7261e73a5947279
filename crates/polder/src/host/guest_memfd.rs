//! Host `guest_memfd`: the kernel keeps private pages; shared ones lie in a memfd.
//!
//! ```text
//!                guest_memfd       memfd: guest view   host view          trusted view
//! who            KVM's slots       KVM's slots         device models      Polder alone
//! shared page    not shown         mapped by faults    mapped by answers  mapped by use
//! private page   mapped by faults  not shown           poisoned if touched never used
//! ```
//! Which of the two a guest frame shows is the frame's attribute (`KVM_SET_MEMORY_ATTRIBUTES`),
//! set here for every frame that a page is bound at. A page exists on one side at most: a
//! conversion frees it on both, when all frames are told, so that the guest finds zeros. The host
//! view is watched as on host `memfd`: a stray touch of a private page is denied, and no page of
//! the memfd comes into being by it.
//!
//! # Without private memory
//! A KVM that can't keep memory private may still make a guest_memfd whose pages are all shared
//! (`MMAP` and `INIT_SHARED`: Linux 6.18, any MMU). An object made
//! [shared](crate::Builder::shared) is then served from it alone: attached to such a VM, the views
//! show the guest_memfd in the memfd's place, and no page of it can become private.
//!
//! # Holes
//! - A page may exist on both sides for a while, which costs memory and shows nobody anything:
//!   where a guest uses it amid a conversion, or a vCPU's fault began before and ends after it; and
//!   where KVM itself touches a private frame (kvmclock, string I/O, an emulated fetch), which it
//!   does by the shared side; or uses it amid an unbind. It lasts until the page is converted,
//!   discarded or bound the next time.
//! - The descriptor of a guest_memfd is closed on exec; between its making and that mark another
//!   thread's fork and exec would inherit it.
//! - The host can't read or write a guest_memfd whose pages are private, and no userfaultfd
//!   watches one (Linux 7.3): private contents are brought by the guest, and none can be owed.
//! - What the VMM's process has as descriptor it can use: free private pages, not read them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::VmFd;
use polder_engine::{PageFacts, Population, RangeSet, Slot, Step, Visibility, VmId};
use polder_linux::{Errno, GuestMemfd, KvmSlot, PrivateMemory, can_pre_fault, set_private};
use polder_units::{Gfn, GfnRange, PageCount, PageRange};

use super::views::{MemfdViews, Views, outside};
use super::{Host, HostKind, Shown, Vm, map_ahead, total};
use crate::dirty::Marks;
use crate::sync::Mutex;
use crate::{Error, PageSize, Vcpu};

pub(crate) struct GuestMemfdHost {
    views: MemfdViews,
    /// Held while attributes or slots change: a slot that appears meanwhile would miss a change.
    state: Mutex<State>,
}

struct State {
    vms: BTreeMap<VmId, Arc<VmFd>>,
    /// The guest_memfd and its VM, from the first bind on; where all is shared, from the first
    /// attach on.
    owner: Option<Owner>,
    slots: BTreeMap<Slot, Bound>,
    /// Pages that the kernel is told are shared.
    shared: RangeSet,
    /// Pages in quarantine: for the kernel they are shared, and poison.
    cut: RangeSet,
}

#[derive(Clone)]
struct Owner {
    id: VmId,
    vm: Arc<VmFd>,
    guest_memfd: Arc<GuestMemfd>,
    /// Whether pages can be private.
    private: bool,
}

/// A slot, and what it shows.
struct Bound {
    slot: KvmSlot,
    gfn: Gfn,
    pages: PageRange,
}

impl Bound {
    /// The guest frames of those of `range` that it shows.
    fn gfns(&self, range: PageRange) -> Option<GfnRange> {
        gfns(self.gfn, self.pages, range)
    }
}

/// The guest frames of those pages of `range` that are bound, `pages` from `gfn` on.
fn gfns(gfn: Gfn, pages: PageRange, range: PageRange) -> Option<GfnRange> {
    let start = range.start().get().max(pages.start().get());
    let end = range.end().min(pages.end());
    let count = end.checked_sub(start).filter(|count| *count > 0)?;
    let first = gfn.get() + (start - pages.start().get());
    GfnRange::between(first, first + count)
}

/// Tells the kernel what frames are, for the sake of these pages, which an error names.
fn tell(vm: &VmFd, gfns: GfnRange, private: bool, pages: PageRange) -> Result<(), Error> {
    let named = |error| polder_linux::Error { range: Some(pages.bytes()), ..error };
    Ok(set_private(vm, gfns, private).map_err(named)?)
}

/// Does what has no way back of its own; more than once, for memory that has run out may come back.
fn patiently(mut put_right: impl FnMut() -> Result<(), Error>) {
    const TRIES: u32 = 100;
    const PAUSE: Duration = Duration::from_millis(1);
    for _ in 0..TRIES {
        if put_right().is_ok() {
            return;
        }
        crate::sync::sleep(PAUSE);
    }
}

impl State {
    /// Tells the kernel what pages are, at every frame that shows one.
    fn set(&self, range: PageRange, to: Visibility) -> Result<(), Error> {
        let Some(owner) = &self.owner else { return Ok(()) };
        let private = to == Visibility::Private;
        if !owner.private {
            return if private { Err(NO_PRIVATE_MEMORY) } else { Ok(()) };
        }
        for gfns in self.slots.values().filter_map(|bound| bound.gfns(range)) {
            tell(&owner.vm, gfns, private, range)?;
        }
        Ok(())
    }

    /// Makes pages private or shared for the kernel, but for those in quarantine.
    fn protect(&mut self, range: PageRange, to: Visibility) -> Result<(), Error> {
        for part in outside(&self.cut, range) {
            self.set(part, to)?;
            match to {
                Visibility::Private => self.shared.remove(part),
                Visibility::Shared => self.shared.insert(part),
            }
        }
        Ok(())
    }

    /// Tells the kernel what the frames of a slot that is there are.
    fn tell_all(&self, owner: &Owner, bound: &Bound) -> Result<(), Error> {
        let Some(all) = bound.gfns(bound.pages) else { return Ok(()) };
        tell(&owner.vm, all, true, bound.pages)?;
        let shared = self.shared.within(bound.pages).chain(self.cut.within(bound.pages));
        for (run, gfns) in shared.filter_map(|run| Some((run, bound.gfns(run)?))) {
            tell(&owner.vm, gfns, false, run)?;
        }
        Ok(())
    }

    /// The guest_memfd for a VM: a new one if there is none yet.
    fn owner(&self, id: VmId, pages: PageCount) -> Result<Owner, Error> {
        let vm = self.vms.get(&id).map(Arc::clone).ok_or(Error::NoSuchVm)?;
        match &self.owner {
            Some(owner) if Arc::ptr_eq(&owner.vm, &vm) => Ok(owner.clone()),
            Some(owner) => Err(Error::OneVm { owner: owner.id, vm: id }),
            None => {
                let guest_memfd = Arc::new(GuestMemfd::new(&vm, pages)?);
                Ok(Owner { id, vm, guest_memfd, private: true })
            }
        }
    }
}

/// What is said where memory was to be private on a VM that has none that can.
const NO_PRIVATE_MEMORY: Error = Error::NotOffered {
    what: "this VM has no private memory: KVM offers it with TDP (EPT or NPT), to VMs of a \
           protected type",
    way_out: "make the VM of type KVM_X86_SW_PROTECTED_VM on a kernel with \
              CONFIG_KVM_SW_PROTECTED_VM and TDP, or use HostKind::Memfd (--host memfd)",
};

/// What is said where what is written was to be logged (`check_memory_region_flags()`, Linux 7.3
/// `virt/kvm/kvm_main.c`).
const NO_DIRTY_LOG: Error = Error::NotOffered {
    what: "KVM logs no dirty pages of a slot with a guest_memfd",
    way_out: "use HostKind::Memfd (--host memfd)",
};

impl GuestMemfdHost {
    /// An object of `pages` pages, all as `initial` says; refused if contents are owed.
    pub(crate) fn new(pages: PageCount, initial: PageFacts) -> Result<Self, Error> {
        if initial.population == Population::Owed {
            return Err(Error::NotOffered {
                what: "contents can't be owed on host guest_memfd: no kernel lets a userfaultfd \
                       watch a guest_memfd, or the host write its private pages",
                way_out: "have the guest copy them from shared pages, or use HostKind::Memfd \
                          (--host memfd)",
            });
        }
        let views = MemfdViews::new("polder-shared", pages, false, PageSize::Small)?;
        let mut state = State {
            vms: BTreeMap::new(),
            owner: None,
            slots: BTreeMap::new(),
            shared: RangeSet::default(),
            cut: RangeSet::default(),
        };
        if initial.visibility == Visibility::Shared {
            state.shared.insert(views.all());
        }
        Ok(Self { views, state: Mutex::new(state) })
    }

    /// Serves the object from a guest_memfd of `vm` alone, all of whose pages are shared.
    fn serve(&self, state: &mut State, id: VmId, vm: Arc<VmFd>) -> Result<(), Error> {
        if state.owner.is_none() {
            if !state.shared.runs().eq([self.views.all()]) {
                return Err(NO_PRIVATE_MEMORY);
            }
            let guest_memfd = Arc::new(GuestMemfd::shared(&vm, self.views.pages())?);
            if !self.views.show_instead(&guest_memfd)? {
                return Err(Error::NotOffered {
                    what: "memory was touched before it was attached to a VM without private \
                           memory, whose guest_memfd is to hold it",
                    way_out: "attach the VM first",
                });
            }
            state.owner = Some(Owner { id, vm: Arc::clone(&vm), guest_memfd, private: false });
        }
        state.vms.insert(id, vm);
        Ok(())
    }

    fn guest_memfd(&self) -> Option<Arc<GuestMemfd>> {
        self.state.lock().owner.as_ref().map(|owner| Arc::clone(&owner.guest_memfd))
    }

    /// Makes the kernel treat pages as what they become. Here, and in [`Self::free`], is where an
    /// ioctl of a future kernel that converts a guest_memfd in place would go: it would take the
    /// place of the attributes and of the second pool, `free` would free nothing at a conversion,
    /// and the engine would be told `in_place`, so that contents can be kept.
    fn protect(&self, range: PageRange, to: Visibility) -> Result<(), Error> {
        self.state.lock().protect(range, to)
    }

    /// Frees pages on both sides: on the one that they are on for their contents, on the other for
    /// what a guest may have had made there amid a conversion.
    fn free(&self, range: PageRange) -> Result<(), Error> {
        self.views.free(range)?;
        if let Some(guest_memfd) = self.guest_memfd() {
            guest_memfd.punch_hole(range)?;
        }
        Ok(())
    }

    /// Frees what a running guest may have had made of private pages on the shared side, while
    /// the kernel was being told that they are private.
    fn free_shared_side(&self, state: &State, pages: PageRange) -> Result<(), Error> {
        let private = outside(&state.shared, pages).into_iter();
        private
            .flat_map(|run| outside(&state.cut, run))
            .try_for_each(|run| Ok(self.views.memfd().punch_hole(run)?))
    }

    /// Takes pages out of all views for good. A guest_memfd has no poison: the guest is shown the
    /// shared side, where there is a marker. All of it is done that can be.
    fn quarantine(&self, range: PageRange) -> Result<(), Error> {
        let mut state = self.state.lock();
        // From now on no step gives them back.
        state.cut.insert(range);
        let cut = self.views.quarantine(range);
        let told = state.set(range, Visibility::Shared);
        cut.and(told)
    }
}

impl Host for GuestMemfdHost {
    fn take(&self, step: Step) -> Result<(), Error> {
        match step {
            Step::UnmapHost(range) => self.views.unmap_host(range),
            Step::Protect(range, to) => self.protect(range, to),
            Step::Free(range) => self.free(range),
            Step::Quarantine(range) => self.quarantine(range),
            // The kernel takes frames from the guest when it is told what they become; references
            // from outside are to the shared side, which is freed; nothing is ever owed.
            Step::UnmapGuest(_) | Step::CheckReferences(_) | Step::Publish(_) => Ok(()),
            Step::PrepareSplit(_)
            | Step::SplitFolio(_)
            | Step::MergeFolio(_)
            | Step::ReleaseTables(_) => unreachable!("this host splits no folios"),
            Step::Assign(_)
            | Step::Unassign(_)
            | Step::Reassign(_)
            | Step::Smash(_)
            | Step::Merge(_)
            | Step::Thaw(_) => {
                unreachable!("there is no memory of an SNP guest on this host")
            }
            Step::Launch(_) | Step::Move(_) | Step::MapDma(..) | Step::UnmapDma(..) => {
                unreachable!("not offered on this host, or the driver's own: {step}")
            }
        }
    }

    fn views(&self) -> &dyn Views {
        &self.views
    }

    fn attach(&self, id: VmId, vm: Vm) -> Result<(), Error> {
        let Vm::Kvm(vm) = vm else {
            return Err(Error::WrongVm { host: HostKind::GuestMemfd });
        };
        let offered = PrivateMemory::of(&vm);
        let mut state = self.state.lock();
        if offered.guest_memfd && offered.attributes {
            state.vms.insert(id, vm);
            return Ok(());
        }
        match offered.can_be_shared() {
            true => self.serve(&mut state, id, vm),
            false => Err(NO_PRIVATE_MEMORY),
        }
    }

    fn bind(&self, vm: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error> {
        let mut state = self.state.lock();
        let owner = state.owner(vm, self.views.pages())?;
        let sides = (&owner.guest_memfd, self.views.guest_view());
        // First the slot, by which KVM says whether the frames are free: those of another memory of
        // this VM's are not ours to change. Until they are told apart the guest finds zeros in
        // them.
        let made = KvmSlot::with_guest_memfd(&owner.vm, slot.0, gfn, sides, pages)?;
        let bound = Bound { slot: made, gfn, pages };
        if owner.private {
            let told = state.tell_all(&owner, &bound);
            told.and_then(|()| self.free_shared_side(&state, pages)).inspect_err(|_| {
                // Where nothing is, nothing is private: the guest would be stopped by it.
                patiently(|| match bound.gfns(pages) {
                    Some(all) => tell(&owner.vm, all, false, pages),
                    None => Ok(()),
                });
            })?;
        }
        state.slots.insert(slot, bound);
        state.owner = Some(owner);
        Ok(())
    }

    fn unbind(&self, _: VmId, slot: Slot) -> Result<(), Error> {
        let mut state = self.state.lock();
        let Some(owner) = state.owner.clone() else { return Ok(()) };
        let Some(mut bound) = state.slots.remove(&slot) else { return Ok(()) };
        let pages = bound.pages;
        let gfns = bound.gfns(pages).filter(|_| owner.private);
        // While the frames are still ours: a private one that shows nothing stops the guest, where
        // it is to find nothing.
        let told = gfns.map_or(Ok(()), |gfns| tell(&owner.vm, gfns, false, pages));
        if let Err(error) = told.and_then(|()| Ok(bound.slot.delete()?)) {
            if owner.private {
                patiently(|| state.tell_all(&owner, &bound));
            }
            state.slots.insert(slot, bound);
            return Err(error);
        }
        Ok(())
    }

    fn log_dirty(&self, on: bool) -> Result<(), Error> {
        if on { Err(NO_DIRTY_LOG) } else { Ok(()) }
    }

    fn take_dirty(&self, _: &Marks) -> Result<(), Error> {
        Err(NO_DIRTY_LOG)
    }

    fn show(
        &self,
        vm: VmId,
        vcpu: Vcpu<'_>,
        shown: Shown,
        _: PageRange,
    ) -> Result<(u64, u64), Error> {
        // Nothing is ever owed, so that KVM waits for nobody here. A conversion waits: what a
        // frame is does not change under KVM, which would refuse it then.
        let fd = self.state.lock().vms.get(&vm).map(Arc::clone).ok_or(Error::NoSuchVm)?;
        if !can_pre_fault(&fd) {
            return Err(Error::NotOffered {
                what: "nothing of a guest_memfd can be mapped ahead but by KVM_PRE_FAULT_MEMORY, \
                       which this kernel lacks",
                way_out: "use Linux 6.11 or newer, or do without",
            });
        }
        Ok((map_ahead(vcpu, shown.gfns)?, 0))
    }

    fn settle(&self, failed: &[PageRange]) -> Result<(), Error> {
        match &self.state.lock().owner {
            // A guest_memfd can't be watched.
            Some(Owner { private: false, .. }) => Ok(()),
            _ => self.views.settle(failed),
        }
    }

    fn existing(&self) -> Result<Vec<PageRange>, Error> {
        let mut existing = RangeSet::default();
        self.views.memfd().existing()?.into_iter().for_each(|run| existing.insert(run));
        let private = self.guest_memfd().map(|guest_memfd| guest_memfd.existing());
        match private.transpose() {
            Ok(runs) => runs.into_iter().flatten().for_each(|run| existing.insert(run)),
            // A kernel that can't count the pages of a guest_memfd leaves the shared ones.
            Err(error) if error.errno == Errno::NOSYS => {}
            Err(error) => return Err(error.into()),
        }
        Ok(existing.runs().collect())
    }

    fn resident(&self) -> Result<PageCount, Error> {
        let mut pages = self.views.memfd().existing()?;
        if let Some(guest_memfd) = self.guest_memfd() {
            pages.extend(guest_memfd.existing()?);
        }
        Ok(total(&pages))
    }
}
