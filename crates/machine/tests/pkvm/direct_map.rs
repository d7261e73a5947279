//! The kernel's direct map is one more mapping, of the kernel's alone.

use polder_machine::{AccessCheck, AccessFault, Discrepancy, Error};
use polder_units::{Level, PfnRange};

use crate::{Rig, page, pages, pfn};

#[test]
fn what_is_not_in_it_the_kernel_does_not_reach_and_processes_do() {
    let mut rig = Rig::new();
    rig.host_write(1, 3).unwrap();
    rig.machine.direct_map_remove(PfnRange::one(pfn(1))).unwrap();
    assert!(!rig.machine.is_in_direct_map(pfn(1)));
    let (object, at) = (rig.object, page(1).offset());
    for denied in [
        rig.machine.object_read(object, at, &mut [0]),
        rig.machine.object_write(object, at, &[1]),
        rig.machine.zero(object, pages(1, 2)),
    ] {
        let Err(Error::Refused(refused)) = denied else { panic!("{denied:?}") };
        assert_eq!((refused.check, refused.fault()), (AccessCheck::DirectMap, AccessFault::Oops));
    }
    assert_eq!(rig.host_read(1), Ok(3));
    rig.machine.direct_map_restore(PfnRange::one(pfn(1)));
    rig.machine.object_write(object, at, &[4; 8]).unwrap();
    assert_eq!(rig.host_read(1), Ok(4));
}

#[test]
fn what_is_freed_without_being_put_back_is_found_and_given_to_nobody() {
    let mut rig = Rig::new();
    rig.machine.direct_map_remove(PfnRange::one(pfn(1))).unwrap();
    rig.machine.punch(rig.object, pages(1, 2), None).unwrap();
    assert_eq!(rig.machine.audit(), Err(Discrepancy::FreeUnmapped { pfn: pfn(1) }));
    assert!(rig.machine.allocate(rig.object, page(1), Level::Size4K).is_err());
    let free = rig.machine.direct_map_remove(PfnRange::one(pfn(1)));
    assert_eq!(free, Err(Error::Free { pfn: pfn(1) }));
}
