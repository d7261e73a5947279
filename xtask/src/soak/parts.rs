//! What is soaked: each a command of cargo's.

/// A long form of a checker.
pub(super) struct Part {
    pub(super) name: &'static str,
    pub(super) about: &'static str,
    /// Arguments of cargo that run it: `SEED` and `SECONDS` stand for numbers.
    pub(super) run: &'static [&'static str],
    /// Of the environment, the same.
    pub(super) environment: &'static [(&'static str, &'static str)],
}

impl Part {
    /// Arguments of cargo that build it.
    pub(super) fn build(&self) -> Vec<&'static str> {
        let (verb, rest) = self.run.split_first().expect("cargo is asked for something");
        let verb = if *verb == "run" { &["build"][..] } else { &["test", "--no-run"] };
        let of_program = |word: &&&str| **word == "--";
        verb.iter().chain(rest.iter().take_while(|word| !of_program(word))).copied().collect()
    }

    pub(super) fn takes_a_seed(&self) -> bool {
        self.run.contains(&"SEED")
    }
}

pub(super) const PARTS: &[Part] = &[
    Part {
        name: "check",
        about: "every configuration of the search; random ways where not all can be searched",
        run: &[
            "run",
            "--release",
            "-p",
            "polder-cli",
            "--",
            "check",
            "--seed",
            "SEED",
            "--seconds",
            "SECONDS",
        ],
        environment: &[],
    },
    Part {
        name: "differential",
        about: "random programs on the machine and on real memory, which have to agree",
        run: &[
            "run",
            "--release",
            "-p",
            "polder-differential",
            "--",
            "--seed",
            "SEED",
            "--seconds",
            "SECONDS",
        ],
        environment: &[],
    },
    Part {
        name: "run",
        about: "a guest on real memory, with operations held up at their stages",
        run: &[
            "run",
            "--release",
            "-p",
            "polder-cli",
            "--",
            "run",
            "--host",
            "memfd",
            "--vcpus",
            "4",
            "--delays",
            "200",
            "--seed",
            "SEED",
        ],
        environment: &[],
    },
    Part {
        name: "stress",
        about: "conversions under raw touches of the host view",
        run: &["test", "--release", "-p", "polder", "--test", "stress"],
        environment: &[("POLDER_STRESS_SECONDS", "SECONDS")],
    },
    Part {
        name: "ring",
        about: "conversions under io_uring's reads into the same pages",
        run: &["test", "--release", "-p", "polder", "--test", "ring"],
        environment: &[("POLDER_RING_ROUNDS", "10000")],
    },
    Part {
        name: "misuse",
        about: "the whole public API, called with any arguments by several threads",
        run: &["test", "--release", "-p", "polder", "--test", "misuse"],
        environment: &[("PROPTEST_CASES", "4000")],
    },
    Part {
        name: "shuttle",
        about: "the driver, with every turn of its threads chosen",
        run: &["test", "--release", "-p", "polder-shuttle"],
        environment: &[("POLDER_SHUTTLE", "20000")],
    },
    Part {
        name: "folios",
        about: "folios and the pool of huge pages, by up to 100,000 operations in a row",
        run: &[
            "test",
            "--release",
            "-p",
            "polder-engine",
            "--lib",
            "--",
            "levels_agree_with_an_oracle",
            "it_agrees_with_one_that_counts_anew",
        ],
        environment: &[("POLDER_FOLIO_OPS", "100000"), ("POLDER_POOL_OPS", "100000")],
    },
    Part {
        name: "hostile",
        about: "a guest and a scenario of any bytes",
        run: &["test", "--release", "-p", "polder-hostile"],
        environment: &[],
    },
    Part {
        name: "populations",
        about: "ten million pages that a source fills, seen by four readers",
        run: &["test", "--release", "-p", "polder", "--test", "source_threads", "four_readers"],
        environment: &[("POLDER_POPULATIONS", "10000000")],
    },
    Part {
        name: "play",
        about: "any steps of a scenario, played to an end",
        run: &["test", "--release", "-p", "polder-play", "--test", "bad_input"],
        environment: &[],
    },
];

#[cfg(test)]
mod tests {
    use super::PARTS;

    #[test]
    fn parts_have_names_of_their_own_and_say_what_they_are() {
        for (index, part) in PARTS.iter().enumerate() {
            assert!(!part.about.is_empty());
            assert!(PARTS[..index].iter().all(|other| other.name != part.name), "{}", part.name);
        }
    }
}
