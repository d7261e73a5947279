//! Things with a number: objects, processes, VMs, pins.
//!
//! The lowest free number is given out next, so that the state of a machine does not tell how many
//! things it has had before: a search over states must not take "pinned, unpinned" for a new one.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;

use crate::Error;

/// The number of a thing of one kind.
pub(crate) trait Id: Copy {
    /// What it numbers, as an error says it.
    const WHAT: &'static str;
    fn from_number(number: u32) -> Self;
    fn number(self) -> u32;
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        ///
        /// The number is given out again once the thing is gone.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(u32);

        impl $name {
            /// The number.
            pub const fn get(self) -> u32 {
                self.0
            }
        }

        impl Id for $name {
            const WHAT: &'static str = $what;
            fn from_number(number: u32) -> Self {
                Self(number)
            }
            fn number(self) -> u32 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($what, " {}"), self.0)
            }
        }
    };
}

id! {
    /// A memory object: a memfd or guest_memfd of the machine.
    ObjectId, "object"
}
id! {
    /// A host process.
    ProcessId, "process"
}
id! {
    /// A domain of the IOMMU.
    DomainId, "iommu domain"
}
id! {
    /// A virtual machine.
    VmId, "vm"
}
id! {
    /// A pin of `pin_user_pages`, until it is released.
    PinId, "pin"
}

/// The things of one kind.
#[derive(Clone, Hash)]
pub(crate) struct Slab<K, T> {
    things: Vec<Option<T>>,
    free: BTreeSet<u32>,
    kind: PhantomData<K>,
}

impl<K: Id, T> Slab<K, T> {
    pub(crate) const fn new() -> Self {
        Self { things: Vec::new(), free: BTreeSet::new(), kind: PhantomData }
    }

    /// Keeps `thing` under the lowest free number.
    pub(crate) fn insert(&mut self, thing: T) -> Result<K, Error> {
        if let Some(number) = self.free.pop_first() {
            self.things[number as usize] = Some(thing);
            return Ok(K::from_number(number));
        }
        let number = u32::try_from(self.things.len()).map_err(|_| Error::TooMany(K::WHAT))?;
        self.things.push(Some(thing));
        Ok(K::from_number(number))
    }

    #[inline]
    pub(crate) fn get(&self, id: K) -> Result<&T, Error> {
        let thing = self.things.get(id.number() as usize).and_then(Option::as_ref);
        thing.ok_or(Error::Gone { what: K::WHAT, number: id.number() })
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, id: K) -> Result<&mut T, Error> {
        let thing = self.things.get_mut(id.number() as usize).and_then(Option::as_mut);
        thing.ok_or(Error::Gone { what: K::WHAT, number: id.number() })
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.things.iter_mut().flatten()
    }

    pub(crate) fn remove(&mut self, id: K) -> Result<T, Error> {
        let number = id.number();
        let gone = Error::Gone { what: K::WHAT, number };
        let thing = self.things.get_mut(number as usize).and_then(Option::take).ok_or(gone)?;
        self.free.insert(number);
        while let Some(None) = self.things.last() {
            self.things.pop();
            self.free.pop_last();
        }
        Ok(thing)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (K, &T)> {
        (0..).zip(&self.things).filter_map(|(n, thing)| Some((K::from_number(n), thing.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_is_given_out_next() {
        let mut slab: Slab<PinId, char> = Slab::new();
        let ids = ['a', 'b', 'c'].map(|thing| slab.insert(thing).unwrap());
        slab.remove(ids[0]).unwrap();
        slab.remove(ids[2]).unwrap();
        assert_eq!(slab.things.len(), 2);
        assert_eq!(slab.insert('d').unwrap(), ids[0]);
        assert_eq!(slab.insert('e').unwrap(), ids[2]);
        assert_eq!(slab.remove(PinId(3)), Err(Error::Gone { what: "pin", number: 3 }));
    }
}
