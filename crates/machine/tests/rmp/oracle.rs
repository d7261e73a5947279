//! The RMP against a naive oracle: an array with every field of every 4K frame, and a flag that
//! says which frames belong to one 2M entry.

use polder_machine::{
    AccessCheck, Contents, FirmwareFail, Plant, RmpEntry, RmpFail, RmpResult, RmpSize, RmpUpdate,
    Side,
};
use polder_units::Level;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::{FRAMES, LARGE, Rig, SMALL, asid, gfn, gfns, pfn};

/// The frames that the guests and the oracle are about; RMPUPDATE tries others too.
const PAGES: u32 = 8;

#[derive(Clone, Debug)]
enum Action {
    Update(u32, RmpUpdate),
    Smash(u32),
    Unsmash(u32),
    Reclaim(u32, RmpSize),
    /// Map `gfn` at a level, after a zap of everything.
    Map(u32, Level),
    Pvalidate(u32, RmpSize, bool),
    Rmpadjust(u32, RmpSize, bool),
    Guest(u32, Side, Option<u64>),
    HostWrite(u32, u64),
}

fn action() -> impl Strategy<Value = Action> {
    use Action::*;
    let at = || 0..PAGES;
    let size = || prop_oneof![Just(SMALL), Just(LARGE)];
    // Mostly what a hypervisor would do, so that much of it succeeds.
    let sane = (at(), size(), 0u8..8).prop_map(|(at, size, kind)| {
        let at = if size == LARGE { at & !3 } else { at };
        let private = RmpUpdate::private(asid(1), gfn(at), size);
        match kind {
            0..4 => Update(at, private),
            4 => Update(at, RmpUpdate { immutable: true, ..private }),
            _ => Update(at, RmpUpdate::shared(size)),
        }
    });
    let odd = (0..FRAMES + 2, any::<(bool, bool)>(), size(), 0u32..8, 0u16..3).prop_map(
        |(at, (assigned, immutable), size, gfn, number)| {
            let asid = polder_machine::Asid::new(number);
            Update(at, RmpUpdate { assigned, size, immutable, gfn: gfn.into(), asid })
        },
    );
    let side = || prop_oneof![Just(Side::Private), Just(Side::Shared)];
    let level = prop_oneof![Just(Level::Size4K), Just(Level::Size2M)];
    prop_oneof![
        8 => sane,
        2 => odd,
        2 => at().prop_map(|at| Smash(at & !3)),
        1 => at().prop_map(Smash),
        1 => at().prop_map(|at| Unsmash(at & !3)),
        1 => (at(), size()).prop_map(|(at, size)| Reclaim(at, size)),
        4 => (at(), level).prop_map(|(at, level)| Map(at, level)),
        6 => (at(), size(), prop::bool::weighted(0.8)).prop_map(|(at, size, yes)| {
            Pvalidate(if size == LARGE { at & !3 } else { at }, size, yes)
        }),
        1 => (at(), size(), any::<bool>()).prop_map(|(at, size, yes)| Rmpadjust(at, size, yes)),
        8 => (at(), side(), any::<Option<u64>>()).prop_map(|(at, s, value)| Guest(at, s, value)),
        2 => (at(), any::<u64>()).prop_map(|(at, value)| HostWrite(at, value)),
    ]
}

/// What a page holds: what the guest wrote privately, or plain bytes.
#[derive(Clone, Copy, PartialEq)]
enum Value {
    Plain(u64),
    Private(u64),
}

struct Oracle {
    rmp: [RmpEntry; FRAMES as usize],
    values: [Value; PAGES as usize],
    /// The level at which each gfn is mapped; to the frame of the same number.
    mapped: [Option<Level>; PAGES as usize],
}

fn block(at: u32) -> std::ops::Range<usize> {
    let start = (at & !3) as usize;
    start..start + 4
}

fn frames(at: u32, size: RmpSize) -> std::ops::Range<usize> {
    let at = at as usize;
    at..at + if size == LARGE { 4 } else { 1 }
}

impl Oracle {
    fn update(&mut self, at: u32, new: RmpUpdate) -> RmpResult {
        let range = frames(at, new.size);
        let unaligned = new.size == LARGE && !at.is_multiple_of(4);
        let contradicts = !new.assigned && (new.immutable || new.asid.is_some());
        if unaligned || contradicts || range.end > FRAMES as usize {
            return Err(RmpFail::Input);
        }
        let old = self.rmp[at as usize];
        if old.immutable {
            return Err(RmpFail::Permission);
        }
        let wrong = |it: &RmpEntry| it.assigned && it.size != new.size;
        if self.rmp[range.clone()].iter().any(wrong) {
            return Err(RmpFail::Overlap);
        }
        let same = old.assigned && old.asid == new.asid && old.gfn == new.gfn;
        for (offset, frame) in (0u32..).zip(range) {
            self.rmp[frame] = RmpEntry::HYPERVISOR;
            if new.assigned {
                let RmpUpdate { assigned, size, immutable, asid, .. } = new;
                let gfn = gfn(u32::try_from(new.gfn.get()).unwrap() + offset);
                let (validated, vmsa) = (same && old.validated, same && old.vmsa);
                self.rmp[frame] =
                    RmpEntry { assigned, size, immutable, gfn, asid, validated, vmsa };
            }
        }
        Ok(())
    }

