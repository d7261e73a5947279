//! The hosts: what each gives to the cases, and which cases are not applicable to it.

mod guest_memfd;
mod machine;
mod memfd;

use polder::machine::Plant;

use crate::Host;

/// How often a run is looked at before it counts as hung; some twenty times a second.
const LOOKS: u32 = 20 * 30;

/// The columns of the table, in order.
pub fn hosts() -> &'static [&'static dyn Host] {
    &[&memfd::Memfd, &guest_memfd::GuestMemfd, &machine::Machine(None)]
}

/// The simulated machine with a bug: no column of the table, but what its rows are tried on.
pub fn planted(plant: Plant) -> &'static dyn Host {
    match plant {
        Plant::SkipFlush => &machine::Machine(Some(Plant::SkipFlush)),
        Plant::StaleGup => &machine::Machine(Some(Plant::StaleGup)),
        Plant::StaleSequence => &machine::Machine(Some(Plant::StaleSequence)),
        Plant::LostMapcount => &machine::Machine(Some(Plant::LostMapcount)),
        Plant::LostPin => &machine::Machine(Some(Plant::LostPin)),
    }
}
