//! Memory mapped ahead of a guest's touches, next to all that may go on meanwhile.

use super::{Actor, PRIVATE, Role, SHARED, Setup, Task, actor, convert, small};

fn ahead(name: &'static str, start: u8, end: u8) -> Actor {
    actor(name, Role::Caller, &[Task::Prefault { start, end }])
}

pub(super) fn prefault() -> Setup {
    Setup {
        name: "prefault",
        about: "two prefaults of the same pages, a guest, a conversion and a discard; a step fails",
        failures: 1,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestWrite(1, 1)]),
            ahead("prefault", 0, 2),
            ahead("second prefault", 0, 2),
            actor("converter", Role::Caller, &[convert(1, 2, PRIVATE)]),
            actor("caller", Role::Caller, &[Task::Discard { start: 0, end: 1 }]),
        ],
        ..small()
    }
}

pub(super) fn owed() -> Setup {
    Setup {
        name: "prefault-owed",
        about: "pages whose contents come, or are dropped, while they are mapped ahead",
        pages: 3,
        slot_pages: 3,
        owed: true,
        deaths: 1,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestRead(0), Task::GuestWrite(1, 1)]),
            actor(
                "prefault",
                Role::Caller,
                &[Task::Prefault { start: 0, end: 3 }, Task::Prefault { start: 0, end: 3 }],
            ),
            actor(
                "source",
                Role::Caller,
                &[
                    Task::Populate { start: 0, end: 1, value: 5 },
                    Task::Populate { start: 1, end: 2, value: 6 },
                ],
            ),
            actor("caller", Role::Caller, &[Task::Discard { start: 1, end: 3 }]),
        ],
        ..small()
    }
}

pub(super) fn slots() -> Setup {
    Setup {
        name: "prefault-slots",
        about: "a slot is made anew, and deleted for good, while its pages are mapped ahead",
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestRead(0)]),
            ahead("prefault", 0, 2),
            ahead("second prefault", 1, 3),
            actor("caller", Role::Caller, &[Task::Rebind, Task::Unbind]),
            actor("discarder", Role::Caller, &[Task::Discard { start: 1, end: 2 }]),
        ],
        ..small()
    }
}

pub(super) fn large() -> Setup {
    Setup {
        name: "prefault-large",
        about: "large pages, of which the slot has a part, mapped ahead next to conversions",
        pages: 4,
        slot_pages: 3,
        huge: true,
        failures: 1,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestWrite(0, 1), Task::GuestRead(2)]),
            ahead("prefault", 0, 4),
            ahead("second prefault", 1, 2),
            actor("converter", Role::Caller, &[convert(1, 2, PRIVATE), convert(0, 2, SHARED)]),
        ],
        ..small()
    }
}

pub(super) fn copied() -> Setup {
    Setup {
        name: "prefault-copied",
        about: "pages that another has too, copied at the first write, and the page of zeros",
        pages: 3,
        slot_pages: 3,
        copied: true,
        actors: vec![
            actor("vcpu 0", Role::Vcpu(0), &[Task::GuestRead(0), Task::GuestRead(2)]),
            actor("vcpu 1", Role::Vcpu(1), &[Task::GuestRead(1)]),
            ahead("prefault", 0, 3),
            ahead("second prefault", 1, 3),
            actor("other", Role::Caller, &[Task::CopiedWrite(1, 7), Task::CopiedWrite(2, 8)]),
        ],
        ..small()
    }
}
