//! The hosts: what each gives to the cases, and which cases are not applicable to it.

mod guest_memfd;
mod machine;
mod memfd;

use polder::machine::Plant;
use polder::{Bug, PageSize, Platform};
use polder_vmm::GuestRoot;

use crate::Host;

const KERNEL_MOVES: &str = "where pages lie is the kernel's affair on this host";
const NO_DEVICE: &str =
    "no device with an IOMMU is to be had here: what a domain is told is another row";

/// How often a run is looked at before it counts as hung; some twenty times a second.
const LOOKS: u32 = 20 * 30;

const MEMFD: &dyn Host = &memfd::Memfd { size: PageSize::Small };

/// The columns of the table, in order.
pub fn hosts() -> &'static [&'static dyn Host] {
    const PLAIN: &dyn Host = &machine::Machine::new(Platform::Plain);
    const PROTECTED: &dyn Host = &machine::Machine::new(Platform::SwProtected);
    const SNP: &dyn Host = &machine::Machine::new(Platform::Snp);
    const PKVM: &dyn Host = &machine::Machine::new(Platform::Pkvm);
    const SHADOW: &dyn Host = &machine::Machine::on(GuestRoot::Shadow);
    const NESTED: &dyn Host = &machine::Machine::on(GuestRoot::Nested);
    const THP: &dyn Host = &memfd::Memfd { size: PageSize::Thp };
    &[MEMFD, THP, &guest_memfd::GuestMemfd, PLAIN, PROTECTED, SNP, PKVM, SHADOW, NESTED]
}

/// The simulated machine with a bug of its own: no column of the table, but what its rows are
/// tried on.
pub fn planted(plant: Plant) -> &'static dyn Host {
    let plain = machine::Machine::new(Platform::Plain);
    Box::leak(Box::new(machine::Machine { plant: Some(plant), ..plain }))
}

/// An SNP guest's memory whose engine or driver has a bug.
pub fn planted_in_engine(bug: Bug) -> &'static dyn Host {
    let snp = machine::Machine::new(Platform::Snp);
    Box::leak(Box::new(machine::Machine { bug: Some(bug), ..snp }))
}
