//! 2M entries and 2M pages: what thread 1 left open.

use std::collections::{BTreeMap, BTreeSet};

use polder_machine::{
    AccessCheck, Discrepancy, Machine, RmpEntry, RmpFail, RmpUpdate, Side, VcpuId, VmId,
};
use polder_units::Level;

use crate::{LARGE, OWNER, Rig, SMALL, asid, gfn, gfns, large, page, pfn, refused, small};

#[test]
fn unassigning_names_the_size_and_keeps_none() {
    let mut rig = Rig::new();
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    let shared = |size| RmpUpdate::shared(size);
    assert_eq!(rig.machine.rmpupdate(pfn(0), shared(SMALL)), Err(RmpFail::Overlap), "too small");
    assert_eq!(rig.machine.rmpupdate(pfn(2), shared(LARGE)), Err(RmpFail::Input), "unaligned");
    assert_eq!(rig.machine.rmpupdate(pfn(0), shared(LARGE)), Ok(()));
    for at in 0..4 {
        assert_eq!(rig.machine.rmp_entry(pfn(at)), Some(RmpEntry::HYPERVISOR), "all of it");
    }
    assert_eq!(rig.machine.rmpupdate(pfn(0), small(0)), Ok(()), "no 2M bit was left behind");
    assert_eq!(rig.machine.rmpupdate(pfn(0), shared(LARGE)), Err(RmpFail::Overlap), "too large");
    assert_eq!(rig.machine.rmpupdate(pfn(0), shared(SMALL)), Ok(()));
    assert_eq!(rig.machine.rmpupdate(pfn(0), shared(LARGE)), Ok(()), "nothing to take away");
}

#[test]
fn a_part_of_a_2m_entry_becomes_shared_by_psmash_first() {
    let mut rig = Rig::validated();
    rig.write(3, Side::Private, 7).unwrap();
    assert_eq!(rig.machine.rmpupdate(pfn(1), RmpUpdate::shared(SMALL)), Err(RmpFail::Overlap));
    rig.machine.tdp_zap(rig.vm, gfns(0, 4)).unwrap();
    rig.machine.psmash(pfn(0)).unwrap();
    rig.machine.rmpupdate(pfn(1), RmpUpdate::shared(SMALL)).unwrap();
    (0..4).for_each(|at| rig.map(at, Level::Size4K));
    assert_eq!(rig.read(3, Side::Private), Ok(7), "its neighbours stay validated");
    assert_eq!(rig.write(1, Side::Shared, 8), Ok(()));
    rig.machine.audit().unwrap();
}

#[test]
fn nothing_but_the_access_checks_keeps_frame_and_guest_frame_congruent() {
    let mut rig = Rig::new();
    assert_eq!(rig.machine.rmpupdate(pfn(0), large(1)), Ok(()), "RMPUPDATE does not look");
    assert_eq!(rig.machine.audit(), Err(Discrepancy::RmpAlignment { pfn: pfn(0) }));
    rig.map(0, Level::Size2M);
    for at in 0..4 {
        let check = refused(rig.read(at, Side::Private)).check;
        assert_eq!(
            check,
            AccessCheck::ReverseMap,
            "gfn {at}: stage 2 is congruent, so never right"
        );
    }
}

#[test]
fn there_is_no_1g_entry_and_two_2m_entries_serve_a_1g_folio() {
    let mut rig = Rig::new();
    rig.machine.merge_folios(rig.object, page(0), Level::Size1G, OWNER).unwrap();
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    assert_eq!(rig.machine.rmp_entry(pfn(4)), Some(RmpEntry::HYPERVISOR));
    rig.map(0, Level::Size1G);
    assert_eq!(rig.pvalidate(0, LARGE), Ok(Ok(true)));
    assert_eq!(rig.pvalidate(4, LARGE).map_err(|it| refused::<()>(Err(it)).check).err(), {
        Some(AccessCheck::GuestOwned)
    });
    rig.machine.rmpupdate(pfn(4), large(4)).unwrap();
    assert_eq!(rig.pvalidate(4, LARGE), Ok(Ok(true)));
    rig.machine.audit().unwrap();
}

