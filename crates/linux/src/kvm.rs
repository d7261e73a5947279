//! KVM memory slots.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::VmFd;
use polder_units::{Gfn, PAGE_SIZE, PageRange};
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl};

use crate::call::{self, Call};
use crate::uapi::kvm::KVM_CLEAR_DIRTY_LOG;
use crate::{Error, GuestMemfd, View};

/// A slot of a VM that shows it a part of a view, and where it has a guest_memfd the same part of
/// that, by each frame's attribute. Dropping it deletes the slot: the guest's mappings go, the
/// pages stay. What it shows stays at least as long as the slot: for good, if that can't be
/// deleted.
pub struct KvmSlot {
    vm: Arc<VmFd>,
    region: kvm_userspace_memory_region,
    pages: PageRange,
    view: Arc<View>,
    #[expect(dead_code, reason = "held so that it stays as long as the slot")]
    guest_memfd: Option<Arc<GuestMemfd>>,
    deleted: bool,
}

/// The making of a slot, or a change of its flags, in errors.
const SETTING: &str = "KVM_SET_USER_MEMORY_REGION";

/// The deletion of a slot, in errors.
const DELETION: &str = "KVM_SET_USER_MEMORY_REGION (deletion)";

impl KvmSlot {
    /// Makes slot `slot` of `vm` show `pages` of the view at guest frame `gfn`.
    ///
    /// # Errors
    /// Those of `KVM_SET_USER_MEMORY_REGION`: `EINVAL` for a slot number that the VM doesn't have
    /// or a size that KVM can't take, `EEXIST` for an overlap in guest-physical space, `ENOMEM`.
    pub fn new(
        vm: &Arc<VmFd>,
        slot: u32,
        gfn: Gfn,
        view: &Arc<View>,
        pages: PageRange,
    ) -> Result<Self, Error> {
        Self::with_flags(vm, (slot, 0), gfn, view, pages)
    }

    /// The same, of a slot that logs what is written to it from the first on.
    ///
    /// # Errors
    /// As [`KvmSlot::new`].
    pub fn logging(
        vm: &Arc<VmFd>,
        slot: u32,
        gfn: Gfn,
        view: &Arc<View>,
        pages: PageRange,
    ) -> Result<Self, Error> {
        Self::with_flags(vm, (slot, KVM_MEM_LOG_DIRTY_PAGES), gfn, view, pages)
    }

    fn with_flags(
        vm: &Arc<VmFd>,
        (slot, flags): (u32, u32),
        gfn: Gfn,
        view: &Arc<View>,
        pages: PageRange,
    ) -> Result<Self, Error> {
        let call = Call::on(SETTING, pages.bytes());
        let mut region = region(slot, gfn, view, pages).ok_or(call.error(Errno::INVAL))?;
        region.flags = flags;
        // SAFETY: the addresses lie in the view, which stays mapped until the slot is deleted: the
        // slot made here holds it. No Rust reference points into it.
        call.make(|| unsafe { vm.set_user_memory_region(region) }.map_err(call::of_kvm))?;
        let (vm, view) = (Arc::clone(vm), Arc::clone(view));
        Ok(Self { vm, region, pages, view, guest_memfd: None, deleted: false })
    }

    /// Makes slot `slot` of `vm` show at guest frame `gfn` the same `pages` of the guest_memfd,
    /// where a frame is private, and of the view where it is shared.
    ///
    /// # Errors
    /// Those of `KVM_SET_USER_MEMORY_REGION2`: as [`KvmSlot::new`], and `EINVAL` for a guest_memfd
    /// of another VM, or pages of it that another slot shows. Pages beyond the guest_memfd are
    /// `EINVAL` from here: Linux 6.18 takes them.
    pub fn with_guest_memfd(
        vm: &Arc<VmFd>,
        slot: u32,
        gfn: Gfn,
        (guest_memfd, view): (&Arc<GuestMemfd>, &Arc<View>),
        pages: PageRange,
    ) -> Result<Self, Error> {
        let call = Call::on("KVM_SET_USER_MEMORY_REGION2", pages.bytes());
        let invalid = call.error(Errno::INVAL);
        let inside = pages.end() <= guest_memfd.pages().get();
        let region = region(slot, gfn, view, pages).filter(|_| inside).ok_or(invalid)?;
        let fd = guest_memfd.as_fd().as_raw_fd();
        let region2 = kvm_userspace_memory_region2 {
            slot,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: region.guest_phys_addr,
            memory_size: region.memory_size,
            userspace_addr: region.userspace_addr,
            guest_memfd_offset: pages.bytes().start(),
            guest_memfd: u32::try_from(fd).map_err(|_| invalid)?,
            ..Default::default()
        };
        // SAFETY: as in `new`; the guest_memfd has no address.
        call.make(|| unsafe { vm.set_user_memory_region2(region2) }.map_err(call::of_kvm))?;
        Ok(Self {
            vm: Arc::clone(vm),
            region,
            pages,
            view: Arc::clone(view),
            guest_memfd: Some(Arc::clone(guest_memfd)),
            deleted: false,
        })
    }

