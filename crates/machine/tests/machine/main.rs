//! What the machine does, a sentence a test.

#![expect(clippy::unwrap_used, reason = "a test")]

mod guest;
mod gup;
mod host;
mod object;
mod planted;

use polder_machine::{
    Config, LockOwner, Machine, ObjectId, ProcessId, Thread, VcpuId, View, VmId, Vpn, VpnRange,
};
use polder_units::{Geometry, Gfn, GfnRange, Gpa, Level, PageCount, PageIndex, PageRange, Pfn};

const OWNER: LockOwner = LockOwner(1);

/// Two huge pages of four pages each make a 1G page here.
fn geometry() -> Geometry {
    Geometry::new(4, 2).unwrap()
}

/// A machine of 64 frames with an object of 16 pages, seen by one process at page 0 and by a VM
/// with two vCPUs at gfn 0.
struct Rig {
    machine: Machine,
    object: ObjectId,
    process: ProcessId,
    thread: Thread,
    vm: VmId,
    vcpus: [VcpuId; 2],
}

impl Rig {
    fn new(view: View) -> Self {
        let config = Config::symbolic(PageCount::from(64), geometry());
        let mut machine = Machine::new(config).unwrap();
        let object = machine.create_object(PageCount::from(16)).unwrap();
        let process = machine.create_process().unwrap();
        machine.mmap(process, vpns(0, 20), object, page(0), view).unwrap();
        let vm = machine.create_vm().unwrap();
        machine.bind(vm, Gfn::from(0), object, pages(0, 16)).unwrap();
        let vcpus = [(); 2].map(|()| machine.add_vcpu(vm).unwrap());
        let thread = Thread { process, index: 0 };
        Self { machine, object, process, thread, vm, vcpus }
    }

    /// With the first `Size2M` folio allocated, and its first frame.
    fn with_folio(view: View) -> (Self, Pfn) {
        let mut rig = Self::new(view);
        let pfn = rig.machine.allocate(rig.object, page(0), Level::Size2M).unwrap();
        (rig, pfn)
    }
}

#[test]
fn a_machine_can_be_cloned_hashed_and_put_behind_a_mutex() {
    fn can<T: Clone + std::hash::Hash + std::fmt::Debug + Send + Sync>() {}
    can::<Machine>();
}

fn page(number: u32) -> PageIndex {
    PageIndex::from(number)
}

fn vpn(number: u32) -> Vpn {
    Vpn::from(number)
}

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

fn vpns(start: u64, end: u64) -> VpnRange {
    VpnRange::between(start, end).unwrap()
}

fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange::between(start, end).unwrap()
}

fn gpa(gfn: u32) -> Gpa {
    Gfn::from(gfn).gpa()
}
