//! Configurations about pins, devices, and pages that move.

use super::{PRIVATE, SHARED, actor, convert, faults, small};
use crate::polder::setup::{Role, Setup, Task};

pub(super) fn pins() -> Setup {
    Setup {
        name: "pins",
        about: "pins and copies by the library, and pins by the kernel, next to conversions",
        actors: vec![
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2)]),
            faults(),
            actor("pinner", Role::Pinner, &[Task::Gup(0), Task::Gup(1)]),
            actor("backend", Role::Caller, &[Task::Pin(0)]),
            actor("copier", Role::Caller, &[Task::CopyIn(0, 3)]),
            actor("converter", Role::Caller, &[convert(0, 2, PRIVATE), convert(0, 2, SHARED)]),
            actor("caller", Role::Caller, &[Task::Discard { start: 0, end: 1 }]),
        ],
        ..small()
    }
}

pub(super) fn exclusive() -> Setup {
    Setup {
        name: "exclusive",
        about: "an exclusive pin next to GUP-fast, another exclusive pin and a conversion",
        actors: vec![
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2)]),
            faults(),
            actor("pinner", Role::Pinner, &[Task::Gup(0)]),
            actor("second pinner", Role::Pinner, &[Task::PinExclusive(0)]),
            actor("third pinner", Role::Pinner, &[Task::PinExclusive(0)]),
            actor("converter", Role::Caller, &[convert(0, 1, PRIVATE), convert(0, 1, SHARED)]),
        ],
        ..small()
    }
}

pub(super) fn pinners() -> Setup {
    Setup {
        name: "pinners",
        about: "pins that take no lock, and an exclusive one, next to all that minds them",
        actors: vec![
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2)]),
            faults(),
            actor("queue", Role::Caller, &[Task::PinUnlocked(0), Task::PinUnlocked(1)]),
            actor("second queue", Role::Caller, &[Task::PinUnlocked(0)]),
            actor("hypervisor", Role::Caller, &[Task::PinAlone(0)]),
            actor("converter", Role::Caller, &[convert(0, 2, PRIVATE), convert(0, 1, SHARED)]),
            actor(
                "caller",
                Role::Caller,
                &[Task::Discard { start: 0, end: 1 }, Task::Move { start: 0, end: 2 }],
            ),
        ],
        ..small()
    }
}

pub(super) fn dma() -> Setup {
    Setup {
        name: "dma",
        about: "a device that has what is shared mapped, next to conversions and a move",
        failures: 1,
        device: true,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestRead(0)]),
            actor("device", Role::Device, &[Task::DmaWrite(0, 3), Task::DmaWrite(0, 4)]),
            faults(),
            actor("converter", Role::Caller, &[convert(0, 2, PRIVATE), convert(0, 1, SHARED)]),
            actor("mover", Role::Caller, &[Task::Move { start: 0, end: 1 }]),
            actor("hypervisor", Role::Caller, &[Task::PinAlone(0)]),
        ],
        ..small()
    }
}

pub(super) fn moves() -> Setup {
    Setup {
        name: "move",
        about: "pages that move under guest, host and the kernel's pins, next to a conversion",
        failures: 1,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestWrite(0, 1), Task::GuestRead(1)]),
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2), Task::HostRead(0)]),
            faults(),
            actor("mover", Role::Caller, &[Task::Move { start: 0, end: 2 }]),
            actor("converter", Role::Caller, &[convert(0, 1, PRIVATE)]),
            actor("pinner", Role::Pinner, &[Task::Gup(0)]),
        ],
        ..small()
    }
}
