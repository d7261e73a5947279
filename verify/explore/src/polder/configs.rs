//! The configurations that `polder check` knows.

use polder_explored_engine::{Contents, Platform, Visibility};
use polder_units::Geometry;

use super::setup::{Actor, Role, Setup, Task};

mod contents;
mod folios;
mod pins;
mod pkvm;
mod prefault;
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
        copied: false,
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
        contents::population(),
        contents::sources(),
        contents::holes(),
        contents::direct_map(),
        discard(),
        pins::pins(),
        slots(),
        folios::levels(),
        folios::apart(),
        folios::folios(),
        folios::pieces(),
        pins::moves(),
        pins::dma(),
        pins::exclusive(),
        pins::pinners(),
        prefault::prefault(),
        prefault::owed(),
        prefault::slots(),
        prefault::large(),
        prefault::copied(),
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
