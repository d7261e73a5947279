//! What roots do, a sentence a test.

use polder_machine::{
    Alias, Config, Error, Exit, Intercept, L2, Machine, Op, Plant, Pte, Ran, Root, Side, Touch,
    Untranslated,
};
use polder_units::{AddressSpace, Gfn, GfnRange, Gpa, Level, PageCount, PageIndex, PageRange};

use crate::rig::{Came, Kind, PAGES, Rig, gfn};

const USED: u64 = Pte::ACCESSED | Pte::DIRTY;

/// Tables at 0 (the top) to 3, of which the last maps pages 0 to 3 at gfns 0 to 3 and, with these
/// bits, page `page` at gfn 32 more.
fn rig(kind: Kind, bits: u64) -> Rig {
    let mut rig = Rig::new(kind);
    for table in 0..3 {
        rig.pte(table, 0, table + 1, Pte::ALL);
    }
    rig.pte(2, 1, 4, Pte::ALL);
    for index in 0..4 {
        rig.pte(3, index, index.into(), Pte::ALL);
        rig.pte(4, index, 36 + u64::from(index), bits);
    }
    rig.load(0, 0);
    rig
}

#[test]
fn a_write_to_a_top_table_is_made_by_the_hypervisor_and_seen_at_once() {
    for kind in [Kind::Shadow, Kind::Nested] {
        let mut rig = rig(kind, Pte::ALL);
        assert_eq!(rig.access(0, 4, 0, Some(7)), Came::Done(7));
        // Page 2 is the table of the second level.
        assert!(matches!(rig.access(0, 2, 1, None), Came::Done(_)));
        let before = rig.machine.shadow_pages(rig.vm).unwrap();
        assert_eq!(rig.access(0, 2, 1, Some(0)), Came::Done(0));
        assert!(rig.machine.shadow_pages(rig.vm).unwrap() < before);
        assert_eq!(rig.access(0, 4, 0, None), Came::PageFault, "nobody has flushed");
        let again = Pte::new(gfn(4), Pte::ALL).0;
        assert_eq!(rig.access(0, 2, 1, Some(again)), Came::Done(again));
        assert_eq!(rig.access(0, 4, 0, None), Came::Done(7));
        rig.machine.audit().unwrap();
    }
}

#[test]
fn a_write_to_a_last_table_is_seen_after_the_flush() {
    for load in [false, true] {
        let mut rig = rig(Kind::Shadow, Pte::ALL);
        assert_eq!(rig.access(0, 4, 0, Some(7)), Came::Done(7));
        // Table 4 becomes reachable by page 3, and is written to there.
        rig.pte(3, 3, 4, Pte::ALL);
        let other = Pte::new(gfn(50), Pte::ALL).0;
        assert_eq!(rig.access(0, 3, 0, Some(other)), Came::Done(other));
        assert_eq!(rig.access(0, 4, 0, None), Came::Done(7), "not yet");
        match load {
            true => rig.load(0, 0),
            false => rig.machine.invlpg(rig.vcpus[0], 4).unwrap(),
        }
        assert_eq!(rig.access(0, 4, 0, None), Came::Done(0));
        rig.machine.audit().unwrap();
    }
}

#[test]
fn a_root_that_comes_to_tables_out_of_sync_finds_them_in_sync() {
    let mut rig = rig(Kind::Shadow, Pte::ALL);
    rig.pte(5, 0, 1, Pte::ALL);
    assert_eq!(rig.access(0, 4, 0, Some(7)), Came::Done(7));
    // The other vCPU has never used its root, which leads to the same tables.
    rig.direct(1);
    let other = Pte::new(gfn(50), Pte::ALL).0;
    assert_eq!(rig.access(1, 4, 0, Some(other)), Came::Done(other));
    rig.load(1, 5);
    assert_eq!(rig.access(1, 0, 0, None), Came::Done(rig.word(0, 0)));
    assert_eq!(rig.access(1, 4, 0, None), Came::Done(0));
}

