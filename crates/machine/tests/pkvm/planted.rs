//! Bugs planted into the hypervisor are found.

use polder_machine::{Discrepancy, Plant};

use crate::{Rig, gfn, pfn};

#[test]
fn a_donation_left_half_way_is_found() {
    for nth in 1..3 {
        let mut rig = Rig::new();
        rig.machine.plant(Plant::HalfDonation, true);
        rig.machine.fail_hypervisor(Some(nth));
        rig.donate(1).unwrap_err();
        assert_eq!(rig.machine.audit(), Err(Discrepancy::Ownership { pfn: pfn(1) }), "{nth}");
    }
}

#[test]
fn a_donation_that_leaves_the_iommu_open_is_found() {
    let mut rig = Rig::new();
    rig.machine.plant(Plant::IommuForgotten, true);
    rig.donate(1).unwrap();
    assert_eq!(rig.machine.audit(), Err(Discrepancy::Ownership { pfn: pfn(1) }));
}

#[test]
fn a_host_tlb_that_is_not_flushed_is_found() {
    let mut rig = Rig::new();
    rig.machine.plant(Plant::SkipFlush, true);
    rig.host_write(1, 1).unwrap();
    rig.donate(1).unwrap();
    assert_eq!(rig.host_write(1, 2), Ok(()), "the bug");
    assert_eq!(rig.machine.audit(), Err(Discrepancy::StaleOwner { pfn: pfn(1) }));
}

#[test]
fn a_page_that_is_not_scrubbed_tells_the_guests_secret() {
    let mut rig = Rig::new();
    rig.machine.plant(Plant::NotScrubbed, true);
    rig.donate(1).unwrap();
    rig.guest_write(1, 5).unwrap();
    rig.machine.vcpu(rig.vcpu).unwrap().mem_relinquish(gfn(1)).unwrap().unwrap();
    let vm = rig.vm;
    rig.machine.answer_guest(vm, gfn(1)).unwrap();
    assert_eq!(rig.host_read(1), Ok(5), "the bug");
}
