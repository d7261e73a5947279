//! Every way in which the engine says no.

use core::fmt;

use polder_units::{Gfn, GfnRange, Level, PageCount, PageIndex, PageRange, RangeError};

use crate::{Activity, Contents, Holder, PinKind, Platform, Slot, Visibility, VmId};

/// A request that was refused; it changed nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the fields are what the messages say of them")]
pub enum Refusal {
    /// `EINVAL`: no range at all.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// `EINVAL`: the range reaches past the object's end.
    #[error("pages {range} reach beyond the object, which has {pages}")]
    Beyond { range: PageRange, pages: PageCount },
    /// `EINVAL`: no binding of the VM covers the guest frames.
    #[error("guest frames {gfns} are not all bound to memory")]
    Unbound { gfns: GfnRange },
    /// `ENOENT`: a prefault where no binding of the VM is.
    #[error("guest frame {gfn} lies in no slot; bind memory there first")]
    NoSlot { gfn: Gfn },
    /// `EAGAIN`: an operation holds the range. The same request may succeed once it has ended.
    #[error("pages {range} are held by a {by} of pages {held}; try again")]
    Busy { range: PageRange, by: Activity, held: PageRange },
    /// `EAGAIN`: somebody came first who waits for pages of the range. The same request may succeed
    /// once he has had his turn.
    #[error("pages {range} are awaited by somebody who came first, for pages {held}; try again")]
    Awaited { range: PageRange, held: PageRange },
    /// `EAGAIN`: somebody pinned a page. The same request may succeed once it is unpinned.
    #[error("page {page} is pinned ({kind}) by {holder}; try again once it is unpinned")]
    Pinned { page: PageIndex, kind: PinKind, holder: Holder },
    /// `EAGAIN`: somebody refers to a page whom the engine doesn't know.
    #[error("page {page} has {references} references that are not Polder's, {holder}; try again")]
    Referenced { page: PageIndex, references: u64, holder: Holder },
    /// `EACCES`: the host asked for a page that is the guest's alone.
    #[error("page {page} is private to the guest; it has to share the page first")]
    Private { page: PageIndex },
    /// `EAGAIN`: the page's contents have not arrived.
    #[error("the contents of page {page} are still owed; populate it first")]
    Owed { page: PageIndex },
    /// `EIO`: the page's contents were to come and did not.
    #[error("the contents of page {page} could not be brought; discard it to have zeros")]
    SourceFailed { page: PageIndex },
    /// `EEXIST`: a population of a page that is whole.
    #[error("page {page} is whole already; discard it before populating it again")]
    Whole { page: PageIndex },
    /// `EOPNOTSUPP`: a population of a page whose contents only the guest can write.
    #[error(
        "page {page} is private, and the host can't write private memory of {platform}; \
         share the page first, or have the guest copy what it needs"
    )]
    GuestFills { page: PageIndex, platform: Platform },
    /// `EPERM`: only the guest's own request changes whose a page is.
    #[error(
        "page {page} is the guest's to share and to take back under {platform}: a wish changes \
         nothing; note it with want, and have the guest ask"
    )]
    GuestDecides { page: PageIndex, platform: Platform },
    /// `EPERM`: bytes for a private page of a guest that has begun.
    #[error(
        "page {page} is private, and the guest has begun: preload before that, or have the guest \
         copy what it needs"
    )]
    Launched { page: PageIndex },
    /// `EEXIST`: bytes for a page that is shared.
    #[error("page {page} is shared; write to it instead")]
    NotPrivate { page: PageIndex },
    /// `EOPNOTSUPP`: a private page that nobody can move.
    #[error(
        "page {page} is private, and nobody can move private memory of {platform}; have the guest \
         share the page first"
    )]
    Unmovable { page: PageIndex, platform: Platform },
    /// `EINVAL`: a part of a folio was to be moved.
    #[error("page {page} is a part of a {level} folio: move all of it")]
    FolioPart { page: PageIndex, level: Level },
    /// `EINVAL`: pages that are no multiple of what a device is told at a time.
    #[error("pages {range} cut what a device maps at a time, {granule} pages; take whole ones")]
    Granule { range: PageRange, granule: PageCount },
    /// `EINVAL`: no device is attached under that id (any more).
    #[error("there is no such device")]
    NoSuchDevice,
    /// `EHWPOISON`: an operation on the page failed and could not be undone.
    #[error("page {page} is in quarantine: an operation on it failed and could not be undone")]
    Quarantined { page: PageIndex },
    /// `EOPNOTSUPP`: platform and host can't treat the contents as asked.
    #[error("a {platform} conversion to {to} can't {contents} the contents on this host")]
    Contents { contents: Contents, to: Visibility, platform: Platform },
    /// `EEXIST`: the slot is in use; unbind it first.
    #[error("slot {slot} is bound already; unbind it first")]
    SlotTaken { slot: Slot },
    /// `EINVAL`: the VM has no slot at all.
    #[error("vm {} has no slot; bind memory to it first", .vm.0)]
    NoSlots { vm: VmId },
    /// `EINVAL`: the VM has no such slot.
    #[error("slot {slot} is not bound")]
    NoSuchSlot { slot: Slot },
    /// `EEXIST`: another slot of the VM has some of the guest frames.
    #[error("guest frames {gfns} overlap those of slot {slot}")]
    GfnsTaken { gfns: GfnRange, slot: Slot },
    /// `EEXIST`: another slot of the VM has some of the pages.
    #[error("pages {range} overlap those of slot {slot}")]
    PagesTaken { range: PageRange, slot: Slot },
}

