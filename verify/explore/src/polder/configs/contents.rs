//! Configurations about contents that are owed, and who sees a page.

use super::{PRIVATE, actor, convert, faults, small};
use crate::polder::setup::{Role, Setup, Task};

pub(super) fn population() -> Setup {
    Setup {
        name: "population",
        about: "two populators, a conversion and a discard of pages whose contents are to come",
        owed: true,
        failures: 1,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestRead(0)]),
            actor("thread", Role::Thread(0), &[Task::HostRead(0)]),
            faults(),
            actor("source", Role::Caller, &[Task::Populate { start: 0, end: 2, value: 5 }]),
            actor(
                "second source",
                Role::Caller,
                &[
                    Task::Populate { start: 0, end: 1, value: 6 },
                    Task::Discard { start: 0, end: 2 },
                ],
            ),
            actor("converter", Role::Caller, &[convert(0, 1, PRIVATE)]),
        ],
        ..small()
    }
}

pub(super) fn sources() -> Setup {
    Setup {
        name: "sources",
        about: "populations whose threads die, next to others and to who waits for the bytes",
        owed: true,
        deaths: 2,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestRead(0)]),
            actor("thread", Role::Thread(0), &[Task::HostRead(1)]),
            faults(),
            actor("source", Role::Caller, &[Task::Populate { start: 0, end: 2, value: 5 }]),
            actor("second source", Role::Caller, &[Task::Populate { start: 0, end: 2, value: 5 }]),
            actor("converter", Role::Caller, &[convert(0, 1, PRIVATE)]),
        ],
        ..small()
    }
}

pub(super) fn holes() -> Setup {
    Setup {
        name: "holes",
        about: "a huge page of two whose pages are populated one by one, one of them by two sources",
        owed: true,
        huge: true,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestRead(0), Task::GuestWrite(0, 1)]),
            actor("thread", Role::Thread(0), &[Task::HostRead(0), Task::HostRead(1)]),
            faults(),
            actor("source", Role::Caller, &[Task::Populate { start: 0, end: 1, value: 5 }]),
            actor("second source", Role::Caller, &[Task::Populate { start: 0, end: 1, value: 6 }]),
            actor("third source", Role::Caller, &[Task::Populate { start: 1, end: 2, value: 7 }]),
        ],
        ..small()
    }
}

pub(super) fn direct_map() -> Setup {
    Setup {
        name: "direct-map",
        about: "pages that are taken off the kernel's direct map when they are published",
        owed: true,
        off_direct_map: true,
        deaths: 1,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestRead(0), Task::GuestRead(0)]),
            actor("thread", Role::Thread(0), &[Task::HostRead(0), Task::HostRead(0)]),
            faults(),
            actor("source", Role::Caller, &[Task::Populate { start: 0, end: 2, value: 5 }]),
            actor("second source", Role::Caller, &[Task::Populate { start: 0, end: 1, value: 6 }]),
            actor("discarder", Role::Caller, &[Task::Discard { start: 0, end: 1 }]),
        ],
        ..small()
    }
}
