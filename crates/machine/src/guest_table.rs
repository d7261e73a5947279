//! Page tables that lie in guest memory: x86-64's four levels, as a guest makes them for itself and
//! for its own guest.
//!
//! Read as the hypervisor reads them (`FNAME(walk_addr_generic)`, arch/x86/kvm/mmu/paging_tmpl.h).
//! Every access is one of user mode, as a guest's workload makes, and as nested page tables see all
//! (AMD APM volume 2, section 15.25.5). A large page is one at level 2 or 3, of the machine's
//! geometry. What a guest writes there is an allegation: bits that are reserved and frames that
//! are not aligned translate nothing. Execution is not modelled, so that NX is not looked at.

use polder_units::{Geometry, Gfn, Level, PAGE_SHIFT, Pfn};

use crate::ObjectId;
use crate::anonymous::Behind;
use crate::frames::Frames;
use crate::object::Object;
use crate::slab::Slab;
use crate::vm::Slot;

/// The bits of an entry (AMD APM volume 2, section 5.4), and how entries are put together.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Pte(pub u64);

impl Pte {
    /// It translates.
    pub const PRESENT: u64 = 1;
    /// Writes are let through.
    pub const WRITABLE: u64 = 1 << 1;
    /// User-mode accesses are let through.
    pub const USER: u64 = 1 << 2;
    /// It was used.
    pub const ACCESSED: u64 = 1 << 5;
    /// The page was written to.
    pub const DIRTY: u64 = 1 << 6;
    /// It is a large page, not a table.
    pub const LARGE: u64 = 1 << 7;
    /// What an entry of a table has that lets everything through and has been used.
    pub const ALL: u64 = Self::PRESENT | Self::WRITABLE | Self::USER | Self::ACCESSED | Self::DIRTY;

    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

    /// An entry for a frame, or for the table in it, with these bits.
    pub const fn new(gfn: Gfn, bits: u64) -> Self {
        Self((gfn.get() << PAGE_SHIFT) & Self::ADDRESS | bits)
    }

    /// Whether all of these bits are set.
    pub const fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }

    /// The frame.
    pub const fn gfn(self) -> Gfn {
        match Gfn::new((self.0 & Self::ADDRESS) >> PAGE_SHIFT) {
            Some(gfn) => gfn,
            None => unreachable!(),
        }
    }
}

/// The level of a guest's top table. A table of level 1 has entries of 4K pages.
pub(crate) const TOP: u8 = 4;

/// log2 of the entries of a table of level 3 and 4.
const WIDE: u32 = 9;

/// Why a guest's tables do not translate a page. It is the guest's own affair (`#PF`), or that of
/// the guest whose nested tables they are (`#VMEXIT(NPF)`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, thiserror::Error)]
pub enum Untranslated {
    /// An entry is not present.
    #[error("an entry is not present")]
    NotPresent,
    /// An entry lets no write through.
    #[error("an entry lets no write through")]
    NotWritable,
    /// An entry lets no user through.
    #[error("an entry lets no user-mode access through")]
    NotUser,
    /// An entry has a bit set that is reserved, or a frame that is not aligned.
    #[error("an entry has a reserved bit set")]
    Reserved,
    /// The address has more bits than the tables translate.
    #[error("the address is not canonical")]
    NotCanonical,
}

/// Why a walk has no end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Stopped {
    /// By the guest's own doing.
    Untranslated(Untranslated),
    /// The table in this frame can't be read: no slot is there, or no memory behind it.
    Table(Gfn),
}

/// An entry that a walk passed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Step {
    pub(crate) table: Gfn,
    pub(crate) level: u8,
    pub(crate) index: u16,
    pub(crate) entry: Pte,
}

/// How a guest's tables translate a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Walk {
    steps: [Option<Step>; TOP as usize],
    /// The frame of the page.
    pub(crate) gfn: Gfn,
    /// The level of the guest's own mapping.
    pub(crate) level: Level,
}

impl Walk {
    /// The entries passed, from the top.
    pub(crate) fn steps(&self) -> impl Iterator<Item = Step> {
        self.steps.into_iter().flatten()
    }

    fn all(&self, bits: u64) -> bool {
        self.steps().all(|step| step.entry.has(bits))
    }

    fn last(&self) -> Pte {
        self.steps().last().map_or(Pte(0), |step| step.entry)
    }

    /// Whether the guest's tables let a write through.
    pub(crate) fn writable(&self) -> bool {
        self.all(Pte::WRITABLE)
    }

    /// Whether every entry says that it was used.
    pub(crate) fn accessed(&self) -> bool {
        self.all(Pte::ACCESSED)
    }

    /// Whether the page was written to, by what the guest's tables say.
    pub(crate) fn dirty(&self) -> bool {
        self.last().has(Pte::DIRTY)
    }
}

/// The pages' share of an address at a table's level: which entry.
pub(crate) fn index_at(geometry: Geometry, page: u64, level: u8) -> u16 {
    let shift = shift_at(geometry, level);
    let width = shift_at(geometry, level + 1) - shift;
    let index = (page >> shift) & ((1 << width) - 1);
    u16::try_from(index).unwrap_or(u16::MAX)
}

/// log2 of the pages that an entry of a table of this level covers.
pub(crate) fn shift_at(geometry: Geometry, level: u8) -> u32 {
    let large = |level| geometry.pages(level).get().trailing_zeros();
    match level {
        0 | 1 => 0,
        2 => large(Level::Size2M),
        3 => large(Level::Size1G),
        above => large(Level::Size1G) + WIDE * u32::from(above - 3),
    }
}

