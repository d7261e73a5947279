//! VMSA pages: made by the guest, in use while they run.

use polder_machine::{AccessCheck, AccessFault, Discrepancy, Error, RmpFail, RmpSize, RmpUpdate};
use polder_units::Level;

use crate::{LARGE, Rig, SMALL, asid, gfn, pfn, refused, small};

/// A guest with validated 4K pages at gfns 0 to 3.
fn rig() -> Rig {
    let mut rig = Rig::new();
    for at in 0..4 {
        rig.machine.rmpupdate(pfn(at), small(at)).unwrap();
        rig.map(at, Level::Size4K);
        rig.pvalidate(at, SMALL).unwrap().unwrap();
    }
    rig
}

fn rmpadjust(rig: &mut Rig, at: u32, size: RmpSize, vmsa: bool) {
    let mut vcpu = rig.machine.vcpu(rig.vcpus[0]).unwrap();
    vcpu.rmpadjust(gfn(at), size, vmsa).unwrap().unwrap();
}

fn vmrun(rig: &mut Rig, vcpu: usize, at: u32) -> Option<AccessCheck> {
    match rig.machine.vmrun(rig.vcpus[vcpu], pfn(at)) {
        Ok(()) => None,
        Err(Error::Refused(refused)) => Some(refused.check),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_page_is_a_vmsa_when_its_guest_says_so() {
    let mut rig = rig();
    assert_eq!(vmrun(&mut rig, 0, 1), Some(AccessCheck::Vmsa));
    rmpadjust(&mut rig, 1, SMALL, true);
    assert!(rig.machine.rmp_entry(pfn(1)).unwrap().vmsa);
    assert_eq!(vmrun(&mut rig, 0, 1), None);
    rig.machine.vmexit(rig.vcpus[0]);
    rmpadjust(&mut rig, 1, SMALL, false);
    let Err(Error::Refused(refused)) = rig.machine.vmrun(rig.vcpus[0], pfn(1)) else {
        panic!("it is none any more");
    };
    assert_eq!(refused.fault(), AccessFault::InvalidVmsa);
}

#[test]
fn rmpadjust_needs_a_validated_page() {
    let mut rig = rig();
    rig.machine.rmpupdate(pfn(1), RmpUpdate::shared(SMALL)).unwrap();
    rig.machine.rmpupdate(pfn(1), small(1)).unwrap();
    let mut vcpu = rig.machine.vcpu(rig.vcpus[0]).unwrap();
    let refused = refused(vcpu.rmpadjust(gfn(1), SMALL, true));
    assert_eq!(refused.fault(), AccessFault::NotValidated);
}

#[test]
fn vmrun_needs_a_mutable_page_of_this_guest() {
    let mut rig = rig();
    rmpadjust(&mut rig, 1, SMALL, true);
    let immutable = RmpUpdate { immutable: true, ..small(1) };
    rig.machine.rmpupdate(pfn(1), immutable).unwrap();
    assert_eq!(vmrun(&mut rig, 0, 1), Some(AccessCheck::Mutable), "the vmsa bit is kept");
    rig.machine.rmpupdate(pfn(2), RmpUpdate { asid: Some(asid(2)), ..small(2) }).unwrap();
    assert_eq!(vmrun(&mut rig, 0, 2), Some(AccessCheck::GuestOwned));
    assert_eq!(vmrun(&mut rig, 0, 9), Some(AccessCheck::GuestOwned));
    let plain = rig.machine.create_vm().unwrap();
    let vcpu = rig.machine.add_vcpu(plain).unwrap();
    assert_eq!(rig.machine.vmrun(vcpu, pfn(1)), Err(Error::NoSnp));
}

#[test]
fn a_running_vmsa_is_in_use_until_its_vcpu_exits() {
    let mut rig = rig();
    rmpadjust(&mut rig, 1, SMALL, true);
    rmpadjust(&mut rig, 2, SMALL, true);
    assert_eq!(vmrun(&mut rig, 0, 1), None);
    assert_eq!(vmrun(&mut rig, 1, 1), Some(AccessCheck::InUse), "by two at once");
    assert_eq!(vmrun(&mut rig, 0, 2), Some(AccessCheck::InUse), "the vcpu runs already");
    assert_eq!(vmrun(&mut rig, 1, 2), None);
    let shared = RmpUpdate::shared(SMALL);
    assert_eq!(rig.machine.rmpupdate(pfn(1), shared), Err(RmpFail::InUse));
    let mut vcpu = rig.machine.vcpu(rig.vcpus[0]).unwrap();
    assert_eq!(refused(vcpu.rmpadjust(gfn(1), SMALL, false)).check, AccessCheck::InUse);
    rig.machine.vmexit(rig.vcpus[0]);
    assert_eq!(rig.machine.rmpupdate(pfn(1), shared), Ok(()));
    assert_eq!(rig.machine.rmpupdate(pfn(2), shared), Err(RmpFail::InUse), "the other's");
    rig.machine.destroy_vm(rig.vm).unwrap();
    assert_eq!(rig.machine.rmpupdate(pfn(2), shared), Ok(()));
}

#[test]
fn a_vmsa_that_runs_at_a_2m_boundary_is_a_discrepancy() {
    let mut rig = rig();
    rmpadjust(&mut rig, 0, SMALL, true);
    rig.machine.audit().unwrap();
    assert_eq!(vmrun(&mut rig, 0, 0), None, "the processor does not refuse: the host has to");
    assert_eq!(rig.machine.audit(), Err(Discrepancy::AlignedVmsa { pfn: pfn(0) }));
    rig.machine.vmexit(rig.vcpus[0]);
    rig.machine.audit().unwrap();
}

#[test]
fn psmash_keeps_the_vmsa_bit_and_unsmash_refuses_it() {
    let mut rig = Rig::validated();
    rmpadjust(&mut rig, 0, LARGE, true);
    rig.machine.psmash(pfn(0)).unwrap();
    for at in 0..4 {
        assert!(rig.machine.rmp_entry(pfn(at)).unwrap().vmsa);
        let immutable = RmpUpdate { immutable: true, ..small(at) };
        rig.machine.rmpupdate(pfn(at), immutable).unwrap();
    }
    assert!(rig.machine.page_unsmash(pfn(0)).is_err());
}
