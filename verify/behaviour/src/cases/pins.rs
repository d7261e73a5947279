//! Pins of the library's callers: who excludes whom, who waits for whom, and who is named.

use std::time::Duration;

use polder::{Error, Holder, Memory, OnBusy, Pin, PinKind, Refusal, Visibility};

use crate::Section::Pins;
use crate::world::{PASSED, World, byte, meanwhile, page, pages, put, share_all, to};
use crate::{Case, Ran};

use PinKind::{Exclusive, LongTerm, Short};

pub(super) const CASES: &[Case] = &[
    Case::new(
        Pins,
        "an exclusive pin is granted beside no other, and no other beside it, by name",
        excludes,
    ),
    Case::new(Pins, "what is pinned exclusively stays shared, and is touched as ever", stays),
    Case::new(Pins, "an exclusive pin and a device exclude each other", device),
    Case::new(
        Pins,
        "who waits for pins has his turn when the last goes, or its holder's name in time",
        waits,
    ),
    Case::new(Pins, "a holder that dies lets go, and is told of", dies),
    Case::new(Pins, MAPPED, mapped),
];

pub(crate) const MAPPED: &str = "a pinned page is in the host view before it is touched";

const HYPERVISOR: &str = "a hypervisor";

fn pinned(page: u32, kind: PinKind, holder: &'static str) -> Error {
    Refusal::Pinned { page: page.into(), kind, holder: Holder::new(holder) }.into()
}

fn shared(w: &World<'_>) -> Result<Memory, crate::Skipped> {
    let memory = w.memory(8)?;
    to(&memory, pages(0, 8), Visibility::Shared).expect("no pins");
    Ok(memory)
}

fn excludes(w: &World<'_>) -> Ran {
    let memory = shared(w)?;
    let pin = |kind, holder| memory.pin(pages(2, 4), kind, Holder::new(holder));
    for kind in [Short, LongTerm, Exclusive] {
        let first = pin(kind, "virtio-blk").expect("nobody else has it");
        assert_eq!(pin(Exclusive, HYPERVISOR).err(), Some(pinned(2, kind, "virtio-blk")));
        drop(first);
    }
    let queue = memory.pinner(Short, Holder::new("a queue")).expect("of short pins");
    let in_flight = queue.pin(page(3), OnBusy::Wait).expect("nobody else has it");
    assert_eq!(pin(Exclusive, HYPERVISOR).err(), Some(pinned(3, Short, "a queue")));
    drop(in_flight);
    let exclusive = pin(Exclusive, HYPERVISOR).expect("all others are gone");
    for kind in [Short, LongTerm, Exclusive] {
        assert_eq!(pin(kind, "virtio-blk").err(), Some(pinned(2, Exclusive, HYPERVISOR)));
    }
    let refused = queue.pin(page(3), OnBusy::Wait).err();
    assert_eq!(refused, Some(pinned(3, Exclusive, HYPERVISOR)));
    let beside = queue.pin(page(4), OnBusy::Wait).expect("another page");
    drop((exclusive, beside));
    pin(Short, "virtio-blk").map(drop).expect("it is gone");
    PASSED
}

fn stays(w: &World<'_>) -> Ran {
    // A pin of a part of a huge page is in the way of all of it.
    let whole = w.folios();
    let memory = w.memory(whole.count(4))?;
    share_all(&memory);
    let (at, pinned) = (whole.first(1), pages(whole.first(1), whole.first(1) + 1));
    put(&memory, at, 7);
    let exclusive = memory.pin(pinned, Exclusive, Holder::new(HYPERVISOR)).expect("nobody's");
    let refused = to(&memory, whole.pages(0, 2), Visibility::Private).err();
    let named =
        Refusal::Pinned { page: pinned.start(), kind: Exclusive, holder: Holder::new(HYPERVISOR) };
    assert_eq!(refused, Some(named.into()));
    assert_eq!(byte(&memory, at), Some(7), "a touch is no pin");
    put(&memory, at, 8);
    let neighbours = to(&memory, whole.pages(2, 4), Visibility::Private);
    assert_eq!(neighbours, Ok(whole.count(2)));
    drop(exclusive);
    assert_eq!(byte(&memory, at), Some(8));
    assert_eq!(to(&memory, whole.pages(0, 4), Visibility::Private), Ok(whole.count(2)));
    let refused = memory.pin(pinned, Exclusive, Holder::new(HYPERVISOR)).err();
    assert_eq!(refused, Some(Refusal::Private { page: pinned.start() }.into()));
    PASSED
}