#[test]
fn a_table_is_mapped_read_only_by_every_root_and_in_no_large_page() {
    let mut rig = Rig::new(Kind::Nested);
    let huge = PageIndex::from(0);
    rig.machine.allocate(rig.object, huge, Level::Size2M).unwrap();
    assert_eq!(rig.access(0, 1, 100, Some(1)), Came::Done(1));
    let spte = |rig: &Rig, at: u32| rig.machine.spte(rig.vm, Gfn::from(at)).unwrap();
    assert_eq!(spte(&rig, 1).unwrap().level, Level::Size2M);
    for table in 0..3 {
        rig.pte(table, 0, table + 1, Pte::ALL);
    }
    rig.pte(3, 0, 40, Pte::ALL);
    rig.load(0, 0);
    assert_eq!(rig.access(0, 0, 0, Some(5)), Came::Done(5));
    assert_eq!(spte(&rig, 1), None, "the large page has gone");
    rig.direct(0);
    assert_eq!(rig.access(0, 1, 100, None), Came::Done(1));
    let table = spte(&rig, 1).unwrap();
    assert_eq!((table.level, table.writable), (Level::Size4K, false));
    rig.machine.audit().unwrap();
}

#[test]
fn a_vcpu_that_runs_a_guest_of_its_guest_has_the_root_that_follows() {
    let mut rig = rig(Kind::Nested, Pte::ALL);
    let vcpu = rig.vcpus[0];
    assert_eq!(rig.machine.root(vcpu), Ok(Root::Nested { ncr3: gfn(0) }));
    assert_eq!(rig.access(0, 4, 0, Some(9)), Came::Done(9));
    rig.direct(0);
    assert_eq!(rig.machine.root(vcpu), Ok(Root::Tdp));
    assert_eq!(rig.access(0, 36, 0, None), Came::Done(9), "by L1's own address");
    // L1 shadows its guest's tables itself: hardware goes on by its guest-physical addresses.
    rig.machine.enter_l2(vcpu, L2 { ncr3: None, cr3: Some(gfn(0)) }).unwrap();
    let root = rig.machine.root(vcpu).unwrap();
    assert_eq!((root, root.space()), (Root::Tdp, AddressSpace::Gpa));
    assert_eq!(rig.access(0, 36, 0, None), Came::Done(9));
    assert_eq!(rig.prefault(0, 37), Err(Error::Hole { object: rig.object, page: 37u32.into() }));
}