#[test]
fn a_collapse_leaves_4k_entries_that_work_at_4k() {
    let mut rig = Rig::new();
    rig.machine.lock_folio(pfn(0), OWNER).unwrap();
    rig.machine.split_folio(rig.object, page(0), OWNER).unwrap();
    (0..4).for_each(|at| rig.machine.rmpupdate(pfn(at), small(at)).unwrap());
    rig.machine.merge_folios(rig.object, page(0), Level::Size2M, OWNER).unwrap();
    assert_eq!(rig.machine.rmp_entry(pfn(0)).unwrap().size, SMALL, "a folio is not the rmp's");
    for at in 0..4 {
        rig.map(at, Level::Size4K);
        assert_eq!(rig.pvalidate(at, SMALL), Ok(Ok(true)));
        assert_eq!(rig.write(at, Side::Private, 7), Ok(()));
    }
    rig.machine.audit().unwrap();
    rig.machine.tdp_zap(rig.vm, gfns(0, 4)).unwrap();
    rig.map(0, Level::Size2M);
    assert_eq!(rig.machine.audit(), Err(Discrepancy::RmpLevel { vm: rig.vm, gfn: 0 }));
    assert_eq!(refused(rig.read(0, Side::Private)).check, AccessCheck::PageSize, "not at 2M");
}

#[test]
fn a_split_leaves_a_2m_entry_that_the_next_fault_smashes() {
    let mut rig = Rig::validated();
    rig.write(2, Side::Private, 7).unwrap();
    rig.machine.tdp_zap(rig.vm, gfns(0, 4)).unwrap();
    rig.machine.lock_folio(pfn(0), OWNER).unwrap();
    rig.machine.split_folio(rig.object, page(2), OWNER).unwrap();
    assert_eq!(rig.machine.rmp_entry(pfn(2)).unwrap().size, LARGE);
    rig.map(2, Level::Size4K);
    rig.machine.audit().unwrap();
    assert_eq!(refused(rig.read(2, Side::Private)).check, AccessCheck::PageSize);
    rig.machine.psmash(pfn(0)).unwrap();
    rig.machine.tdp_zap(rig.vm, gfns(0, 4)).unwrap();
    rig.map(2, Level::Size4K);
    assert_eq!(rig.read(2, Side::Private), Ok(7));
}

#[test]
fn a_4k_mapping_over_a_2m_entry_faults_for_ever_unless_somebody_smashes() {
    let mut rig = Rig::validated();
    rig.machine.tdp_zap(rig.vm, gfns(0, 4)).unwrap();
    for _ in 0..8 {
        rig.map(1, Level::Size4K);
        assert_eq!(refused(rig.read(1, Side::Private)).check, AccessCheck::PageSize);
        rig.machine.tdp_zap(rig.vm, gfns(0, 4)).unwrap();
    }
    rig.machine.psmash(pfn(0)).unwrap();
    rig.map(1, Level::Size4K);
    assert!(rig.read(1, Side::Private).is_ok());
}

/// One vCPU at a 4K page of a 2M entry: access, and on a refusal what `sev_handle_rmp_fault()` does
/// (arch/x86/kvm/svm/sev.c), a step at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Actor {
    Access,
    LookUp,
    Smash,
    Zap,
    Map,
    Done,
}

