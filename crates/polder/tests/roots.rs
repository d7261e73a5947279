//! Prefault by each root of the simulated machine: what the behaviour table can't bring about,
//! whose guests have all of memory mapped.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::atomic::{AtomicBool, Ordering};

use polder::machine::{Error as Machine, Intercept, L2, Pte, Root};
use polder::units::{
    AddressSpace, FrameRange, Gfn, GfnRange, Gpa, GuestPage, L2Gfn, Lpn, PAGE_SIZE, PageCount,
    PageRange,
};
use polder::{
    Contents, Errno, Error, GuestExit, HostKind, MachineVcpu, Memory, OnBusy, Prefaulted, Refusal,
    Slot, Visibility, Vm, VmId,
};

const PAGES: u64 = 64;
/// The tables are the last pages: the top, three below it.
const TOP: u64 = 60;

struct Rig {
    memory: Memory,
    vm: VmId,
    vcpu: MachineVcpu,
}

fn range<P: GuestPage>(start: u64, end: u64) -> FrameRange<P> {
    FrameRange::between(start, end).unwrap()
}

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

fn gfn(number: u64) -> Gfn {
    Gfn::new(number).unwrap()
}

impl Rig {
    /// Pages 0 to 31 of the space show frames 0 to 31; the others, nothing.
    fn new(vm: Vm) -> Self {
        let memory = Memory::builder(PageCount::new(PAGES).unwrap()).host(HostKind::Machine);
        let memory = memory.build().unwrap();
        let vm = memory.attach(vm).unwrap();
        memory.bind(vm, Slot(0), gfn(0), pages(0, PAGES)).unwrap();
        let vcpu = memory.machine_vcpu(vm).unwrap();
        let rig = Self { memory, vm, vcpu };
        for table in 0..3 {
            rig.pte(TOP + table, 0, TOP + table + 1, Pte::ALL);
        }
        for page in 0..32 {
            rig.pte(TOP + 3, page, page, Pte::ALL);
        }
        rig
    }

    fn shadow() -> Self {
        let rig = Self::new(Vm::MachineWithoutTdp);
        rig.vcpu.carry_out(Intercept::Cr3(Some(gfn(TOP)))).unwrap();
        rig
    }

    fn nested() -> Self {
        let rig = Self::new(Vm::Machine);
        rig.run_l2(Some(gfn(TOP)));
        rig
    }

    fn run_l2(&self, ncr3: Option<Gfn>) {
        self.vcpu.carry_out(Intercept::Vmrun(L2 { ncr3, cr3: None })).unwrap();
    }

    /// Writes an entry as a guest on another vCPU would, by guest frames.
    fn pte(&self, table: u64, index: u64, to: u64, bits: u64) {
        let vcpu = self.memory.machine_vcpu(self.vm).unwrap();
        let entry = Pte::new(gfn(to), bits).0.to_le_bytes();
        let at = Gpa::new(table * PAGE_SIZE + index * 8);
        vcpu.write(at, Visibility::Private, &entry).unwrap();
    }

    fn prefault<P: GuestPage>(&self, start: u64, end: u64) -> Result<Prefaulted<P>, Error> {
        self.memory.prefault(self.vm, &self.vcpu, range(start, end))
    }

    /// The pages of the space that the vCPU's root has mapped, and those that it calls accessed.
    fn mapped(&self) -> (Vec<u64>, Vec<u64>) {
        let vm = self.memory.simulated_vm(self.vm).unwrap();
        let vcpu = polder::machine::VcpuId { vm, index: 0 };
        let mut found = (Vec::new(), Vec::new());
        self.memory
            .simulated(|machine, _, _| {
                // Not those of the tables.
                for page in 0..TOP {
                    if let Some(spte) = machine.mapped(vcpu, page).unwrap() {
                        found.0.push(page);
                        found.1.extend(spte.accessed.then_some(page));
                    }
                }
                machine.audit().unwrap();
            })
            .unwrap();
        found
    }

    fn read(&self, page: u64) -> Result<u64, GuestExit> {
        let mut word = [0; 8];
        let at = Gpa::new(page * PAGE_SIZE);
        self.vcpu.read(at, Visibility::Private, &mut word).map(|()| u64::from_le_bytes(word))
    }

    fn write(&self, page: u64, value: u64) {
        let at = Gpa::new(page * PAGE_SIZE);
        self.vcpu.write(at, Visibility::Private, &value.to_le_bytes()).unwrap();
    }
}

fn whole<P: GuestPage>(start: u64, end: u64, skipped: u32) -> Result<Prefaulted<P>, Error> {
    let skipped = PageCount::from(skipped);
    Ok(Prefaulted { done: range(start, end), skipped, left: None })
}

