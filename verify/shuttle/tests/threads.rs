//! The driver, its fault thread and host `machine` on threads whose every turn a scheduler picks.
//!
//! No wait has a limit here: somebody who is not told of what he waits for is a deadlock, which
//! shuttle reports with the schedule that leads there. `POLDER_SHUTTLE` is the number of schedules
//! of each test, by each of two schedulers.

#![expect(clippy::unwrap_used, reason = "a failing test may panic anywhere")]

use std::sync::Arc;

use polder_shuttle::machine::RmpFail;
use polder_shuttle::units::{GfnRange, Gpa, Level, PAGE_BYTES, PageCount, PageRange};
use polder_shuttle::{
    Contents, Error, GuestExit, Holder, HostKind, MachineVcpu, Memory, OnBusy, PinKind, Platform,
    Refusal, Slot, Visibility, Vm, VmId,
};
use shuttle::thread;

use Visibility::{Private, Shared};

/// How many schedules unless `POLDER_SHUTTLE` says otherwise.
const SCHEDULES: usize = 2000;

/// How many times may the thread that runs be changed for another in the second scheduler.
const CHANGES: usize = 3;

const VM: u64 = 0x4000_0000;

fn explore(test: fn()) {
    let said = std::env::var("POLDER_SHUTTLE").ok();
    let schedules = said.map_or(SCHEDULES, |said| said.parse().expect("a number of schedules"));
    shuttle::check_random(test, schedules);
    shuttle::check_pct(test, schedules, CHANGES);
}

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

fn gpa(page: u64) -> Gpa {
    Gpa::new(VM + page * PAGE_BYTES as u64)
}

fn memory(
    pages: PageRange,
    make: impl FnOnce(polder_shuttle::Builder) -> polder_shuttle::Builder,
) -> Arc<Memory> {
    let builder = Memory::builder(pages.count()).host(HostKind::Machine);
    let memory = make(builder).build().unwrap();
    let vm = memory.attach(Vm::Machine).unwrap();
    assert_eq!(vm, VmId(0));
    memory.bind(vm, Slot(0), gpa(0).gfn(), pages).unwrap();
    Arc::new(memory)
}

/// Starts a thread of the memory's; its end is waited for before the memory's.
fn spawn(
    memory: &Arc<Memory>,
    body: impl FnOnce(&Memory) + Send + 'static,
) -> thread::JoinHandle<()> {
    let memory = Arc::clone(memory);
    thread::spawn(move || body(&memory))
}

/// Waits for all, and ends the memory here: its fault thread has to be joined, too.
fn end(memory: Arc<Memory>, threads: Vec<thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(memory.quarantined(), []);
    drop(Arc::into_inner(memory).expect("no thread has it any more"));
}

fn visibility(memory: &Memory, page: u64) -> Visibility {
    memory.facts(pages(page, page + 1)).unwrap()[0].1.visibility
}

fn denied(result: Result<(), Error>) -> bool {
    match result {
        Ok(()) => false,
        Err(Error::Copy(_) | Error::Refused(Refusal::Private { .. })) => true,
        Err(other) => panic!("{other}"),
    }
}

/// A page's bytes are of one write, whoever looks.
fn whole(bytes: &[u8]) -> u8 {
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "torn: {:?}", &bytes[..16]);
    bytes[0]
}

#[test]
fn who_touches_a_page_that_changes_hands_is_answered_and_who_holds_it_keeps_it() {
    explore(|| {
        let memory = memory(pages(0, 2), polder_shuttle::Builder::shared);
        let converter = spawn(&memory, |memory| {
            let to = |to| memory.convert(pages(0, 2), to, Contents::Preserve, OnBusy::Wait);
            match to(Private) {
                Ok(_) => assert_eq!(to(Shared).unwrap(), PageCount::new(2).unwrap()),
                Err(Error::Refused(Refusal::Pinned { .. })) => {}
                Err(other) => panic!("{other}"),
            }
        });
        let device = spawn(&memory, |memory| {
            let view = memory.host_view();
            if !denied(view.touch_write(0, &[7; 64])) {
                let _ = denied(view.touch_read(0, &mut [0; 64]));
            }
        });
        let copier = spawn(&memory, |memory| {
            let mut bytes = [1; 64];
            if !denied(memory.read(VmId(0), gpa(0), &mut bytes)) {
                assert!([0, 7].contains(&whole(&bytes)));
            }
        });
        let pinner = spawn(&memory, |memory| {
            match memory.pin(pages(1, 2), PinKind::Short, Holder::new("a queue")) {
                Ok(pin) => {
                    assert_eq!(visibility(memory, 1), Shared, "it is pinned");
                    assert!(!denied(memory.host_view().touch_write(4096, &[9; 8])));
                    drop(pin);
                }
                Err(Error::Refused(Refusal::Private { .. } | Refusal::Busy { .. })) => {}
                Err(other) => panic!("{other}"),
            }
        });
        let vcpu = memory.machine_vcpu(VmId(0)).unwrap();
        let guest = thread::spawn(move || {
            vcpu.write(gpa(1), Private, &[5; 32]).unwrap();
            let mut bytes = [0; 8];
            vcpu.read(gpa(1), Private, &mut bytes).unwrap();
            assert!([5, 9].contains(&whole(&bytes)));
        });
        end(memory, vec![converter, device, copier, pinner, guest]);
    });
}

