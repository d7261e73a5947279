//! The machine against a naive oracle that keeps every fact page by page: after each operation
//! of a random sequence the outcome, every count and every byte must agree.

#![expect(clippy::unwrap_used, reason = "a test")]

mod action;
mod apply;
mod naive;

use std::collections::BTreeSet;
use std::ops::Range;

use polder_machine::{
    Contents, LockOwner, Machine, ObjectId, Plant, ProcessId, Thread, VcpuId, View, VmId, Vpn,
    VpnRange,
};
use polder_units::{Gfn, Level, PageCount, PageIndex, PageRange};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::action::{Action, action};
use crate::naive::{Naive, geometry};

const PAGES: u64 = 16;
const FRAMES: u32 = 1024;
const OWNER: LockOwner = LockOwner(1);

/// The machine with two processes (0 watched, up to 1G; 1 plain) and a guest, all onto one object.
struct Rig {
    machine: Machine,
    object: ObjectId,
    processes: [ProcessId; 2],
    vm: VmId,
    vcpu: VcpuId,
    naive: Naive,
}

fn vpns(page: u64, len: u64) -> VpnRange {
    VpnRange::between(page, page + len).unwrap()
}

fn page_range(page: u64, len: u64) -> PageRange {
    PageRange::between(page, page + len).unwrap()
}

fn vpn(page: u64) -> Vpn {
    Vpn::new(page).unwrap()
}

fn index(page: u64) -> PageIndex {
    PageIndex::new(page).unwrap()
}

impl Rig {
    fn new(contents: Contents) -> Self {
        let config = polder_machine::Config {
            frames: PageCount::from(FRAMES),
            geometry: geometry(),
            contents,
            tlb_entries: 4,
            accessed_dirty: true,
        };
        let mut machine = Machine::new(config).unwrap();
        let object = machine.create_object(PageCount::new(PAGES).unwrap()).unwrap();
        let views = [View { largest: Level::Size1G, ..View::HOST }, View::PLAIN];
        let processes = views.map(|view| {
            let process = machine.create_process().unwrap();
            machine.mmap(process, vpns(0, PAGES), object, index(0), view).unwrap();
            process
        });
        let vm = machine.create_vm().unwrap();
        machine.bind(vm, Gfn::from(0), object, page_range(0, PAGES)).unwrap();
        let vcpu = machine.add_vcpu(vm).unwrap();
        Self { machine, object, processes, vm, vcpu, naive: Naive::default() }
    }

    fn thread(&self, process: usize) -> Thread {
        Thread { process: self.processes[process], index: 0 }
    }

    fn zap_guest(&mut self, range: &Range<u64>) {
        let gfns = polder_units::GfnRange::between(range.start, range.end).unwrap();
        self.machine.tdp_zap(self.vm, gfns).unwrap();
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Allocate(..) | Action::Punch(..) | Action::Zero(..) => self.memory(action),
            Action::Split(..) | Action::Merge(..) => self.reshape(action),
            Action::Map(..) | Action::MapRange(..) => self.map(action),
            Action::Unmap(..) | Action::Zap(..) | Action::Poison(..) => self.unmap(action),
            Action::Write(..) | Action::Read(..) => self.touch(action),
            Action::Pin(..) | Action::GupFast(..) | Action::Unpin(..) | Action::Dma(..) => {
                self.pin(action);
            }
            Action::GuestWrite(page, value) => self.guest(page, Some(value)),
            Action::GuestRead(page) => self.guest(page, None),
        }
    }

    fn check(&self) {
        self.machine.audit().unwrap();
        for page in 0..PAGES {
            let backing = self.machine.backing(self.object, index(page)).unwrap();
            assert_eq!(backing.map(|it| it.level), self.naive.level(page), "page {page}");
            let Some(backing) = backing else { continue };
            let counts = self.machine.counts(backing.pfn).unwrap();
            let (refs, maps, pins) = self.naive.counts(page);
            let is = (counts.refs, u64::from(counts.mapcount), u64::from(counts.pincount));
            assert_eq!(is, (refs, maps, pins), "page {page}");
            let mut word = [0; 8];
            self.machine.object_read(self.object, page << 12, &mut word).unwrap();
            assert_eq!(u64::from_le_bytes(word), self.naive.values[self.naive.pages[&page]]);
        }
        let cached: BTreeSet<_> =
            self.naive.pages.values().map(|it| self.naive.folio_of[*it]).collect();
        let pinned = self.naive.pins.iter().map(|(_, frame)| self.naive.folio_of[*frame]);
        let folios: BTreeSet<_> = cached.into_iter().chain(pinned).collect();
        let pages = |folio: &usize| geometry().pages(self.naive.levels[*folio]).get();
        let used: u64 = folios.iter().map(pages).sum();
        assert_eq!(self.machine.free_frames(), u64::from(FRAMES) - used);
    }

    /// Takes everything down; nothing may be left.
    fn tear_down(mut self) {
        self.machine.destroy_vm(self.vm).unwrap();
        for process in self.processes {
            self.machine.exit_process(process).unwrap();
        }
        self.machine.destroy_object(self.object).unwrap();
        for (pin, _) in self.naive.pins {
            self.machine.unpin(pin).unwrap();
        }
        assert_eq!(self.machine.free_frames(), u64::from(FRAMES));
        self.machine.audit().unwrap();
    }
}

proptest! {
    #[test]
    fn every_count_and_every_byte_agrees_with_the_oracle(
        symbolic: bool,
        actions in prop::collection::vec(action(), 1..80),
    ) {
        let mut rig = Rig::new(if symbolic { Contents::Symbolic } else { Contents::Bytes });
        for action in actions {
            rig.act(action);
            rig.check();
        }
        rig.tear_down();
    }
}

#[test]
fn the_oracle_catches_skipped_flushes_and_lost_counts() {
    for plant in [Plant::SkipFlush, Plant::LostMapcount, Plant::LostPin] {
        let config = Config { max_shrink_iters: 0, failure_persistence: None, ..Config::default() };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let mut runner = TestRunner::new_with_rng(config, rng);
        let outcome = runner.run(&prop::collection::vec(action(), 1..80), |actions| {
            let mut rig = Rig::new(Contents::Symbolic);
            rig.machine.plant(plant, true);
            for action in actions {
                rig.act(action);
                rig.check();
            }
            Ok(())
        });
        assert!(outcome.is_err(), "{plant:?} was not noticed");
    }
}
