//! What this kernel's userfaultfd offers to this process, asked without a view.

use std::os::fd::OwnedFd;

use rustix::mm::UserfaultfdFlags;

use super::{Way, handshake, open};
use crate::Error;
use crate::call::Call;
use crate::uapi::userfaultfd as uapi;

/// What userfaultfd offers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UserfaultOffer {
    way: Result<Way, Error>,
    features: u64,
}

impl UserfaultOffer {
    /// Asks the kernel. No feature is enabled by that: asked for none, `UFFDIO_API` answers with
    /// all there are, also to who may not use them all.
    ///
    /// # Errors
    /// Where there is no userfaultfd at all for this process, not even for its own touches.
    pub fn ask() -> Result<Self, Error> {
        let (way, fd) = match open() {
            Ok((fd, way)) => (Ok(way), fd),
            Err(error) => (Err(error), open_for_own_touches().map_err(|_| error)?),
        };
        Ok(Self { way, features: handshake(&fd, 0)? })
    }

    /// How it may be had for the kernel's touches too, which guest memory takes.
    ///
    /// # Errors
    /// Of the system call, where it may be had for this process's own touches only.
    pub fn way(&self) -> Result<Way, Error> {
        self.way
    }

    /// Whether a feature is there, by the name that the kernel's header has after `UFFD_FEATURE_`.
    pub fn has(&self, feature: &str) -> bool {
        self.features().any(|name| name == feature)
    }

    /// The names of the features that are there.
    pub fn features(&self) -> impl Iterator<Item = &'static str> {
        let features = self.features;
        let there = move |bit: u32| features & u64::from(bit) != 0;
        uapi::FEATURES.iter().filter(move |(_, bit)| there(*bit)).map(|(name, _)| *name)
    }

    /// Bits of features that have no name yet.
    pub fn nameless(&self) -> u64 {
        uapi::FEATURES.iter().fold(self.features, |left, (_, bit)| left & !u64::from(*bit))
    }
}

/// A userfaultfd that is told of this process's own touches only: nobody needs leave for that, but
/// what KVM touches goes unseen.
fn open_for_own_touches() -> Result<OwnedFd, Error> {
    let flags = UserfaultfdFlags::CLOEXEC
        | UserfaultfdFlags::NONBLOCK
        | UserfaultfdFlags::from_bits_retain(uapi::UFFD_USER_MODE_ONLY);
    // SAFETY: it watches no memory.
    Call::new("userfaultfd").make(|| unsafe { rustix::mm::userfaultfd(flags) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_names_and_the_rest_a_number() {
        let none = UserfaultOffer { way: Ok(Way::Device), features: 0 };
        assert_eq!((none.features().count(), none.nameless()), (0, 0));
        let bits = u64::from(uapi::UFFD_FEATURE_POISON) | 1 << 40;
        let some = UserfaultOffer { way: Ok(Way::SystemCall), features: bits };
        assert_eq!(some.features().collect::<Vec<_>>(), ["POISON"]);
        assert!(some.has("POISON") && !some.has("MINOR_SHMEM"));
        assert_eq!(some.nameless(), 1 << 40);
    }

    #[test]
    fn no_two_names_are_of_one_bit() {
        let all = uapi::FEATURES.iter().fold(0, |all, (_, bit)| all | bit);
        assert_eq!(all.count_ones() as usize, uapi::FEATURES.len());
    }
}