#[test]
fn each_root_has_pages_of_its_own_space_mapped_ahead_and_calls_none_accessed() {
    fn check<P: GuestPage>(rig: &Rig) {
        assert_eq!(rig.vcpu.root().space(), P::SPACE);
        assert_eq!(rig.prefault::<P>(3, 20), whole(3, 20, 0));
        assert_eq!(rig.mapped(), ((3..20).collect(), vec![]));
        let faults = rig.memory.statistics().guest_faults;
        assert_eq!(rig.read(3), Ok(0));
        rig.write(19, 7);
        assert_eq!(rig.memory.statistics().guest_faults, faults);
        assert_eq!(rig.mapped().1, [3, 19]);
    }
    check::<Gfn>(&Rig::new(Vm::Machine));
    check::<Gfn>(&Rig::new(Vm::MachineWithoutTdp));
    check::<Lpn>(&Rig::shadow());
    check::<L2Gfn>(&Rig::nested());
    // L1 uses shadow paging for L2: what serves L2 is TDP, and nobody asks whether it runs.
    let rig = Rig::new(Vm::Machine);
    rig.run_l2(None);
    assert_eq!(rig.vcpu.root(), Root::Tdp);
    check::<Gfn>(&rig);
}

#[test]
fn another_space_than_the_roots_is_refused_by_the_roots_name() {
    let rig = Rig::shadow();
    let refused = rig.prefault::<Gfn>(0, 4).unwrap_err();
    assert_eq!(refused.errno(), Errno::EOPNOTSUPP);
    assert!(refused.to_string().contains("shadow of cr3 0x3c"), "{refused}");
    assert!(refused.way_out().is_some_and(|way| way.contains("prefault_reverse")));
    assert_eq!(rig.prefault::<L2Gfn>(0, 4).unwrap_err().errno(), Errno::EOPNOTSUPP);
    let rig = Rig::new(Vm::Machine);
    let root = "tdp".to_owned();
    let (asked, translates) = (AddressSpace::Linear, AddressSpace::Gpa);
    assert_eq!(rig.prefault::<Lpn>(0, 4), Err(Error::OtherRoot { asked, root, translates }));
    assert_eq!(rig.memory.existing().unwrap().len(), 1, "the tables alone");
}

#[test]
fn what_the_guests_tables_do_not_map_is_left_out_and_counted() {
    for rig in [Rig::shadow(), Rig::nested()] {
        rig.pte(TOP + 3, 5, 5, 0);
        // Written to once, or so its tables say, and never used.
        rig.pte(TOP + 3, 6, 6, Pte::PRESENT | Pte::USER | Pte::WRITABLE);
        let came = match rig.vcpu.root().space() {
            AddressSpace::Linear => {
                rig.prefault::<Lpn>(2, 40).map(|it| (it.skipped, it.left.is_some()))
            }
            _ => rig.prefault::<L2Gfn>(2, 40).map(|it| (it.skipped, it.left.is_some())),
        };
        // Of 32 to 39 there are no entries.
        assert_eq!(came, Ok((PageCount::from(10), false)));
        let mapped = (2..32).filter(|page| ![5, 6].contains(page)).collect::<Vec<_>>();
        assert_eq!(rig.mapped().0, mapped);
        assert!(matches!(rig.read(5), Err(GuestExit::PageFault(_))));
        assert_eq!(rig.read(6), Ok(0));
    }
    // All of it is nowhere: pointless, and no failure.
    let rig = Rig::shadow();
    assert_eq!(rig.prefault::<Lpn>(32, 48), whole(32, 48, 16));
    let high: FrameRange<Lpn> = FrameRange::between(1 << 40, (1 << 40) + 3).unwrap();
    let came = rig.memory.prefault(rig.vm, &rig.vcpu, high).unwrap();
    assert_eq!(came.skipped, PageCount::from(3), "not even canonical");
}

#[test]
fn a_frame_in_no_slot_ends_it_whatever_the_root() {
    let rig = Rig::shadow();
    rig.pte(TOP + 3, 9, 700, Pte::ALL);
    let came = rig.prefault::<Lpn>(4, 16).unwrap();
    assert_eq!((came.done, came.left), (range(4, 9), Some(range(9, 16))));
    let refused = rig.prefault::<Lpn>(9, 16).unwrap_err();
    assert_eq!(refused, Refusal::NoSlot { gfn: gfn(700) }.into());
    assert_eq!(refused.errno(), Errno::ENOENT);
}

