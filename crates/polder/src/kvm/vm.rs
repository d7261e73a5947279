//! [`Vm`]: the VM's side: what it has made, and its slots.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use polder_engine::{Contents, Platform, Slot, Visibility, VmId};
use polder_units::{ByteSize, Gfn, GfnRange, Gpa, PAGE_SIZE, PageRange};

use super::{
    Exit, Failed, GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, GuestMemfd,
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    KVM_SET_MEMORY_ATTRIBUTES2_ZERO, aligned, kvm_create_guest_memfd, kvm_pre_fault_memory,
    kvm_userspace_memory_region2,
};
use crate::sync::Mutex;
use crate::{Errno, Error, HostKind, Memory, Vcpu};

/// How many slots a VM has (`KVM_USER_MEM_SLOTS`, Linux `include/linux/kvm_host.h`, on x86).
const SLOTS: u32 = 32764;

/// The most pages of a slot (`KVM_MEM_MAX_NR_PAGES`).
const MOST_PAGES: u64 = (1 << 31) - 1;

/// What can be asked of [`Vm::check_extension`], by the kernel's names without `KVM_CAP_`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Capability {
    /// The flags of [`Vm::create_guest_memfd`].
    GuestMemfdFlags,
    /// The attributes of [`GuestMemfd::set_memory_attributes2`].
    GuestMemfdMemoryAttributes,
    /// The flags of [`GuestMemfd::set_memory_attributes2`] that hold for both directions.
    MemoryAttributes2Flags,
}

/// A VM, as far as its memory is concerned.
///
/// ```
/// # use polder::{HostKind, Platform, kvm};
/// let vm = kvm::Vm::new(polder::Vm::Machine, HostKind::Machine, Platform::Plain);
/// let unaligned = kvm::kvm_create_guest_memfd { size: 0x1001, ..Default::default() };
/// assert_eq!(vm.create_guest_memfd(unaligned).unwrap_err().errno, polder::Errno::EINVAL);
/// ```
#[derive(Clone, Debug)]
pub struct Vm(Arc<Shared>);

/// What a VM and its guest_memfds know of each other.
pub(super) struct Shared {
    vm: crate::Vm,
    host: HostKind,
    platform: Platform,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next_fd: u32,
    files: BTreeMap<u32, File>,
    slots: BTreeMap<u32, SlotOf>,
}

/// A guest_memfd that is open.
#[derive(Clone)]
struct File {
    memory: Weak<Memory>,
    id: VmId,
}

/// A slot, and what it shows: nothing any more, once that is closed.
struct SlotOf {
    gfns: GfnRange,
    pages: PageRange,
    fd: u32,
}

impl Shared {
    /// Forgets a guest_memfd: its number means nothing any more.
    pub(super) fn close(&self, fd: u32) {
        self.state.lock().files.remove(&fd);
    }
}

impl Vm {
    /// A VM whose memory is on `host`, and of this kind.
    pub fn new(vm: impl Into<crate::Vm>, host: HostKind, platform: Platform) -> Self {
        let state = Mutex::default();
        Self(Arc::new(Shared { vm: vm.into(), host, platform, state }))
    }

    /// `KVM_CHECK_EXTENSION`: the flags or attributes that it offers, 0 for none.
    pub fn check_extension(&self, capability: Capability) -> u64 {
        let Shared { host, platform, .. } = *self.0;
        match capability {
            Capability::GuestMemfdFlags => GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
            Capability::GuestMemfdMemoryAttributes => KVM_MEMORY_ATTRIBUTE_PRIVATE,
            Capability::MemoryAttributes2Flags => {
                let both = |contents| {
                    [Visibility::Private, Visibility::Shared]
                        .into_iter()
                        .all(|to| platform.offers(contents, to, host.is_in_place()))
                };
                let flag = |contents, flag| if both(contents) { flag } else { 0 };
                flag(Contents::Zero, KVM_SET_MEMORY_ATTRIBUTES2_ZERO)
                    | flag(Contents::Preserve, KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE)
            }
        }
    }

