//! The programs' source of chance.

/// `SplitMix64`: a run of words decided by its seed.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    const fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from `low` to before `high`, or `low` where there is none. (Slightly uneven; no
    /// matter here.)
    pub(crate) const fn between(&mut self, low: u64, high: u64) -> u64 {
        if high > low { low + self.word() % (high - low) } else { low }
    }

    /// True so many times of a hundred.
    pub(crate) const fn percent(&mut self, times: u64) -> bool {
        self.between(0, 100) < times
    }

    /// One of several.
    pub(crate) fn one_of<T: Copy>(&mut self, items: &[T]) -> T {
        let at = self.between(0, items.len() as u64);
        items[usize::try_from(at).unwrap_or(0)]
    }

    /// One of several, each as often as its weight.
    pub(crate) fn weighted<T: Copy>(&mut self, items: &[(u64, T)]) -> T {
        let sum = items.iter().map(|(weight, _)| weight).sum();
        let mut left = self.between(0, sum);
        for (weight, item) in items {
            if left < *weight {
                return *item;
            }
            left -= weight;
        }
        items[0].1
    }
}
