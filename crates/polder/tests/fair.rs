//! Whoever waits for pages has his turn, however busy others are with them. Nothing here is timed:
//! what is counted is how many operations are begun after somebody waits, and before he has what he
//! waits for.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::ThreadId;

use polder::units::{Gfn, Gpa, PAGE_BYTES, PageCount, PageIndex, PageRange};
use polder::{
    Contents, Error, Holder, HostKind, Memory, Moment, OnBusy, PinKind, Reached, Slot, Visibility,
    Vm, VmId, Watch,
};
use polder_require::{Facility, require};

use Visibility::{Private, Shared};

/// After so many operations those who are busy give up: whoever waits would wait for ever.
const MANY: u64 = 500;

const ALL: u64 = 16;

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

/// Sees one thread wait, and counts what others begin meanwhile.
#[derive(Default)]
struct Overtakers {
    waiter: Mutex<Option<ThreadId>>,
    came: Mutex<Came>,
    changed: Condvar,
    /// The waiter has what he waited for.
    served: AtomicBool,
    begun: AtomicU64,
    /// The number of what the busy thread does, and what it was when the waiter began to wait.
    number: AtomicU64,
    number_then: AtomicU64,
}

#[derive(Default)]
struct Came {
    /// Somebody holds pages.
    held: bool,
    /// The waiter waits.
    waits: bool,
    /// How many of those who were busy are so no more.
    ended: usize,
}

impl Overtakers {
    fn goes_on(&self) -> bool {
        !self.served.load(SeqCst) && self.begun.load(SeqCst) < MANY
    }

    fn wait_until(&self, is: impl Fn(&Came) -> bool) {
        let came = self.came.lock().unwrap();
        drop(self.changed.wait_while(came, |came| !is(came)).unwrap());
    }

    /// Notes that the waiter waits, the first time.
    fn waits(&self) {
        let mut came = self.came.lock().unwrap();
        if !std::mem::replace(&mut came.waits, true) {
            self.number_then.store(self.number.load(SeqCst), SeqCst);
            self.changed.notify_all();
        }
    }

    /// Somebody else has begun. The first ones hold their pages until the waiter waits for them.
    fn begun(&self) {
        let mut came = self.came.lock().unwrap();
        if came.waits {
            self.begun.fetch_add(u64::from(!self.served.load(SeqCst)), SeqCst);
            return;
        }
        came.held = true;
        self.changed.notify_all();
        drop(came);
        self.wait_until(|came| came.waits);
    }
}

impl Watch for Overtakers {
    fn at(&self, moment: Moment) {
        let mine = *self.waiter.lock().unwrap() == Some(std::thread::current().id());
        match moment {
            Moment::Waits if mine => self.waits(),
            Moment::TouchWaits(..) => self.waits(),
            Moment::Answer(..) => self.served.store(true, SeqCst),
            Moment::Reached(Reached::Claimed) if mine => self.served.store(true, SeqCst),
            Moment::Reached(Reached::Claimed) => self.begun(),
            _ => {}
        }
    }
}

/// What is done over and over, with its number, until it fails.
type Busy<'a> = &'a (dyn Fn(&Memory, u64) -> Result<(), Error> + Sync);

