//! Hosts: where the bytes live, and what cuts people off from them.

pub(crate) mod guest_memfd;
pub(crate) mod machine;
pub(crate) mod memfd;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::VmFd;
use polder_engine::{Response, Slot, Step, View, VmId};
use polder_units::{Gfn, Level, PageCount, PageIndex, PageRange};

use crate::Error;

/// Which host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum HostKind {
    /// A memfd with three views, on any KVM. Protects private pages against stray pointers and
    /// bugs of the VMM, not against a hostile VMM.
    Memfd,
    /// The kernel's guest_memfd for private pages, a memfd for shared ones: the kernel keeps
    /// private pages from the VMM. A conversion loses their contents. Takes a VM whose memory can
    /// be private (`KVM_X86_SW_PROTECTED_VM`), and so a KVM with TDP.
    GuestMemfd,
    /// The simulated machine ([`polder_machine`]): needs nothing of the machine it runs on.
    Machine,
}

impl HostKind {
    /// Every host.
    pub const ALL: [Self; 3] = [Self::Memfd, Self::GuestMemfd, Self::Machine];

    /// Whether private and shared pages are the same memory, so that a conversion can keep what is
    /// in them ([`Contents::Preserve`](crate::Contents::Preserve)).
    pub const fn is_in_place(self) -> bool {
        match self {
            Self::Memfd | Self::Machine => true,
            Self::GuestMemfd => false,
        }
    }
}

impl fmt::Display for HostKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Memfd => "memfd",
            Self::GuestMemfd => "guest_memfd",
            Self::Machine => "machine",
        })
    }
}

impl FromStr for HostKind {
    type Err = UnknownHost;

    fn from_str(text: &str) -> Result<Self, UnknownHost> {
        Self::ALL.into_iter().find(|host| host.to_string() == text).ok_or(UnknownHost)
    }
}

/// A text that names no host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("expected a host: memfd, guest_memfd or machine")]
pub struct UnknownHost;

/// A VM, as its host knows it.
#[derive(Clone, Debug)]
pub enum Vm {
    /// A VM of KVM's, for a host of real memory.
    Kvm(Arc<VmFd>),
    /// A new VM of the simulated machine.
    Machine,
}

impl From<Arc<VmFd>> for Vm {
    fn from(vm: Arc<VmFd>) -> Self {
        Self::Kvm(vm)
    }
}

/// What a host does for the driver. All of it can be called from several threads at once; that
/// nothing overlaps that may not is the engine's affair.
pub(crate) trait Host: Send + Sync {
    /// Takes a step of an operation.
    fn take(&self, step: Step) -> Result<(), Error>;

    /// Carries out an answer on pages of a view.
    fn answer(&self, view: View, response: Response, range: PageRange) -> Result<(), Error>;

    /// Lets whoever touches the pages touch again.
    fn wake(&self, view: View, range: PageRange);

    /// Adds the touches that wait to be answered; waits for one, for [`Host::nudge`], or until
    /// `at_most` has passed.
    fn touches(
        &self,
        into: &mut Vec<(View, PageIndex)>,
        at_most: Option<Duration>,
    ) -> Result<(), Error>;

    /// Makes a waiting [`Host::touches`] return.
    fn nudge(&self);

    /// Makes a VM known under this name.
    fn attach(&self, id: VmId, vm: Vm) -> Result<(), Error>;

    /// Shows the pages to a VM.
    fn bind(&self, vm: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error>;

    /// Takes a slot away, and the guest's mappings with it.
    fn unbind(&self, vm: VmId, slot: Slot);

    /// Maps the page of `level` around `gfn` for the guest, whose pages of the object are `range`.
    /// A host whose hypervisor maps by itself has nothing to do.
    fn map_guest(&self, vm: VmId, gfn: Gfn, level: Level, range: PageRange) -> Result<(), Error>;

    /// Stops watching the guest's touches: nothing is owed any more but `failed`, for good.
    fn settle(&self, failed: &[PageRange]) -> Result<(), Error>;

    /// Copies bytes of the object out, unchecked: the caller holds a claim on them.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error>;

    /// Copies bytes of the object in, unchecked: the caller holds a claim on them.
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error>;

    /// Reads through the host view, as a device model's pointer does. The bytes lie in the object.
    fn touch_read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error>;

    /// Writes through the host view.
    fn touch_write(&self, offset: u64, from: &[u8]) -> Result<(), Error>;

    /// Has the kernel read a file into the host view.
    fn touch_from(&self, file: BorrowedFd<'_>, offset: u64, count: usize) -> Result<usize, Error>;

    /// Where the host view is, if it is memory of this process.
    fn host_view(&self) -> Option<*mut u8>;

    /// The page at an address in the guest view, if that is memory of this process.
    fn guest_page(&self, address: usize) -> Option<PageIndex>;

    /// The runs of pages that take up memory.
    fn existing(&self) -> Result<Vec<PageRange>, Error>;

    /// How many pages of memory it takes up, on all sides.
    fn resident(&self) -> Result<PageCount, Error> {
        let pages = self.existing()?.iter().fold(0, |sum, run| sum + run.count().get());
        Ok(PageCount::new(pages).unwrap_or(PageCount::ZERO))
    }

    /// The simulated machine, on that host.
    fn machine(&self) -> Option<&machine::MachineHost> {
        None
    }
}
