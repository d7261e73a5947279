//! Configurations with an SNP guest's memory.

use polder_explored_engine::{Contents, Platform};
use polder_units::Geometry;

use super::{PRIVATE, SHARED, actor, faults, small, zeroed};
use crate::polder::Visibility;
use crate::polder::setup::{Actor, Role, Setup, Task};

fn converts(start: u8, end: u8, to: Visibility) -> Task {
    Task::Convert { start, end, to, contents: Contents::Unspecified }
}

fn vcpu(index: u16, tasks: &[Task]) -> Actor {
    actor(if index == 0 { "vcpu 0" } else { "vcpu 1" }, Role::Vcpu(index), tasks)
}

fn thread(tasks: &[Task]) -> Actor {
    actor("thread", Role::Thread(0), tasks)
}

fn caller(name: &'static str, tasks: &[Task]) -> Actor {
    actor(name, Role::Caller, tasks)
}

/// A 2M page of two, which is one folio, has one large entry, and was accepted by its guest.
fn accepted() -> Setup {
    Setup { platform: Platform::Snp, initial: PRIVATE, huge: true, accepted: true, ..small() }
}

pub(super) fn snp() -> Setup {
    Setup {
        name: "snp",
        about: "a large RMP entry, of a part of which an SNP guest shares and takes back",
        actors: vec![
            vcpu(0, &[Task::PrivateWrite(1, 81), Task::PrivateRead(1)]),
            vcpu(1, &[Task::GuestWrite(0, 1), Task::Accept(0), Task::PrivateWrite(0, 82)]),
            thread(&[Task::HostWrite(0, 2), Task::HostRead(0)]),
            faults(),
            caller("sharer", &[zeroed(0, 1, SHARED)]),
            caller("taker", &[converts(0, 1, PRIVATE)]),
        ],
        ..accepted()
    }
}

pub(super) fn merge() -> Setup {
    Setup {
        name: "snp-merge",
        about: "RMP entries that are merged, next to faults, PVALIDATE and conversions",
        actors: vec![
            vcpu(0, &[Task::PrivateWrite(1, 81), Task::Accept(0), Task::PrivateRead(1)]),
            vcpu(1, &[Task::PrivateWrite(1, 81), Task::Accept(0), Task::PrivateRead(1)]),
            faults(),
            caller("converter", &[converts(0, 1, SHARED), converts(0, 1, PRIVATE)]),
            caller("merger", &[Task::Merge { start: 0, end: 2 }, Task::Merge { start: 0, end: 2 }]),
        ],
        ..accepted()
    }
}

pub(super) fn folio() -> Setup {
    Setup {
        name: "snp-folio",
        about: "a folio that is split and merged under an SNP guest",
        actors: vec![
            vcpu(0, &[Task::PrivateWrite(0, 81), Task::PrivateRead(1)]),
            vcpu(1, &[Task::PrivateWrite(1, 82)]),
            actor("kernel", Role::Kernel, &[Task::Split(0), Task::Collapse(0)]),
            caller("converter", &[converts(0, 1, SHARED), converts(0, 1, PRIVATE)]),
            caller("merger", &[Task::Merge { start: 0, end: 2 }]),
        ],
        ..accepted()
    }
}

pub(super) fn contention() -> Setup {
    Setup {
        name: "snp-contention",
        about: "RMP entries that other CPUs have in use, and any step that may fail",
        failures: 2,
        actors: vec![
            vcpu(0, &[Task::PrivateWrite(1, 81)]),
            thread(&[Task::HostWrite(0, 2)]),
            faults(),
            caller("converter", &[converts(0, 1, SHARED), converts(0, 2, PRIVATE)]),
            caller("merger", &[Task::Merge { start: 0, end: 2 }]),
            actor("other cpu", Role::OtherCpu, &[Task::Hold(0, false), Task::Hold(0, true)]),
        ],
        ..accepted()
    }
}

pub(super) fn apart() -> Setup {
    Setup {
        name: "snp-apart",
        about: "a slot of an SNP guest whose guest frames and pages are not congruent",
        platform: Platform::Snp,
        pages: 4,
        slot_pages: 3,
        first_gfn: 1,
        huge: true,
        actors: vec![
            vcpu(0, &[Task::GuestRead(0), Task::Accept(0), Task::PrivateWrite(0, 81)]),
            vcpu(1, &[Task::Accept(1), Task::PrivateWrite(1, 82)]),
            caller("converter", &[converts(0, 2, PRIVATE), converts(1, 2, SHARED)]),
        ],
        ..small()
    }
}

