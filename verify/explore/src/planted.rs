//! Bugs to plant, each with the configuration in which it is found.
//!
//! A search that finds nothing says little until it is known what it would have found.

use polder_explored_engine::{Bug as EngineBug, NotLarge};
use polder_machine::Plant;

use crate::models::{MAPCOUNT_WITHOUT_LOCK, Model};
use crate::polder::{self, Bug, Setup, Slip, World};
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

    /// The shortest way to the bug that a scenario can say, as a scenario: it passes on the product,
    /// and would not with the bug (`docs/check.md`).
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

const fn engine(
    name: &'static str,
    about: &'static str,
    bug: EngineBug,
    config: &'static str,
    breaks: &'static str,
) -> PlantedBug {
    PlantedBug { name, about, breaks, place: Place::Polder(Bug::Engine(bug), config) }
}

const fn driver(
    name: &'static str,
    about: &'static str,
    slip: Slip,
    config: &'static str,
    breaks: &'static str,
) -> PlantedBug {
    PlantedBug { name, about, breaks, place: Place::Polder(Bug::Driver(slip), config) }
}

const fn machine(
    name: &'static str,
    about: &'static str,
    plant: Plant,
    config: &'static str,
    breaks: &'static str,
) -> PlantedBug {
    PlantedBug { name, about, breaks, place: Place::Polder(Bug::Machine(plant), config) }
}

