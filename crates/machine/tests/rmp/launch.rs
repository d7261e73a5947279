//! What the firmware takes before the guest begins.

use polder_machine::{FirmwareFail, RmpUpdate, Side};
use polder_units::Level;

use crate::{Rig, gfn, page, pfn, small};

#[test]
fn what_the_host_wrote_is_the_guests_after_a_launch_update_and_ciphertext_to_the_host() {
    let mut rig = Rig::new();
    let bytes = *b"kernel..";
    rig.machine.object_write(rig.object, page(1).offset(), &bytes).unwrap();
    assert_eq!(rig.machine.launch_update(pfn(1)), Err(FirmwareFail::PageState), "not assigned");
    rig.machine.rmpupdate(pfn(1), small(1)).unwrap();
    assert_eq!(rig.machine.launch_update(pfn(1)), Err(FirmwareFail::PageState), "not immutable");
    rig.machine.rmpupdate(pfn(1), RmpUpdate { immutable: true, ..small(1) }).unwrap();
    rig.machine.launch_update(pfn(1)).unwrap();
    assert_eq!(rig.machine.launch_update(pfn(1)), Err(FirmwareFail::PageState), "once");

    let resolved = rig.machine.tdp_resolve(rig.vm, gfn(1)).unwrap();
    rig.machine.tdp_map(&resolved, Level::Size4K, true).unwrap();
    let mut seen = [0; 8];
    let mut vcpu = rig.machine.vcpu(rig.vcpus[0]).unwrap();
    vcpu.read(gfn(1).gpa(), Side::Private, &mut seen).unwrap();
    assert_eq!(seen, bytes, "validated, and deciphered");
    rig.machine.object_read(rig.object, page(1).offset(), &mut seen).unwrap();
    assert_ne!(seen, bytes);
}
