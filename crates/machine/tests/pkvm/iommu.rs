//! Devices behind the IOMMU.

use polder_machine::{AccessCheck, AccessFault, Discrepancy, Error, IommuFault, PinKind, PkvmFail};

use crate::{Rig, gfn, gfns, pfn};

impl Rig {
    /// A long-term pin of page `at`, mapped for the device at the same number.
    fn map(&mut self, at: u32) -> polder_machine::PinId {
        let pin = self.pin(at, PinKind::LongTerm).unwrap();
        self.machine.iommu_map(self.domain, gfn(at), pin).unwrap();
        pin
    }
}

#[test]
fn a_device_reaches_what_its_domain_maps_and_faults_elsewhere() {
    let mut rig = Rig::new();
    rig.map(2);
    rig.device_write(2, 4).unwrap();
    assert_eq!(rig.host_read(2), Ok(4));
    let fault = IommuFault { domain: rig.domain, gfn: gfn(3), write: true };
    assert_eq!(rig.device_write(3, 4), Err(Error::Iommu(fault)));
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn an_access_of_two_pages_is_made_wholly_or_not_at_all() {
    let mut rig = Rig::new();
    rig.map(2);
    let domain = rig.domain;
    let across = polder_units::Gpa::new(3 * 4096 - 4);
    assert!(rig.machine.device_write(domain, across, &[9; 8]).is_err());
    assert_eq!(rig.host_read(2), Ok(0));
}

#[test]
fn nothing_is_mapped_over_what_is_there() {
    let mut rig = Rig::new();
    let pin = rig.map(2);
    let (domain, again) = (rig.domain, gfn(2));
    let mapped = rig.machine.iommu_map(domain, again, pin);
    assert_eq!(mapped, Err(Error::Exists { number: 2 }));
}

#[test]
fn the_iotlb_is_stale_until_it_is_flushed() {
    let mut rig = Rig::new();
    rig.map(2);
    rig.device_write(2, 4).unwrap();
    let domain = rig.domain;
    rig.machine.iommu_unmap(domain, gfns(2, 3)).unwrap();
    assert_eq!(rig.device_write(2, 5), Ok(()), "remembered");
    assert_eq!(rig.machine.audit(), Err(Discrepancy::Iotlb { domain, gfn: 2 }));
    rig.machine.flush_iotlb(domain, gfns(2, 3)).unwrap();
    assert!(matches!(rig.device_read(2), Err(Error::Iommu(_))));
}

#[test]
fn a_page_that_a_device_has_mapped_is_given_to_nobody() {
    let mut rig = Rig::new();
    let pin = rig.map(2);
    assert_eq!(rig.donate(2), Err(PkvmFail::Busy));
    assert_eq!(rig.machine.host_donate_hyp(pfn(2)), Err(PkvmFail::Busy));
    rig.donate(3).unwrap();
    rig.share(3).unwrap();
    let shared = rig.map(3);
    assert_eq!(rig.unshare(3), Err(PkvmFail::Busy), "the guest's own page, while DMA is mapped");
    let domain = rig.domain;
    rig.machine.iommu_unmap(domain, gfns(0, 8)).unwrap();
    rig.machine.flush_iotlb(domain, gfns(0, 8)).unwrap();
    rig.unshare(3).unwrap();
    for pin in [pin, shared] {
        rig.machine.unpin(pin).unwrap();
    }
    rig.donate(2).unwrap();
    assert_eq!(rig.machine.audit(), Ok(()));
}

#[test]
fn a_device_that_was_unmapped_and_not_flushed_loses_a_donated_page_all_the_same() {
    let mut rig = Rig::new();
    rig.map(2);
    rig.device_write(2, 4).unwrap();
    let domain = rig.domain;
    rig.machine.iommu_unmap(domain, gfns(2, 3)).unwrap();
    rig.donate(2).unwrap();
    assert!(matches!(rig.device_write(2, 5), Err(Error::Iommu(_))), "the hypervisor has flushed");
    assert_eq!(rig.guest_read(2), Ok(4));
}

#[test]
fn what_a_guest_has_is_mapped_for_no_device_of_the_hosts() {
    let mut rig = Rig::new();
    // Pinned plainly while the host could: nothing but the hypervisor stops the rest.
    let pin = rig.pin(2, PinKind::LongTerm).unwrap();
    rig.donate(2).unwrap();
    let mapped = rig.machine.iommu_map(rig.domain, gfn(2), pin);
    let Err(Error::Refused(refused)) = mapped else { panic!("{mapped:?}") };
    assert_eq!((refused.check, refused.fault()), (AccessCheck::Iommu, AccessFault::Iommu));
    let straight = rig.machine.dma_write(pin, 0, &[1]);
    assert!(matches!(straight, Err(Error::Refused(_))), "nor without a domain");
}

#[test]
fn the_audit_names_what_is_mapped_and_not_pinned() {
    let mut rig = Rig::new();
    let pin = rig.map(2);
    rig.machine.unpin(pin).unwrap();
    let wrong = Discrepancy::DmaUnpinned { domain: rig.domain, gfn: 2 };
    assert_eq!(rig.machine.audit(), Err(wrong));
}

#[test]
fn a_domain_that_goes_maps_nothing_any_more() {
    let mut rig = Rig::new();
    let pin = rig.map(2);
    rig.machine.destroy_domain(rig.domain).unwrap();
    rig.machine.unpin(pin).unwrap();
    rig.donate(2).unwrap();
    assert_eq!(rig.machine.audit(), Ok(()));
}
