//! Configurations with a protected guest's memory under pKVM.

use polder_explored_engine::Platform;

use super::{PRIVATE, SHARED, actor, convert, faults, small};
use crate::polder::setup::{Role, Setup, Task};

/// Two pages, the first of which the guest has; it touches the other first.
fn donated() -> Setup {
    Setup { platform: Platform::Pkvm, initial: PRIVATE, donated: 1, ..small() }
}

pub(super) fn pkvm() -> Setup {
    Setup {
        name: "pkvm",
        about: "a protected guest that shares a page and takes it back, and what the VMM wishes",
        actors: vec![
            actor("vcpu 0", Role::Vcpu(0), &[Task::GuestWrite(1, 81), Task::GuestRead(0)]),
            actor("vcpu 1", Role::Vcpu(1), &[Task::GuestWrite(0, 1), Task::GuestRead(1)]),
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2), Task::HostRead(0)]),
            faults(),
            actor(
                "guest",
                Role::Caller,
                &[convert(0, 1, SHARED), convert(0, 1, PRIVATE), convert(0, 1, SHARED)],
            ),
            actor("vmm", Role::Caller, &[Task::Want(0, SHARED), Task::Want(1, SHARED)]),
            actor("pinner", Role::Pinner, &[Task::Gup(0)]),
        ],
        ..donated()
    }
}

pub(super) fn device() -> Setup {
    Setup {
        name: "pkvm-device",
        about: "a device that has mapped what a protected guest shares, and any step that may fail",
        device: true,
        failures: 1,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestWrite(1, 81), Task::GuestRead(0)]),
            actor("device", Role::Device, &[Task::DmaWrite(0, 3), Task::DmaWrite(0, 4)]),
            faults(),
            actor("guest", Role::Caller, &[convert(0, 1, SHARED), convert(0, 1, PRIVATE)]),
        ],
        ..donated()
    }
}

pub(super) fn moves() -> Setup {
    Setup {
        name: "pkvm-move",
        about: "pages of a protected guest that its hypervisor moves",
        failures: 1,
        actors: vec![
            actor("vcpu 0", Role::Vcpu(0), &[Task::GuestWrite(1, 81), Task::GuestRead(1)]),
            actor("vcpu 1", Role::Vcpu(1), &[Task::GuestWrite(0, 1), Task::GuestRead(0)]),
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2)]),
            faults(),
            actor("guest", Role::Caller, &[convert(0, 1, SHARED), convert(0, 1, PRIVATE)]),
            actor("mover", Role::Caller, &[Task::Move { start: 0, end: 2 }]),
            actor("hypervisor", Role::Kernel, &[Task::HypervisorFails(3)]),
        ],
        ..donated()
    }
}

pub(super) fn failures() -> Setup {
    Setup {
        name: "pkvm-failures",
        about: "a hypervisor that runs out of memory in the middle of what it changes",
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestWrite(1, 81), Task::GuestRead(1)]),
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2)]),
            faults(),
            actor("guest", Role::Caller, &[convert(0, 1, SHARED), convert(0, 1, PRIVATE)]),
            actor(
                "hypervisor",
                Role::Kernel,
                &[Task::HypervisorFails(1), Task::HypervisorFails(2)],
            ),
        ],
        ..donated()
    }
}