    /// `KVM_CREATE_GUEST_MEMFD`: an object, private unless `GUEST_MEMFD_FLAG_INIT_SHARED`.
    ///
    /// # Errors
    /// `EINVAL` for a size that is 0, negative or no multiple of the page size, and for unknown
    /// flags; what the host fails with.
    pub fn create_guest_memfd(&self, args: kvm_create_guest_memfd) -> Result<GuestMemfd, Failed> {
        const CALL: &str = "KVM_CREATE_GUEST_MEMFD";
        let invalid = || Failed::bad(CALL, Errno::EINVAL);
        let known = self.check_extension(Capability::GuestMemfdFlags);
        let sized = i64::try_from(args.size).is_ok_and(|size| size > 0) && aligned(args.size);
        if args.flags & !known != 0 || !sized {
            return Err(invalid());
        }
        let pages = ByteSize::new(args.size).pages().map_err(|_| invalid())?;
        let Shared { ref vm, host, platform, .. } = *self.0;
        let builder = Memory::builder(pages).host(host).platform(platform);
        let shared = args.flags & GUEST_MEMFD_FLAG_INIT_SHARED != 0;
        let builder = if shared { builder.shared() } else { builder };
        let memory = builder.build().map_err(|why| Failed::of(CALL, why))?;
        let id = memory.attach(vm.clone()).map_err(|why| Failed::of(CALL, why))?;
        let memory = Arc::new(memory);
        let mut state = self.0.state.lock();
        let fd = state.next_fd;
        state.next_fd = fd.checked_add(1).ok_or(Failed::bad(CALL, Errno::ENOMEM))?;
        state.files.insert(fd, File { memory: Arc::downgrade(&memory), id });
        let can_mmap = args.flags & GUEST_MEMFD_FLAG_MMAP != 0;
        Ok(GuestMemfd { memory, id, fd, can_mmap, vm: Arc::clone(&self.0) })
    }

    /// `KVM_SET_USER_MEMORY_REGION2`: makes a slot, or deletes one by a size of 0. A slot is
    /// immutable.
    ///
    /// # Errors
    /// `EINVAL` for a slot that the VM doesn't have; for flags other than `KVM_MEM_GUEST_MEMFD`
    /// alone; for addresses, sizes and offsets that are unaligned, overflow or lie beyond the
    /// guest_memfd; for a guest_memfd of another VM's; for a deletion of nothing; for a change of a
    /// slot. `EBADF` for a guest_memfd that there is not. `EEXIST` for frames that another slot
    /// has, and pages that another slot shows.
    pub fn set_user_memory_region2(
        &self,
        region: kvm_userspace_memory_region2,
    ) -> Result<(), Failed> {
        const CALL: &str = "KVM_SET_USER_MEMORY_REGION2";
        let bad = |errno| Failed::bad(CALL, errno);
        let invalid = || bad(Errno::EINVAL);
        if region.slot >= SLOTS || region.flags != KVM_MEM_GUEST_MEMFD {
            return Err(invalid());
        }
        let gpa = Gpa::new(region.guest_phys_addr);
        let words = [gpa.get(), region.memory_size, region.userspace_addr];
        if !words.into_iter().all(aligned) {
            return Err(invalid());
        }
        let mut state = self.0.state.lock();
        if region.memory_size == 0 {
            let slot = state.slots.get(&region.slot).ok_or_else(invalid)?;
            // What is closed has no slots any more.
            if let Some(file) = state.files.get(&slot.fd).cloned()
                && let Some(memory) = file.memory.upgrade()
            {
                let unbound = memory.unbind(file.id, Slot(region.slot));
                unbound.map_err(|why| Failed::of(CALL, why))?;
            }
            state.slots.remove(&region.slot);
            return Ok(());
        }
        let gfns = GfnRange::from_bytes(gpa.get(), region.memory_size).map_err(|_| invalid())?;
        let pages = PageRange::from_bytes(region.guest_memfd_offset, region.memory_size);
        let pages = pages.map_err(|_| invalid())?;
        if gfns.count().get() > MOST_PAGES || state.slots.contains_key(&region.slot) {
            return Err(invalid());
        }
        if state.slots.values().any(|slot| slot.gfns.overlaps(gfns)) {
            return Err(bad(Errno::EEXIST));
        }
        let file = state.files.get(&region.guest_memfd).cloned().ok_or(bad(Errno::EBADF))?;
        let memory = file.memory.upgrade().ok_or(bad(Errno::EBADF))?;
        let at =
            memory.host_view().as_ptr().map(|view| view.addr() as u64 + pages.start().offset());
        if region.userspace_addr != 0 && Some(region.userspace_addr) != at
            || pages.end() > memory.pages().get()
        {
            return Err(invalid());
        }
        let shown = |slot: &SlotOf| slot.fd == region.guest_memfd && slot.pages.overlaps(pages);
        if state.slots.values().any(shown) {
            return Err(bad(Errno::EEXIST));
        }
        let bound = memory.bind(file.id, Slot(region.slot), gpa.gfn(), pages);
        bound.map_err(|why| Failed::of(CALL, why))?;
        state.slots.insert(region.slot, SlotOf { gfns, pages, fd: region.guest_memfd });
        Ok(())
    }

