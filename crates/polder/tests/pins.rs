//! Pins of the library's callers: short and long ones, exclusive ones, and who waits for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use polder::units::{PageCount, PageRange};
use polder::{Contents, Error, Holder, HostKind, Memory, OnBusy, PinKind, Refusal, Visibility};

use PinKind::{Exclusive, LongTerm, Short};
use Visibility::{Private, Shared};

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in the test")
}

/// Shared memory of 16 pages.
fn memory() -> Arc<Memory> {
    let memory = Memory::builder(PageCount::from(16)).host(HostKind::Machine).shared().build();
    Arc::new(memory.expect("the machine needs nothing"))
}

fn to(memory: &Memory, range: PageRange, to: Visibility, on_busy: OnBusy) -> Result<(), Error> {
    memory.convert(range, to, Contents::Preserve, on_busy).map(drop)
}

fn pinned(page: u32, kind: PinKind, holder: &'static str) -> Error {
    Refusal::Pinned { page: page.into(), kind, holder: Holder::new(holder) }.into()
}

fn waits(milliseconds: u64) -> OnBusy {
    OnBusy::WaitForPins { at_most: Duration::from_millis(milliseconds) }
}

#[test]
fn a_holder_pins_and_unpins_and_is_named() {
    let memory = memory();
    let disk = memory.pinner(Short, Holder::new("virtio-blk")).unwrap();
    let net = memory.pinner(LongTerm, Holder::new("virtio-net")).unwrap();
    let first = disk.pin(pages(3, 6), OnBusy::Wait).unwrap();
    let second = net.pin(pages(5, 16), OnBusy::Wait).unwrap();
    let all = || to(&memory, pages(0, 16), Private, OnBusy::Wait);
    assert_eq!(all(), Err(pinned(3, Short, "virtio-blk")));
    drop(first);
    assert_eq!(all(), Err(pinned(5, LongTerm, "virtio-net")));
    assert_eq!(
        memory.discard(pages(15, 16), OnBusy::Wait),
        Err(pinned(15, LongTerm, "virtio-net"))
    );
    to(&memory, pages(0, 5), Private, OnBusy::Wait).unwrap();
    assert_eq!(second.range(), pages(5, 16));
    drop(second);
    all().unwrap();
    let refused = disk.pin(pages(2, 3), OnBusy::Wait).unwrap_err();
    assert_eq!(refused, Refusal::Private { page: 2_u32.into() }.into());
    let beyond = disk.pin(pages(15, 17), OnBusy::Wait).unwrap_err();
    assert!(matches!(beyond, Error::Refused(Refusal::Beyond { .. })), "{beyond}");
    assert!(memory.pinner(Exclusive, Holder::new("a driver")).is_err());
}

#[test]
fn an_exclusive_pin_excludes_every_other_and_is_excluded_by_any() {
    let memory = memory();
    let pin = |kind, holder| memory.pin(pages(4, 5), kind, Holder::new(holder));
    for kind in [Short, LongTerm] {
        let plain = pin(kind, "virtio-net").unwrap();
        assert_eq!(pin(Exclusive, "a hypervisor").unwrap_err(), pinned(4, kind, "virtio-net"));
        drop(plain);
    }
    let queue = memory.pinner(Short, Holder::new("a queue")).unwrap();
    let in_flight = queue.pin(pages(0, 16), OnBusy::Wait).unwrap();
    assert_eq!(pin(Exclusive, "a hypervisor").unwrap_err(), pinned(4, Short, "a queue"));
    drop(in_flight);

    let exclusive = pin(Exclusive, "a hypervisor").unwrap();
    for kind in [Short, LongTerm, Exclusive] {
        let refused = pin(kind, "virtio-net").unwrap_err();
        assert_eq!(refused, pinned(4, Exclusive, "a hypervisor"));
    }
    let refused = queue.pin(pages(0, 16), OnBusy::Wait).unwrap_err();
    assert_eq!(refused, pinned(4, Exclusive, "a hypervisor"));
    assert_eq!(refused.errno(), polder::Errno::EAGAIN);
    drop(queue.pin(pages(5, 16), OnBusy::Wait).unwrap());
    let refused = to(&memory, pages(0, 16), Private, OnBusy::Wait).unwrap_err();
    assert_eq!(refused, pinned(4, Exclusive, "a hypervisor"));
    // What is no pin goes on: a touch, and a copy.
    memory.host_view().touch_write(4 * 4096, &[7]).unwrap();
    drop(exclusive);
    drop(queue.pin(pages(0, 16), OnBusy::Wait).unwrap());
    to(&memory, pages(4, 5), Private, OnBusy::Wait).unwrap();
    assert_eq!(
        pin(Exclusive, "a hypervisor").unwrap_err(),
        Refusal::Private { page: 4_u32.into() }.into()
    );
}

