//! KVM memory slots.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use polder_units::{Gfn, PAGE_SIZE, PageRange};
use rustix::io::Errno;

use crate::{Error, View};

/// A slot of a VM that shows it a part of a view. Dropping it deletes the slot: the guest's
/// mappings go, the pages stay.
pub struct KvmSlot {
    vm: Arc<VmFd>,
    region: kvm_userspace_memory_region,
    view: Arc<View>,
}

impl KvmSlot {
    /// Makes slot `slot` of `vm` show `pages` of the view at guest frame `gfn`.
    ///
    /// # Errors
    /// Of `KVM_SET_USER_MEMORY_REGION`: `EINVAL` for a slot number that the VM doesn't have or a
    /// size that KVM can't take, `EEXIST` for an overlap in guest-physical space, `ENOMEM`.
    pub fn new(
        vm: &Arc<VmFd>,
        slot: u32,
        gfn: Gfn,
        view: &Arc<View>,
        pages: PageRange,
    ) -> Result<Self, Error> {
        const CALL: &str = "KVM_SET_USER_MEMORY_REGION";
        let bytes = pages.bytes();
        let inside = pages.end() <= view.length() as u64 / PAGE_SIZE;
        let size = bytes.len().filter(|_| inside).ok_or(Error::on(CALL, bytes, Errno::INVAL))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gfn.gpa().get(),
            memory_size: size,
            userspace_addr: view.address() as u64 + bytes.start(),
        };
        // SAFETY: the addresses lie in the view, which stays mapped until the slot is deleted: the
        // slot made here holds it. No Rust reference points into it.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|error| Error::on(CALL, bytes, Errno::from_raw_os_error(error.errno())))?;
        Ok(Self { vm: Arc::clone(vm), region, view: Arc::clone(view) })
    }

    /// The view that it shows.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }
}

impl Drop for KvmSlot {
    fn drop(&mut self) {
        self.region.memory_size = 0;
        // SAFETY: a slot of size 0 is a slot deleted; KVM forgets the view's address.
        let deleted = unsafe { self.vm.set_user_memory_region(self.region) };
        if deleted.is_err() {
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
