//! What the engine asks of a host, one thing at a time.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use polder_units::PageRange;

use crate::{DeviceId, Visibility};

/// One thing for a host to do. A host does it wholly and reports success, or reports failure; a
/// step that failed may have been done in part, and so is undone too. Doing one twice is harmless.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Step {
    /// Take the pages out of every host view and flush; also lifts the markers in their place.
    UnmapHost(PageRange),
    /// Take the pages out of the guest's stage-2 tables and flush, where the host decides there
    /// by visibility. A host whose guest mappings are right for both has nothing to do.
    UnmapGuest(PageRange),
    /// Find whether anybody still refers to the pages in a way that the engine can't know of. A
    /// host that can't see such references has nothing to do.
    CheckReferences(PageRange),
    /// Make hardware or kernel treat the pages as private or shared, where there is no RMP.
    Protect(PageRange, Visibility),
    /// Give the pages, which lie in one 2M page, to their guest in the RMP: as one large entry if
    /// [`can_install_large_rmp_entry`](crate::can_install_large_rmp_entry), else as 4K entries.
    /// Pages without memory, or that no VM sees, are left for the answer that maps them first.
    Assign(PageRange),
    /// Take the pages, which lie in one 2M page, back from their guest in the RMP, at the level
    /// that their entries have.
    Unassign(PageRange),
    /// Give back to their guest in the RMP what the last [`Unassign`](Self::Unassign) of these
    /// pages took, and nothing else: a page that was not assigned is left for the answer that maps
    /// it first, which cuts off who has it mapped.
    Reassign(PageRange),
    /// Make 4K entries of a large RMP entry of this 2M page, if there is one.
    Smash(PageRange),
    /// Make one large RMP entry of the 4K entries of this 2M page, if one binding shows it and they
    /// agree, and take it out of stage 2 for that; else nothing is touched.
    Merge(PageRange),
    /// Take the RMP entries of this 2M page back from the firmware that it has; their levels stay.
    Thaw(PageRange),
    /// Have what is needed to split this folio, which is all of the range, to those of the next
    /// level: nothing is split yet.
    PrepareSplit(PageRange),
    /// Split this folio to those of the next level, by what was prepared. Of memory that is not
    /// there yet the shape is noted.
    SplitFolio(PageRange),
    /// Make one folio of those of the next level that this range consists of, and keep what it took
    /// to split it.
    MergeFolio(PageRange),
    /// Give back what was kept, or prepared and not used, for a split of this folio.
    ReleaseTables(PageRange),
    /// Make the contents zeros, under every view, and free the memory, of which huge pages go as
    /// a whole or not at all; lifts all markers.
    Free(PageRange),
    /// Prepare freshly written pages for their first use.
    Publish(PageRange),
    /// Make freshly written pages a guest's that has not begun, with what is in them
    /// (`SNP_LAUNCH_UPDATE`).
    Launch(PageRange),
    /// Have other memory behind the pages, with the same in it. Nobody has them mapped, but for a
    /// guest whose stage 2 a hypervisor keeps, which moves them itself.
    Move(PageRange),
    /// Map the pages for a device.
    MapDma(DeviceId, PageRange),
    /// Take the pages away from a device: its domain, and its IOTLB.
    UnmapDma(DeviceId, PageRange),
    /// Cut everybody off from the pages for good.
    Quarantine(PageRange),
}

impl Step {
    /// The pages it is about.
    pub const fn range(self) -> PageRange {
        match self {
            Self::UnmapHost(range)
            | Self::UnmapGuest(range)
            | Self::CheckReferences(range)
            | Self::Protect(range, _)
            | Self::Assign(range)
            | Self::Unassign(range)
            | Self::Reassign(range)
            | Self::Smash(range)
            | Self::Merge(range)
            | Self::Thaw(range)
            | Self::PrepareSplit(range)
            | Self::SplitFolio(range)
            | Self::MergeFolio(range)
            | Self::ReleaseTables(range)
            | Self::Free(range)
            | Self::Publish(range)
            | Self::Launch(range)
            | Self::Move(range)
            | Self::MapDma(_, range)
            | Self::UnmapDma(_, range)
            | Self::Quarantine(range) => range,
        }
    }

