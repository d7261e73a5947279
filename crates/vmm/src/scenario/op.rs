//! The ops, and the patterns memory is filled with.

pub use polder::Visibility;
use polder_units::{Gpa, PAGE_SIZE};

use crate::guest::DeviceRequest;

/// Bytes of the word that guests write and compare.
pub const WORD: u64 = 8;

/// The odd constant of [`pattern`]: 2^64 over the golden ratio.
pub(crate) const PATTERN_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// The seeded word at `gpa`: `(gpa ^ seed) * 0x9e3779b97f4a7c15`, modulo 2^64.
///
/// For one seed it differs from address to address (an odd factor has an inverse), so that a page
/// seen at the wrong address is noticed; and it costs the guest one multiplication.
pub const fn pattern(gpa: Gpa, seed: u64) -> u64 {
    (gpa.get() ^ seed).wrapping_mul(PATTERN_FACTOR)
}

/// The digest of words, one after the other; 0 of none. Each word is stirred in by steps that have
/// an inverse, so that no single word changes without the digest.
pub fn digest(words: impl IntoIterator<Item = u64>) -> u64 {
    let stir =
        |digest: u64, word: u64| (digest ^ word).wrapping_mul(PATTERN_FACTOR).rotate_left(29);
    words.into_iter().fold(0, stir)
}

/// What words a piece of memory holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Pattern {
    /// Every word is 0.
    Zero,
    /// The word at `a` is [`pattern`]`(a, seed)`.
    Seeded {
        /// The seed.
        seed: u64,
    },
    /// The word at `a` is the bitwise complement of [`pattern`]`(a + offset, seed)`: what a device
    /// answers to a seeded payload that lies `offset` bytes (modulo 2^64) further on.
    Complement {
        /// The payload's seed.
        seed: u64,
        /// The payload's address less the answer's, modulo 2^64.
        offset: u64,
    },
}

impl Pattern {
    /// The word at `gpa`.
    pub const fn word(self, gpa: Gpa) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Seeded { seed } => pattern(gpa, seed),
            Self::Complement { seed, offset } => {
                !pattern(Gpa::new(gpa.get().wrapping_add(offset)), seed)
            }
        }
    }
}

/// The answer a guest expects to a request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// 0: done.
    Done,
    /// -EINVAL: the range is no range of memory. It is unaligned, empty, or reaches out of memory.
    Invalid,
    /// -EFAULT: the host may not reach the memory.
    Fault,
    /// -EOPNOTSUPP: the memory can't be private on this host.
    Unsupported,
}

impl Outcome {
    /// What the request returns: 0 or a negative errno, as [`KVM_HC_MAP_GPA_RANGE`] does.
    ///
    /// [`KVM_HC_MAP_GPA_RANGE`]: https://docs.kernel.org/virt/kvm/x86/hypercalls.html
    pub const fn code(self) -> i32 {
        match self {
            Self::Done => 0,
            Self::Invalid => -22,
            Self::Fault => -14,
            Self::Unsupported => -95,
        }
    }
}

/// What the host finds when it tries a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HostAccess {
    /// It is refused, by the API as by a touch of the raw pointer.
    Denied,
    /// It reads the page, by both.
    Readable,
}

