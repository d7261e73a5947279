//! What looks like a bug, and is none here.

use polder_explored_engine::{Bug as EngineBug, NotLarge};
use polder_machine::Plant;

use crate::polder::{self, Bug, Setup, Slip};

/// A change that breaks nothing, by every interleaving of some configurations.
#[derive(Clone, Copy, Debug)]
pub struct Harmless {
    /// Its name on the command line.
    pub name: &'static str,
    /// The change, and why nobody meets it.
    pub about: &'static str,
    /// The configurations.
    pub configs: &'static [&'static str],
    bug: Bug,
}

impl Harmless {
    /// Where it is searched for what it breaks.
    ///
    /// # Panics
    /// If it names no configuration.
    pub fn setups(&self) -> impl Iterator<Item = Setup> {
        let Self { configs, bug, .. } = *self;
        configs.iter().map(move |name| polder::named(name).expect("a configuration").with(bug))
    }
}

/// What looks like a bug, and is none here. That it is found to break nothing says as much about
/// the protocol as what is found says about the search.
pub const HARMLESS: &[Harmless] = &[
    Harmless {
        name: "one-table",
        about: "one table says what is wished and what is granted; claims keep everybody from it",
        configs: &["snp", "snp-taken", "snp-contention", "snp-other", "failures"],
        bug: Bug::Engine(EngineBug::OneTable),
    },
    Harmless {
        name: "assigned-before-check",
        about: "references are looked for after pages were assigned: assigning looks for them too",
        configs: &["snp-taken"],
        bug: Bug::Engine(EngineBug::AssignedBeforeCheck),
    },
    Harmless {
        name: "psmash-error-spurious",
        about: "whatever PSMASH refuses is taken for spurious: the guest comes again",
        configs: &["snp-folio", "snp-contention"],
        bug: Bug::Driver(Slip::SmashErrorSpurious),
    },
    Harmless {
        name: "large-without-binding",
        about: "a large entry is made of what a slot shows in part: it costs a PSMASH",
        configs: &["snp-part", "snp-apart"],
        bug: Bug::Driver(Slip::Clause(NotLarge::Binding)),
    },
    Harmless {
        name: "large-overlaps",
        about: "hardware takes a large entry over small ones, for which nobody asks",
        configs: &["snp", "snp-discard"],
        bug: Bug::Machine(Plant::LargeOverAssigned),
    },
    Harmless {
        name: "kept-validated",
        about: "RMPUPDATE keeps the validated bit; nobody updates an entry that is assigned",
        configs: &["snp", "snp-discard"],
        bug: Bug::Machine(Plant::KeptValidated),
    },
];
