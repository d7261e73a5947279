//! Hosts: where the bytes live, and what cuts people off from them.

pub(crate) mod memfd;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::VmFd;
use polder_engine::{Response, Slot, Step, View, VmId};
use polder_units::{Gfn, PageIndex, PageRange};

use crate::Error;

/// Which host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum HostKind {
    /// A memfd with three views, on any KVM. Protects private pages against stray pointers and
    /// bugs of the VMM, not against a hostile VMM.
    Memfd,
}

impl HostKind {
    /// Every host.
    pub const ALL: [Self; 1] = [Self::Memfd];
}

impl fmt::Display for HostKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Memfd => "memfd",
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
#[error("expected a host: memfd")]
pub struct UnknownHost;

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

    /// Shows the pages to a VM.
    fn bind(
        &self,
        vm: (VmId, &Arc<VmFd>),
        slot: Slot,
        gfn: Gfn,
        pages: PageRange,
    ) -> Result<(), Error>;

    /// Takes a slot away.
    fn unbind(&self, vm: VmId, slot: Slot);

    /// Stops watching the guest's touches: nothing is owed any more.
    fn settle(&self) -> Result<(), Error>;

    /// Copies bytes of the object out, unchecked: the caller holds a claim on them.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error>;

    /// Copies bytes of the object in, unchecked: the caller holds a claim on them.
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error>;

    /// The host view, where the host's memory can be mapped at all.
    fn host_view(&self) -> &polder_linux::View;

    /// The byte of the object at an address in the guest view.
    fn guest_offset(&self, address: usize) -> Option<u64>;

    /// The runs of pages that take up memory.
    fn existing(&self) -> Result<Vec<PageRange>, Error>;
}
