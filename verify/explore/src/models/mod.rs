//! Other orders than Polder's: what the kernel does, or was proposed to do, searched the same way.
//!
//! A model is a file with one [`Model`] in it: what a conversion does, one step after the other,
//! what its failure does, and what a fault does meanwhile. To search another one, write it down in
//! the same words and add it to [`ALL`]. Which invariants it keeps is not a verdict on code that
//! runs somewhere: it is about the order as it is written here.

mod folio_lock;
mod gmem_in_place;
mod hugetlb_rfc;
mod vm_attributes;
mod world;

pub use folio_lock::UNLOCKED as MAPCOUNT_WITHOUT_LOCK;
pub use world::ModelWorld;

/// An order of doing things.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Model {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// Whether private and shared pages are of two memories.
    pub two_pools: bool,
    /// What the page is at first.
    pub private_first: bool,
    /// A conversion to private.
    pub to_private: &'static [Do],
    /// What it does when a step of it fails.
    pub to_private_failed: &'static [Do],
    /// A conversion to shared.
    pub to_shared: &'static [Do],
    /// What it does when a step of it fails.
    pub to_shared_failed: &'static [Do],
    /// A fault of the host, from any path that ends in the page cache.
    pub fault: &'static [Fault],
}

/// A step of a conversion.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Do {
    /// `filemap_invalidate_lock()`: waits for faults that hold it shared.
    TakeLock,
    /// `filemap_invalidate_unlock()`.
    DropLock,
    /// The host may not fault the page in any more.
    Deny,
    /// It may.
    Allow,
    /// The page counts as private: KVM's attribute, and what the guest is told.
    SetPrivate,
    /// It counts as shared.
    SetShared,
    /// Takes the page out of every process, and flushes.
    UnmapHost,
    /// Takes the page out of stage 2, and flushes.
    ZapGuest,
    /// The same, and lets no fault map until [`Do::EndZap`] (`kvm_mmu_invalidate_begin()`).
    BeginZap,
    /// `kvm_mmu_invalidate_end()`.
    EndZap,
    /// Locks the folio; waits for it.
    LockFolio,
    /// Unlocks it.
    UnlockFolio,
    /// Fails if the folio is mapped, or anybody refers to it.
    CheckCounts,
    /// Splits the huge folio; fails if it is mapped, or anybody refers to it.
    Split,
    /// Merges it again, where it can be.
    Merge,
}

/// A step of a fault of the host.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fault {
    /// `filemap_invalidate_lock_shared()`: waits for a conversion that holds it.
    TakeLock,
    /// `filemap_invalidate_unlock_shared()`.
    DropLock,
    /// Ends in a `SIGBUS` if the page is denied.
    Look,
    /// Locks the folio; waits for it.
    LockFolio,
    /// Unlocks it.
    UnlockFolio,
    /// Maps the page.
    Map,
}

/// Every model.
pub const ALL: &[Model] =
    &[gmem_in_place::MODEL, hugetlb_rfc::MODEL, vm_attributes::MODEL, folio_lock::MODEL];

/// The invariants that are looked at, each in a search of its own.
pub const INVARIANTS: [&str; 5] = ["INV-1", "INV-2", "INV-4", "INV-8", "INV-10"];

/// The model of this name.
pub fn named(name: &str) -> Option<Model> {
    ALL.iter().copied().find(|model| model.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{How, check};

    fn broken(model: Model) -> Vec<&'static str> {
        let breaks = |&invariant: &&'static str| {
            let start = ModelWorld::new(&model, invariant);
            let report = check(&start, How::Shortest, &mut |_, _| true);
            assert!(report.complete || report.finding.is_some(), "{} is small", model.name);
            report.finding.is_some()
        };
        INVARIANTS.into_iter().filter(breaks).collect()
    }

    #[test]
    fn what_each_order_keeps_is_what_docs_protocols_md_says() {
        let found = ALL.iter().map(|&model| (model.name, broken(model))).collect::<Vec<_>>();
        assert_eq!(
            found,
            [
                ("gmem-in-place", vec!["INV-4"]),
                ("hugetlb-rfc", vec!["INV-1", "INV-4"]),
                ("vm-attributes", vec!["INV-10"]),
                ("folio-lock", vec!["INV-4"]),
            ]
        );
    }

    #[test]
    fn a_map_count_read_without_the_folio_lock_is_one_too_late() {
        assert!(broken(MAPCOUNT_WITHOUT_LOCK).contains(&"INV-1"));
    }
}