/// A device that takes whatever it is told.
struct Takes;

impl polder::Dma for Takes {
    fn map(&self, _: polder::units::PageRange) -> Result<(), Error> {
        Ok(())
    }

    fn unmap(&self, _: polder::units::PageRange) -> Result<(), Error> {
        Ok(())
    }
}

fn device(w: &World<'_>) -> Ran {
    let memory = shared(w)?;
    let one = polder::units::PageCount::ONE;
    let attach = || memory.attach_dma(Holder::new("nic"), one, std::sync::Arc::new(Takes));
    let nic = attach().expect("nothing is pinned");
    let exclusive = || memory.pin(page(5), Exclusive, Holder::new(HYPERVISOR));
    assert_eq!(exclusive().err(), Some(pinned(5, LongTerm, "nic")));
    drop(memory.pin(page(5), LongTerm, Holder::new("vhost-net")).expect("a plain one"));
    nic.detach().expect("it takes everything");
    let held = exclusive().expect("no device has it");
    assert_eq!(attach().err(), Some(pinned(5, Exclusive, HYPERVISOR)));
    drop(held);
    attach().expect("it is gone").detach().expect("it takes everything");
    PASSED
}

fn waits(w: &World<'_>) -> Ran {
    let memory = shared(w)?;
    let exclusive = |at_most| {
        let on_busy = OnBusy::WaitForPins { at_most };
        memory.pin_with(pages(0, 8), Exclusive, Holder::new(HYPERVISOR), on_busy).map(drop)
    };
    let held = memory.pin(page(6), LongTerm, Holder::new("vfio")).expect("nobody's");
    let late = exclusive(Duration::from_millis(20));
    assert_eq!(late.err(), Some(pinned(6, LongTerm, "vfio")));
    let queue = memory.pinner(Short, Holder::new("a queue")).expect("of short pins");
    let lets_go = |held: Pin<'_>| {
        // From some moment on nobody new comes before him who waits.
        while queue.pin(page(1), OnBusy::Refuse).is_ok() {
            std::thread::yield_now();
        }
        drop(held);
    };
    let (came, ()) = meanwhile(|| exclusive(Duration::from_secs(600)), || lets_go(held));
    assert_eq!(came, Ok(()));
    PASSED
}

fn dies(w: &World<'_>) -> Ran {
    let memory = shared(w)?;
    let died = std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            let _pin = memory.pin(pages(1, 3), LongTerm, Holder::new("virtio-gpu"));
            // No message of a panic's: it is meant.
            std::panic::resume_unwind(Box::new("a device model's bug"));
        });
        device.join()
    });
    assert!(died.is_err());
    let dead = memory.dead_pins();
    let [dead] = &dead[..] else { panic!("{dead:?}") };
    assert_eq!((dead.range, dead.kind), (pages(1, 3), LongTerm));
    assert_eq!(dead.holder, Holder::new("virtio-gpu"));
    assert_eq!(to(&memory, pages(0, 8), Visibility::Private), Ok(8));
    PASSED
}

fn mapped(w: &World<'_>) -> Ran {
    let memory = shared(w)?;
    let pin = memory.pin(pages(2, 5), LongTerm, Holder::new("vhost-net")).expect("nobody's");
    let mapped = w.mapped(&memory, pages(0, 8));
    assert!((2..5_u32).all(|page| mapped.contains(&page.into())), "{mapped:?}");
    drop(pin);
    assert_eq!(to(&memory, pages(0, 8), Visibility::Private), Ok(8));
    assert_eq!(w.mapped(&memory, pages(0, 8)), []);
    PASSED
}
