//! Guests that convert, and the smallest hypervisor that serves them.

use polder_machine::{AccessCheck, Exit, Op, Ran, Request, RmpFail, RmpSize, RmpUpdate, Side};
use polder_units::{GfnRange, Level};

use crate::{LARGE, Rig, SMALL, asid, gfn, gfns, large, pfn};

/// Answers what a vCPU stopped with; frame and guest frame have the same number in the rig.
fn serve(rig: &mut Rig, exit: Exit) {
    match exit {
        Exit::Fault(fault) => {
            let resolved = rig.machine.tdp_resolve(rig.vm, fault.gfn).unwrap();
            let entry = rig.machine.rmp_entry(resolved.pfn()).unwrap();
            let level = resolved.largest().min(entry.size.level());
            rig.machine.tdp_map(&resolved, level, true).unwrap();
        }
        Exit::Refused(refused) => {
            assert!(
                matches!(refused.check, AccessCheck::PageSize | AccessCheck::InstructionSize),
                "{refused}"
            );
            let block = u32::try_from(refused.pfn.get() & !3).unwrap();
            match rig.machine.psmash(pfn(block)) {
                Ok(()) | Err(RmpFail::BadAddress) => {}
                Err(other) => panic!("{other}"),
            }
            let range = gfns(u64::from(block), u64::from(block) + 4);
            rig.machine.tdp_zap(rig.vm, range).unwrap();
        }
        Exit::Request(Request::MapGpaRange { range, side }) => convert(rig, range, side),
        Exit::Halted => {}
        other => panic!("no program of these does this: {other}"),
    }
}

/// Stage 2 and TLBs first, then the RMP: by 2M where all of it is, by 4K elsewhere.
fn convert(rig: &mut Rig, range: GfnRange, side: Side) {
    rig.machine.tdp_zap(rig.vm, range).unwrap();
    let numbers = range.start().get()..range.end();
    let mut at = u32::try_from(numbers.start).unwrap();
    while u64::from(at) < numbers.end {
        let whole = at.is_multiple_of(4) && u64::from(at) + 4 <= numbers.end;
        let there = rig.machine.rmp_entry(pfn(at)).unwrap();
        let size = match side {
            Side::Shared if there.size == LARGE && !whole => {
                rig.machine.psmash(pfn(at & !3)).unwrap();
                SMALL
            }
            Side::Shared => there.size,
            Side::Private if whole => LARGE,
            Side::Private => SMALL,
        };
        let update = |size| match side {
            Side::Shared => RmpUpdate::shared(size),
            Side::Private => RmpUpdate::private(asid(1), gfn(at), size),
        };
        rig.machine.rmpupdate(pfn(at), update(size)).unwrap();
        at += if size == LARGE { 4 } else { 1 };
    }
}

/// Runs the programs a step of each in turn, and returns what each vCPU's steps came to.
fn run(rig: &mut Rig, programs: [&[Op]; 2]) -> [Vec<Ran>; 2] {
    for (vcpu, program) in rig.vcpus.into_iter().zip(programs) {
        rig.machine.load(vcpu, program.into()).unwrap();
    }
    let mut ran = [const { Vec::new() }; 2];
    let mut halted = [false; 2];
    for _ in 0..1000 {
        for who in 0..2 {
            match rig.machine.vcpu(rig.vcpus[who]).unwrap().step() {
                Ok(outcome) => ran[who].push(outcome),
                Err(Exit::Halted) => halted[who] = true,
                Err(exit) => serve(rig, exit),
            }
        }
        if halted == [true; 2] {
            return ran;
        }
    }
    panic!("a fault loop: {ran:?}");
}

fn ask(start: u64, end: u64, side: Side) -> Op {
    Op::Request(Request::MapGpaRange { range: gfns(start, end), side })
}

fn pvalidate(at: u32, size: RmpSize, validate: bool) -> Op {
    Op::Pvalidate { gfn: gfn(at), size, validate }
}

fn write(at: u32, side: Side, value: u64) -> Op {
    Op::Write { gpa: gfn(at).gpa(), side, value }
}

fn read(at: u32, side: Side) -> Op {
    Op::Read { gpa: gfn(at).gpa(), side }
}

#[test]
fn a_guest_shares_one_page_of_a_2m_page_and_takes_it_back() {
    let mut rig = Rig::new();
    let program = [
        ask(0, 4, Side::Private),
        pvalidate(0, LARGE, true),
        write(1, Side::Private, 7),
        write(2, Side::Private, 8),
        pvalidate(1, SMALL, false),
        ask(1, 2, Side::Shared),
        write(1, Side::Shared, 9),
        read(2, Side::Private),
        ask(1, 2, Side::Private),
        pvalidate(1, SMALL, true),
        write(1, Side::Private, 10),
        read(1, Side::Private),
    ];
    let [ran, _] = run(&mut rig, [&program, &[]]);
    let changed = Ran::Pvalidated(Ok(true));
    assert_eq!(
        ran,
        [
            changed,
            Ran::Wrote,
            Ran::Wrote,
            changed,
            Ran::Wrote,
            Ran::Read(8),
            changed,
            Ran::Wrote,
            Ran::Read(10),
        ]
    );
    assert_eq!(rig.machine.rmp_entry(pfn(1)).unwrap().size, SMALL, "nobody merged it");
    rig.machine.audit().unwrap();
}

#[test]
fn two_vcpus_convert_different_parts_of_a_2m_page() {
    let mut rig = Rig::new();
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    rig.map(0, Level::Size2M);
    rig.pvalidate(0, LARGE).unwrap().unwrap();
    (0..4).for_each(|at| rig.write(at, Side::Private, 5).unwrap());
    let program = |at: u32| {
        [
            pvalidate(at, SMALL, false),
            ask(at.into(), u64::from(at) + 1, Side::Shared),
            write(at, Side::Shared, 6),
            read(at ^ 1, Side::Private),
            read(at, Side::Shared),
        ]
    };
    let ran = run(&mut rig, [&program(0), &program(2)]);
    let expected = [Ran::Pvalidated(Ok(true)), Ran::Wrote, Ran::Read(5), Ran::Read(6)];
    assert_eq!(ran, [&expected, &expected].map(|it| it.to_vec()));
    assert_eq!([0, 2].map(|at| rig.host_word(at)), [6; 2]);
    rig.machine.audit().unwrap();
}

#[test]
fn a_guest_that_shares_without_asking_is_refused_and_may_be_asked_about() {
    let mut rig = Rig::validated();
    let exit = rig.write(1, Side::Shared, 7).unwrap_err();
    assert!(matches!(exit, Exit::Refused(it) if it.check == AccessCheck::HypervisorOwned));
    convert(&mut rig, gfns(1, 2), Side::Shared);
    rig.map(1, Level::Size4K);
    assert_eq!(rig.write(1, Side::Shared, 7), Ok(()));
}
