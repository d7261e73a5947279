//! `include/uapi/linux/userfaultfd.h`. The structures are of `linux-raw-sys`; the ioctls' numbers
//! are macros in the header, and so not there.

use linux_raw_sys::general as sys;
pub(crate) use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM,
    UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_POISON,
    UFFD_USER_MODE_ONLY, UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING, uffdio_api,
    uffdio_continue, uffdio_copy, uffdio_poison, uffdio_range, uffdio_register,
};
use rustix::ioctl::{Opcode, opcode};

const UFFDIO: u8 = 0xAA;

#[expect(clippy::cast_possible_truncation, reason = "an ioctl's number is one byte")]
const fn number(header: u32) -> u8 {
    header as u8
}

pub(crate) const UFFDIO_API: Opcode =
    opcode::read_write::<uffdio_api>(UFFDIO, number(sys::_UFFDIO_API));
pub(crate) const UFFDIO_REGISTER: Opcode =
    opcode::read_write::<uffdio_register>(UFFDIO, number(sys::_UFFDIO_REGISTER));
pub(crate) const UFFDIO_UNREGISTER: Opcode =
    opcode::read::<uffdio_range>(UFFDIO, number(sys::_UFFDIO_UNREGISTER));
pub(crate) const UFFDIO_WAKE: Opcode =
    opcode::read::<uffdio_range>(UFFDIO, number(sys::_UFFDIO_WAKE));
pub(crate) const UFFDIO_COPY: Opcode =
    opcode::read_write::<uffdio_copy>(UFFDIO, number(sys::_UFFDIO_COPY));
pub(crate) const UFFDIO_CONTINUE: Opcode =
    opcode::read_write::<uffdio_continue>(UFFDIO, number(sys::_UFFDIO_CONTINUE));
pub(crate) const UFFDIO_POISON: Opcode =
    opcode::read_write::<uffdio_poison>(UFFDIO, number(sys::_UFFDIO_POISON));
/// Of `/dev/userfaultfd`: a new userfaultfd.
pub(crate) const USERFAULTFD_IOC_NEW: Opcode = opcode::none(UFFDIO, 0);

/// The size of `struct uffd_msg`, what a read returns for each event.
pub(crate) const UFFD_MSG_SIZE: usize = size_of::<sys::uffd_msg>();
/// Where `event` stands in it.
pub(crate) const UFFD_MSG_EVENT: usize = core::mem::offset_of!(sys::uffd_msg, event);
/// Where `arg` stands in it; `arg.pagefault` is `{ flags: u64, address: u64, .. }`.
pub(crate) const UFFD_MSG_ARG: usize = core::mem::offset_of!(sys::uffd_msg, arg);

/// The features, by the names that they have after `UFFD_FEATURE_`.
pub(crate) const FEATURES: [(&str, u32); 17] = [
    ("PAGEFAULT_FLAG_WP", sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP),
    ("EVENT_FORK", sys::UFFD_FEATURE_EVENT_FORK),
    ("EVENT_REMAP", sys::UFFD_FEATURE_EVENT_REMAP),
    ("EVENT_REMOVE", sys::UFFD_FEATURE_EVENT_REMOVE),
    ("MISSING_HUGETLBFS", sys::UFFD_FEATURE_MISSING_HUGETLBFS),
    ("MISSING_SHMEM", sys::UFFD_FEATURE_MISSING_SHMEM),
    ("EVENT_UNMAP", sys::UFFD_FEATURE_EVENT_UNMAP),
    ("SIGBUS", sys::UFFD_FEATURE_SIGBUS),
    ("THREAD_ID", sys::UFFD_FEATURE_THREAD_ID),
    ("MINOR_HUGETLBFS", sys::UFFD_FEATURE_MINOR_HUGETLBFS),
    ("MINOR_SHMEM", sys::UFFD_FEATURE_MINOR_SHMEM),
    ("EXACT_ADDRESS", sys::UFFD_FEATURE_EXACT_ADDRESS),
    ("WP_HUGETLBFS_SHMEM", sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM),
    ("WP_UNPOPULATED", sys::UFFD_FEATURE_WP_UNPOPULATED),
    ("POISON", sys::UFFD_FEATURE_POISON),
    ("WP_ASYNC", sys::UFFD_FEATURE_WP_ASYNC),
    ("MOVE", sys::UFFD_FEATURE_MOVE),
];
