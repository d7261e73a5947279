//! [`GuestMemfd`]: the object.

use std::fmt;
use std::sync::Arc;

use polder_engine::{Contents, Visibility, VmId};
use polder_units::PageRange;

use super::vm::Shared;
use super::{
    FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, Failed, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE, KVM_SET_MEMORY_ATTRIBUTES2_ZERO, aligned,
};
use crate::{Errno, HostView, Memory, OnBusy};

/// What [`GuestMemfd::set_memory_attributes2`] is told, and tells: laid out as in the kernel's
/// proposal.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C)]
pub struct kvm_memory_attributes2 {
    /// In: where the range begins, in bytes of the object.
    pub offset: u64,
    /// In: its size in bytes.
    pub size: u64,
    /// In: what the pages become: [`KVM_MEMORY_ATTRIBUTE_PRIVATE`], or 0 for shared.
    pub attributes: u64,
    /// In: what becomes of the contents: [`KVM_SET_MEMORY_ATTRIBUTES2_ZERO`],
    /// [`KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE`], or 0 for whatever is cheapest.
    pub flags: u64,
    /// Out: where the first page in the way is. In: 0.
    pub error_offset: u64,
    /// In: 0.
    pub reserved: [u64; 11],
}

/// A guest_memfd: memory of one VM, to show it by [`Vm::set_user_memory_region2`]. Dropping it is
/// to close it: its slots stay, and show nothing any more.
///
/// [`Vm::set_user_memory_region2`]: super::Vm::set_user_memory_region2
pub struct GuestMemfd {
    pub(super) memory: Arc<Memory>,
    pub(super) id: VmId,
    pub(super) fd: u32,
    pub(super) can_mmap: bool,
    pub(super) vm: Arc<Shared>,
}

impl GuestMemfd {
    /// What stands for it where the kernel's interface has a descriptor.
    pub fn fd(&self) -> u32 {
        self.fd
    }

    /// The memory, for all that the kernel has no call for: pins, copies, contents that are owed.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What the memory calls its VM.
    pub fn vm(&self) -> VmId {
        self.id
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES2`: makes a range private or shared, all of it or nothing.
    ///
    /// # Errors
    /// `EINVAL` for a range that is empty, unaligned, overflowing or beyond the object, for
    /// attributes and flags that are unknown or exclude each other, and for words that have to be
    /// 0. `EOPNOTSUPP` for contents that can't be treated so. `EAGAIN` for a page that is pinned,
    /// referred to or held by another operation, `EHWPOISON` for one in quarantine, `ENOMEM`: the
    /// first such page is in `error_offset`.
    ///
    /// ```
    /// # use polder::{HostKind, Platform, kvm};
    /// # let vm = kvm::Vm::new(polder::Vm::Machine, HostKind::Machine, Platform::Plain);
    /// # let size = kvm::kvm_create_guest_memfd { size: 0x4000, ..Default::default() };
    /// # let memory = vm.create_guest_memfd(size)?;
    /// let mut beyond = kvm::kvm_memory_attributes2 { offset: 0x4000, size: 0x1000, ..Default::default() };
    /// let refused = memory.set_memory_attributes2(&mut beyond).unwrap_err();
    /// assert_eq!(refused.errno, polder::Errno::EINVAL);
    /// # Ok::<_, kvm::Failed>(())
    /// ```
    pub fn set_memory_attributes2(
        &self,
        attributes: &mut kvm_memory_attributes2,
    ) -> Result<(), Failed> {
        const CALL: &str = "KVM_SET_MEMORY_ATTRIBUTES2";
        let invalid = Failed::bad(CALL, Errno::EINVAL);
        let given = *attributes;
        if given.error_offset != 0 || given.reserved != [0; 11] {
            return Err(invalid);
        }
        let to = match given.attributes {
            0 => Visibility::Shared,
            KVM_MEMORY_ATTRIBUTE_PRIVATE => Visibility::Private,
            _ => return Err(invalid),
        };
        let contents = match given.flags {
            0 => Contents::Unspecified,
            KVM_SET_MEMORY_ATTRIBUTES2_ZERO => Contents::Zero,
            KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE => Contents::Preserve,
            _ => return Err(invalid),
        };
        let range = PageRange::from_bytes(given.offset, given.size).map_err(|_| invalid.clone())?;
        if range.end() > self.memory.pages().get() {
            return Err(invalid);
        }
        match self.memory.convert(range, to, contents, OnBusy::Wait) {
            Ok(_) => Ok(()),
            Err(why) => {
                let failed = Failed::of(CALL, why);
                if failed.errno == Errno::EINVAL || failed.errno == Errno::EOPNOTSUPP {
                    return Err(failed);
                }
                let failed = failed.at(given.offset);
                attributes.error_offset = failed.error_offset.unwrap_or(given.offset);
                Err(failed)
            }
        }
    }

    /// `fallocate(2)`, by which holes are punched: contents go, visibility stays. A hole may reach
    /// past the end, where nothing is.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for another mode than [`FALLOC_FL_KEEP_SIZE`] and [`FALLOC_FL_PUNCH_HOLE`];
    /// `EINVAL` for a range that is empty, negative or unaligned; `EFBIG` for one that overflows;
    /// `EAGAIN` where a page is pinned (**ours**: the kernel takes the page from whom has it
    /// pinned).
    pub fn fallocate(&self, mode: u32, offset: i64, len: i64) -> Result<(), Failed> {
        const CALL: &str = "fallocate";
        if mode != FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE {
            return Err(Failed::bad(CALL, Errno::EOPNOTSUPP));
        }
        let invalid = Failed::bad(CALL, Errno::EINVAL);
        let offset = u64::try_from(offset).map_err(|_| invalid.clone())?;
        let len = u64::try_from(len).ok().filter(|&len| len > 0).ok_or(invalid.clone())?;
        let end = offset.checked_add(len).filter(|&end| i64::try_from(end).is_ok());
        let end = end.ok_or(Failed::bad(CALL, Errno::EFBIG))?;
        if !aligned(offset) || !aligned(len) {
            return Err(invalid);
        }
        let end = end.min(self.memory.pages().bytes().unwrap_or(end));
        let Some(len) = end.checked_sub(offset).filter(|&len| len > 0) else { return Ok(()) };
        let range = PageRange::from_bytes(offset, len).map_err(|_| invalid)?;
        self.memory.discard(range, OnBusy::Wait).map_err(|why| Failed::of(CALL, why).at(offset))
    }

    /// `mmap(2)` of all of it, shared: a touch of a private page raises SIGBUS.
    ///
    /// # Errors
    /// `ENODEV` unless it was made with `GUEST_MEMFD_FLAG_MMAP`.
    pub fn mmap(&self) -> Result<HostView<'_>, Failed> {
        match self.can_mmap {
            true => Ok(self.memory.host_view()),
            false => Err(Failed::bad("mmap", Errno::ENODEV)),
        }
    }
}

impl Drop for GuestMemfd {
    fn drop(&mut self) {
        self.vm.close(self.fd);
    }
}

impl fmt::Debug for GuestMemfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemfd").field("fd", &self.fd).finish_non_exhaustive()
    }
}
