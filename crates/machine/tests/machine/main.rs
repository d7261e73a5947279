//! What the machine does, a sentence a test.

#![expect(clippy::unwrap_used, reason = "a test")]

mod dirty;
mod guest;
mod gup;
mod host;
#[path = "../numbers/mod.rs"]
mod numbers;
mod object;
mod planted;
mod pool;

use numbers::{OWNER, geometry, gfns, page, pages, vpns};
use polder_machine::{Config, Machine, ObjectId, ProcessId, Thread, VcpuId, View, VmId, Vpn};
use polder_units::{Gfn, Gpa, Level, PageCount, Pfn};

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

fn vpn(number: u32) -> Vpn {
    Vpn::from(number)
}

fn gpa(gfn: u32) -> Gpa {
    Gfn::from(gfn).gpa()
}