#[test]
fn nobody_sees_a_page_before_it_is_whole_and_nobody_waits_for_ever() {
    explore(|| {
        let memory = memory(pages(0, 2), |builder| builder.shared().owed());
        let source = spawn(&memory, |memory| {
            memory.populate(pages(0, 1), &[7; PAGE_BYTES]).unwrap();
            memory.fail(pages(1, 2)).unwrap();
        });
        let devices = (0..2).map(|page| {
            spawn(&memory, move |memory| {
                let mut bytes = [0; 256];
                let touched = memory.host_view().touch_read(page * 4096, &mut bytes);
                assert_eq!(denied(touched), page == 1);
                assert_eq!(whole(&bytes), if page == 0 { 7 } else { 0 });
            })
        });
        let mut threads: Vec<_> = devices.collect();
        let vcpus = (0..2).map(|page| {
            let vcpu = memory.machine_vcpu(VmId(0)).unwrap();
            thread::spawn(move || {
                let mut bytes = [0; 256];
                match vcpu.read(gpa(page), Private, &mut bytes) {
                    Ok(()) => assert_eq!((page, whole(&bytes)), (0, 7)),
                    Err(GuestExit::MemoryFault(_)) => assert_eq!(page, 1),
                    Err(other) => panic!("{other}"),
                }
            })
        });
        threads.extend(vcpus);
        threads.push(source);
        end(memory, threads);
    });
}

#[test]
fn two_conversions_a_discard_and_a_slot_that_moves_get_in_nobodys_way_for_good() {
    explore(|| {
        let memory = memory(pages(0, 4), polder_shuttle::Builder::shared);
        let convert = |range: PageRange, to| {
            spawn(&memory, move |memory| {
                memory.convert(range, to, Contents::Zero, OnBusy::Wait).unwrap();
            })
        };
        let converters = [convert(pages(0, 3), Private), convert(pages(1, 4), Shared)];
        let discard = spawn(&memory, |memory| memory.discard(pages(2, 4), OnBusy::Wait).unwrap());
        let slots = spawn(&memory, |memory| {
            memory.unbind(VmId(0), Slot(0)).unwrap();
            memory.bind(VmId(0), Slot(1), gpa(0).gfn(), pages(2, 4)).unwrap();
        });
        let vcpu = memory.machine_vcpu(VmId(0)).unwrap();
        let guest = thread::spawn(move || match vcpu.write(gpa(1), Private, &[1; 8]) {
            Ok(()) | Err(GuestExit::MemoryFault(_)) => {}
            Err(other) => panic!("{other}"),
        });
        let mut threads = vec![discard, slots, guest];
        threads.extend(converters);
        end(memory, threads);
    });
}

#[test]
fn a_vcpu_that_waits_for_contents_comes_back_when_it_is_kicked_and_told() {
    use std::sync::atomic::Ordering;
    explore(|| {
        let memory = memory(pages(0, 1), |builder| builder.shared().owed());
        let vcpu = memory.machine_vcpu(VmId(0)).unwrap();
        let kicker = vcpu.kicker();
        let guest = thread::spawn(move || match vcpu.read(gpa(0), Private, &mut [0; 8]) {
            Ok(()) | Err(GuestExit::Kicked) => {}
            Err(other) => panic!("{other}"),
        });
        kicker.store(true, Ordering::Release);
        memory.settle().unwrap();
        end(memory, vec![guest]);
    });
}

