//! SEV-SNP on the machine, a clause a test.

#![expect(clippy::unwrap_used, reason = "a test")]

mod access;
mod contents;
mod conversion;
mod instructions;
mod large;
mod launch;
#[path = "../numbers/mod.rs"]
mod numbers;
mod oracle;
mod planted;
mod vmsa;

use numbers::{OWNER, geometry, gfns, page, pages, vpns};
use polder_machine::{
    AccessCheck, Asid, Config, Contents, Exit, Machine, ObjectId, ProcessId, Refused, RmpSize,
    RmpUpdate, Side, Thread, VcpuId, View, VmId, Vpn,
};
use polder_units::{Gfn, Level, PageCount, Pfn};

const SMALL: RmpSize = RmpSize::Size4K;
const LARGE: RmpSize = RmpSize::Size2M;
const FRAMES: u32 = 32;

fn asid(number: u16) -> Asid {
    Asid::new(number).unwrap()
}

fn pfn(number: u32) -> Pfn {
    Pfn::from(number)
}

fn gfn(number: u32) -> Gfn {
    Gfn::from(number)
}

/// A 4K entry for guest frame `at` of the rig's guest.
fn small(at: u32) -> RmpUpdate {
    RmpUpdate::private(asid(1), gfn(at), SMALL)
}

/// A 2M entry for guest frame `at` of the rig's guest.
fn large(at: u32) -> RmpUpdate {
    RmpUpdate::private(asid(1), gfn(at), LARGE)
}

/// A machine with SNP: an object of 8 pages, in two 2M folios at frames 0 and 4, seen by a guest of
/// ASID 1 with two vCPUs at gfn 0, and by a process at page 0, at up to 2M.
struct Rig {
    machine: Machine,
    object: ObjectId,
    process: ProcessId,
    thread: Thread,
    vm: VmId,
    vcpus: [VcpuId; 2],
}

impl Rig {
    fn new() -> Self {
        Self::with(Contents::Symbolic)
    }

    fn with(contents: Contents) -> Self {
        let config = Config { contents, ..Config::symbolic(FRAMES.into(), geometry()) };
        let mut machine = Machine::new(config).unwrap();
        machine.enable_snp();
        let object = machine.create_object(PageCount::from(8)).unwrap();
        for at in [0, 4] {
            assert_eq!(machine.allocate(object, page(at), Level::Size2M), Ok(pfn(at)));
        }
        let process = machine.create_process().unwrap();
        let view = View { largest: Level::Size2M, ..View::PLAIN };
        machine.mmap(process, vpns(0, 8), object, page(0), view).unwrap();
        let vm = machine.create_snp_vm(asid(1)).unwrap();
        machine.bind(vm, gfn(0), object, pages(0, 8)).unwrap();
        let vcpus = [(); 2].map(|()| machine.add_vcpu(vm).unwrap());
        let thread = Thread { process, index: 0 };
        Self { machine, object, process, thread, vm, vcpus }
    }

    /// With the first 2M page assigned and mapped at that level, and validated.
    fn validated() -> Self {
        let mut rig = Self::new();
        rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
        rig.map(0, Level::Size2M);
        assert_eq!(rig.pvalidate(0, LARGE), Ok(Ok(true)));
        rig
    }

    fn map(&mut self, at: u32, level: Level) {
        let resolved = self.machine.tdp_resolve(self.vm, gfn(at)).unwrap();
        self.machine.tdp_map(&resolved, level, true).unwrap();
    }

    fn pvalidate(
        &mut self,
        at: u32,
        size: RmpSize,
    ) -> Result<polder_machine::RmpResult<bool>, Exit> {
        self.machine.vcpu(self.vcpus[0]).unwrap().pvalidate(gfn(at), size, true)
    }

    fn read(&mut self, at: u32, side: Side) -> Result<u64, Exit> {
        self.machine.vcpu(self.vcpus[0]).unwrap().read_u64(gfn(at).gpa(), side)
    }

    fn write(&mut self, at: u32, side: Side, value: u64) -> Result<(), Exit> {
        self.machine.vcpu(self.vcpus[0]).unwrap().write_u64(gfn(at).gpa(), side, value)
    }

    /// What the driver's trusted view reads.
    fn host_word(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        self.machine.object_read(self.object, at << 12, &mut word).unwrap();
        u64::from_le_bytes(word)
    }

    fn host_write(&mut self, at: u32) -> Option<AccessCheck> {
        let written = self.machine.host_write(self.thread, Vpn::from(at).hva(), &[7; 8]);
        match written {
            Ok(()) => None,
            Err(polder_machine::HostExit::Refused(refused)) => Some(refused.check),
            Err(other) => panic!("{other}"),
        }
    }
}

/// The check that a guest's access did not pass.
fn refused<T: std::fmt::Debug>(outcome: Result<T, Exit>) -> Refused {
    match outcome {
        Err(Exit::Refused(refused)) => refused,
        other => panic!("{other:?}"),
    }
}

/// The names in docs/snp.md are promises.
#[test]
fn the_tests_that_the_document_names_exist() {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = std::fs::read_to_string(here.join("../../docs/snp.md")).unwrap();
    let modules = ["access", "contents", "conversion", "instructions", "large", "vmsa"];
    let own = modules.map(|module| format!("tests/rmp/{module}.rs"));
    let others = [
        "../engine/src/rmp.rs",
        "../engine/src/tests/rmp.rs",
        "../polder/src/driver/tests.rs",
        "../polder/src/driver/tests/snp.rs",
        "../polder/src/host/machine/rmp/tests.rs",
        "../polder/src/host/machine/rmp/merge.rs",
        "../polder/tests/prefault.rs",
    ];
    let files = own.iter().map(String::as_str).chain(others);
    let modules: Vec<_> =
        files.map(|file| std::fs::read_to_string(here.join(file)).unwrap()).collect();
    let names = document.split('`').filter(|it| it.matches('_').count() > 3 && !it.contains('('));
    let mut count = 0;
    for name in names {
        let exists = modules.iter().any(|module| module.contains(&format!("fn {name}(")));
        assert!(exists, "there is no test {name}");
        count += 1;
    }
    assert!(count > 10, "only {count} tests are named");
}