    /// Has KVM log what is written to the slot from now on, or no longer
    /// (`KVM_MEM_LOG_DIRTY_PAGES`): by the guest, by KVM for it, by nobody else. Meanwhile KVM maps
    /// it by 4K. A log that is on already goes on with what it has.
    ///
    /// # Errors
    /// Those of `KVM_SET_USER_MEMORY_REGION`: `ENOMEM`, and `EINVAL` for a slot with a guest_memfd,
    /// which can't be logged (`check_memory_region_flags()`, Linux `virt/kvm/kvm_main.c`). It is as
    /// it was then.
    pub fn log_dirty(&mut self, on: bool) -> Result<(), Error> {
        let vm = &self.vm;
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let region = kvm_userspace_memory_region { flags, ..self.region };
        // SAFETY: the same addresses as before, of the view that the slot holds.
        let set = || unsafe { vm.set_user_memory_region(region) }.map_err(call::of_kvm);
        Call::on(SETTING, self.pages.bytes()).make(set)?;
        self.region = region;
        Ok(())
    }

    /// Gives `note` what was written since the log was turned on or taken last: a bit for each page
    /// of the slot, the lowest of the first word for the first. Whoever writes to a page from now on
    /// has it logged again.
    ///
    /// # Errors
    /// Those of `KVM_GET_DIRTY_LOG`: `ENOENT` for a slot that does not log, `ENXIO` on a VM with a
    /// dirty ring; the log is as it was then. Those of `KVM_CLEAR_DIRTY_LOG`: `note` has had the
    /// pages, and may get them once more.
    pub fn take_dirty(&self, note: impl FnOnce(&[u64])) -> Result<(), Error> {
        let (slot, bytes) = (self.region.slot, self.pages.bytes());
        let call = Call::on("KVM_GET_DIRTY_LOG", bytes);
        let size =
            usize::try_from(self.region.memory_size).map_err(|_| call.error(Errno::INVAL))?;
        let mut dirty = call.make(|| self.vm.get_dirty_log(slot, size).map_err(call::of_kvm))?;
        note(&dirty);
        // On a VM with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 that has taken nothing out of the log.
        // Elsewhere it has, and a page that was written in between is taken twice for once: it is
        // among these still.
        if dirty.iter().any(|&word| word != 0) { self.clear_dirty(&mut dirty) } else { Ok(()) }
    }

    /// Takes pages out of the log.
    fn clear_dirty(&self, pages: &mut [u64]) -> Result<(), Error> {
        let call = Call::on("KVM_CLEAR_DIRTY_LOG", self.pages.bytes());
        let count = u32::try_from(self.pages.count().get());
        let mut clear = kvm_clear_dirty_log {
            slot: self.region.slot,
            num_pages: count.map_err(|_| call.error(Errno::INVAL))?,
            first_page: 0,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: pages.as_mut_ptr().cast(),
            },
        };
        // SAFETY: the descriptor is the VM's, and lives as long as the slot.
        let fd = unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) };
        call.make(|| {
            // SAFETY: the opcode goes with this structure. The kernel reads a bit for each page of
            // the slot, which are in `pages`, and writes nothing of ours.
            let request = unsafe { Updater::<KVM_CLEAR_DIRTY_LOG, _>::new(&mut clear) };
            // SAFETY: as above.
            unsafe { ioctl(fd, request) }
        })
    }

    /// Deletes the slot, as dropping it does. If that fails the guest goes on seeing it.
    ///
    /// # Errors
    /// Those of `KVM_SET_USER_MEMORY_REGION`: `ENOMEM`.
    pub fn delete(&mut self) -> Result<(), Error> {
        if !self.deleted {
            let (vm, mut region) = (&self.vm, self.region);
            region.memory_size = 0;
            // SAFETY: a slot of size 0 is a slot deleted; KVM forgets the view's address.
            let delete = || unsafe { vm.set_user_memory_region(region) }.map_err(call::of_kvm);
            Call::on(DELETION, self.pages.bytes()).make(delete)?;
            self.deleted = true;
        }
        Ok(())
    }

    /// The view that it shows.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }
}

/// What both ioctls are told; `None` for pages beyond the view.
fn region(
    slot: u32,
    gfn: Gfn,
    view: &View,
    pages: PageRange,
) -> Option<kvm_userspace_memory_region> {
    let bytes = pages.bytes();
    let inside = pages.end() <= view.length() as u64 / PAGE_SIZE;
    Some(kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gfn.gpa().get(),
        memory_size: bytes.len().filter(|_| inside)?,
        userspace_addr: view.address() as u64 + bytes.start(),
    })
}

impl Drop for KvmSlot {
    fn drop(&mut self) {
        if self.delete().is_err() {
            // KVM still has the address: what is there must stay for good.
            core::mem::forget(Arc::clone(&self.view));
        }
    }
}

impl core::fmt::Debug for KvmSlot {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("KvmSlot").field("region", &self.region).finish_non_exhaustive()
    }
}