    fn smash(&mut self, at: u32) -> RmpResult {
        if !at.is_multiple_of(4) {
            return Err(RmpFail::Input);
        }
        let entry = self.rmp[at as usize];
        if !entry.assigned || entry.size == SMALL || entry.immutable {
            return Err(RmpFail::BadAddress);
        }
        self.rmp[block(at)].iter_mut().for_each(|it| it.size = SMALL);
        Ok(())
    }

    fn unsmash(&mut self, at: u32) -> Result<(), FirmwareFail> {
        if !at.is_multiple_of(4) {
            return Err(FirmwareFail::Param);
        }
        let first = self.rmp[at as usize];
        let fits = (0u32..).zip(&self.rmp[block(at)]).all(|(offset, it)| {
            it.assigned
                && it.size == SMALL
                && it.immutable
                && !it.vmsa
                && it.asid.is_some()
                && it.asid == first.asid
                && it.validated == first.validated
                && it.gfn.get() == first.gfn.get() + u64::from(offset)
        });
        if !fits || !first.gfn.get().is_multiple_of(4) {
            return Err(FirmwareFail::PageState);
        }
        self.rmp[block(at)].iter_mut().for_each(|it| it.size = LARGE);
        Ok(())
    }

    fn reclaim(&mut self, at: u32, size: RmpSize) -> Result<(), FirmwareFail> {
        if size == LARGE && !at.is_multiple_of(4) {
            return Err(FirmwareFail::Param);
        }
        let entry = self.rmp[at as usize];
        if !entry.assigned {
            return Err(FirmwareFail::PageState);
        }
        if entry.size != size {
            return Err(FirmwareFail::PageSize);
        }
        self.rmp[frames(at, size)].iter_mut().for_each(|it| it.immutable = false);
        Ok(())
    }

    fn owned(&self, at: u32) -> Option<AccessCheck> {
        let entry = self.rmp[at as usize];
        match entry {
            _ if entry.asid != Some(asid(1)) => Some(AccessCheck::GuestOwned),
            _ if entry.gfn != gfn(at) => Some(AccessCheck::ReverseMap),
            _ if entry.immutable => Some(AccessCheck::Mutable),
            _ => None,
        }
    }

    /// The check that PVALIDATE of a mapped page meets, or its result.
    fn size_of_instruction(&self, at: u32, size: RmpSize) -> Result<RmpResult, AccessCheck> {
        if let Some(check) = self.owned(at) {
            return Err(check);
        }
        let (entry, mapped) = (self.rmp[at as usize].size, self.mapped[at as usize].unwrap());
        match (size == LARGE, entry == LARGE, mapped == Level::Size2M) {
            (false, true, _) => Err(AccessCheck::InstructionSize),
            (false, false, true) => Err(AccessCheck::PageSize),
            (true, true, true) | (false, false, false) => Ok(Ok(())),
            (true, ..) => Ok(Err(RmpFail::SizeMismatch)),
        }
    }

    fn access(&self, at: u32, side: Side, write: bool) -> Option<AccessCheck> {
        let mapped = self.mapped[at as usize].unwrap();
        if side == Side::Shared {
            let range = if mapped == Level::Size4K { frames(at, SMALL) } else { block(at) };
            let owned = write && self.rmp[range].iter().any(|it| it.assigned);
            return owned.then_some(AccessCheck::HypervisorOwned);
        }
        let entry = self.rmp[at as usize];
        let fits = (entry.size == LARGE) == (mapped == Level::Size2M);
        let size = (!fits).then_some(AccessCheck::PageSize);
        let validated = (!entry.validated).then_some(AccessCheck::Validated);
        self.owned(at).or(size).or(validated)
    }
}

fn check_of(exit: polder_machine::Exit) -> AccessCheck {
    match exit {
        polder_machine::Exit::Refused(refused) => refused.check,
        other => panic!("{other}"),
    }
}

