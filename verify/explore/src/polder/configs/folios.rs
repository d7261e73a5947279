//! Configurations about folios: how large a page is mapped, and what is split.

use polder_units::Geometry;

use super::{PRIVATE, SHARED, actor, convert, faults, small};
use crate::polder::setup::{Role, Setup, Task};

pub(super) fn levels() -> Setup {
    Setup {
        name: "levels",
        about: "large pages that lie in a slot in part, and are converted in part",
        pages: 4,
        slot_pages: 3,
        huge: true,
        actors: vec![
            actor("vcpu 0", Role::Vcpu(0), &[Task::GuestWrite(0, 1), Task::GuestRead(2)]),
            actor("vcpu 1", Role::Vcpu(1), &[Task::GuestRead(1)]),
            actor("thread", Role::Thread(0), &[Task::HostRead(1)]),
            faults(),
            actor("converter", Role::Caller, &[convert(1, 2, PRIVATE), convert(1, 2, SHARED)]),
        ],
        ..small()
    }
}

pub(super) fn apart() -> Setup {
    Setup {
        name: "apart",
        about: "a slot whose guest frames and pages are not congruent",
        pages: 4,
        slot_pages: 4,
        first_gfn: 1,
        huge: true,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestWrite(0, 1), Task::GuestRead(1)]),
            actor("converter", Role::Caller, &[convert(1, 2, PRIVATE)]),
        ],
        ..small()
    }
}

pub(super) fn folios() -> Setup {
    Setup {
        name: "folios",
        about: "a 1G folio of the pool that is split along the path, and merged again, amid touches",
        initial: PRIVATE,
        failures: 1,
        actors: vec![
            actor("vcpu 0", Role::Vcpu(0), &[Task::GuestWrite(1, 1), Task::GuestRead(3)]),
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2)]),
            faults(),
            actor("converter", Role::Caller, &[convert(0, 1, SHARED), convert(0, 1, PRIVATE)]),
            actor("other", Role::Caller, &[convert(2, 4, SHARED)]),
        ],
        ..pooled()
    }
}

pub(super) fn pieces() -> Setup {
    Setup {
        name: "pieces",
        about: "shared folios of the pool, pins of their pages, and a page that becomes private",
        deaths: 1,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestRead(0)]),
            actor("thread", Role::Thread(0), &[Task::HostRead(1)]),
            faults(),
            actor("pinner", Role::Pinner, &[Task::Gup(1)]),
            actor("backend", Role::Caller, &[Task::Pin(1)]),
            actor("converter", Role::Caller, &[convert(0, 1, PRIVATE), convert(1, 2, PRIVATE)]),
        ],
        ..pooled()
    }
}

/// A folio of four pages, of two of two.
fn pooled() -> Setup {
    let geometry = Geometry::new(2, 2).expect("powers of two");
    Setup { pages: 4, slot_pages: 4, geometry, huge: true, pooled: true, ..small() }
}