/// Has somebody wait while others are busy. Returns how many operations were begun meanwhile.
fn overtakers(memory: &Memory, busy: &[Busy<'_>], wait: impl FnOnce(&Overtakers)) -> u64 {
    let seen = Arc::new(Overtakers::default());
    assert!(memory.watch(seen.clone()));
    let waited = std::thread::scope(|scope| {
        for busy in busy {
            let seen = &seen;
            scope.spawn(move || {
                let next = || seen.number.fetch_add(1, SeqCst) + 1;
                while seen.goes_on() && busy(memory, next()).is_ok() {}
                seen.came.lock().unwrap().ended += 1;
                seen.changed.notify_all();
            });
        }
        seen.wait_until(|came| came.held);
        *seen.waiter.lock().unwrap() = Some(std::thread::current().id());
        wait(&seen);
        let waited = seen.came.lock().unwrap().waits;
        seen.served.store(true, SeqCst);
        // Lets the others go in any case.
        seen.waits();
        waited
    });
    assert!(waited, "it had to wait");
    seen.begun.load(SeqCst)
}

/// Memory of the simulated machine, bound to a VM at 0.
fn memory(make: impl FnOnce(polder::Builder) -> polder::Builder) -> (Memory, VmId) {
    let builder = Memory::builder(PageCount::new(ALL).unwrap()).host(HostKind::Machine);
    let memory = make(builder).build().unwrap();
    let vm = memory.attach(Vm::Machine).unwrap();
    memory.bind(vm, Slot(0), Gfn::from(0), pages(0, ALL)).unwrap();
    (memory, vm)
}

/// Moves the first two pages: they stay what they are, with all that is in them.
fn moves(memory: &Memory, _: u64) -> Result<(), Error> {
    memory.move_pages(pages(0, 2), OnBusy::Wait)
}

/// The same of the second and the third page.
fn moves_others(memory: &Memory, _: u64) -> Result<(), Error> {
    memory.move_pages(pages(1, 3), OnBusy::Wait)
}

/// The same as [`moves`], with its number in the first page.
fn numbers(memory: &Memory, number: u64) -> Result<(), Error> {
    let bytes = number.to_le_bytes();
    memory.simulated(|machine, object, _| machine.object_write(object, 0, &bytes))?.unwrap();
    moves(memory, number)
}

/// By how many moves somebody is overtaken who waits to read the number.
fn overtakers_of_a_read(read: impl FnOnce(&Memory, VmId, &mut [u8])) -> u64 {
    let (memory, vm) = memory(polder::Builder::shared);
    // The machine makes memory when it is touched.
    memory.host_view().touch_write(0, &[0]).unwrap();
    let mut overtakers_of_it = 0;
    overtakers(&memory, &[&numbers], |seen| {
        let mut bytes = [0; 8];
        read(&memory, vm, &mut bytes);
        overtakers_of_it = u64::from_le_bytes(bytes) - seen.number_then.load(SeqCst);
    });
    overtakers_of_it
}

#[test]
fn a_vcpu_that_waits_makes_its_access_before_the_next_operation_but_one() {
    let overtakers = overtakers_of_a_read(|memory, vm, bytes| {
        memory.machine_vcpu(vm).unwrap().read(Gpa::new(0), Shared, bytes).unwrap();
    });
    // The number is written before its move has to wait.
    assert!(overtakers <= 1, "{overtakers} moves came first");
}

#[test]
fn a_copy_that_waits_is_made_before_the_next_operation_but_one() {
    let overtakers = overtakers_of_a_read(|memory, vm, bytes| {
        memory.read(vm, Gpa::new(0), bytes).unwrap();
    });
    assert!(overtakers <= 1, "{overtakers} moves came first");
}

/// One operation may have begun, and not have told it, before somebody had to wait for another.
fn assert_few(overtakers: u64, busy: usize) {
    assert!(overtakers <= busy as u64, "{overtakers} operations came first");
}

#[test]
fn an_operation_that_waits_for_pages_of_several_others_is_the_next() {
    let wait: [fn(&Memory); 4] = [
        |memory| {
            let kept = Contents::Preserve;
            memory.convert(pages(0, 4), Private, kept, OnBusy::Wait).unwrap();
        },
        |memory| memory.discard(pages(0, ALL), OnBusy::Wait).unwrap(),
        |memory| memory.move_pages(pages(0, 3), OnBusy::Wait).unwrap(),
        |memory| drop(memory.simulated_device(Holder::new("a nic")).unwrap()),
    ];
    for wait in wait {
        let (memory, _) = memory(polder::Builder::shared);
        let busy: [Busy<'_>; 2] = [&moves, &moves_others];
        assert_few(overtakers(&memory, &busy, |_| wait(&memory)), busy.len());
    }
}

#[test]
fn a_pin_that_waits_is_the_next() {
    for kind in [PinKind::Short, PinKind::LongTerm, PinKind::Exclusive] {
        let (memory, _) = memory(polder::Builder::shared);
        let busy: [Busy<'_>; 2] = [&moves, &moves_others];
        let overtakers = overtakers(&memory, &busy, |seen| {
            let (pages, holder) = (pages(0, 3), Holder::new("a queue"));
            let pin = memory.pin_with(pages, kind, holder, OnBusy::Wait).unwrap();
            // From here on moves are refused.
            seen.wait_until(|came| came.ended == 2);
            drop(pin);
        });
        // Who pins exclusively closes the pages to pins first, and may be overtaken before he
        // looks.
        if kind != PinKind::Exclusive {
            assert_few(overtakers, busy.len());
        }
    }
}

#[test]
fn a_population_and_the_end_of_all_population_have_their_turn() {
    let wait: [fn(&Memory); 2] = [
        |memory| memory.populate(pages(0, 1), &[7; PAGE_BYTES]).unwrap(),
        |memory| memory.settle().unwrap(),
    ];
    for wait in wait {
        let (memory, _) = memory(|builder| builder.shared().owed());
        let converts = |memory: &Memory, number: u64| {
            let to = if number.is_multiple_of(2) { Shared } else { Private };
            let owed = memory.facts(pages(0, 1))?[0].1.population == polder::Population::Owed;
            let first = pages(0, 2);
            match owed {
                true => memory.convert(first, to, Contents::Preserve, OnBusy::Wait).map(drop),
                false => Err(polder::Refusal::Whole { page: PageIndex::from(0) }.into()),
            }
        };
        let busy: [Busy<'_>; 1] = [&converts];
        assert_few(overtakers(&memory, &busy, |_| wait(&memory)), busy.len());
    }
}

#[test]
fn a_touch_that_waits_is_answered_before_the_next_operation() {
    for kind in [HostKind::Machine, HostKind::Memfd] {
        let builder = Memory::builder(PageCount::new(ALL).unwrap()).host(kind).shared();
        let Some(memory) = require(Facility::Userfault, builder.build()) else { continue };
        let converts = |memory: &Memory, number: u64| {
            let to = if number.is_multiple_of(2) { Shared } else { Private };
            memory.convert(pages(0, 2), to, Contents::Preserve, OnBusy::Wait).map(drop)
        };
        let busy: [Busy<'_>; 1] = [&converts];
        let overtakers = overtakers(&memory, &busy, |_| {
            // Denied or not: it is told.
            let _ = memory.host_view().touch_read(0, &mut [0]);
        });
        assert_few(overtakers, busy.len());
    }
}