/// One step of a guest.
///
/// Addresses and lengths of memory that a guest fills, checks, loads or stores are multiples of
/// [`WORD`]. "Counts one check" is said of what passes; what does not pass fails the guest, which
/// reports the op's index in its program and the address, expected and found value given here.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Op {
    /// Writes `pattern` to every word of `[gpa..gpa + len)`, lowest first. No check.
    Fill {
        /// The first byte.
        gpa: Gpa,
        /// The length in bytes.
        len: u64,
        /// What to write.
        pattern: Pattern,
    },
    /// Reads every word of `[gpa..gpa + len)`, lowest first, and compares it with `pattern`.
    /// Counts one check in all. The first word that differs fails, with its own address.
    Check {
        /// The first byte.
        gpa: Gpa,
        /// The length in bytes.
        len: u64,
        /// What to expect.
        pattern: Pattern,
    },
    /// Reads `count` words at random places of `[gpa..gpa + len)`, whose order `seed` decides. No
    /// check.
    Roam {
        /// The first byte.
        gpa: Gpa,
        /// The length in bytes: a power of two.
        len: u64,
        /// How many words.
        count: u64,
        /// Of the order; not 0.
        seed: u64,
    },
    /// Reads every word of `[gpa..gpa + len)`, lowest first, and has the host compare their
    /// [`digest`] with what should be there. Counts one check. A failure's found and expected are
    /// digests.
    Digest {
        /// The first byte.
        gpa: Gpa,
        /// The length in bytes, at most 16 MiB.
        len: u64,
    },
    /// Asks that `pages` pages from `gpa` on become private or shared, contents kept
    /// where the host can (`KVM_HC_MAP_GPA_RANGE`). Whatever the arguments, they are passed on as
    /// they are. Counts one check if the answer is `expect`. On a failure found is the answer,
    /// sign-extended.
    Convert {
        /// The address of the first page; need not be aligned.
        gpa: Gpa,
        /// How many pages of 4 KiB; may be 0 or too many.
        pages: u64,
        /// What they are to become.
        to: Visibility,
        /// The answer.
        expect: Outcome,
    },
    /// Writes a [`DeviceRequest`] to `request`, with status pending,
    /// and rings the doorbell. The device reads `len` bytes at `source` and writes the complement
    /// of every word to `destination`. Counts one check if the outcome is `expect`: the doorbell's
    /// answer, or where that is 0, the status word the device left in the request. On a failure
    /// the address is `request` and found is the outcome, sign-extended.
    Device {
        /// Where the request goes: 40 bytes of a shared page.
        request: Gpa,
        /// The request's number.
        id: u64,
        /// The payload.
        source: Gpa,
        /// The payload's length in bytes, and the answer's.
        len: u64,
        /// Where the answer goes.
        destination: Gpa,
        /// The outcome.
        expect: Outcome,
    },
    /// Notifies the device of the virtqueue of `size` descriptors at `queue`, laid out as a legacy
    /// device's: it does all chains that are available there. Counts one check if the answer is
    /// `expect`; on a failure the address is `queue` and found is the answer, sign-extended.
    Notify {
        /// The descriptors.
        queue: Gpa,
        /// How many.
        size: u64,
        /// The answer.
        expect: Outcome,
    },
    /// Asks the host to try each page right now, by its API and by a touch of the raw pointer.
    /// Counts one check if all were as expected (the answer is 0); else it fails with found the
    /// answer and expected 0.
    Probe {
        /// The address of the first page.
        gpa: Gpa,
        /// How many pages of 4 KiB.
        pages: u64,
        /// What the host is to find.
        expect: HostAccess,
    },
    /// Loads the word at `gpa`, of memory or beyond it. Counts one check if it is `expect`. Beyond
    /// memory every load gives all ones.
    Load {
        /// The address.
        gpa: Gpa,
        /// The word.
        expect: u64,
    },
    /// Stores a word at `gpa`. Beyond memory nothing comes of it. No check.
    Store {
        /// The address.
        gpa: Gpa,
        /// The word.
        value: u64,
    },
    /// Passes over `[gpa..gpa + len)` until the word at `until` is not 0; the word is looked at
    /// after each pass, so there is at least one. Pass `n` (from 0) fills it with
    /// [`Pattern::Seeded`] and the seed `seed + n` (modulo 2^64) and checks it as [`Op::Check`]
    /// does. Each pass counts one check.
    Churn {
        /// The first byte.
        gpa: Gpa,
        /// The length in bytes.
        len: u64,
        /// The seed of the first pass.
        seed: u64,
        /// The flag that ends it.
        until: Gpa,
    },
    /// Stores 1 in the word at `gpa`. No check.
    SetFlag {
        /// The flag.
        gpa: Gpa,
    },
    /// Waits until the word at `gpa` is not 0. No check.
    WaitFlag {
        /// The flag.
        gpa: Gpa,
    },
    /// Reads the first word of each of `pages` pages from `gpa` on, and stores how long each read
    /// took to the words from `log` on: in ticks of the vCPU's TSC, 0 on the simulated machine,
    /// which has no clock. No check.
    Time {
        /// The address of the first page.
        gpa: Gpa,
        /// How many pages of 4 KiB.
        pages: u64,
        /// Where the times go: a word a page.
        log: Gpa,
    },
    /// As [`Op::Convert`], done; stores how long it took, from before the request to after its
    /// answer, to the word at `log`: in ticks as [`Op::Time`].
    TimeConvert {
        /// The address of the first page.
        gpa: Gpa,
        /// How many pages of 4 KiB.
        pages: u64,
        /// What they are to be.
        to: Visibility,
        /// Where the time goes.
        log: Gpa,
    },
    /// Reads the first word of each of `pages` pages from `gpa` on, over and over, until the word
    /// at `until` is not 0. Counts the pages read in the word at `log`, and keeps the longest time
    /// from one to the next in the word after it: in ticks as [`Op::Time`], and more than it holds
    /// already. No check.
    StandStill {
        /// The address of the first page.
        gpa: Gpa,
        /// How many pages of 4 KiB.
        pages: u64,
        /// Where count and longest time go: two words.
        log: Gpa,
        /// The flag that ends it.
        until: Gpa,
    },
    /// Reports how many checks have passed, and stops.
    Done,
}

impl Op {
    /// The memory that the guest itself reads and writes, as first address and bytes. `None` for
    /// ops that touch none: requests are about memory, they don't touch it.
    pub const fn touched(&self) -> Option<(Gpa, u64)> {
        Some(match *self {
            Self::Fill { gpa, len, .. } | Self::Check { gpa, len, .. } => (gpa, len),
            Self::Digest { gpa, len } => (gpa, len),
            Self::Churn { gpa, len, .. } | Self::Roam { gpa, len, .. } => (gpa, len),
            Self::Device { request, .. } => (request, DeviceRequest::BYTES),
            Self::Load { gpa, .. } | Self::Store { gpa, .. } => (gpa, WORD),
            Self::SetFlag { gpa } | Self::WaitFlag { gpa } => (gpa, WORD),
            Self::TimeConvert { log, .. } => (log, WORD),
            Self::Time { gpa, pages, .. } | Self::StandStill { gpa, pages, .. } => {
                (gpa, pages.saturating_mul(PAGE_SIZE))
            }
            Self::Convert { .. } | Self::Notify { .. } | Self::Probe { .. } => return None,
            Self::Done => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complement_answers_the_payload_it_names() {
        let (payload, answer) = (Gpa::new(0x20_1000), Gpa::new(0x20_0000));
        let pattern = Pattern::Complement { seed: 7, offset: 0x1000 };
        assert_eq!(pattern.word(answer), !Pattern::Seeded { seed: 7 }.word(payload));
        let before = Pattern::Complement { seed: 7, offset: 0u64.wrapping_sub(0x1000) };
        assert_eq!(before.word(payload), !Pattern::Seeded { seed: 7 }.word(answer));
    }

    #[test]
    fn a_page_at_another_address_holds_other_words() {
        let words = |page: u64| (0..512).map(move |i| pattern(Gpa::new(page + i * 8), 42));
        assert!(words(0x1000).zip(words(0x2000)).all(|(a, b)| a != b));
    }
}
