//! Bugs to plant, each with the configuration in which it is found.
//!
//! A search that finds nothing says little until it is known what it would have found.

mod contents;
mod conversion;
mod folios;
mod harmless;
mod pins;
mod pkvm;
mod prefault;
mod snp;
mod touches;

pub use self::harmless::{HARMLESS, Harmless};
use crate::models::{MAPCOUNT_WITHOUT_LOCK, Model};
use crate::polder::{self, Bug, Setup, World};
use crate::{SHORTEST_AMONG, search};

/// A bug, as `polder check --planted` knows it.
#[derive(Clone, Copy, Debug)]
pub struct PlantedBug {
    /// Its name on the command line.
    pub name: &'static str,
    /// The mistake, in a line.
    pub about: &'static str,
    /// The invariant that it breaks. That something else is found does not count.
    pub breaks: &'static str,
    place: Place,
}

/// Where a bug is planted.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In a configuration of the product.
    Polder(Bug, &'static str),
    /// In another protocol, searched by the invariant that it breaks.
    Model(Model),
}

/// What is to be searched for a bug.
#[derive(Clone, Debug)]
pub enum Host {
    /// The product.
    Polder(Setup),
    /// Another protocol, by this invariant.
    Model(Model, &'static str),
}

impl PlantedBug {
    /// Where it is to be found.
    ///
    /// # Panics
    /// If it names no configuration.
    pub fn host(&self) -> Host {
        match self.place {
            Place::Polder(bug, config) => {
                Host::Polder(polder::named(config).expect("a configuration").with(bug))
            }
            Place::Model(model) => Host::Model(model, self.breaks),
        }
    }

    /// The shortest way to the bug that a scenario can say, as a scenario: it passes on the
    /// product, and would not with the bug (`docs/check.md`).
    ///
    /// # Errors
    /// Why there is none.
    pub fn scenario(&self) -> Result<String, String> {
        let Host::Polder(setup) = self.host() else {
            return Err("it is in another protocol than Polder's".into());
        };
        if setup.platform != polder_explored_engine::Platform::Plain {
            return Err(format!("it is in the memory of a guest of {}", setup.platform));
        }
        if setup.device {
            return Err("a device is at work, which no scenario is told of".into());
        }
        if (setup.first_gfn, setup.slot_pages) != (setup.first_page, setup.pages) {
            return Err("its slot does not show all pages from the first on".into());
        }
        if setup.off_direct_map {
            return Err("it is in the kernel's direct map, which no scenario can ask about".into());
        }
        if setup.pooled {
            return Err("its huge pages have two pages or four".into());
        }
        // In a scenario no step is made to fail and no thread dies, and a huge page has 512 pages.
        let held = Setup { held: true, huge: false, failures: 0, deaths: 0, ..setup };
        let found = search::shortest(&World::new(&held), SHORTEST_AMONG, &mut |_, _| true);
        let finding = found.finding.ok_or("no way that a scenario can say leads to it")?;
        if finding.circle {
            return Err("it goes round in a circle, and a scenario ends".into());
        }
        polder::story(&held, &finding, self.about)
    }
}

const fn bug(
    name: &'static str,
    about: &'static str,
    bug: Bug,
    config: &'static str,
    breaks: &'static str,
) -> PlantedBug {
    PlantedBug { name, about, breaks, place: Place::Polder(bug, config) }
}

/// Every bug, by topic.
pub fn all() -> impl Iterator<Item = &'static PlantedBug> {
    let of_polder = [
        conversion::BUGS,
        touches::BUGS,
        folios::BUGS,
        contents::BUGS,
        pins::BUGS,
        snp::BUGS,
        pkvm::BUGS,
        prefault::BUGS,
    ];
    of_polder.into_iter().flatten().chain(OF_MODELS)
}

const OF_MODELS: &[PlantedBug] = &[PlantedBug {
    name: MAPCOUNT_WITHOUT_LOCK.name,
    about: MAPCOUNT_WITHOUT_LOCK.about,
    breaks: "INV-1",
    place: Place::Model(MAPCOUNT_WITHOUT_LOCK),
}];