#[test]
fn a_table_whose_contents_are_owed_ends_it_and_one_without_memory_is_brought_in() {
    let builder = Memory::builder(PageCount::new(PAGES).unwrap()).host(HostKind::Machine);
    let memory = builder.owed().build().unwrap();
    let vm = memory.attach(Vm::MachineWithoutTdp).unwrap();
    memory.bind(vm, Slot(0), gfn(0), pages(0, PAGES)).unwrap();
    let vcpu = memory.machine_vcpu(vm).unwrap();
    vcpu.carry_out(Intercept::Cr3(Some(gfn(TOP)))).unwrap();
    let owed = |page: u64| Err(Refusal::Owed { page: pages(page, page + 1).start() }.into());
    let ask = || memory.prefault(vm, &vcpu, range::<Lpn>(0, 2)).map(|came| came.skipped);
    assert_eq!(ask(), owed(TOP));
    memory
        .populate(pages(TOP, TOP + 1), &Pte::new(gfn(TOP + 1), Pte::ALL).0.to_le_bytes())
        .unwrap();
    assert_eq!(ask(), owed(TOP + 1));
    // It is zeros, and nobody has touched it.
    memory.discard(pages(TOP + 1, TOP + 2), OnBusy::Wait).unwrap();
    assert_eq!(ask(), Ok(PageCount::from(2)));
}

#[test]
fn in_reverse_frames_are_mapped_wherever_the_tables_show_them() {
    let rig = Rig::shadow();
    // Frames 8 and 9 show again, at pages 40 and 41; frame 33 nowhere.
    rig.pte(TOP + 3, 40, 8, Pte::ALL);
    rig.pte(TOP + 3, 41, 9, Pte::ALL);
    let reverse = |start, end| rig.memory.prefault_reverse(rig.vm, &rig.vcpu, range(start, end));
    assert_eq!(reverse(7, 10), whole(7, 10, 0));
    assert_eq!(rig.mapped().0, [7, 8, 9, 40, 41]);
    assert_eq!(reverse(30, 36), whole(30, 36, 4));
    assert_eq!(rig.mapped().0, [7, 8, 9, 30, 31, 40, 41]);
    // By the direct root it is what a prefault is.
    let rig = Rig::new(Vm::Machine);
    let came = rig.memory.prefault_reverse(rig.vm, &rig.vcpu, range(7, 10));
    assert_eq!(came, whole(7, 10, 0));
    // Tables that lead to each other have no end.
    let rig = Rig::shadow();
    for index in 0..512 {
        rig.pte(TOP, index, TOP, Pte::ALL);
    }
    let came = rig.memory.prefault_reverse(rig.vm, &rig.vcpu, range(0, 1));
    assert!(matches!(came, Err(Error::NotOffered { .. })), "{came:?}");
}

#[test]
fn a_guest_that_changes_its_tables_and_roots_meanwhile_loses_nothing() {
    for rig in [Rig::shadow(), Rig::nested()] {
        let stop = AtomicBool::new(false);
        let other = rig.memory.machine_vcpu(rig.vm).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut round = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    // Page 4 shows frame 4 or 5, or nothing; and frame 12 goes and comes back.
                    let bits = if round.is_multiple_of(3) { 0 } else { Pte::ALL };
                    let entry = Pte::new(gfn(4 + round % 2), bits).0.to_le_bytes();
                    let at = Gpa::new((TOP + 3) * PAGE_SIZE + 4 * 8);
                    other.write(at, Visibility::Private, &entry).unwrap();
                    rig.memory.discard(pages(12, 13), OnBusy::Wait).unwrap();
                    let to = if round.is_multiple_of(2) {
                        Visibility::Shared
                    } else {
                        Visibility::Private
                    };
                    let contents = Contents::Preserve;
                    rig.memory.convert(pages(16, 24), to, contents, OnBusy::Wait).unwrap();
                    round += 1;
                }
            });
            for _ in 0..300 {
                let left = match rig.vcpu.root().space() {
                    AddressSpace::Linear => rig.prefault::<Lpn>(0, 32).map(|it| it.left.is_none()),
                    _ => rig.prefault::<L2Gfn>(0, 32).map(|it| it.left.is_none()),
                };
                assert_eq!(left, Ok(true));
                for page in [3, 12, 31] {
                    assert_eq!(rig.read(page), Ok(0));
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        rig.mapped();
    }
}

#[test]
fn an_snp_guests_tables_are_not_shadowed() {
    let builder = Memory::builder(PageCount::from(8)).host(HostKind::Machine);
    let memory = builder.platform(polder::Platform::Snp).build().unwrap();
    let refused = memory.attach(Vm::MachineWithoutTdp).unwrap_err();
    assert_eq!(refused.errno(), Errno::EOPNOTSUPP);
    let vm = memory.attach(Vm::Machine).unwrap();
    let vcpu = memory.machine_vcpu(vm).unwrap();
    let refused = vcpu.carry_out(Intercept::Vmrun(L2 { ncr3: Some(gfn(0)), cr3: None }));
    assert_eq!(refused, Err(Error::Machine(Machine::NoIndirect)));
    let none: Result<GfnRange, _> = GfnRange::new(gfn(0), PageCount::ZERO);
    assert!(none.is_err());
}