#[test]
fn an_exclusive_pin_and_a_device_exclude_each_other() {
    let memory = memory();
    let nic = memory.simulated_device(Holder::new("nic")).unwrap();
    let pin = |range| memory.pin(range, Exclusive, Holder::new("a hypervisor"));
    assert_eq!(pin(pages(4, 6)).unwrap_err(), pinned(4, LongTerm, "nic"));
    let waited = memory.pin_with(pages(4, 6), Exclusive, Holder::new("a hypervisor"), waits(5));
    assert_eq!(waited.unwrap_err(), pinned(4, LongTerm, "nic"), "it never lets go");
    // What it was refused it has not closed, and plain pins do not mind a device.
    drop(memory.pin(pages(0, 16), LongTerm, Holder::new("vhost-net")).unwrap());
    nic.write(4 * 4096, &[9]).unwrap();
    nic.detach().unwrap();

    let exclusive = pin(pages(4, 6)).unwrap();
    let refused = memory.simulated_device(Holder::new("nic")).unwrap_err();
    assert_eq!(refused, pinned(4, Exclusive, "a hypervisor"));
    drop(exclusive);
    let nic = memory.simulated_device(Holder::new("nic")).unwrap();
    let mut byte = [0];
    nic.read(4 * 4096, &mut byte).unwrap();
    assert_eq!(byte, [9]);
}

#[test]
fn a_pinned_page_is_mapped_before_it_is_touched() {
    let memory = memory();
    let pin = memory.pin(pages(2, 10), LongTerm, Holder::new("vhost-net")).unwrap();
    memory.host_view().touch_write(2 * 4096, &[1; 8 * 4096]).unwrap();
    // A fault is counted once it was answered.
    memory.host_view().touch_write(0, &[1]).unwrap();
    assert!(memory.statistics().host_faults <= 1, "of the pinned ones none");
    drop(pin);
    to(&memory, pages(2, 3), Private, OnBusy::Wait).unwrap();
    assert!(memory.host_view().touch_read(2 * 4096, &mut [0]).is_err(), "mapped or not");
    // Where a page can't be had there is no pin.
    memory.simulated(|machine, _, _| machine.fail_allocation(Some(0))).unwrap();
    let refused = memory.pin(pages(12, 13), LongTerm, Holder::new("vhost-net")).unwrap_err();
    assert_eq!(refused.errno(), polder::Errno::ENOMEM);
    memory.simulated(|machine, _, _| machine.fail_allocation(None)).unwrap();
    to(&memory, pages(12, 13), Private, OnBusy::Refuse).unwrap();
}

#[test]
fn a_move_waits_for_pins_if_it_is_asked_to() {
    let memory = memory();
    let held = memory.pin(pages(2, 4), LongTerm, Holder::new("vfio")).unwrap();
    assert_eq!(memory.move_pages(pages(0, 8), waits(20)), Err(pinned(2, LongTerm, "vfio")));
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| memory.move_pages(pages(0, 8), waits(60_000)));
        while memory.pin_with(pages(6, 7), Short, Holder::new("a queue"), OnBusy::Refuse).is_ok() {
            assert!(!mover.is_finished(), "page 2 is pinned");
            std::thread::yield_now();
        }
        drop(held);
        mover.join().unwrap().unwrap();
    });
}

#[test]
fn who_waits_for_pins_has_his_turn_when_the_last_goes_and_none_comes_between() {
    let memory = memory();
    for kind in [None, Some(Exclusive)] {
        let disk = memory.pinner(LongTerm, Holder::new("virtio-blk")).unwrap();
        let held = disk.pin(pages(2, 4), OnBusy::Wait).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| match kind {
                None => to(&memory, pages(0, 8), Private, waits(60_000)),
                Some(kind) => {
                    let holder = Holder::new("a hypervisor");
                    memory.pin_with(pages(0, 8), kind, holder, waits(60_000)).map(drop)
                }
            });
            // From some moment on nobody new can pin.
            while disk.pin(pages(6, 7), OnBusy::Refuse).is_ok() {
                assert!(!waiter.is_finished(), "page 2 is pinned");
                std::thread::yield_now();
            }
            // He who holds a page is not denied it.
            memory.host_view().touch_write(2 * 4096, &[7]).unwrap();
            assert!(!waiter.is_finished());
            drop(held);
            waiter.join().unwrap().unwrap();
        });
        to(&memory, pages(0, 16), Shared, OnBusy::Wait).unwrap();
        drop(disk.pin(pages(0, 16), OnBusy::Wait).unwrap());
    }
}