/// The error codes of [`Refusal::errno`] and of interfaces shaped like the kernel's, by Linux's
/// names and numbers (`include/uapi/asm-generic/errno-base.h`, `errno.h`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[expect(missing_docs, reason = "Linux's names")]
#[repr(i32)]
pub enum Errno {
    EPERM = 1,
    ENOENT = 2,
    EINTR = 4,
    EIO = 5,
    EBADF = 9,
    EAGAIN = 11,
    ENOMEM = 12,
    EACCES = 13,
    EFAULT = 14,
    EEXIST = 17,
    ENODEV = 19,
    EINVAL = 22,
    EFBIG = 27,
    EOPNOTSUPP = 95,
    EHWPOISON = 133,
}

impl Refusal {
    /// The error code that the kernel's interface has for it.
    pub const fn errno(&self) -> Errno {
        match self {
            Self::NoSlot { .. } => Errno::ENOENT,
            Self::GuestDecides { .. } | Self::Launched { .. } => Errno::EPERM,
            Self::NotPrivate { .. } => Errno::EEXIST,
            Self::Unmovable { .. } => Errno::EOPNOTSUPP,
            Self::FolioPart { .. } | Self::Granule { .. } | Self::NoSuchDevice => Errno::EINVAL,
            Self::Range(_) | Self::Beyond { .. } | Self::Unbound { .. } => Errno::EINVAL,
            Self::NoSuchSlot { .. } | Self::NoSlots { .. } => Errno::EINVAL,
            Self::Busy { .. } | Self::Awaited { .. } => Errno::EAGAIN,
            Self::Pinned { .. } => Errno::EAGAIN,
            Self::Referenced { .. } | Self::Owed { .. } => Errno::EAGAIN,
            Self::Private { .. } => Errno::EACCES,
            Self::SourceFailed { .. } => Errno::EIO,
            Self::Whole { .. } | Self::SlotTaken { .. } => Errno::EEXIST,
            Self::GfnsTaken { .. } | Self::PagesTaken { .. } => Errno::EEXIST,
            Self::Quarantined { .. } => Errno::EHWPOISON,
            Self::Contents { .. } | Self::GuestFills { .. } => Errno::EOPNOTSUPP,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
