//! What a test needs of the machine it runs on, and what becomes of it without.
//!
//! A test that lacks a facility says `SKIPPED` and why, and passes. Where nothing may be missing,
//! `POLDER_REQUIRE=kvm,userfault` names what has to be there: then the same test fails.

mod huge;

use std::fmt::Display;
use std::io::Write;
use std::time::Duration;

pub use huge::{HugetlbPages, Thp};

/// What a test may need.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Facility {
    /// A usable `/dev/kvm`.
    Kvm,
    /// A userfaultfd that is told of the kernel's own touches, with poison.
    Userfault,
    /// System calls that fail by a filter (seccomp).
    Seccomp,
    /// A KVM that offers VMs with private memory.
    PrivateMemory,
    /// A KVM whose guest_memfds can be shared with the host as a whole.
    SharedGuestMemfd,
    /// Huge pages that a test may set aside: root, and memory in large enough pieces.
    HugePages,
    /// The same of 1G, for which memory is seldom in one piece.
    GiganticPages,
    /// The pages of any file counted (`cachestat`).
    Cachestat,
    /// A process that may look into another of the same user (ptrace).
    Ptrace,
    /// A ring of io_uring.
    IoUring,
}

impl Facility {
    /// Its name in `POLDER_REQUIRE`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Userfault => "userfault",
            Self::Seccomp => "seccomp",
            Self::PrivateMemory => "private-memory",
            Self::SharedGuestMemfd => "shared-guest-memfd",
            Self::HugePages => "huge-pages",
            Self::GiganticPages => "gigantic-pages",
            Self::Cachestat => "cachestat",
            Self::Ptrace => "ptrace",
            Self::IoUring => "io-uring",
        }
    }

    /// Whether `POLDER_REQUIRE` names it.
    pub fn is_required(self) -> bool {
        let required = std::env::var("POLDER_REQUIRE").unwrap_or_default();
        required.split(',').any(|required| required == self.name())
    }
}

/// How long to wait where `on_a_machine` would do on a machine that is one: emulated, it is
/// `POLDER_SLOW` times as long.
pub fn patience(on_a_machine: Duration) -> Duration {
    let slow = std::env::var("POLDER_SLOW").ok().and_then(|times| times.parse().ok());
    on_a_machine.saturating_mul(slow.unwrap_or(1).max(1))
}

/// What was found, or `None` if the test is to be skipped.
///
/// # Panics
/// If it is missing and `POLDER_REQUIRE` names it.
pub fn require<T, E: Display>(facility: Facility, found: Result<T, E>) -> Option<T> {
    let why = match found {
        Ok(found) => return Some(found),
        Err(why) => why,
    };
    let name = facility.name();
    assert!(
        !facility.is_required(),
        "{name} is required (POLDER_REQUIRE names it) and missing: {why}"
    );
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    // Not by `eprintln`, which the test harness would keep to itself.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: needs {name}: {why}");
    None
}