#[test]
fn who_never_lets_go_is_named_at_the_deadline_and_is_in_the_way_of_nobody_then() {
    let memory = memory();
    let held = memory.pin(pages(2, 4), LongTerm, Holder::new("vfio")).unwrap();
    let begun = now();
    let refused = to(&memory, pages(0, 8), Private, waits(30)).unwrap_err();
    assert_eq!(refused, pinned(2, LongTerm, "vfio"));
    assert_eq!(memory.discard(pages(3, 4), waits(30)), Err(pinned(3, LongTerm, "vfio")));
    let refused = memory.pin_with(pages(0, 4), Exclusive, Holder::new("a hypervisor"), waits(30));
    assert_eq!(refused.unwrap_err(), pinned(2, LongTerm, "vfio"));
    assert!(begun.elapsed() >= Duration::from_millis(90));
    drop(memory.pin(pages(0, 8), Short, Holder::new("another")).unwrap());
    drop(held);
    to(&memory, pages(0, 8), Private, OnBusy::Wait).unwrap();
}

#[expect(clippy::disallowed_methods, reason = "the deadline is what is tested")]
fn now() -> Instant {
    Instant::now()
}

#[test]
fn a_holder_that_dies_lets_go_and_is_told_of() {
    let memory = memory();
    let queue = memory.pinner(Short, Holder::new("a queue")).unwrap();
    let died = std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            let _pin = memory.pin(pages(1, 3), LongTerm, Holder::new("virtio-gpu")).unwrap();
            let _exclusive = memory.pin(pages(8, 9), Exclusive, Holder::new("virtio-gpu")).unwrap();
            let _short = queue.pin(pages(4, 5), OnBusy::Wait).unwrap();
            panic!("a device model's bug");
        });
        device.join()
    });
    assert!(died.is_err());
    let dead = memory.dead_pins();
    let dead: Vec<_> = dead.iter().map(|pin| (pin.range, pin.kind, &pin.holder)).collect();
    let (gpu, queue) = (Holder::new("virtio-gpu"), Holder::new("a queue"));
    let expected = [
        (pages(4, 5), Short, &queue),
        (pages(8, 9), Exclusive, &gpu),
        (pages(1, 3), LongTerm, &gpu),
    ];
    assert_eq!(dead, expected);
    to(&memory, pages(0, 16), Private, OnBusy::Refuse).unwrap();
}

/// INV-7 under load: exclusive pins that overlap, plain ones and conversions from several threads.
#[test]
fn no_pin_is_beside_an_exclusive_one_and_no_pinned_page_is_private() {
    let memory = memory();
    // Plain pins of each page, and from bit 32 on exclusive ones.
    let held: Vec<AtomicU64> = (0..16).map(|_| AtomicU64::new(0)).collect();
    let (stop, exclusives, plains) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for offset in 0..2_usize {
            let (memory, held, stop, exclusives) = (&memory, &held, &stop, &exclusives);
            scope.spawn(move || {
                let mut at = offset;
                while !stop.load(Ordering::Relaxed) {
                    at = (at * 5 + 3) % 13;
                    let holder = Holder::new("a hypervisor");
                    let pin = memory.pin(pages(at as u64, at as u64 + 3), Exclusive, holder);
                    let Ok(pin) = pin else { continue };
                    for page in &held[at..at + 3] {
                        assert_eq!(page.fetch_add(1 << 32, Ordering::SeqCst), 0, "nobody else");
                        page.fetch_sub(1 << 32, Ordering::SeqCst);
                    }
                    drop(pin);
                    exclusives.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for offset in 0..2_usize {
            let (memory, held, stop, plains) = (&memory, &held, &stop, &plains);
            scope.spawn(move || {
                let queue = memory.pinner(Short, Holder::new("a queue")).unwrap();
                let mut at = offset;
                while !stop.load(Ordering::Relaxed) {
                    at = (at * 5 + 1) % 16;
                    let range = pages(at as u64, at as u64 + 1);
                    let Ok(pin) = queue.pin(range, OnBusy::Wait) else { continue };
                    let page = &held[at];
                    assert_eq!(page.fetch_add(1, Ordering::SeqCst) >> 32, 0, "no exclusive pin");
                    let facts = memory.facts(range).unwrap();
                    assert_eq!(facts[0].1.visibility, Shared);
                    page.fetch_sub(1, Ordering::SeqCst);
                    drop(pin);
                    plains.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let (memory, stop) = (&memory, &stop);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let _ = to(memory, pages(7, 9), Private, OnBusy::Wait);
                let _ = to(memory, pages(7, 9), Shared, OnBusy::Wait);
            }
        });
        std::thread::sleep(Duration::from_millis(1000));
        stop.store(true, Ordering::Relaxed);
    });
    let counts = [exclusives, plains].map(AtomicU64::into_inner);
    assert!(counts.iter().all(|count| *count > 20), "{counts:?}");
    drop(memory.pin(pages(0, 16), Exclusive, Holder::new("a hypervisor")).unwrap());
}
