//! The configurations that `polder check` knows.

use polder_explored_engine::{Contents, Platform, Visibility};
use polder_units::Geometry;

use super::setup::{Actor, Role, Setup, Task};

mod pkvm;
mod snp;

const PRIVATE: Visibility = Visibility::Private;
const SHARED: Visibility = Visibility::Shared;

fn actor(name: &'static str, role: Role, tasks: &[Task]) -> Actor {
    Actor { name, role, tasks: tasks.to_vec() }
}

fn faults() -> Actor {
    actor("fault thread", Role::Faults, &[])
}

fn convert(start: u8, end: u8, to: Visibility) -> Task {
    Task::Convert { start, end, to, contents: Contents::Preserve }
}

fn zeroed(start: u8, end: u8, to: Visibility) -> Task {
    Task::Convert { start, end, to, contents: Contents::Zero }
}

fn small() -> Setup {
    Setup {
        name: "",
        about: "",
        exhaustive: true,
        platform: Platform::Plain,
        pages: 2,
        geometry: Geometry::new(2, 2).expect("powers of two"),
        huge: false,
        pooled: false,
        initial: SHARED,
        accepted: false,
        donated: 0,
        device: false,
        owed: false,
        off_direct_map: false,
        first_gfn: 0,
        first_page: 0,
        slot_pages: 2,
        actors: Vec::new(),
        failures: 0,
        deaths: 0,
        held: false,
        bug: None,
    }
}

/// The configuration of this name.
pub fn named(name: &str) -> Option<Setup> {
    all().into_iter().find(|setup| setup.name == name)
}

/// Every configuration.
pub fn all() -> Vec<Setup> {
    vec![
        conversion(),
        failures(),
        abandoned(),
        population(),
        sources(),
        holes(),
        direct_map(),
        discard(),
        pins(),
        slots(),
        levels(),
        apart(),
        folios(),
        pieces(),
        moves(),
        dma(),
        exclusive(),
        pinners(),
        pkvm::pkvm(),
        pkvm::device(),
        pkvm::moves(),
        pkvm::failures(),
        snp::snp(),
        snp::merge(),
        snp::folio(),
        snp::contention(),
        snp::apart(),
        snp::holes(),
        snp::taken(),
        snp::discard(),
        snp::part(),
        snp::other(),
        snp::large(),
        large(),
    ]
}

fn conversion() -> Setup {
    Setup {
        name: "conversion",
        about: "a huge page of two, two vCPUs, a host thread, a converter, a pinner",
        huge: true,
        actors: vec![
            actor("vcpu 0", Role::Vcpu(0), &[Task::GuestWrite(0, 1), Task::GuestRead(1)]),
            actor("vcpu 1", Role::Vcpu(1), &[Task::GuestWrite(0, 1), Task::GuestRead(1)]),
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2), Task::HostRead(1)]),
            faults(),
            actor(
                "converter",
                Role::Caller,
                &[convert(0, 2, PRIVATE), convert(0, 1, SHARED), convert(0, 2, PRIVATE)],
            ),
            actor("pinner", Role::Pinner, &[Task::Gup(0), Task::Gup(1)]),
        ],
        ..small()
    }
}

fn failures() -> Setup {
    Setup {
        name: "failures",
        about: "conversions of pages of both kinds, any two steps of which may fail",
        pages: 3,
        slot_pages: 3,
        failures: 2,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestWrite(0, 1)]),
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2), Task::HostRead(2)]),
            faults(),
            actor(
                "converter",
                Role::Caller,
                &[convert(1, 2, PRIVATE), convert(0, 3, PRIVATE), zeroed(0, 2, SHARED)],
            ),
        ],
        ..small()
    }
}

fn abandoned() -> Setup {
    Setup {
        name: "abandoned",
        about: "threads that die in the middle of an operation; others meet what they leave",
        deaths: 2,
        failures: 1,
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestRead(0)]),
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2)]),
            faults(),
            actor("converter", Role::Caller, &[convert(0, 2, PRIVATE)]),
            actor("other", Role::Caller, &[convert(0, 1, PRIVATE), zeroed(0, 1, SHARED)]),
        ],
        ..small()
    }
}

fn population() -> Setup {
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

fn sources() -> Setup {
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

fn holes() -> Setup {
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

fn direct_map() -> Setup {
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

fn discard() -> Setup {
    Setup {
        name: "discard",
        about: "discards and conversions that drop contents, next to who reads them",
        actors: vec![
            actor("vcpu", Role::Vcpu(0), &[Task::GuestWrite(0, 1), Task::GuestRead(0)]),
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2), Task::HostRead(0)]),
            faults(),
            actor("caller", Role::Caller, &[Task::Discard { start: 0, end: 1 }]),
            actor("converter", Role::Caller, &[zeroed(0, 2, PRIVATE), zeroed(0, 1, SHARED)]),
            actor("copier", Role::Caller, &[Task::CopyOut(0)]),
        ],
        ..small()
    }
}

fn pins() -> Setup {
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

fn slots() -> Setup {
    Setup {
        name: "slots",
        about: "a slot that is deleted and made again while its guest faults",
        actors: vec![
            actor("vcpu 0", Role::Vcpu(0), &[Task::GuestWrite(0, 1), Task::GuestRead(1)]),
            actor("vcpu 1", Role::Vcpu(1), &[Task::GuestRead(0)]),
            actor("caller", Role::Caller, &[Task::Rebind]),
            actor("converter", Role::Caller, &[convert(0, 1, PRIVATE), convert(0, 1, SHARED)]),
            actor("discarder", Role::Caller, &[Task::Discard { start: 0, end: 1 }]),
        ],
        ..small()
    }
}

fn levels() -> Setup {
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

fn apart() -> Setup {
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

fn moves() -> Setup {
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

fn dma() -> Setup {
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

fn exclusive() -> Setup {
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

fn pinners() -> Setup {
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

/// A folio of four pages, of two of two.
fn pooled() -> Setup {
    let geometry = Geometry::new(2, 2).expect("powers of two");
    Setup { pages: 4, slot_pages: 4, geometry, huge: true, pooled: true, ..small() }
}

fn folios() -> Setup {
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

fn pieces() -> Setup {
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

fn large() -> Setup {
    Setup {
        name: "large",
        about: "all kinds of work at once, on a huge page of four: random ways through it",
        exhaustive: false,
        pages: 4,
        geometry: Geometry::new(4, 2).expect("powers of two"),
        slot_pages: 4,
        failures: 1,
        deaths: 1,
        actors: vec![
            actor(
                "vcpu",
                Role::Vcpu(0),
                &[Task::GuestWrite(0, 1), Task::GuestRead(1), Task::GuestWrite(3, 1)],
            ),
            actor("thread", Role::Thread(0), &[Task::HostWrite(0, 2), Task::HostRead(1)]),
            faults(),
            actor("pinner", Role::Pinner, &[Task::Gup(0), Task::Gup(1)]),
            actor(
                "converter",
                Role::Caller,
                &[convert(0, 4, PRIVATE), zeroed(1, 3, SHARED), convert(0, 2, SHARED)],
            ),
            actor("caller", Role::Caller, &[Task::Discard { start: 0, end: 2 }, Task::Rebind]),
            actor("backend", Role::Caller, &[Task::Pin(0), Task::CopyIn(1, 4)]),
        ],
        ..small()
    }
}