/// Every bug.
pub const ALL: &[PlantedBug] = &[
    engine(
        "check-before-cut-off",
        "references are looked for while the pages can still be reached",
        EngineBug::CheckBeforeCuttingOff,
        "conversion",
        "INV-1",
    ),
    driver(
        "no-retry",
        "a reference that GUP-fast is about to drop fails a conversion",
        Slip::NoRetry,
        "conversion",
        "INV-4",
    ),
    engine(
        "commit-before-hardware",
        "the page map changes when a conversion is claimed",
        EngineBug::CommitBeforeHardware,
        "failures",
        "INV-4",
    ),
    engine(
        "undo-forward",
        "what was done is undone first to last",
        EngineBug::ForwardUndo,
        "failures",
        "INV-4",
    ),
    engine(
        "undo-skips-failing",
        "the step that failed, and may be done in part, is not undone",
        EngineBug::SkippedFailed,
        "failures",
        "INV-9",
    ),
    engine(
        "no-congruence",
        "a large page is mapped where gfns and pages are not congruent",
        EngineBug::NoCongruence,
        "apart",
        "INV-5",
    ),
    engine(
        "no-fit",
        "a large page is mapped of which the slot has a part only",
        EngineBug::NoFit,
        "levels",
        "INV-5",
    ),
    engine(
        "large-over-claimed",
        "a large page is mapped while an operation holds a part of it",
        EngineBug::LargeOverClaimed,
        "levels",
        "INV-5",
    ),
    engine(
        "no-drain",
        "an operation does not wait for the answers in flight",
        EngineBug::NoDrain,
        "conversion",
        "INV-1",
    ),
    engine(
        "exists-while-claimed",
        "a second populator is told that pages exist whose bytes are being written",
        EngineBug::ExistsWhileClaimed,
        "population",
        "INV-3",
    ),
    engine(
        "denied-while-claimed",
        "who touches a page of a conversion that may yet fail is denied, the holder of a pin too",
        EngineBug::DeniedWhileClaimed,
        "pins",
        "INV-4",
    ),
    engine(
        "abandoned-forgotten",
        "nobody sees that the thread of an operation has died",
        EngineBug::AbandonedForgotten,
        "abandoned",
        "INV-8",
    ),
    engine(
        "markers-forgotten",
        "a conversion to shared leaves the markers of touches that were denied",
        EngineBug::MarkersForgotten,
        "conversion",
        "INV-4",
    ),
    engine(
        "split-not-minimal",
        "a folio is split though all of it is converted",
        EngineBug::SplitNotMinimal,
        "folios",
        "INV-5",
    ),
    engine(
        "neighbours-unclaimed",
        "of a folio that is split or merged the rest is not claimed",
        EngineBug::NeighboursUnclaimed,
        "folios",
        "INV-4",
    ),
    engine(
        "reshaped-while-pinned",
        "a folio with a pinned page in it is split",
        EngineBug::ReshapedWhilePinned,
        "pieces",
        "INV-7",
    ),
    engine(
        "stale-level",
        "a page is mapped at the level of its folio, whatever else is in it",
        EngineBug::StaleLevel,
        "levels",
        "INV-5",
    ),
    engine(
        "folio-populated",
        "contents of some pages of a folio count for all of it",
        EngineBug::FolioPopulated,
        "population",
        "INV-3",
    ),
    engine(
        "pins-forgotten",
        "a conversion does not look for pins",
        EngineBug::PinsForgotten,
        "pins",
        "INV-7",
    ),
    engine(
        "pinned-while-drained",
        "what an operation has claimed can be pinned by who does not ask the engine",
        EngineBug::PinnedWhileDrained,
        "pinners",
        "INV-7",
    ),
    engine(
        "exclusive-unchecked",
        "an exclusive pin is granted without a look at pins that took no lock",
        EngineBug::ExclusiveUnchecked,
        "pinners",
        "INV-7",
    ),
    engine(
        "exclusive-beside-dma",
        "an exclusive pin is granted of what a device has mapped",
        EngineBug::ExclusiveBesideDma,
        "dma",
        "INV-7",
    ),
    driver(
        "looks-before-counting",
        "who pins without the lock looks first, and counts afterwards",
        Slip::LooksBeforeCounting,
        "pinners",
        "INV-7",
    ),
    engine(
        "owed-shown",
        "a touch of a page whose contents are to come is answered",
        EngineBug::OwedShown,
        "population",
        "INV-3",
    ),
    engine(
        "discard-keeps-source",
        "what is discarded stays owed: the source brings contents that were dropped",
        EngineBug::DiscardKeepsSource,
        "population",
        "INV-3",
    ),
    engine(
        "hole-populated-twice",
        "a 4K hole in a huge page is filled again while another page of it is owed",
        EngineBug::HolePopulatedTwice,
        "holes",
        "INV-3",
    ),
    driver(
        "direct-map-late",
        "a page is taken off the kernel's direct map after it was mapped",
        Slip::DirectMapLate,
        "direct-map",
        "INV-3",
    ),
    driver(
        "touch-forgotten",
        "a touch is lost with the fault thread that took it from its queue",
        Slip::TouchForgotten,
        "abandoned",
        "INV-8",
    ),
    driver(
        "missing-only",
        "a view traps missing pages only, and shows a page that another mapping is writing",
        Slip::MissingOnly,
        "population",
        "INV-3",
    ),
    driver(
        "publish-before-bytes",
        "a page is shown before its bytes are written",
        Slip::PublishBeforeBytes,
        "population",
        "INV-2",
    ),
    driver(
        "answer-after-given-back",
        "a fault is answered after the drain has seen its answer given back",
        Slip::AnswerAfterGivenBack,
        "conversion",
        "INV-1",
    ),
    driver(
        "copy-unclaimed",
        "the page map is looked at, and bytes are copied later",
        Slip::CopyUnclaimed,
        "pins",
        "INV-1",
    ),
    driver(
        "slot-not-zapped",
        "a slot that is deleted stays in stage 2",
        Slip::SlotNotZapped,
        "slots",
        "INV-2",
    ),
    driver(
        "never-mapped",
        "a guest's fault is answered, and its page is not mapped",
        Slip::NeverMapped,
        "conversion",
        "INV-8",
    ),
    driver(
        "undone-doubted",
        "what was undone is taken for lost, and put in quarantine",
        Slip::UndoneDoubted,
        "failures",
        "INV-9",
    ),
    driver(
        "last-copy-kept",
        "the last of all copies does not give its claim back",
        Slip::LastCopyKept,
        "pins",
        "INV-8",
    ),
    machine("no-flush", "a TLB is not flushed", Plant::SkipFlush, "conversion", "INV-2"),
    machine(
        "gup-looks-once",
        "GUP-fast does not look at the page table again",
        Plant::StaleGup,
        "conversion",
        "INV-1",
    ),
    machine(
        "sequence-not-rechecked",
        "a guest's page is mapped though it was invalidated since it was found",
        Plant::StaleSequence,
        "slots",
        "INV-2",
    ),
    machine(
        "lost-mapcount",
        "mapping a page does not count",
        Plant::LostMapcount,
        "conversion",
        "INV-2",
    ),
    machine("lost-pin", "pinning a page does not count", Plant::LostPin, "conversion", "INV-2"),
    driver(
        "psmash-forgotten",
        "a fault for its size smashes nothing",
        Slip::SmashForgotten,
        "snp-folio",
        "INV-8",
    ),
    engine(
        "psmash-forgotten-by-conversion",
        "a part of a large RMP entry is taken away, and the rest not smashed before",
        EngineBug::ForgottenSmash,
        "snp",
        "INV-9",
    ),
    driver(
        "psmash-error-fatal",
        "PSMASH that is refused because another was faster ends the vCPU",
        Slip::SmashErrorFatal,
        "snp-folio",
        "INV-8",
    ),
    driver(
        "psmash-not-zapped",
        "after PSMASH stage 2 keeps the 2M page",
        Slip::SmashNotZapped,
        "snp",
        "INV-5",
    ),
    driver(
        "mapped-above-rmp",
        "stage 2 maps as large as folio and slot allow, whatever the RMP has",
        Slip::MappedAboveRmp,
        "snp-merge",
        "INV-5",
    ),
    driver(
        "large-without-congruence",
        "a large RMP entry is made for an unaligned guest frame",
        Slip::Clause(NotLarge::Gfn),
        "snp-apart",
        "INV-5",
    ),
    driver(
        "large-without-range",
        "a large RMP entry is made for a part of its pages",
        Slip::Clause(NotLarge::Range),
        "snp-taken",
        "INV-9",
    ),
    driver(
        "large-over-assigned",
        "a large RMP entry is made of which a part is assigned already",
        Slip::Clause(NotLarge::Assigned),
        "snp-discard",
        "INV-9",
    ),
    driver(
        "large-over-split",
        "a large RMP entry is made over small folios",
        Slip::Clause(NotLarge::Folio),
        "snp-holes",
        "INV-9",
    ),
    driver(
        "unassigned-small",
        "a large RMP entry is taken away as 4K",
        Slip::UnassignedSmall,
        "snp-taken",
        "INV-9",
    ),
    engine(
        "assigned-before-cut-off",
        "the RMP gives pages to the guest before the host is cut off",
        EngineBug::AssignedBeforeCutOff,
        "snp",
        "INV-9",
    ),
    driver(
        "assigned-uncut",
        "pages are assigned that another process may have touched again since it was cut off",
        Slip::AssignedUncut,
        "snp-other",
        "INV-1",
    ),
    engine(
        "undo-leaves-rmp",
        "undoing leaves the RMP as it is",
        EngineBug::NotReverted,
        "snp-contention",
        "INV-9",
    ),
    driver(
        "merged-unzapped",
        "RMP entries are merged while stage 2 maps them",
        Slip::MergedUnzapped,
        "snp-merge",
        "INV-2",
    ),
    engine(
        "one-table-unclaimed",
        "one table says what is wished and granted, and faults take its word for it at once",
        EngineBug::OneTableUnclaimed,
        "snp",
        "INV-1",
    ),
    machine(
        "rmp-no-flush",
        "a TLB is not flushed before the RMP changes",
        Plant::SkipFlush,
        "snp",
        "INV-2",
    ),
    machine(
        "smash-unvalidates",
        "PSMASH takes what a neighbour has validated",
        Plant::SmashUnvalidates,
        "snp",
        "INV-2",
    ),
    engine(
        "wanted-is-granted",
        "what the VMM wishes counts as granted, and only the guest decides: one xarray for both",
        EngineBug::WantedIsGranted,
        "pkvm",
        "INV-4",
    ),
    engine(
        "dma-unmapped-late",
        "a device keeps what becomes private until after the check, and after the hardware was told",
        EngineBug::DmaUnmappedLate,
        "dma",
        "INV-1",
    ),
    engine(
        "dma-forgotten",
        "a device keeps what becomes private",
        EngineBug::DmaForgotten,
        "dma",
        "INV-1",
    ),
    driver(
        "iotlb-not-flushed",
        "a device's pages are taken out of its table, and its IOTLB keeps them",
        Slip::IotlbNotFlushed,
        "dma",
        "INV-1",
    ),
    engine(
        "moved-while-mapped",
        "pages are moved while guest and host have them mapped",
        EngineBug::MovedMapped,
        "move",
        "INV-2",
    ),
    machine(
        "half-a-donation",
        "a donation that fails half-way is left half-way",
        Plant::HalfDonation,
        "pkvm-failures",
        "INV-9",
    ),
    machine(
        "donation-leaves-the-iommu",
        "what becomes a guest's stays open to the host's devices",
        Plant::IommuForgotten,
        "pkvm",
        "INV-9",
    ),
    machine(
        "source-not-scrubbed",
        "the frame that a guest's page has moved from keeps what was in it",
        Plant::NotScrubbed,
        "pkvm-move",
        "INV-10",
    ),
    machine(
        "exclusive-without-gup-fast",
        "GUP-fast does not look whether a page is pinned exclusively",
        Plant::GupFastIgnoresExclusive,
        "exclusive",
        "INV-7",
    ),
    PlantedBug {
        name: MAPCOUNT_WITHOUT_LOCK.name,
        about: MAPCOUNT_WITHOUT_LOCK.about,
        breaks: "INV-1",
        place: Place::Model(MAPCOUNT_WITHOUT_LOCK),
    },
];

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