fn act(rig: &mut Rig, oracle: &mut Oracle, action: &Action) {
    match *action {
        Action::Update(at, new) => {
            assert_eq!(rig.machine.rmpupdate(pfn(at), new), oracle.update(at, new));
        }
        Action::Smash(at) => assert_eq!(rig.machine.psmash(pfn(at)), oracle.smash(at)),
        Action::Unsmash(at) => {
            assert_eq!(rig.machine.page_unsmash(pfn(at)), oracle.unsmash(at));
        }
        Action::Reclaim(at, size) => {
            assert_eq!(rig.machine.page_reclaim(pfn(at), size), oracle.reclaim(at, size));
        }
        Action::Map(at, level) => {
            let range = if level == Level::Size2M { block(at) } else { frames(at, SMALL) };
            let whole = gfns(range.start as u64, range.end as u64);
            rig.machine.tdp_unmap(rig.vm, whole).unwrap();
            let drops = oracle.mapped[at as usize] == Some(Level::Size2M);
            oracle.mapped[if drops { block(at) } else { range.clone() }].fill(None);
            rig.map(at, level);
            oracle.mapped[range].fill(Some(level));
        }
        Action::Pvalidate(at, size, validate) if oracle.mapped[at as usize].is_some() => {
            let mut vcpu = rig.machine.vcpu(rig.vcpus[0]).unwrap();
            let outcome = vcpu.pvalidate(gfn(at), size, validate).map_err(check_of);
            let expected = oracle.size_of_instruction(at, size).map(|result| {
                result.map(|()| {
                    let changed = oracle.rmp[at as usize].validated != validate;
                    let range = frames(at, size);
                    oracle.rmp[range].iter_mut().for_each(|it| it.validated = validate);
                    changed
                })
            });
            assert_eq!(outcome, expected);
        }
        Action::Rmpadjust(at, size, vmsa) if oracle.mapped[at as usize].is_some() => {
            let mut vcpu = rig.machine.vcpu(rig.vcpus[0]).unwrap();
            let outcome = vcpu.rmpadjust(gfn(at), size, vmsa).map_err(check_of);
            if size == LARGE && !at.is_multiple_of(4) {
                assert_eq!(outcome, Ok(Err(RmpFail::Input)));
                return;
            }
            let mut expected = oracle.size_of_instruction(at, size);
            if expected == Ok(Ok(())) {
                if oracle.rmp[at as usize].validated {
                    oracle.rmp[frames(at, size)].iter_mut().for_each(|it| it.vmsa = vmsa);
                } else {
                    expected = Err(AccessCheck::Validated);
                }
            }
            assert_eq!(outcome, expected);
        }
        Action::Guest(at, side, value) if oracle.mapped[at as usize].is_some() => {
            guest(rig, oracle, at, side, value);
        }
        Action::Pvalidate(..) | Action::Rmpadjust(..) | Action::Guest(..) => {}
        Action::HostWrite(at, value) => {
            let offset = u64::from(at) << 12;
            let outcome = rig.machine.object_write(rig.object, offset, &value.to_le_bytes());
            assert_eq!(outcome.is_ok(), !oracle.rmp[at as usize].assigned);
            if outcome.is_ok() {
                oracle.values[at as usize] = Value::Plain(value);
            }
        }
    }
}

fn guest(rig: &mut Rig, oracle: &mut Oracle, at: u32, side: Side, value: Option<u64>) {
    // The oracle has no TLB: every access walks.
    rig.machine.flush_vm(rig.vm, gfns(0, PAGES.into())).unwrap();
    let expected = oracle.access(at, side, value.is_some());
    let kind = if side == Side::Private { Value::Private } else { Value::Plain };
    if let Some(value) = value {
        assert_eq!(rig.write(at, side, value).map_err(check_of).err(), expected);
        if expected.is_none() {
            oracle.values[at as usize] = kind(value);
        }
        return;
    }
    let outcome = rig.read(at, side).map_err(check_of);
    assert_eq!(outcome.err(), expected);
    let Ok(read) = outcome else { return };
    let there = oracle.values[at as usize];
    match there {
        Value::Plain(value) | Value::Private(value) => {
            assert_eq!(kind(value) == there, read == value, "it reads as it was written");
        }
    }
}

fn run(contents: Contents, plant: Option<Plant>, actions: &[Action]) {
    let mut rig = Rig::with(contents);
    if let Some(plant) = plant {
        rig.machine.plant(plant, true);
    }
    let mut oracle = Oracle {
        rmp: [RmpEntry::HYPERVISOR; FRAMES as usize],
        values: [Value::Plain(0); PAGES as usize],
        mapped: [None; PAGES as usize],
    };
    for action in actions {
        act(&mut rig, &mut oracle, action);
        for (at, expected) in (0..).zip(oracle.rmp) {
            let entry = rig.machine.rmp_entry(pfn(at)).unwrap();
            assert_eq!(entry, expected, "pfn {at} after {action:?}");
        }
    }
}

proptest! {
    #[test]
    fn every_entry_result_and_access_agrees_with_the_oracle(
        symbolic: bool,
        actions in prop::collection::vec(action(), 1..60),
    ) {
        run(if symbolic { Contents::Symbolic } else { Contents::Bytes }, None, &actions);
    }
}

#[test]
fn the_oracle_catches_every_planted_bug_of_the_rmp() {
    for plant in [
        Plant::SmashUnvalidates,
        Plant::LargeOverAssigned,
        Plant::KeptValidated,
        Plant::NoSizeCheck,
    ] {
        let cases = 4096;
        let config =
            Config { cases, max_shrink_iters: 0, failure_persistence: None, ..Config::default() };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let mut runner = TestRunner::new_with_rng(config, rng);
        let outcome = runner.run(&prop::collection::vec(action(), 1..60), |actions| {
            run(Contents::Symbolic, Some(plant), &actions);
            Ok(())
        });
        assert!(outcome.is_err(), "{plant:?} was not noticed");
    }
}