impl Actor {
    fn step(self, machine: &mut Machine, vm: VmId, vcpu: VcpuId, at: u32) -> Self {
        match self {
            Self::Access => {
                match machine.vcpu(vcpu).unwrap().read_u64(gfn(at).gpa(), Side::Private) {
                    Ok(value) => {
                        assert_eq!(value, u64::from(at), "what it wrote");
                        Self::Done
                    }
                    Err(polder_machine::Exit::Fault(_)) => Self::Map,
                    Err(polder_machine::Exit::Refused(refused)) => {
                        assert_ne!(refused.check, AccessCheck::Validated, "never lost");
                        Self::LookUp
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            Self::LookUp => match machine.rmp_entry(pfn(at)).unwrap().size {
                size if size == SMALL => Self::Access,
                _ => Self::Smash,
            },
            Self::Smash => match machine.psmash(pfn(0)) {
                Ok(()) => Self::Zap,
                Err(RmpFail::InUse) => Self::Smash,
                // Somebody else was faster: look again.
                Err(RmpFail::BadAddress) => {
                    assert_eq!(machine.rmp_entry(pfn(at)).unwrap().size, SMALL);
                    Self::Access
                }
                Err(other) => panic!("{other}"),
            },
            Self::Zap => {
                machine.tdp_zap(vm, gfns(0, 4)).unwrap();
                Self::Access
            }
            Self::Map => {
                let resolved = machine.tdp_resolve(vm, gfn(at)).unwrap();
                machine.tdp_map(&resolved, Level::Size4K, true).unwrap();
                Self::Access
            }
            Self::Done => Self::Done,
        }
    }
}

/// Every order of the steps of two vCPUs and of a third CPU that has the entry in use for a while:
/// from wherever they get to, both can still get through.
///
/// Returns how many states can reach an end, and how many there are.
fn explore(smashes: bool) -> (usize, usize) {
    let mut rig = Rig::validated();
    (0..4).for_each(|at| rig.write(at, Side::Private, at.into()).unwrap());
    rig.machine.tdp_zap(rig.vm, gfns(0, 4)).unwrap();
    rig.machine.lock_folio(pfn(0), OWNER).unwrap();
    rig.machine.split_folio(rig.object, page(0), OWNER).unwrap();
    let start = (rig.machine.clone(), [Actor::Access; 2], 0);
    let mut before: BTreeMap<u64, Vec<u64>> = BTreeMap::from([(digest(&start), Vec::new())]);
    let (mut ends, mut todo) = (Vec::new(), vec![start]);
    while let Some(state) = todo.pop() {
        let (machine, actors, holder) = &state;
        if *actors == [Actor::Done; 2] && *holder == 2 {
            machine.audit().unwrap();
            ends.push(digest(&state));
        }
        let mut next = Vec::new();
        for who in 0..2 {
            let (mut machine, mut actors) = (machine.clone(), *actors);
            let at = u32::try_from(who).unwrap() + 1;
            let next_step = actors[who].step(&mut machine, rig.vm, rig.vcpus[who], at);
            let skipped = next_step == Actor::Smash && !smashes;
            actors[who] = if skipped { Actor::Zap } else { next_step };
            next.push((machine, actors, *holder));
        }
        let mut machine = machine.clone();
        let moved = match holder {
            0 => machine.rmp_hold(pfn(0), LARGE, OWNER),
            1 => machine.rmp_release(pfn(0), OWNER),
            _ => Err(RmpFail::Input),
        };
        next.extend(moved.ok().map(|()| (machine, *actors, holder + 1)));
        for next in next {
            let known = before.entry(digest(&next)).or_default();
            if known.is_empty() {
                todo.push(next);
            }
            known.push(digest(&state));
        }
    }
    let mut live = BTreeSet::new();
    while let Some(state) = ends.pop() {
        if live.insert(state) {
            ends.extend(&before[&state]);
        }
    }
    (live.len(), before.len())
}

#[test]
fn two_vcpus_that_meet_the_same_2m_entry_both_go_on_in_every_order() {
    let (live, all) = explore(true);
    assert_eq!(live, all, "somebody faults for ever");
    assert!(all > 100, "{all} states are no search");
    let (live, _) = explore(false);
    assert_eq!(live, 0, "without PSMASH nobody gets through, and the search sees it");
}

type State = (Machine, [Actor; 2], u8);

fn digest((machine, actors, holder): &State) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    machine.hash(&mut hasher);
    (actors.map(|it| it as u8), holder).hash(&mut hasher);
    hasher.finish()
}

#[test]
fn a_2m_entry_over_a_page_that_the_host_shares_is_what_rmpupdate_refuses() {
    let mut rig = Rig::new();
    rig.machine.rmpupdate(pfn(0), large(0)).unwrap();
    rig.machine.psmash(pfn(0)).unwrap();
    rig.machine.rmpupdate(pfn(3), RmpUpdate::shared(SMALL)).unwrap();
    assert_eq!(rig.machine.rmpupdate(pfn(0), large(0)), Err(RmpFail::Overlap), "not over a mix");
    assert_eq!(rig.host_write(3), Some(AccessCheck::HypervisorOwned), "nor a 2M host mapping");
}

#[test]
fn stage_2_of_one_guest_over_a_frame_of_another_is_a_discrepancy() {
    let mut rig = Rig::new();
    rig.machine.rmpupdate(pfn(0), RmpUpdate::private(asid(2), gfn(0), LARGE)).unwrap();
    rig.map(0, Level::Size2M);
    let other = Discrepancy::RmpOwner { vm: rig.vm, gfn: 0, pfn: pfn(0) };
    assert_eq!(rig.machine.audit(), Err(other));
}

#[test]
fn a_2m_entry_does_not_ask_whose_memory_it_covers() {
    let mut rig = Rig::new();
    let [one, other] = [(); 2].map(|()| {
        let object = rig.machine.create_object(1u32.into()).unwrap();
        let pfn = rig.machine.allocate(object, page(0), Level::Size4K).unwrap();
        (object, pfn)
    });
    assert_eq!((one.1, other.1), (pfn(8), pfn(9)));
    assert_eq!(rig.machine.rmpupdate(pfn(8), large(0)), Ok(()));
    assert!(rig.machine.object_write(other.0, 0, &[7]).is_err(), "its neighbour's memory is gone");
    assert_eq!(rig.machine.audit(), Err(Discrepancy::FreeAssigned { pfn: pfn(10) }));
}
