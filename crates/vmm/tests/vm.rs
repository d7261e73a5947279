//! A guest on KVM that does what it is told.

use polder::units::{Gfn, GfnRange, PAGE_SIZE, PageRange};
use polder::{HostKind, Memory, MemoryFault, Slot};
use polder_require::{Facility, require};
use polder_vmm::scenario::{HostAccess, Op, Outcome, Pattern, Visibility};
use polder_vmm::{End, Failure, Supervision, Vm};

#[test]
fn ops_run_on_memory_that_somebody_else_made() {
    for host in HostKind::ALL {
        let Some(vm) = require(Facility::Kvm, Vm::new(host)) else { continue };
        let pages = PageRange::between(0, 8).unwrap();
        let memory = Memory::builder(pages.count()).host(host).build().unwrap();
        let id = vm.attach(&memory).unwrap();
        let gfn = Vm::RAM.gfn();
        memory.bind(id, Slot(0), gfn, pages).unwrap();

        let gpa = gfn.gpa();
        let pattern = Pattern::Seeded { seed: 5 };
        let len = 2 * PAGE_SIZE;
        let program = vec![
            Op::Fill { gpa, len, pattern },
            Op::Probe { gpa, pages: 2, expect: HostAccess::Denied },
            Op::Convert { gpa, pages: 1, to: Visibility::Shared, expect: Outcome::Done },
            Op::Probe { gpa, pages: 1, expect: HostAccess::Readable },
            Op::Check { gpa, len, pattern },
            Op::Load { gpa: Gfn::new(0x1000).unwrap().gpa(), expect: u64::MAX },
            Op::Done,
        ];
        let run = |program: &Vec<Op>| {
            vm.run((&memory, id), std::slice::from_ref(program), |_| Supervision::GoOn).unwrap()
        };
        let ended = run(&program);
        assert_eq!((ended.end, ended.checks_passed), (End::Ok, 5));
        let beyond = GfnRange::one(Gfn::new(0x1000).unwrap());
        assert_eq!(ended.faults, [MemoryFault::Unbound(beyond)]);

        // The second guest of one VM finds what the first left.
        let wrong = Pattern::Seeded { seed: 6 };
        let ended =
            run(&vec![Op::Check { gpa, len, pattern }, Op::Check { gpa, len, pattern: wrong }]);
        assert!(matches!(
            ended.end,
            End::Failed(Failure::Check { op: 1, gpa: at, .. }) if at == gpa
        ));
    }
}
