//! What memory encryption does to contents: one guest's key, tweaked by the frame.
//!
//! A private write stores its bytes combined with a word made of key and frame, and a private read
//! undoes it. Everybody else sees what is stored: the host reads ciphertext; a guest that reads
//! what the host wrote, or what another key or frame encrypted, reads garbage; and the RMP moves no
//! byte (AMD APM volume 2, section 15.34). The word is repeated over the page, so that it works
//! the same on real bytes and on tokens.

use polder_units::Pfn;

/// A guest's key.
#[derive(Clone, Copy)]
pub(crate) struct Cipher(u64);

impl Cipher {
    pub(crate) const fn new(key: u64) -> Self {
        Self(key)
    }

    /// What the eight bytes at each multiple of 8 of a frame are combined with.
    #[inline]
    pub(crate) const fn word(self, pfn: Pfn) -> u64 {
        // The finalizer of splitmix64: a permutation, so that no two (key, frame) pairs below
        // 2^24 keys share a word.
        let mut word = (self.0 << 40) ^ pfn.get();
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// What an aligned or unaligned word at `offset` of a frame is combined with.
    #[inline]
    pub(crate) fn word_at(self, pfn: Pfn, offset: u64) -> u64 {
        self.word(pfn).rotate_right(u32::try_from(offset % 8 * 8).unwrap_or(0))
    }

    /// Combines the bytes at `offset` of a frame.
    pub(crate) fn apply(self, pfn: Pfn, offset: u64, bytes: &mut [u8]) {
        let word = self.word_at(pfn, offset).to_le_bytes();
        for (byte, with) in bytes.iter_mut().zip(word.iter().cycle()) {
            *byte ^= with;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ciphertext_differs_from_key_to_key_and_frame_to_frame_and_is_undone_by_its_own() {
        let cipher = |key, pfn: u32, bytes: [u8; 3]| {
            let mut bytes = bytes;
            Cipher::new(key).apply(pfn.into(), 6, &mut bytes);
            bytes
        };
        let stored = cipher(1, 5, *b"abc");
        assert_eq!(cipher(1, 5, stored), *b"abc");
        for other in [cipher(2, 5, stored), cipher(1, 6, stored), stored] {
            assert_ne!(other, *b"abc");
        }
    }

    #[test]
    fn a_word_is_combined_as_its_bytes_are() {
        let (cipher, pfn) = (Cipher::new(3), Pfn::from(9));
        for offset in 0..16 {
            let mut bytes = 7u64.to_le_bytes();
            cipher.apply(pfn, offset, &mut bytes);
            assert_eq!(u64::from_le_bytes(bytes), 7 ^ cipher.word_at(pfn, offset));
        }
    }
}
