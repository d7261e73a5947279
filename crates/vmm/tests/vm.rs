//! A guest that does what it is told, on KVM and on the simulated machine.

use std::time::Duration;

use polder::units::{Gfn, GfnRange, Gpa, PAGE_SIZE, PageRange};
use polder::{HostKind, Memory, MemoryFault, OnBusy, PageSize, Slot, VmId};
use polder_require::{Facility, HugetlbPages, patience, require};
use polder_vmm::scenario::{HostAccess, Op, Outcome, Pattern, Visibility, WORD};
use polder_vmm::{End, Ended, Failure, Progress, Supervision, Vm};

fn a_vm(host: HostKind) -> Option<Vm> {
    let facility = match host {
        HostKind::Memfd | HostKind::Machine => Facility::Kvm,
        HostKind::GuestMemfd => Facility::PrivateMemory,
    };
    require(facility, Vm::new(host))
}

#[test]
fn ops_run_on_memory_that_somebody_else_made() {
    for host in HostKind::ALL {
        let Some(vm) = a_vm(host) else { continue };
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
            match host.is_in_place() {
                true => Op::Check { gpa, len, pattern },
                false => Op::Check { gpa, len: PAGE_SIZE, pattern: Pattern::Zero },
            },
            Op::Fill { gpa, len, pattern },
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

#[test]
fn huge_pages_are_mapped_by_4k_while_the_dirty_log_is_on_and_by_2m_before_and_after() {
    let Some(vm) = a_vm(HostKind::Memfd) else { return };
    let Some(_pages) = require(Facility::HugePages, HugetlbPages::of_2m(2)) else { return };
    let pages = PageRange::between(0, 1024).unwrap();
    let memory = Memory::builder(pages.count()).shared().page_size(PageSize::Huge2M);
    let memory = memory.build().unwrap();
    let id = vm.attach(&memory).unwrap();
    memory.bind(id, Slot(0), Vm::RAM.gfn(), pages).unwrap();
    let (len, pattern) = (1024 * PAGE_SIZE, Pattern::Seeded { seed: 9 });
    let program = vec![Op::Fill { gpa: Vm::RAM, len, pattern }, Op::Done];
    let count = |name| polder_linux::vm_count(vm.kvm().unwrap(), name).unwrap();
    // What KVM has mapped, by 2M and by 4K.
    let mapped = || {
        let ran = vm.run((&memory, id), std::slice::from_ref(&program), |_| Supervision::GoOn);
        assert_eq!(ran.unwrap().end, End::Ok);
        (count("pages_2m").unwrap(), count("pages_4k").unwrap())
    };
    let (huge, few) = mapped();
    assert!(huge >= 2 && few < 1024, "{huge} of 2M, {few} of 4K");
    memory.start_dirty_log().unwrap();
    let (none, many) = mapped();
    assert!(none <= huge - 2 && many >= 1024, "{none} of 2M, {many} of 4K while it is on");
    assert_eq!(memory.take_dirty_log().unwrap().count(), pages.count());
    memory.stop_dirty_log().unwrap();
    let (again, left) = mapped();
    assert!(again >= huge && left < 1024, "{again} of 2M, {left} of 4K after it");
    assert_eq!(count("no_such_count"), None);
}

#[test]
fn a_guest_times_its_reads_and_how_long_it_stood_still() {
    for host in HostKind::ALL {
        let Some(vm) = a_vm(host) else { continue };
        let pages = PageRange::between(0, 8).expect("a range");
        let memory = Memory::builder(pages.count()).shared().host(host).build().expect("memory");
        let id = vm.attach(&memory).expect("a VM of the host's");
        memory.bind(id, Slot(0), Vm::RAM.gfn(), pages).expect("a slot");
        let at = |bytes| Gpa::new(Vm::RAM.get() + bytes);
        // The log is in the last page, the flag in its last word.
        let (log, until) = (at(7 * PAGE_SIZE), at(8 * PAGE_SIZE - WORD));
        let words = |count: usize| {
            let mut bytes = vec![0; count * 8];
            memory.read(id, log, &mut bytes).expect("shared");
            let words = bytes.chunks_exact(8);
            words.map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect::<Vec<_>>()
        };
        let has_clock = host != HostKind::Machine;

        let run = |programs: &[Vec<Op>]| {
            let ended = vm.run((&memory, id), programs, |_| Supervision::GoOn).expect("it runs");
            assert_eq!(ended.end, End::Ok, "{host}");
        };
        run(&[vec![Op::Time { gpa: Vm::RAM, pages: 6, log }, Op::Done]]);
        let [times @ .., after] = &words(7)[..] else { unreachable!("7 words") };
        assert!(times.iter().all(|&ticks| (ticks > 0) == has_clock), "{host}: {times:?}");
        assert_eq!(*after, 0, "{host}: a word a page");

        let to = Visibility::Private;
        run(&[vec![Op::TimeConvert { gpa: Vm::RAM, pages: 1, to, log }, Op::Done]]);
        assert!((words(1)[0] > 0) == has_clock, "{host}");
        let facts = memory.facts(PageRange::one(0u32.into())).expect("a page");
        assert_eq!(facts[0].1.visibility, to, "{host}");

        memory.write(id, log, &[0; 16]).expect("shared");
        let still = Op::StandStill { gpa: Vm::RAM, pages: 6, log, until };
        // The other vCPU reads until the first word says that a pass is over, and ends it.
        let wait = Op::WaitFlag { gpa: log };
        run(&[vec![still, Op::Done], vec![wait, Op::SetFlag { gpa: until }, Op::Done]]);
        let [count, longest] = words(2)[..] else { unreachable!("2 words") };
        assert!(count > 0 && (longest > 0) == has_clock, "{host}: {count}, {longest}");
    }
}

#[test]
fn frames_that_the_guest_tried_before_they_were_bound_are_memory_once_they_are() {
    for host in HostKind::ALL {
        let Some(vm) = a_vm(host) else { continue };
        let pages = PageRange::between(0, 2).expect("a range");
        let memory = Memory::builder(pages.count()).host(host).build().expect("memory");
        let id = vm.attach(&memory).expect("a VM of the host's");
        let run = |op| {
            let mut left = 20 * patience(Duration::from_secs(2)).as_secs();
            let supervise = |_: Progress<'_>| {
                left = left.saturating_sub(1);
                if left == 0 { Supervision::TimeOut } else { Supervision::GoOn }
            };
            vm.run((&memory, id), &[vec![op, Op::Done]], supervise).expect("it runs").end
        };
        let load = |expect| Op::Load { gpa: Vm::RAM, expect };
        assert_eq!(run(load(u64::MAX)), End::Ok, "{host}");
        memory.bind(id, Slot(0), Vm::RAM.gfn(), pages).expect("a first slot");
        assert_eq!(run(load(0)), End::Ok, "{host}");
        memory.unbind(id, Slot(0)).expect("it is bound");
        assert_eq!(run(load(u64::MAX)), End::Ok, "{host}");
        memory.bind(id, Slot(0), Vm::RAM.gfn(), pages).expect("it was unbound");
        assert_eq!(run(load(0)), End::Ok, "{host}");
    }
}

/// Memory whose contents are owed, bound to a VM, on each host that can run a guest here and can
/// have that.
fn owed_memory(each: impl Fn(&Vm, &Memory, VmId)) {
    for host in HostKind::ALL.into_iter().filter(|host| host.is_in_place()) {
        let Some(vm) = a_vm(host) else { continue };
        let pages = PageRange::between(0, 8).expect("a range");
        let memory = Memory::builder(pages.count()).host(host).owed().build().expect("memory");
        let id = vm.attach(&memory).expect("a VM of the host's");
        memory.bind(id, Slot(0), Vm::RAM.gfn(), pages).expect("a first slot");
        each(&vm, &memory, id);
    }
}

/// Runs a guest that checks page 0, and does something else once the guest waits for it.
fn meanwhile(
    (vm, memory, id): (&Vm, &Memory, VmId),
    pattern: Pattern,
    then: impl FnOnce(),
) -> Ended {
    let check = Op::Check { gpa: Vm::RAM, len: PAGE_SIZE, pattern };
    std::thread::scope(|scope| {
        let guest = scope
            .spawn(move || vm.run((memory, id), &[vec![check, Op::Done]], |_| Supervision::GoOn));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!guest.is_finished(), "the page is owed: the guest waits");
        then();
        guest.join().expect("it doesn't panic").expect("the guest runs")
    })
}

