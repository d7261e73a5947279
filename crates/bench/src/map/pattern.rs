//! Which pages are shared, and which are asked about.

/// Numbers that are the same in every run.
pub(super) struct Random(u64);

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// A number below `bound` (xorshift64*).
    pub(super) fn below(&mut self, bound: u32) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let upper_half = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        let below = (upper_half * u64::from(bound)) >> 32;
        u32::try_from(below).expect("it is below a u32")
    }
}

/// Which pages are shared; all others are private.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pattern {
    /// None.
    Uniform,
    /// Of every so many pages one, at a random place among them.
    OneOf(u32),
}

impl Pattern {
    pub(super) const ALL: [Self; 3] = [Self::Uniform, Self::ONE_PERCENT, Self::HALF];
    pub(super) const ONE_PERCENT: Self = Self::OneOf(100);
    pub(super) const HALF: Self = Self::OneOf(2);

    pub(super) fn name(self) -> String {
        match self {
            Self::Uniform => "uniform".into(),
            Self::OneOf(pages) => format!("{}%", 100 / pages),
        }
    }

    /// The shared ones of `pages` pages, in order.
    pub(super) fn shared(self, pages: u32) -> impl Iterator<Item = u32> {
        let mut random = Random::new(1);
        let group = match self {
            Self::Uniform => u32::MAX,
            Self::OneOf(group) => group,
        };
        (0..pages / group).map(move |number| number * group + random.below(group))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_shares_as_many_pages_as_it_is_called_for() {
        assert_eq!(Pattern::Uniform.shared(1 << 20).count(), 0);
        assert_eq!(Pattern::HALF.shared(1 << 20).count(), 1 << 19);
        let one_percent: Vec<u32> = Pattern::ONE_PERCENT.shared(100_000).collect();
        assert_eq!((one_percent.len(), Pattern::ONE_PERCENT.name()), (1000, "1%".into()));
        assert!(one_percent.is_sorted());
    }
}
