//! pKVM's four tables against a naive oracle that knows of each frame one owner and who else was
//! let in, and nothing of tables and states.

use std::collections::BTreeMap;

use polder_machine::{
    Ask, Component, DomainId, Exit, PageState, PinId, PinKind, PkvmFail, PkvmResult, Plant,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::{FRAMES, PAGES, Rig, gfn, gfns, pfn};

#[derive(Clone, Copy, Debug)]
enum Action {
    ShareHyp(u32),
    UnshareHyp(u32),
    DonateHyp(u32),
    HypDonates(u32),
    ShareGuest(u32, u32),
    UnshareGuest(u32),
    Donate(u32, u32),
    Asks(u32, Ask),
    Answer(u32),
    TakeBack(u32),
    Resume(u32),
    Map(u32, u32),
    Unmap(u32),
    /// To a frame that no object has.
    Move(u32, u32),
    /// The next hypercall that writes more than so many entries fails.
    Fail(u64),
    Guest(u32, u8),
    Host(u32, u8),
    Device(u32, u8),
}

fn action() -> impl Strategy<Value = Action> {
    use Action::*;
    let at = || 0..4u32;
    let ask = prop_oneof![Just(Ask::Share), Just(Ask::Unshare), Just(Ask::Relinquish)];
    prop_oneof![
        1 => at().prop_map(ShareHyp),
        1 => at().prop_map(UnshareHyp),
        1 => at().prop_map(DonateHyp),
        1 => at().prop_map(HypDonates),
        1 => (at(), at()).prop_map(|(gfn, pfn)| ShareGuest(gfn, pfn)),
        1 => at().prop_map(UnshareGuest),
        4 => (at(), at()).prop_map(|(gfn, pfn)| Donate(gfn, pfn)),
        6 => (at(), ask).prop_map(|(at, ask)| Asks(at, ask)),
        6 => at().prop_map(Answer),
        2 => at().prop_map(TakeBack),
        3 => at().prop_map(Resume),
        3 => (at(), at()).prop_map(|(gfn, page)| Map(gfn, page)),
        2 => at().prop_map(Unmap),
        2 => (at(), PAGES..PAGES + 3).prop_map(|(gfn, to)| Move(gfn, to)),
        1 => (0..4u64).prop_map(Fail),
        3 => (at(), 1..9u8).prop_map(|(at, token)| Guest(at, token)),
        3 => (at(), 1..9u8).prop_map(|(at, token)| Host(at, token)),
        3 => (at(), 1..9u8).prop_map(|(at, token)| Device(at, token)),
    ]
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Who {
    Host,
    Hyp,
    Guest,
    /// The one that is not protected, at a guest frame.
    Plain(u32),
}

#[derive(Clone)]
struct Frame {
    owner: Who,
    others: Vec<Who>,
    token: u8,
}

/// What is true.
struct Naive {
    frames: Vec<Frame>,
    /// Where the protected guest has which frame.
    guest: BTreeMap<u32, u32>,
    asked: BTreeMap<u32, (Ask, bool)>,
    /// Which frame the device has where, and by which pin.
    device: BTreeMap<u32, (u32, PinId)>,
}

impl Naive {
    fn new() -> Self {
        let frame = Frame { owner: Who::Host, others: Vec::new(), token: 0 };
        Self {
            frames: vec![frame; FRAMES as usize],
            guest: BTreeMap::new(),
            asked: BTreeMap::new(),
            device: BTreeMap::new(),
        }
    }

    fn frame(&mut self, at: u32) -> &mut Frame {
        &mut self.frames[at as usize]
    }

    fn reaches(&self, who: Who, at: u32) -> bool {
        let frame = &self.frames[at as usize];
        frame.owner == who || frame.others.contains(&who)
    }

    fn dma(&self, at: u32) -> bool {
        self.device.values().any(|(frame, _)| *frame == at)
    }

    /// Whether it is the host's, and who else has it is what `others` says.
    fn hosts(&self, at: u32, others: &[Who]) -> PkvmResult {
        let frame = &self.frames[at as usize];
        let is = frame.owner == Who::Host && frame.others == others;
        if is { Ok(()) } else { Err(PkvmFail::Permission) }
    }

    fn no_dma(&self, at: u32) -> PkvmResult {
        if self.dma(at) { Err(PkvmFail::Busy) } else { Ok(()) }
    }

    /// What a hypercall is to come to, and does if it does not run out of memory.
    fn apply(&mut self, action: Action, memory: bool) -> PkvmResult {
        match action {
            Action::ShareHyp(at) => self.hosts(at, &[])?,
            Action::UnshareHyp(at) => self.hosts(at, &[Who::Hyp])?,
            Action::DonateHyp(at) => self.hosts(at, &[]).and_then(|()| self.no_dma(at))?,
            Action::HypDonates(at) if self.frames[at as usize].owner != Who::Hyp => {
                return Err(PkvmFail::Permission);
            }
            Action::ShareGuest(to, at) => {
                let frame = &self.frames[at as usize];
                let plain = |who: &Who| matches!(who, Who::Plain(_));
                let there = self.frames.iter().any(|frame| frame.others.contains(&Who::Plain(to)));
                if frame.owner != Who::Host || !frame.others.iter().all(plain) || there {
                    return Err(PkvmFail::Permission);
                }
            }
            Action::UnshareGuest(at) => {
                let there = self.frames.iter().any(|frame| frame.others.contains(&Who::Plain(at)));
                if !there {
                    return Err(PkvmFail::NotFound);
                }
            }
            Action::Donate(to, at) => {
                self.hosts(at, &[])?;
                if self.guest.contains_key(&to) {
                    return Err(PkvmFail::Permission);
                }
                self.no_dma(at)?;
            }
            Action::Answer(at) => match self.asked.get(&at) {
                Some((ask, false)) => self.may(at, *ask)?,
                _ => return Err(PkvmFail::NotAsked),
            },
            Action::TakeBack(at) => match self.asked.get(&at) {
                Some((Ask::Share, true)) => self.may(at, Ask::Unshare)?,
                Some((Ask::Unshare, true)) => self.may(at, Ask::Share)?,
                Some((Ask::Relinquish, true)) => return Err(PkvmFail::Permission),
                _ => return Err(PkvmFail::NotAsked),
            },
            Action::Move(at, to) => {
                self.hosts(to, &[])?;
                let from = *self.guest.get(&at).ok_or(PkvmFail::NotFound)?;
                self.no_dma(from)?;
            }
            _ => {}
        }
        if !memory {
            return Err(PkvmFail::NoMemory);
        }
        self.perform(action);
        Ok(())
    }

    fn may(&self, at: u32, ask: Ask) -> PkvmResult {
        let frame = *self.guest.get(&at).ok_or(PkvmFail::NotFound)?;
        let shared = self.reaches(Who::Host, frame);
        match ask {
            Ask::Share | Ask::Relinquish if shared => Err(PkvmFail::Permission),
            Ask::Unshare if !shared => Err(PkvmFail::Permission),
            Ask::Unshare => self.no_dma(frame),
            _ => Ok(()),
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::ShareHyp(at) => self.frame(at).others.push(Who::Hyp),
            Action::UnshareHyp(at) => self.frame(at).others.clear(),
            Action::DonateHyp(at) => self.frame(at).owner = Who::Hyp,
            Action::HypDonates(at) => {
                let frame = self.frame(at);
                (frame.owner, frame.token) = (Who::Host, 0);
            }
            Action::ShareGuest(to, at) => self.frame(at).others.push(Who::Plain(to)),
            Action::UnshareGuest(at) => {
                for frame in &mut self.frames {
                    frame.others.retain(|who| *who != Who::Plain(at));
                }
            }
            Action::Donate(to, at) => {
                self.frame(at).owner = Who::Guest;
                self.guest.insert(to, at);
            }
            Action::Answer(at) => {
                let (ask, done) = self.asked.get_mut(&at).unwrap();
                *done = true;
                let ask = *ask;
                self.obey(at, ask);
            }
            Action::TakeBack(at) => {
                let (ask, done) = self.asked.get_mut(&at).unwrap();
                *done = false;
                let back = if *ask == Ask::Share { Ask::Unshare } else { Ask::Share };
                self.obey(at, back);
            }
            Action::Move(at, to) => {
                let from = self.guest.insert(at, to).unwrap();
                let host = Frame { owner: Who::Host, others: Vec::new(), token: 0 };
                let moved = std::mem::replace(self.frame(from), host);
                *self.frame(to) = moved;
            }
            _ => unreachable!("no hypercall: {action:?}"),
        }
    }

    fn obey(&mut self, at: u32, ask: Ask) {
        let frame = self.guest[&at];
        match ask {
            Ask::Share => self.frame(frame).others.push(Who::Host),
            Ask::Unshare => self.frame(frame).others.clear(),
            Ask::Relinquish => {
                self.guest.remove(&at);
                let frame = self.frame(frame);
                (frame.owner, frame.token) = (Who::Host, 0);
            }
        }
    }

    /// What a table is to say of a frame.
    fn state(&self, who: Who, at: u32) -> PageState {
        let frame = &self.frames[at as usize];
        match (frame.owner == who, frame.others.is_empty()) {
            (true, true) => PageState::Owned,
            (true, false) => PageState::SharedOwned,
            (false, _) if frame.others.contains(&who) => PageState::SharedBorrowed,
            (false, _) => PageState::NoPage,
        }
    }
}

/// Does it to the machine.
fn hypercall(rig: &mut Rig, action: Action) -> PkvmResult {
    let (vm, plain, machine) = (rig.vm, rig.plain, &mut rig.machine);
    match action {
        Action::ShareHyp(at) => machine.host_share_hyp(pfn(at)),
        Action::UnshareHyp(at) => machine.host_unshare_hyp(pfn(at)),
        Action::DonateHyp(at) => machine.host_donate_hyp(pfn(at)),
        Action::HypDonates(at) => machine.hyp_donate_host(pfn(at)),
        Action::ShareGuest(to, at) => machine.host_share_guest(plain, gfn(to), pfn(at)),
        Action::UnshareGuest(at) => machine.host_unshare_guest(plain, gfn(at)),
        Action::Donate(to, at) => machine.host_donate_guest(vm, gfn(to), pfn(at)),
        Action::Answer(at) => machine.answer_guest(vm, gfn(at)),
        Action::TakeBack(at) => machine.take_back_answer(vm, gfn(at)),
        Action::Move(at, to) => machine.host_move_guest(vm, gfn(at), pfn(to)),
        _ => unreachable!("no hypercall: {action:?}"),
    }
}

/// The entries that a hypercall writes.
fn entries(action: Action) -> u64 {
    match action {
        Action::ShareHyp(_) | Action::UnshareHyp(_) => 2,
        Action::ShareGuest(..) | Action::UnshareGuest(_) => 2,
        Action::Move(..) => 5,
        _ => 3,
    }
}

fn step(rig: &mut Rig, naive: &mut Naive, left: &mut Option<u64>, action: Action) {
    let domain: DomainId = rig.domain;
    match action {
        Action::Fail(nth) => {
            rig.machine.fail_hypervisor(Some(nth));
            *left = Some(nth);
        }
        Action::Asks(at, ask) => {
            let shared = naive.guest.get(&at).map(|frame| naive.reaches(Who::Host, *frame));
            let mut vcpu = rig.machine.vcpu(rig.vcpu).unwrap();
            let asked = match ask {
                Ask::Share => vcpu.mem_share(gfn(at)),
                Ask::Unshare => vcpu.mem_unshare(gfn(at)),
                Ask::Relinquish => vcpu.mem_relinquish(gfn(at)),
            };
            match shared {
                None => assert!(matches!(asked, Err(Exit::Fault(_))), "{asked:?}"),
                Some(shared) if shared == (ask == Ask::Unshare) => {
                    assert_eq!(asked, Ok(Ok(())));
                    naive.asked.insert(at, (ask, false));
                }
                Some(_) => assert_eq!(asked, Ok(Err(PkvmFail::Permission))),
            }
        }
        Action::Resume(at) => {
            let done = naive.asked.remove(&at).is_some_and(|(_, done)| done);
            assert_eq!(rig.machine.resume_guest(rig.vm, gfn(at)), Ok(done));
        }
        Action::Map(to, at) => {
            // Pinned by a process: it maps the page whoever has it, and stage 2 is asked later.
            let pin = rig.pin(at, PinKind::LongTerm).unwrap();
            let mapped = rig.machine.iommu_map(domain, gfn(to), pin);
            let may = !naive.device.contains_key(&to) && naive.reaches(Who::Host, at);
            assert_eq!(mapped.is_ok(), may, "{mapped:?}");
            if may {
                naive.device.insert(to, (at, pin));
            } else {
                rig.machine.unpin(pin).unwrap();
            }
        }
        Action::Unmap(at) => {
            let range = gfns(at.into(), u64::from(at) + 1);
            rig.machine.iommu_unmap(domain, range).unwrap();
            rig.machine.flush_iotlb(domain, range).unwrap();
            if let Some((_, pin)) = naive.device.remove(&at) {
                rig.machine.unpin(pin).unwrap();
            }
        }
        Action::Guest(at, token) => {
            let written = rig.guest_write(at, token);
            assert_eq!(written.is_ok(), naive.guest.contains_key(&at), "{written:?}");
            if let Some(frame) = naive.guest.get(&at).copied() {
                naive.frame(frame).token = token;
            }
        }
        Action::Host(at, token) => {
            let written = rig.host_write(at, token);
            assert_eq!(written.is_ok(), naive.reaches(Who::Host, at), "{written:?}");
            if written.is_ok() {
                naive.frame(at).token = token;
            }
        }
        Action::Device(at, token) => {
            let written = rig.device_write(at, token);
            assert_eq!(written.is_ok(), naive.device.contains_key(&at), "{written:?}");
            if let Some((frame, _)) = naive.device.get(&at).copied() {
                naive.frame(frame).token = token;
            }
        }
        call => {
            let wanted = entries(call);
            let memory = left.is_none_or(|left| wanted <= left);
            let is = hypercall(rig, call);
            let should = naive.apply(call, memory);
            assert_eq!(is, should, "{call:?}");
            // What is refused has written nothing, and so taken no memory.
            if should == Err(PkvmFail::NoMemory) {
                *left = None;
            } else if should.is_ok() {
                *left = left.map(|left| left - wanted);
            }
        }
    }
}

/// Whether the tables, and whoever looks through them, agree with what is true.
fn compare(rig: &mut Rig, naive: &Naive) {
    for at in 0..FRAMES {
        let state = |who| rig.machine.page_state(who, pfn(at)).unwrap().0;
        assert_eq!(state(Component::Host), naive.state(Who::Host, at), "host, frame {at}");
        assert_eq!(state(Component::Hypervisor), naive.state(Who::Hyp, at), "hyp, frame {at}");
        let guest = state(Component::Guest(rig.vm));
        assert_eq!(guest, naive.state(Who::Guest, at), "guest, frame {at}");
        let open = rig.machine.is_open_to_devices(pfn(at)).unwrap();
        assert_eq!(open, naive.reaches(Who::Host, at), "iommu, frame {at}");
    }
    for at in 0..4 {
        let read = rig.guest_read(at).ok();
        let should = naive.guest.get(&at).map(|frame| naive.frames[*frame as usize].token);
        assert_eq!(read, should, "what the guest reads at {at}");
        let read = rig.host_read(at).ok();
        let should = naive.reaches(Who::Host, at).then(|| naive.frames[at as usize].token);
        assert_eq!(read, should, "what the host reads of frame {at}");
    }
}

fn run(actions: &[Action], plant: Option<Plant>) {
    let (mut rig, mut naive, mut left) = (Rig::new(), Naive::new(), None);
    if let Some(plant) = plant {
        rig.machine.plant(plant, true);
    }
    for &action in actions {
        step(&mut rig, &mut naive, &mut left, action);
        compare(&mut rig, &naive);
    }
}

#[test]
fn the_four_tables_agree_with_who_owns_and_who_was_let_in() {
    proptest!(ProptestConfig::with_cases(400), |(actions in prop::collection::vec(action(), 1..60))| {
        run(&actions, None);
    });
}

#[test]
fn a_bug_in_the_hypervisor_is_found() {
    for plant in [Plant::HalfDonation, Plant::IommuForgotten, Plant::NotScrubbed, Plant::SkipFlush]
    {
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let config = Config { cases: 2000, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, rng);
        let found = runner.run(&prop::collection::vec(action(), 1..60), |actions| {
            let run = std::panic::catch_unwind(|| run(&actions, Some(plant)));
            run.map_err(|_| TestCaseError::fail("found"))
        });
        assert!(found.is_err(), "{plant:?} is not found");
    }
}
