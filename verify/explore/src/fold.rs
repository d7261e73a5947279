//! Fingerprints: 64 bits that stand for a state.
//!
//! Two states that happen to have the same one are taken for the same, and what lies behind the
//! second is not looked at. Among a hundred million states the chance that this happens at all is
//! 1 in 3700.

use core::hash::Hasher;

/// A hasher that is fast on the many small numbers that a state is made of.
#[derive(Clone, Copy)]
pub(crate) struct Fold(u64);

const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

impl Fold {
    pub(crate) const fn new() -> Self {
        Self(0x2545_f491_4f6c_dd1d)
    }
}

/// Multiplies to 128 bits and adds the halves.
fn fold(a: u64, b: u64) -> u64 {
    let bytes = (u128::from(a) * u128::from(b)).to_le_bytes();
    let half = |at: usize| {
        let mut half = [0; 8];
        half.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(half)
    };
    half(0) ^ half(8)
}

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        fold(self.0 ^ FACTOR, 0xd6e8_feb8_6659_fd93)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    #[inline]
    fn write_u64(&mut self, word: u64) {
        self.0 = fold(self.0.rotate_left(5) ^ word, FACTOR) ^ word.rotate_left(32);
    }

    #[inline]
    fn write_u8(&mut self, number: u8) {
        self.write_u64(number.into());
    }

    #[inline]
    fn write_u16(&mut self, number: u16) {
        self.write_u64(number.into());
    }

    #[inline]
    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }

    #[inline]
    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }
}

/// A set of fingerprints: open addressing, no order that could be seen.
pub(crate) struct Seen {
    /// 0 is a free place; a fingerprint of 0 is kept as 1.
    places: Vec<u64>,
    count: usize,
}

impl Seen {
    pub(crate) fn new() -> Self {
        Self { places: vec![0; 1 << 16], count: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Puts it in. Whether it is new.
    pub(crate) fn insert(&mut self, fingerprint: u64) -> bool {
        let fingerprint = fingerprint.max(1);
        if self.count * 3 > self.places.len() * 2 {
            let larger = vec![0; self.places.len() * 2];
            let old = core::mem::replace(&mut self.places, larger);
            for fingerprint in old.into_iter().filter(|&it| it != 0) {
                let at = self.place(fingerprint);
                self.places[at] = fingerprint;
            }
        }
        let at = self.place(fingerprint);
        let new = self.places[at] == 0;
        self.places[at] = fingerprint;
        self.count += usize::from(new);
        new
    }

    /// Where it is, or belongs.
    fn place(&self, fingerprint: u64) -> usize {
        let mask = self.places.len() - 1;
        let mut at = usize::try_from(fingerprint & u64::from(u32::MAX)).unwrap_or(0) & mask;
        while self.places[at] != 0 && self.places[at] != fingerprint {
            at = (at + 1) & mask;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_new_once() {
        let mut seen = Seen::new();
        let numbers = || (0u64..200_000).map(|it| fold(it + 1, FACTOR));
        assert!(numbers().all(|number| seen.insert(number)));
        assert!(!numbers().any(|number| seen.insert(number)));
        assert_eq!(seen.len(), 200_000);
    }
}