/// Accepts a page of 4K, whatever its entry's size.
fn accept(vcpu: &MachineVcpu, page: u64) -> Result<(), GuestExit> {
    match vcpu.pvalidate(gpa(page).gfn(), Level::Size4K, true)? {
        Ok(_) | Err(RmpFail::SizeMismatch) => Ok(()),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn an_snp_guests_vcpus_and_a_page_state_change_all_end() {
    explore(|| {
        let all = pages(0, 4);
        let memory = memory(all, |builder| builder.platform(Platform::Snp));
        let vcpus = [0, 1].map(|page| {
            let vcpu = memory.machine_vcpu(VmId(0)).unwrap();
            thread::spawn(move || {
                let accepted = accept(&vcpu, page);
                let written = accepted.and_then(|()| vcpu.write(gpa(page), Private, &[3; 8]));
                match written {
                    Ok(()) | Err(GuestExit::MemoryFault(_) | GuestExit::NotValidated(_)) => {}
                    Err(other) => panic!("{other}"),
                }
            })
        });
        let converter = spawn(&memory, |memory| {
            let (vm, gfns) = (VmId(0), GfnRange::new(gpa(1).gfn(), PageCount::ONE).unwrap());
            let to = |to| memory.convert_gfns(vm, gfns, to, Contents::Unspecified, OnBusy::Wait);
            for kind in [Shared, Private] {
                match to(kind) {
                    Ok(pages) => assert!(pages <= PageCount::ONE),
                    Err(Error::Refused(Refusal::Unbound { .. })) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        });
        let discard = spawn(&memory, |memory| memory.discard(pages(1, 3), OnBusy::Wait).unwrap());
        let slots = spawn(&memory, |memory| {
            memory.unbind(VmId(0), Slot(0)).unwrap();
            memory.bind(VmId(0), Slot(1), gpa(0).gfn(), pages(0, 4)).unwrap();
        });
        let mut threads = vec![converter, discard, slots];
        threads.extend(vcpus);
        end(memory, threads);
    });
}

#[test]
fn requests_of_a_pkvm_guests_vcpus_that_overlap_are_all_carried_out() {
    explore(|| {
        let memory = memory(pages(0, 3), |builder| builder.platform(Platform::Pkvm));
        let threads = [(0, 2, Shared), (1, 3, Shared), (0, 3, Private)].map(|(start, end, to)| {
            let vcpu = memory.machine_vcpu(VmId(0)).unwrap();
            let gfns = GfnRange::between(VM / 4096 + start, VM / 4096 + end).unwrap();
            thread::spawn(move || assert!(vcpu.convert(gfns, to).unwrap().get() <= 3))
        });
        let [first, others @ ..] = threads;
        first.join().unwrap();
        others.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(memory.quarantined(), []);
        end(memory, Vec::new());
    });
}

/// Notes the number of the move that is going on when a thread first waits.
struct Waited {
    thread: std::sync::Mutex<Option<thread::ThreadId>>,
    number: std::sync::atomic::AtomicU64,
    then: std::sync::OnceLock<u64>,
}

impl polder_shuttle::Watch for Waited {
    fn at(&self, moment: polder_shuttle::Moment) {
        let mine = *self.thread.lock().unwrap() == Some(thread::current().id());
        if mine && moment == polder_shuttle::Moment::Waits {
            let _ = self.then.set(self.number.load(std::sync::atomic::Ordering::SeqCst));
        }
    }
}

/// How many moves are made one right after the other.
const MOVES: u64 = 6;

#[test]
fn whoever_waits_is_overtaken_by_one_operation_at_most() {
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
    explore(|| {
        let memory = memory(pages(0, 1), polder_shuttle::Builder::shared);
        memory.write(VmId(0), gpa(0), &[0; 8]).unwrap();
        let (thread, then) = (std::sync::Mutex::new(None), std::sync::OnceLock::new());
        let waited = Arc::new(Waited { thread, number: AtomicU64::new(0), then });
        assert!(memory.watch(waited.clone()));
        let moving = Arc::clone(&waited);
        let mover = spawn(&memory, move |memory| {
            for number in 1..=MOVES {
                moving.number.store(number, SeqCst);
                let bytes = number.to_le_bytes();
                let write = |machine: &mut polder_shuttle::machine::Machine, object, _| {
                    machine.object_write(object, 0, &bytes)
                };
                memory.simulated(write).unwrap().unwrap();
                memory.move_pages(pages(0, 1), OnBusy::Wait).unwrap();
            }
        });
        let vcpu = memory.machine_vcpu(VmId(0)).unwrap();
        let guest = thread::spawn(move || {
            *waited.thread.lock().unwrap() = Some(thread::current().id());
            let mut bytes = [0; 8];
            vcpu.read(gpa(0), Shared, &mut bytes).unwrap();
            let number = u64::from_le_bytes(bytes);
            if let Some(then) = waited.then.get() {
                // The number is written before its move has to wait.
                assert!(number <= then + 1, "{} moves came first", number - then);
            }
        });
        end(memory, vec![mover, guest]);
    });
}
