//! What can't be had together, and what to do about it.

use polder_engine::{PageFacts, Platform, Population, Visibility};
use polder_units::Geometry;

use super::Builder;
use crate::source::Delivery;
use crate::{Error, HostKind, PageSize};

impl Builder {
    /// Refuses what no host here has.
    pub(super) fn check_offered(&self) -> Result<(), Error> {
        let what = match self.platform {
            Platform::Snp => Some("SEV-SNP is offered on the simulated machine only"),
            Platform::Pkvm => Some("pKVM is offered on the simulated machine only"),
            Platform::Plain | Platform::SwProtected => None,
        };
        if let (Some(what), HostKind::Memfd | HostKind::GuestMemfd) = (what, self.host) {
            let way_out = "use HostKind::Machine (--host machine), or another platform";
            return Err(Error::NotOffered { what, way_out });
        }
        if self.platform.guest_decides() && self.initial.visibility == Visibility::Shared {
            return Err(Error::NotOffered {
                what: "a protected VM's memory is its own at first: only the guest shares it",
                way_out: "leave the memory private (no Builder::shared), and have the guest share",
            });
        }
        let PageFacts { visibility, population } = self.initial;
        if !self.platform.host_fills_private()
            && visibility == Visibility::Private
            && population == Population::Owed
        {
            return Err(Error::NotOffered {
                what: "private pages that the guest alone can fill can't be owed: who touches \
                    one would wait for ever",
                way_out: "make the memory shared at first (Builder::shared), and have the guest \
                    take what it needs",
            });
        }
        if self.delivery == Delivery::Exits && !self.is_on_plain_machine() {
            return Err(Error::NotOffered {
                what: "touches that come as exits of the vCPU (KVM userfault) are for plain VMs of the \
                    simulated machine: no released kernel has them",
                way_out: "have them come as events (Delivery::Events), or use HostKind::Machine",
            });
        }
        if self.off_direct_map && !self.is_on_plain_machine() {
            return Err(Error::NotOffered {
                what: "memory off the kernel's direct map is for plain VMs of the simulated machine",
                way_out: "leave it in (no Builder::off_direct_map), or use HostKind::Machine",
            });
        }
        Ok(())
    }

    /// Whether the simulated machine has it, and nobody but the host owns its pages.
    fn is_on_plain_machine(&self) -> bool {
        let owned = self.platform.has_rmp() || self.platform.hypervisor_keeps_stage2();
        self.host == HostKind::Machine && !owned
    }

    /// The page size that can be had, or why none can.
    pub(super) fn offered_page_size(&self) -> Result<PageSize, Error> {
        let (host, page_size) = (self.host, self.page_size);
        if host == HostKind::GuestMemfd && page_size != PageSize::Small {
            return Err(Error::NotOffered {
                what: "the kernel's guest_memfd has pages of 4K only",
                way_out: "use PageSize::Small (--page-size 4k), or HostKind::Memfd (--host memfd)",
            });
        }
        if self.platform.hypervisor_keeps_stage2() && page_size != PageSize::Small {
            return Err(Error::NotOffered {
                what: "the simulated pKVM gives a guest pages of 4K",
                way_out: "use PageSize::Small (--page-size 4k), or another platform",
            });
        }
        if host == HostKind::Machine && page_size == PageSize::Thp {
            return Err(Error::NotOffered {
                what: "the simulated machine's huge pages are of a pool; it has no transparent ones",
                way_out: "use PageSize::Huge2M or Huge1G (--page-size 2m or 1g), or HostKind::Memfd \
                    (--host memfd)",
            });
        }
        if let Some(level) = page_size.reserved()
            && !self.pages.get().is_multiple_of(Geometry::X86_64.pages(level).get())
        {
            return Err(Error::Unaligned { pages: self.pages, level });
        }
        let thp = page_size == PageSize::Thp;
        Ok(if thp && !polder_linux::shmem_huge_pages() { PageSize::Small } else { page_size })
    }
}
