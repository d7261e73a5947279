//! Roots: what a vCPU's translations begin at, and how they change while it runs.
//!
//! There is one interface for all of them ([`Machine::resolve`](crate::Machine::resolve),
//! [`Machine::map`](crate::Machine::map)), and nobody asks whether a guest's guest runs: which root
//! a vCPU has follows from what it was told, in [`Paging::root`] alone.
//!
//! | hardware | L1's paging | L2 runs | L1 gives L2 | root | space |
//! |---|---|---|---|---|---|
//! | two-dimensional | | no | | `Tdp` | L1's guest-physical |
//! | two-dimensional | | yes | nested tables | `Nested` | L2's guest-physical |
//! | two-dimensional | | yes | shadow tables of its own | `Tdp` | L1's guest-physical |
//! | none | off | no | | `Tdp` | L1's guest-physical |
//! | none | on | no | | `Shadow` | L1's linear |
//! | none | | yes | | `Shadow` | L2's linear |
//!
//! A vCPU keeps its last roots (`prev_roots`, arch/x86/include/asm/kvm_host.h): what its TLB has of
//! each has a tag of its own, as by PCID or ASID.

use core::fmt;

use polder_units::{AddressSpace, Gfn};

/// What a vCPU's translations begin at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Root {
    /// The direct table of guest-physical addresses.
    Tdp,
    /// Shadows of the guest's page tables.
    Shadow {
        /// The guest frame of the guest's top table: its CR3.
        cr3: Gfn,
    },
    /// Shadows of the nested page tables that a guest has made for its own.
    Nested {
        /// The guest frame of the top table: its nCR3.
        ncr3: Gfn,
    },
}

impl Root {
    /// The addresses that it translates.
    pub const fn space(self) -> AddressSpace {
        match self {
            Self::Tdp => AddressSpace::Gpa,
            Self::Shadow { .. } => AddressSpace::Linear,
            Self::Nested { .. } => AddressSpace::L2Gpa,
        }
    }

    /// The table in guest memory that it shadows, if it does.
    pub const fn table(self) -> Option<Gfn> {
        match self {
            Self::Tdp => None,
            Self::Shadow { cr3: table } | Self::Nested { ncr3: table } => Some(table),
        }
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tdp => f.write_str("tdp"),
            Self::Shadow { cr3 } => write!(f, "shadow of cr3 {cr3}"),
            Self::Nested { ncr3 } => write!(f, "shadow of ncr3 {ncr3}"),
        }
    }
}

/// How a guest runs its own guest (VMRUN of a VMCB).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct L2 {
    /// Nested paging, by the tables from this guest frame on; `None` where the guest uses shadow
    /// paging for it.
    pub ncr3: Option<Gfn>,
    /// The top of the page tables that it runs on; `None` with paging off.
    pub cr3: Option<Gfn>,
}

/// What a vCPU was told of its paging.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Paging {
    pub(crate) cr3: Option<Gfn>,
    pub(crate) l2: Option<L2>,
}

impl Paging {
    /// The root that follows from it; `two_dimensional` says what the hardware has.
    pub(crate) fn root(self, two_dimensional: bool) -> Root {
        match (two_dimensional, self.l2) {
            (true, Some(L2 { ncr3: Some(ncr3), .. })) => Root::Nested { ncr3 },
            (true, _) => Root::Tdp,
            (false, l2) => {
                let cr3 = l2.map_or(self.cr3, |l2| l2.cr3);
                cr3.map_or(Root::Tdp, |cr3| Root::Shadow { cr3 })
            }
        }
    }
}

/// How many roots a vCPU has at once, the direct one among them.
const ROOTS: usize = 4;

/// The roots that a vCPU has, and which is in use. The first is the direct one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Roots {
    current: usize,
    indirect: [Option<Root>; ROOTS - 1],
    /// Which indirect one goes next.
    oldest: usize,
}

impl Roots {
    pub(crate) const fn new() -> Self {
        Self { current: 0, indirect: [None; ROOTS - 1], oldest: 0 }
    }

    pub(crate) fn current(&self) -> Root {
        match self.current {
            0 => Root::Tdp,
            at => self.indirect[at - 1].unwrap_or(Root::Tdp),
        }
    }

    /// The TLB's tag of the root in use.
    pub(crate) const fn tag(&self) -> u64 {
        self.current as u64
    }

    /// The roots in shadow pages, each with its tag.
    pub(crate) fn indirect(&self) -> impl Iterator<Item = (u64, Root)> {
        (1..).zip(self.indirect).filter_map(|(tag, root)| Some((tag, root?)))
    }

    /// Goes over to a root. Returns one that had to go for it, with its tag, which is now the
    /// other's.
    pub(crate) fn load(&mut self, root: Root) -> Option<(u64, Root)> {
        if root == Root::Tdp {
            self.current = 0;
            return None;
        }
        if let Some(at) = self.indirect.iter().position(|it| *it == Some(root)) {
            self.current = at + 1;
            return None;
        }
        let at = self.indirect.iter().position(Option::is_none).unwrap_or(self.oldest);
        let gone = self.indirect[at].replace(root);
        self.oldest = (at + 1) % self.indirect.len();
        self.current = at + 1;
        gone.map(|gone| (at as u64 + 1, gone))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_root_a_vcpu_has_follows_from_what_it_was_told() {
        let [cr3, l2_cr3, ncr3] = [1u32, 2, 3].map(Gfn::from);
        let of = |two, cr3, l2| Paging { cr3, l2 }.root(two);
        let nested = Some(L2 { ncr3: Some(ncr3), cr3: Some(l2_cr3) });
        let shadowing = Some(L2 { ncr3: None, cr3: Some(l2_cr3) });
        for (root, two, cr3, l2) in [
            (Root::Tdp, true, None, None),
            (Root::Tdp, true, Some(cr3), None),
            (Root::Nested { ncr3 }, true, Some(cr3), nested),
            (Root::Tdp, true, Some(cr3), shadowing),
            (Root::Tdp, false, None, None),
            (Root::Shadow { cr3 }, false, Some(cr3), None),
            (Root::Shadow { cr3: l2_cr3 }, false, Some(cr3), shadowing),
        ] {
            assert_eq!(of(two, cr3, l2), root);
        }
        assert_eq!(of(true, Some(cr3), shadowing).space(), AddressSpace::Gpa);
    }

    #[test]
    fn the_oldest_of_the_last_roots_goes_for_a_new_one() {
        let mut roots = Roots::new();
        let root = |cr3: u32| Root::Shadow { cr3: Gfn::from(cr3) };
        assert_eq!([1, 2, 3].map(|cr3| roots.load(root(cr3))), [None; 3]);
        assert_eq!((roots.load(root(2)), roots.tag()), (None, 2));
        assert_eq!((roots.load(root(4)), roots.tag()), (Some((1, root(1))), 1));
        assert_eq!((roots.load(Root::Tdp), roots.current()), (None, Root::Tdp));
        assert_eq!(roots.indirect().count(), 3);
    }
}