#[test]
fn a_program_switches_roots_while_it_runs() {
    let mut rig = rig(Kind::Shadow, Pte::ALL);
    let vcpu = rig.vcpus[0];
    let at = |page: u64| Gpa::new(page << 12);
    let (side, top) = (Side::Shared, Some(gfn(0)));
    rig.direct(0);
    let program = [
        Op::Write { gpa: at(36), side, value: 3 },
        Op::Privileged(Intercept::Cr3(top)),
        Op::Read { gpa: at(4), side },
        Op::Privileged(Intercept::Cr3(None)),
        Op::Read { gpa: at(36), side },
    ];
    rig.machine.load(vcpu, program.into()).unwrap();
    let mut read = Vec::new();
    loop {
        match rig.machine.vcpu(vcpu).unwrap().step() {
            Ok(Ran::Read(value)) => read.push(value),
            Ok(_) => {}
            Err(Exit::Intercept(intercept)) => rig.machine.carry_out(vcpu, intercept).unwrap(),
            Err(Exit::Fault(fault)) => {
                rig.ready(fault.gfn);
                let touch = if fault.write { Touch::Write } else { Touch::Read };
                let resolved = rig.machine.resolve(vcpu, fault.page, touch).unwrap();
                rig.machine.map(&resolved, Level::Size4K, true).unwrap();
            }
            Err(Exit::Halted) => break,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(read, [3, 3]);
}

#[test]
fn what_was_resolved_is_stale_when_table_memory_or_root_have_changed() {
    let resolve = |rig: &mut Rig| {
        rig.ready(gfn(36));
        rig.resolve(0, 4, Touch::Read).unwrap()
    };
    let stale = Err(Error::Stale { gfn: gfn(36) });
    let map = |rig: &mut Rig, resolved| rig.machine.map(&resolved, Level::Size4K, true);

    let mut it = rig(Kind::Shadow, Pte::ALL);
    let resolved = resolve(&mut it);
    it.pte(4, 0, 37, Pte::ALL);
    assert_eq!(map(&mut it, resolved), stale, "the guest's table");

    let mut it = rig(Kind::Shadow, Pte::ALL);
    let resolved = resolve(&mut it);
    it.machine.tdp_zap(it.vm, GfnRange::one(gfn(36))).unwrap();
    assert_eq!(map(&mut it, resolved), stale, "an invalidation");

    let mut it = rig(Kind::Shadow, Pte::ALL);
    let resolved = resolve(&mut it);
    it.direct(0);
    assert_eq!(map(&mut it, resolved), stale, "the root");
}

#[test]
fn a_large_page_of_the_guests_is_mapped_as_large_as_the_memory_behind() {
    let mut rig = rig(Kind::Shadow, Pte::ALL);
    rig.pte(2, 2, 16, Pte::ALL | Pte::LARGE);
    rig.load(0, 0);
    assert_eq!(rig.access(0, 9, 0, Some(1)), Came::Done(1));
    let at = |rig: &Rig, page| rig.machine.mapped(rig.vcpus[0], page).unwrap().map(|it| it.level);
    assert_eq!(at(&rig, 9), Some(Level::Size4K));
    let zapped = GfnRange::between(16, 20).unwrap();
    rig.machine.tdp_zap(rig.vm, zapped).unwrap();
    let pages = PageRange::between(16, 20).unwrap();
    rig.machine.punch(rig.object, pages, None).unwrap();
    rig.machine.allocate(rig.object, 16u32.into(), Level::Size2M).unwrap();
    assert_eq!(rig.access(0, 9, 0, Some(2)), Came::Done(2));
    assert_eq!((at(&rig, 9), at(&rig, 8)), (Some(Level::Size2M), Some(Level::Size2M)));
    rig.machine.audit().unwrap();
}

#[test]
fn tables_that_are_no_tables_translate_nothing() {
    let why = |bits, to: u64, page| {
        let mut rig = rig(Kind::Shadow, Pte::ALL);
        rig.pte(2, 1, to, bits);
        match rig.resolve(0, page, Touch::Write) {
            Err(Error::Untranslated { why, .. }) => why,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(why(0, 4, 4), Untranslated::NotPresent);
    assert_eq!(why(Pte::ALL & !Pte::WRITABLE, 4, 4), Untranslated::NotWritable);
    assert_eq!(why(Pte::ALL & !Pte::USER, 4, 4), Untranslated::NotUser);
    assert_eq!(why(Pte::ALL | Pte::LARGE, 5, 4), Untranslated::Reserved, "unaligned");
    assert_eq!(why(Pte::ALL, 4, 1 << 40), Untranslated::NotCanonical);
    let mut outside = rig(Kind::Shadow, Pte::ALL);
    outside.pte(2, 1, PAGES + 8, Pte::ALL);
    let table = Err(Error::Table { gfn: gfn(PAGES + 8) });
    assert_eq!(outside.resolve(0, 4, Touch::Read).map(drop), table);
}

#[test]
fn a_prefault_marks_nothing_accessed_and_leaves_out_what_was_never_used() {
    for (bits, expected) in [
        (Pte::ALL, Ok(Level::Size4K)),
        (Pte::ALL & !Pte::DIRTY, Ok(Level::Size4K)),
        (Pte::ALL & !USED, Err(Error::NotAccessed { page: 4 })),
        (0, Err(Error::Untranslated { page: 4, why: Untranslated::NotPresent })),
    ] {
        let mut rig = rig(Kind::Shadow, bits);
        rig.ready(gfn(36));
        let entry = rig.word(4, 0);
        assert_eq!(rig.prefault(0, 4), expected);
        assert_eq!(rig.word(4, 0), entry);
        let spte = rig.machine.mapped(rig.vcpus[0], 4).unwrap();
        assert_eq!(spte.map(|it| (it.accessed, it.dirty)), expected.ok().map(|_| (false, false)));
        let writable = spte.is_some_and(|it| it.writable);
        assert_eq!(writable, bits == Pte::ALL, "the first write has to be seen by its table");
        if bits & Pte::PRESENT != 0 {
            assert_eq!(rig.access(0, 4, 0, Some(1)), Came::Done(1));
            assert!(Pte(rig.word(4, 0)).has(USED));
            let spte = rig.machine.mapped(rig.vcpus[0], 4).unwrap().unwrap();
            assert!(spte.accessed && spte.dirty && spte.writable);
        }
    }
}

#[test]
fn stage_2_says_what_was_accessed_and_what_was_written() {
    let mut rig = Rig::new(Kind::Nested);
    let used = |rig: &Rig| {
        let spte = rig.machine.spte(rig.vm, gfn(3)).unwrap().unwrap();
        (spte.accessed, spte.dirty)
    };
    rig.ready(gfn(3));
    rig.prefault(0, 3).unwrap();
    assert_eq!(used(&rig), (false, false));
    assert_eq!(rig.access(0, 3, 0, None), Came::Done(0));
    assert_eq!(used(&rig), (true, false));
    assert_eq!(rig.access(0, 3, 0, Some(1)), Came::Done(1));
    assert_eq!(used(&rig), (true, true));
    let one = GfnRange::one(gfn(3));
    assert_eq!(rig.machine.age(rig.vm, one), Ok(true));
    assert_eq!(rig.machine.age(rig.vm, one), Ok(false));
    rig.machine.flush_vm(rig.vm, one).unwrap();
    assert_eq!(rig.access(0, 3, 0, None), Came::Done(1));
    assert_eq!(used(&rig), (true, true));
}

/// The anonymous memory of a rig whose page 7 has been written to, and another that was forked.
fn forked(kind: Kind) -> (Rig, polder_machine::ObjectId) {
    let mut rig = Rig::anonymous(kind);
    assert_eq!(rig.access(0, 7, 0, Some(5)), Came::Done(5));
    let child = rig.machine.fork_anonymous(rig.object).unwrap();
    (rig, child)
}

#[test]
fn a_read_of_what_was_never_written_finds_the_zero_page_and_a_write_makes_a_page() {
    let mut rig = Rig::anonymous(Kind::Nested);
    let before = rig.machine.free_frames();
    assert_eq!(rig.prefault(0, 9), Ok(Level::Size4K));
    let spte = rig.machine.spte(rig.vm, gfn(9)).unwrap().unwrap();
    assert_eq!((Some(spte.pfn), spte.writable), (rig.machine.zero_page(), false));
    assert_eq!(rig.access(0, 9, 0, None), Came::Done(0));
    assert_eq!(rig.machine.free_frames(), before, "no memory was made");
    assert_eq!(rig.access(0, 9, 0, Some(1)), Came::Done(1));
    assert_eq!(rig.access(0, 10, 0, None), Came::Done(0), "the zero page is what it was");
    assert_eq!(rig.machine.free_frames(), before - 1);
    rig.machine.audit().unwrap();
}

#[test]
fn a_prefault_copies_nothing_that_a_read_would_not() {
    for kind in [Kind::Shadow, Kind::Nested] {
        let (mut rig, child) = forked(kind);
        let before = rig.machine.free_frames();
        assert_eq!(rig.prefault(0, 7), Ok(Level::Size4K));
        assert_eq!(rig.machine.copied_on_write(rig.object), Ok(PageCount::ONE));
        assert!(!rig.machine.spte(rig.vm, gfn(7)).unwrap().unwrap().writable);
        assert_eq!(rig.access(0, 7, 0, None), Came::Done(5));
        assert_eq!(rig.machine.free_frames(), before);
        assert_eq!(rig.access(0, 7, 0, Some(6)), Came::Done(6));
        assert_eq!(rig.machine.free_frames(), before - 1);
        let mut bytes = [0; 8];
        rig.machine.object_read(child, 7 << 12, &mut bytes).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 5, "the other's is what it was");
        // The last that has it, has it to itself.
        rig.machine.object_write(child, 7 << 12, &[9]).unwrap();
        assert_eq!(rig.machine.free_frames(), before - 1);
        rig.machine.audit().unwrap();
    }
}

#[test]
fn a_copy_that_is_forgotten_is_noticed() {
    let (mut rig, child) = forked(Kind::Nested);
    rig.machine.plant(Plant::CopyForgotten, true);
    assert_eq!(rig.access(0, 7, 0, Some(6)), Came::Done(6));
    let mut bytes = [0; 8];
    rig.machine.object_read(child, 7 << 12, &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 6, "it is the other's, too");
}

#[test]
fn pages_that_two_have_go_when_both_have_let_go() {
    let (mut rig, child) = forked(Kind::Nested);
    let before = rig.machine.free_frames();
    let all = PageRange::between(0, PAGES).unwrap();
    rig.machine.tdp_zap(rig.vm, GfnRange::between(0, PAGES).unwrap()).unwrap();
    rig.machine.punch(rig.object, all, None).unwrap();
    assert_eq!(rig.machine.free_frames(), before);
    rig.machine.audit().unwrap();
    rig.machine.destroy_object(child).unwrap();
    assert_eq!(rig.machine.free_frames(), before + 1);
    rig.machine.audit().unwrap();
}

#[test]
fn a_tables_entry_that_lies_on_a_page_of_two_is_marked_in_a_copy() {
    let mut rig = Rig::anonymous(Kind::Shadow);
    for table in 0..3 {
        rig.pte(table, 0, table + 1, Pte::ALL);
    }
    rig.pte(3, 0, 20, Pte::ALL & !USED);
    let child = rig.machine.fork_anonymous(rig.object).unwrap();
    rig.load(0, 0);
    assert_eq!(rig.access(0, 0, 0, Some(1)), Came::Done(1));
    let mut bytes = [0; 8];
    rig.machine.object_read(child, 3 << 12, &mut bytes).unwrap();
    assert!(!Pte(u64::from_le_bytes(bytes)).has(Pte::ACCESSED));
    assert!(Pte(rig.word(3, 0)).has(USED));
    rig.machine.audit().unwrap();
}

#[test]
fn where_a_guest_frame_shows_is_found_from_its_tables_within_a_limit() {
    let mut rig = rig(Kind::Shadow, Pte::ALL);
    // Gfn 36 shows twice: at page 4, and at page 8 of a large page.
    rig.pte(2, 2, 36, Pte::ALL | Pte::LARGE);
    let vcpu = rig.vcpus[0];
    let gfns = GfnRange::between(36, 38).unwrap();
    assert_eq!(
        rig.machine.aliases(vcpu, gfns, 1 << 20),
        Ok(vec![Alias { page: 4, gfns }, Alias { page: 8, gfns }])
    );
    assert_eq!(rig.machine.aliases(vcpu, gfns, 100), Err(Error::TooManyEntries { most: 100 }));
    // A table that is all levels of itself has 2^26 pages.
    for index in 0..4 {
        rig.pte(0, index, 0, Pte::ALL);
    }
    let most = 1000;
    let all = rig.machine.aliases(vcpu, gfns, most);
    assert_eq!(all, Err(Error::TooManyEntries { most }));
}

#[test]
fn an_snp_guests_tables_cannot_be_shadowed() {
    let mut machine = Machine::new(Config::x86_64(PageCount::from(16))).unwrap();
    machine.enable_snp();
    let vm = machine.create_snp_vm(polder_machine::Asid::new(1).unwrap()).unwrap();
    let vcpu = machine.add_vcpu(vm).unwrap();
    let l2 = L2 { ncr3: Some(gfn(0)), cr3: None };
    assert_eq!(machine.enter_l2(vcpu, l2), Err(Error::NoIndirect));
    assert_eq!(machine.root(vcpu), Ok(Root::Tdp));
}
