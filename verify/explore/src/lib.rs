//! A search over the interleavings of Polder's protocols: `polder check`.
//!
//! The product's engine, and no copy of it, is driven over the simulated machine by everything
//! that goes on at once in a VM: guests that fault, threads that touch the host view, conversions,
//! populations, discards, pins, steps that fail and threads that die. After each step of each of
//! them every other one may go on, and every invariant is looked at.
//!
//! # Vocabulary
//! | word | here |
//! |---|---|
//! | system | several actors at work on a state, and its invariants ([`System`]) |
//! | actor | a vCPU, a thread, the fault thread, a caller of the library |
//! | step | what an actor does in one go: nobody sees a part of it |
//! | way | one of several outcomes of a step: it is done, it fails, its thread dies |
//! | configuration | which actors there are, with which tasks ([`polder::all`]) |
//! | finding | steps that break an invariant, as few as can be |
//! | overlap | somebody in the middle of some work, met by a step of another |
//! | model | another protocol than Polder's, written down to be searched ([`models`]) |
//!
//! # What a search says
//! Where it ends by itself, no interleaving of that configuration breaks an invariant: states are
//! told apart by 64-bit fingerprints, so that two may be taken for one with a chance that
//! `fold.rs` works out. What a configuration leaves out (more pages, more actors, more tasks) is
//! not searched. Where it does not end, it says nothing of what it has not seen.

mod fair;
mod fold;
pub mod models;
pub mod planted;
pub mod polder;
#[cfg(test)]
mod pool;
pub mod search;
mod system;

pub use search::{Finding, Move, Outcome, Progress};
pub use system::{Point, System, Violation};

/// How many states are searched for the shortest way to a finding.
const SHORTEST_AMONG: usize = 2_000_000;

/// How much is preempted on a random way.
const PREEMPTIONS: u32 = 6;

/// What a search came to, in words.
#[derive(Clone, Debug)]
pub struct Report {
    /// States, each counted once.
    pub states: usize,
    /// Steps taken.
    pub steps: u64,
    /// The longest way.
    pub depth: usize,
    /// Whether every interleaving was looked at.
    pub complete: bool,
    /// What was broken, and how one comes there.
    pub finding: Option<Told>,
    /// How many overlaps there were, of those that the configuration makes possible.
    pub covered: usize,
    /// How many it makes possible.
    pub possible: usize,
    /// Those that did not come.
    pub missing: Vec<String>,
}

/// A finding in words.
#[derive(Clone, Debug)]
pub struct Told {
    /// What was broken.
    pub violation: Violation,
    /// A line for each step.
    pub trace: Vec<String>,
    /// Whether there is no shorter way.
    pub shortest: bool,
}

/// How a system is to be searched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// All of it, each state once.
    All,
    /// Random ways through it, from this seed, for as long as is given.
    Some {
        /// The seed.
        seed: u64,
    },
    /// Only for the shortest way to something broken.
    Shortest,
}

/// Searches a system.
pub fn check<S: System>(start: &S, how: How, progress: &mut Progress<'_>) -> Report {
    let outcome = match how {
        How::All => search::exhaust(start, progress),
        How::Some { seed } => search::wander(start, seed, PREEMPTIONS, progress),
        How::Shortest => search::shortest(start, SHORTEST_AMONG, progress),
    };
    let finding = outcome.finding.as_ref().map(|finding| {
        let near = || search::shortest(start, SHORTEST_AMONG, &mut |_, _| true).finding;
        let nearest = if how == How::Shortest { Some(finding.clone()) } else { near() };
        // Circles are looked for from a sample of the states, not from the nearest.
        let shortest = nearest.as_ref().is_some_and(|finding| !finding.circle);
        let finding = nearest.unwrap_or_else(|| search::shrink(start, finding));
        let trace = search::tell(start, &finding);
        Told { violation: finding.violation, trace, shortest }
    });
    let possible = search::possible(start);
    let missing: Vec<String> =
        possible.difference(&outcome.overlaps).map(|&it| search::name::<S>(it)).collect();
    Report {
        states: outcome.states,
        steps: outcome.steps,
        depth: outcome.depth,
        complete: outcome.complete,
        finding,
        covered: possible.len() - missing.len(),
        possible: possible.len(),
        missing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_planted_bug_is_found_in_its_configuration() {
        let mut count = 0;
        for bug in planted::all() {
            let report = match bug.host() {
                planted::Host::Polder(setup) => {
                    check(&polder::World::new(&setup), How::Shortest, &mut |_, _| true)
                }
                planted::Host::Model(model, invariant) => {
                    let start = models::ModelWorld::new(&model, invariant);
                    check(&start, How::Shortest, &mut |_, _| true)
                }
            };
            let found = report.finding.filter(|finding| !finding.trace.is_empty());
            let broken = found.map(|finding| finding.violation.invariant);
            assert_eq!(broken, Some(bug.breaks), "{} in {} states", bug.name, report.states);
            count += 1;
        }
        assert!(count > 40, "{count} bugs");
    }

    #[test]
    fn what_is_said_to_break_nothing_breaks_nothing_in_a_small_configuration() {
        for change in planted::HARMLESS {
            // The larger ones are searched by the commands of `docs/check.md`.
            let small = ["snp-contention", "snp-part", "snp-apart", "failures"];
            for setup in change.setups().filter(|setup| small.contains(&setup.name)) {
                let report = check(&polder::World::new(&setup), How::All, &mut |_, _| true);
                let (change, config) = (change.name, setup.name);
                assert!(report.complete, "{change} in {config}: {:?}", report.finding);
            }
        }
    }

    #[test]
    fn no_interleaving_of_a_small_configuration_breaks_an_invariant() {
        let small = ["failures", "abandoned", "population", "levels", "apart", "folios", "pieces"];
        let ahead = ["prefault-owed", "prefault-slots"];
        let of_pins = ["pinners", "dma"];
        let of_snp = ["snp-contention", "snp-apart", "snp-part", "snp-other"];
        for name in small.into_iter().chain(ahead).chain(of_pins).chain(of_snp) {
            let setup = polder::named(name).expect("a configuration");
            let report = check(&polder::World::new(&setup), How::All, &mut |_, _| true);
            assert!(report.finding.is_none(), "{name}: {:?}", report.finding);
            assert!(report.complete && report.states > 100, "{name}: {} states", report.states);
        }
    }

    #[test]
    fn random_ways_through_a_large_configuration_break_nothing() {
        for name in ["large", "snp-large"] {
            let setup = polder::named(name).expect("a configuration");
            let start = polder::World::new(&setup);
            let report = check(&start, How::Some { seed: 7 }, &mut |_, steps| steps < 50_000);
            assert!(report.finding.is_none(), "{name}: {:?}", report.finding);
        }
    }

    #[test]
    fn the_same_seed_goes_the_same_ways() {
        let setup = polder::named("large").expect("a configuration");
        let start = polder::World::new(&setup);
        let go = |seed| {
            let report = check(&start, How::Some { seed }, &mut |_, steps| steps < 20_000);
            (report.states, report.steps, report.covered)
        };
        assert_eq!(go(3), go(3));
        assert_ne!(go(3), go(4));
    }
}