pub(super) fn holes() -> Setup {
    Setup {
        name: "snp-holes",
        about: "pages of an SNP guest that get memory, folio by folio, when they are touched",
        platform: Platform::Snp,
        pages: 4,
        slot_pages: 4,
        geometry: Geometry::new(2, 2).expect("powers of two"),
        initial: PRIVATE,
        actors: vec![
            vcpu(0, &[Task::Accept(0), Task::PrivateWrite(0, 81)]),
            vcpu(1, &[Task::Accept(1)]),
            thread(&[Task::HostWrite(2, 2)]),
            faults(),
            caller("converter", &[zeroed(2, 3, SHARED)]),
            caller("discarder", &[Task::Discard { start: 0, end: 1 }]),
        ],
        ..small()
    }
}

pub(super) fn taken() -> Setup {
    Setup {
        name: "snp-taken",
        about: "shared pages that become an SNP guest's, next to pins, touches and failures",
        platform: Platform::Snp,
        huge: true,
        failures: 1,
        actors: vec![
            vcpu(0, &[Task::GuestWrite(1, 1), Task::Accept(0), Task::PrivateWrite(0, 81)]),
            thread(&[Task::HostWrite(1, 2), Task::HostRead(0)]),
            faults(),
            actor("pinner", Role::Pinner, &[Task::Gup(1)]),
            caller("taker", &[converts(0, 1, PRIVATE), converts(0, 2, PRIVATE)]),
            caller("sharer", &[zeroed(0, 2, SHARED)]),
        ],
        ..small()
    }
}

pub(super) fn discard() -> Setup {
    Setup {
        name: "snp-discard",
        about: "a part of a large RMP entry that is discarded, and given anew when it is touched",
        actors: vec![
            vcpu(0, &[Task::Accept(1), Task::PrivateWrite(1, 81), Task::PrivateRead(0)]),
            vcpu(1, &[Task::AcceptLarge(0)]),
            caller("discarder", &[Task::Discard { start: 1, end: 2 }]),
            caller("merger", &[Task::Merge { start: 0, end: 2 }]),
            actor("kernel", Role::Kernel, &[Task::Split(0), Task::Collapse(0)]),
        ],
        ..accepted()
    }
}

pub(super) fn part() -> Setup {
    Setup {
        name: "snp-part",
        about: "a 2M page of which an SNP guest's slot shows a part",
        platform: Platform::Snp,
        pages: 4,
        slot_pages: 3,
        huge: true,
        actors: vec![
            vcpu(0, &[Task::Accept(2), Task::PrivateWrite(2, 81)]),
            vcpu(1, &[Task::AcceptLarge(0), Task::PrivateWrite(1, 82)]),
            caller("converter", &[converts(0, 4, PRIVATE), converts(1, 3, SHARED)]),
            caller("merger", &[Task::Merge { start: 0, end: 4 }]),
        ],
        ..small()
    }
}

pub(super) fn other() -> Setup {
    Setup {
        name: "snp-other",
        about: "another process that writes to what becomes an SNP guest's at its first touch",
        platform: Platform::Snp,
        initial: PRIVATE,
        actors: vec![
            vcpu(0, &[Task::Accept(0), Task::PrivateWrite(0, 81), Task::PrivateRead(0)]),
            vcpu(1, &[Task::Accept(1)]),
            actor("process", Role::Process, &[Task::OtherWrite(0, 3), Task::OtherWrite(0, 4)]),
            caller("converter", &[converts(0, 1, SHARED), converts(0, 1, PRIVATE)]),
        ],
        ..small()
    }
}

pub(super) fn large() -> Setup {
    Setup {
        name: "snp-large",
        about: "all that an SNP guest's memory can meet, on a 2M page of four: random ways through it",
        exhaustive: false,
        pages: 4,
        geometry: Geometry::new(4, 2).expect("powers of two"),
        slot_pages: 4,
        failures: 1,
        deaths: 1,
        actors: vec![
            vcpu(0, &[Task::PrivateWrite(1, 81), Task::Accept(0), Task::PrivateRead(3)]),
            vcpu(1, &[Task::PrivateWrite(3, 82), Task::GuestWrite(0, 1), Task::AcceptLarge(0)]),
            thread(&[Task::HostWrite(0, 2), Task::HostRead(1)]),
            faults(),
            caller("converter", &[zeroed(0, 2, SHARED), converts(0, 2, PRIVATE)]),
            caller(
                "caller",
                &[Task::Merge { start: 0, end: 4 }, Task::Discard { start: 3, end: 4 }],
            ),
            actor(
                "kernel",
                Role::Kernel,
                &[Task::Split(0), Task::Collapse(0), Task::Hold(1, false), Task::Hold(0, true)],
            ),
        ],
        ..accepted()
    }
}