    /// What is left of it where some of its pages are in quarantine: the RMP entries of those stay
    /// as they are, and no device gets them.
    pub(crate) fn without(self, quarantined: PageRange) -> Vec<Self> {
        let rest = self.range().without(quarantined).into_iter().flatten();
        match self {
            Self::Unassign(_) => rest.map(Self::Unassign).collect(),
            Self::Reassign(_) => rest.map(Self::Reassign).collect(),
            Self::MapDma(device, _) => rest.map(|part| Self::MapDma(device, part)).collect(),
            _ => vec![self],
        }
    }

    /// How to undo it.
    pub(crate) const fn undo(self) -> Undo {
        match self {
            // Faults bring mappings back, and put markers back.
            Self::UnmapHost(_) | Self::UnmapGuest(_) => Undo::Nothing,
            Self::CheckReferences(_) | Self::Quarantine(_) => Undo::Nothing,
            Self::Protect(range, to) => Undo::Step(Self::Protect(range, to.other())),
            // What is shared was not assigned before.
            Self::Assign(range) => Undo::Step(Self::Unassign(range)),
            Self::Unassign(range) => Undo::Step(Self::Reassign(range)),
            // A large entry says the same as the 4K ones did, and they the same as it.
            Self::Merge(range) => Undo::Step(Self::Thaw(range)),
            Self::Reassign(_) | Self::Smash(_) | Self::Thaw(_) => Undo::Nothing,
            Self::PrepareSplit(range) => Undo::Step(Self::ReleaseTables(range)),
            Self::SplitFolio(range) => Undo::Step(Self::MergeFolio(range)),
            // It kept what a split takes.
            Self::MergeFolio(range) => Undo::Step(Self::SplitFolio(range)),
            Self::ReleaseTables(_) => Undo::Nothing,
            // Nobody may see what a failed population left behind.
            Self::Publish(range) => Undo::Step(Self::Free(range)),
            Self::Launch(range) => Undo::Step(Self::Unassign(range)),
            // A page that has moved is as good where it is.
            Self::Move(_) => Undo::Nothing,
            Self::MapDma(device, range) => Undo::Step(Self::UnmapDma(device, range)),
            Self::UnmapDma(device, range) => Undo::Step(Self::MapDma(device, range)),
            Self::Free(_) => Undo::Impossible,
        }
    }
}

/// What undoes a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Undo {
    Nothing,
    Step(Step),
    Impossible,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = self.range();
        match self {
            Self::UnmapHost(_) => write!(f, "unmap pages {range} from the host view"),
            Self::UnmapGuest(_) => write!(f, "unmap pages {range} from the guest"),
            Self::CheckReferences(_) => write!(f, "check references to pages {range}"),
            Self::Protect(_, to) => write!(f, "make pages {range} {to}"),
            Self::Assign(_) => write!(f, "assign pages {range} in the rmp"),
            Self::Unassign(_) => write!(f, "unassign pages {range} in the rmp"),
            Self::Reassign(_) => write!(f, "assign pages {range} in the rmp as they were"),
            Self::Smash(_) => write!(f, "smash the large rmp entry of pages {range}"),
            Self::Merge(_) => write!(f, "merge the rmp entries of pages {range}"),
            Self::Thaw(_) => write!(f, "take the rmp entries of pages {range} from the firmware"),
            Self::PrepareSplit(_) => write!(f, "prepare to split the folio of pages {range}"),
            Self::SplitFolio(_) => write!(f, "split the folio of pages {range}"),
            Self::MergeFolio(_) => write!(f, "merge the folios of pages {range}"),
            Self::ReleaseTables(_) => write!(f, "release the split tables of pages {range}"),
            Self::Free(_) => write!(f, "free pages {range}"),
            Self::Publish(_) => write!(f, "publish pages {range}"),
            Self::Launch(_) => write!(f, "launch pages {range}"),
            Self::Move(_) => write!(f, "move pages {range}"),
            Self::MapDma(..) => write!(f, "map pages {range} for a device"),
            Self::UnmapDma(..) => write!(f, "take pages {range} away from a device"),
            Self::Quarantine(_) => write!(f, "quarantine pages {range}"),
        }
    }
}
