//! Who reaches a frame, and the one check that hardware makes of it.
//!
//! Every access of the machine passes here when its translation is made: a host CPU's and a
//! vCPU's when their TLB is filled (what a TLB holds is not checked again, as on SNP: AMD APM
//! volume 2, section 15.36.10), a device's and the trusted view's at each access. The plain
//! machine lets everybody in. An RMP or pKVM's ownership map keeps its state in [`Protection`] and
//! decides in [`Protection::check`], and no path needs to be found again for it.

use polder_units::Pfn;

/// How a frame is reached.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Path {
    /// A host CPU: a process, the kernel, or the driver's trusted view.
    Host,
    /// A guest, as private memory (C-bit set, or a protected VM's own memory).
    GuestPrivate,
    /// A guest, as memory shared with the host.
    GuestShared,
    /// A device.
    Device,
}

/// An access that the hardware refused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
#[error("hardware refused the access to pfn {pfn}")]
pub struct Refused {
    /// How the frame was reached.
    pub path: Path,
    /// The frame.
    pub pfn: Pfn,
    /// Whether it was a write.
    pub write: bool,
}

/// The hardware that keeps private memory private; none yet.
#[derive(Clone, Hash)]
pub(crate) struct Protection;

impl Protection {
    /// Whether the access may be made.
    #[expect(clippy::unused_self, reason = "where RMP and pKVM state will be")]
    #[expect(clippy::unnecessary_wraps, reason = "a plain machine refuses nothing")]
    pub(crate) const fn check(&self, path: Path, pfn: Pfn, write: bool) -> Result<(), Refused> {
        let _ = Refused { path, pfn, write };
        Ok(())
    }
}
