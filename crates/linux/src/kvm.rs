//! KVM memory slots.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::VmFd;
use polder_units::{Gfn, PAGE_SIZE, PageRange};
use rustix::io::Errno;

use crate::call::{self, Call};
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
        let call = Call::on("KVM_SET_USER_MEMORY_REGION", pages.bytes());
        let region = region(slot, gfn, view, pages).ok_or(call.error(Errno::INVAL))?;
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
