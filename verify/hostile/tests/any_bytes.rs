//! Bytes that proptest chose. `fuzz/` has libFuzzer choose them, which finds more in more time.

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_guest_does_what_it_may_and_nothing_else(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        polder_hostile::guest(&bytes);
    }

    #[test]
    fn a_text_is_a_scenario_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        polder_hostile::scenario(&bytes);
    }

    #[test]
    fn a_scenario_with_a_part_overwritten_is_one_or_refused(
        which in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        part in prop::collection::vec(any::<u8>(), 0..8),
        dropped in 0usize..12,
    ) {
        let mut text = which.get(&scenarios()).clone();
        let start = at.index(text.len());
        let end = (start + dropped).min(text.len());
        text.splice(start..end, part);
        polder_hostile::scenario(&text);
    }
}

/// The texts of the project's own scenarios.
fn scenarios() -> Vec<Vec<u8>> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scenarios");
    let files = std::fs::read_dir(folder).expect("the project's scenarios").flatten();
    files.map(|file| std::fs::read(file.path()).expect("a scenario")).collect()
}