/// The page level of an entry at a table's level, if it may be a page.
pub(crate) const fn page_level(level: u8) -> Option<Level> {
    match level {
        1 => Some(Level::Size4K),
        2 => Some(Level::Size2M),
        3 => Some(Level::Size1G),
        _ => None,
    }
}

/// The level of the table whose entries are pages of this level.
pub(crate) const fn table_level(level: Level) -> u8 {
    match level {
        Level::Size4K => 1,
        Level::Size2M => 2,
        Level::Size1G => 3,
    }
}

/// A guest's memory, as the hypervisor reads it.
#[derive(Clone, Copy)]
pub(crate) struct GuestMemory<'a> {
    pub(crate) slots: &'a [Slot],
    pub(crate) objects: &'a Slab<ObjectId, Object>,
    pub(crate) frames: &'a Frames,
    pub(crate) zero_page: Option<Pfn>,
    pub(crate) geometry: Geometry,
}

impl GuestMemory<'_> {
    /// What is behind a guest frame.
    pub(crate) fn behind(&self, gfn: Gfn) -> Option<Behind> {
        let (object, page) = crate::vm::slot_of(self.slots, gfn)?.page(gfn)?;
        self.objects.get(object).ok()?.behind(page, self.zero_page)
    }

    /// An entry of the table in a guest frame.
    pub(crate) fn entry(&self, table: Gfn, index: u16) -> Result<Pte, Stopped> {
        let behind = self.behind(table).ok_or(Stopped::Table(table))?;
        Ok(Pte(self.frames.read_u64(behind.pfn, u64::from(index) * 8)))
    }

    /// Walks the tables from `root` on, for page number `page` of the space that they translate.
    pub(crate) fn walk(&self, root: Gfn, page: u64, write: bool) -> Result<Walk, Stopped> {
        if !self.is_canonical(page) {
            return Err(Stopped::Untranslated(Untranslated::NotCanonical));
        }
        let mut steps = [None; TOP as usize];
        let mut table = root;
        for (at, level) in (1..=TOP).rev().enumerate() {
            let index = index_at(self.geometry, page, level);
            let entry = self.entry(table, index)?;
            steps[at] = Some(Step { table, level, index, entry });
            if let Some(wrong) = self.refused(entry, level) {
                return Err(Stopped::Untranslated(wrong));
            }
            if level > 1 && !entry.has(Pte::LARGE) {
                table = entry.gfn();
                continue;
            }
            let offset = page & ((1 << shift_at(self.geometry, level)) - 1);
            let gfn = Gfn::new(entry.gfn().get() + offset);
            let (Some(gfn), Some(level)) = (gfn, page_level(level)) else { break };
            let walk = Walk { steps, gfn, level };
            // Permissions are those of the whole way, and looked at at its end.
            return match () {
                () if !walk.all(Pte::USER) => Err(Stopped::Untranslated(Untranslated::NotUser)),
                () if write && !walk.writable() => {
                    Err(Stopped::Untranslated(Untranslated::NotWritable))
                }
                () => Ok(walk),
            };
        }
        Err(Stopped::Untranslated(Untranslated::Reserved))
    }

    /// Calls `found` with each page that the tables from `root` on let be read: its number, the
    /// frame and how many pages there are of both. At most `budget` entries are looked at; whether
    /// that was enough. Tables that lead to each other make more pages than memory has.
    pub(crate) fn each(
        &self,
        root: Gfn,
        budget: &mut u64,
        found: &mut impl FnMut(u64, Gfn, u64),
    ) -> bool {
        self.each_below((root, TOP, 0), budget, found)
    }

    fn each_below(
        &self,
        (table, level, base): (Gfn, u8, u64),
        budget: &mut u64,
        found: &mut impl FnMut(u64, Gfn, u64),
    ) -> bool {
        let shift = shift_at(self.geometry, level);
        let entries = 1u64 << (shift_at(self.geometry, level + 1) - shift);
        for index in 0..entries {
            let Some(left) = budget.checked_sub(1) else { return false };
            *budget = left;
            let Ok(entry) = self.entry(table, u16::try_from(index).unwrap_or(u16::MAX)) else {
                return true;
            };
            if self.refused(entry, level).is_some() || !entry.has(Pte::USER) {
                continue;
            }
            let page = self.canonical(base | index << shift);
            if level > 1 && !entry.has(Pte::LARGE) {
                let below = (entry.gfn(), level - 1, base | index << shift);
                if !self.each_below(below, budget, found) {
                    return false;
                }
            } else {
                found(page, entry.gfn(), 1 << shift);
            }
        }
        true
    }

    /// A page number with its highest translated bit in all bits above.
    fn canonical(&self, page: u64) -> u64 {
        let bits = shift_at(self.geometry, TOP + 1);
        let all = (1 << (u64::BITS - PAGE_SHIFT)) - 1;
        if page >> (bits - 1) == 0 { page } else { page | (all & !((1 << bits) - 1)) }
    }

    fn refused(&self, entry: Pte, level: u8) -> Option<Untranslated> {
        let large = level > 1 && entry.has(Pte::LARGE);
        let pages = 1 << shift_at(self.geometry, level);
        let misaligned = large && (level == TOP || !entry.gfn().get().is_multiple_of(pages));
        match () {
            () if !entry.has(Pte::PRESENT) => Some(Untranslated::NotPresent),
            () if misaligned => Some(Untranslated::Reserved),
            () => None,
        }
    }

    /// Whether the bits above those that are translated are all the same as the highest of these.
    fn is_canonical(&self, page: u64) -> bool {
        let bits = shift_at(self.geometry, TOP + 1);
        let above = page >> (bits - 1);
        let ones = (1 << (u64::BITS - PAGE_SHIFT - (bits - 1))) - 1;
        above == 0 || above == ones
    }
}