#[test]
fn a_guest_waits_for_what_is_owed_and_sees_it_whole() {
    owed_memory(|vm, memory, id| {
        let pattern = Pattern::Seeded { seed: 9 };
        let words = (0..512).map(|word| Gpa::new(Vm::RAM.get() + 8 * word));
        let bytes: Vec<u8> = words.flat_map(|gpa| pattern.word(gpa).to_le_bytes()).collect();
        let pages = PageRange::between(0, 4).expect("a range");
        let ended = meanwhile((vm, memory, id), pattern, || {
            memory.populate(pages, &bytes).expect("the pages are owed");
        });
        assert_eq!((ended.end, ended.checks_passed), (End::Ok, 1));
    });
}

#[test]
fn a_guest_that_waits_sees_zeros_once_nothing_more_will_come() {
    owed_memory(|vm, memory, id| {
        let ended = meanwhile((vm, memory, id), Pattern::Zero, || memory.settle().expect("idle"));
        assert_eq!((ended.end, ended.checks_passed), (End::Ok, 1));
    });
}

#[test]
fn a_guest_that_waits_for_a_source_that_fails_stops_with_the_page_named() {
    owed_memory(|vm, memory, id| {
        let all = PageRange::between(0, 8).expect("a range");
        let ended = meanwhile((vm, memory, id), Pattern::Zero, || memory.fail(all).expect("owed"));
        let named = match ended.end {
            End::Failed(Failure::MemoryFailure { page, .. }) => page == Some(all.start()),
            End::Failed(Failure::MemoryFault { fault, .. }) => {
                fault == MemoryFault::SourceFailed(GfnRange::one(Vm::RAM.gfn()))
            }
            _ => false,
        };
        assert!(named, "{:?}", ended.end);
        // Who comes later is denied too, also once nothing else is owed.
        memory.settle().expect("idle");
        let check = Op::Check { gpa: Vm::RAM, len: 8, pattern: Pattern::Zero };
        let again = vm.run((memory, id), &[vec![check, Op::Done]], |_| Supervision::GoOn);
        assert!(matches!(again.expect("it runs").end, End::Failed(_)));
        // Discarded, the pages are zeros.
        memory.discard(all, OnBusy::Wait).expect("no pins");
        let again = vm.run((memory, id), &[vec![check, Op::Done]], |_| Supervision::GoOn);
        assert_eq!(again.expect("it runs").end, End::Ok);
    });
}