    /// `KVM_PRE_FAULT_MEMORY`: maps a range for a vCPU ahead of its guest's touches. It succeeds if
    /// a page was done, and moves `gpa` and `size` past what was: call until `size` is 0.
    ///
    /// # Errors
    /// `EINVAL` for flags, for a range that is empty, unaligned or overflows, and for a vCPU of
    /// another VM's; `ENOENT` where no slot is; as [`Memory::prefault`].
    pub fn pre_fault_memory<'a>(
        &self,
        vcpu: impl Into<Vcpu<'a>>,
        range: &mut kvm_pre_fault_memory,
    ) -> Result<(), Failed> {
        const CALL: &str = "KVM_PRE_FAULT_MEMORY";
        let invalid = || Failed::bad(CALL, Errno::EINVAL);
        if range.flags != 0 || range.padding != [0; 5] {
            return Err(invalid());
        }
        let gfns = GfnRange::from_bytes(range.gpa, range.size).map_err(|_| invalid())?;
        let vcpu = vcpu.into();
        let mut left = Some(gfns);
        while let Some(now) = left {
            let done = match self.file_of(now.start()) {
                Some((memory, id, end)) => {
                    let part = GfnRange::between(now.start().get(), now.end().min(end));
                    memory.prefault(id, vcpu, part.unwrap_or(now))
                }
                None => Err(polder_engine::Refusal::NoSlot { gfn: now.start() }.into()),
            };
            match done {
                Ok(done) => left = GfnRange::between(done.done.end(), gfns.end()),
                Err(why) if now == gfns => return Err(Failed::of(CALL, why)),
                Err(_) => break,
            }
        }
        range.gpa = left.map_or(gfns.end(), |left| left.start().get()) * PAGE_SIZE;
        range.size = left.map_or(0, |left| left.count().get()) * PAGE_SIZE;
        Ok(())
    }

    /// What a guest's access that KVM gave up on is to the VMM; `None` to run on: the access is let
    /// through by now. Waits where an operation holds the page.
    ///
    /// # Errors
    /// As [`Memory::guest_fault`].
    pub fn exit(&self, gpa: u64, private: bool) -> Result<Option<Exit>, Failed> {
        let gpa = Gpa::new(gpa);
        let visibility = if private { Visibility::Private } else { Visibility::Shared };
        let fault = match self.file_of(gpa.gfn()) {
            Some((memory, id, _)) => {
                let fault = memory.guest_fault(id, gpa, visibility);
                fault.map_err(|why: Error| Failed::of("KVM_RUN", why))?
            }
            None => Some(polder_engine::MemoryFault::Unbound(GfnRange::one(gpa.gfn()))),
        };
        Ok(fault.map(|fault| Exit::new(fault, visibility)))
    }

    /// The memory that a frame shows, what that calls the VM, and the number of the frame after the
    /// slot's last.
    fn file_of(&self, gfn: Gfn) -> Option<(Arc<Memory>, VmId, u64)> {
        let state = self.0.state.lock();
        let slot = state.slots.values().find(|slot| slot.gfns.contains(gfn))?;
        let file = state.files.get(&slot.fd)?;
        Some((file.memory.upgrade()?, file.id, slot.gfns.end()))
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("host", &self.host).finish_non_exhaustive()
    }
}
