//! What is done to the machine, in one hold of its lock at a time.

mod perform;

use polder_machine::{
    Error, Exit, FirmwareFail, GupFast, GupStep, HostExit, PinId, Resolved, RmpFail, RmpSize,
    RmpUpdate, Side, Thread, VcpuId, Vpn,
};
use polder_units::{Gfn, GfnRange, Level, PageIndex, PageRange, Pfn};

/// What is done to the machine in one hold of its lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Act {
    /// A thread reads a word by the host view.
    HostRead(Thread, Vpn),
    /// A thread writes a token there.
    HostWrite(Thread, Vpn, u8),
    /// Another process writes a token there.
    OtherWrite(Vpn, u8),
    /// Who has the same pages writes a token to one, which is copied first.
    CopiedWrite(PageIndex, u8),
    /// A page of the object's is copied, as before a write.
    Unshare(PageIndex),
    /// A guest reads a word.
    GuestRead(VcpuId, Gfn, Side),
    /// A guest writes a token.
    GuestWrite(VcpuId, Gfn, Side, u8),
    /// A guest accepts a page.
    Pvalidate(VcpuId, Gfn, RmpSize),
    /// Those of the pages that have no memory get some.
    Allocate(PageRange),
    /// The trusted view writes bytes of a token, so many, at an offset of each page.
    Fill {
        pages: PageRange,
        offset: u8,
        len: u8,
        token: u8,
    },
    /// Those of the pages that have memory are taken off the kernel's direct map.
    TakeOffDirectMap(PageRange),
    /// The pages are mapped in the host view.
    MapHost(PageRange),
    /// Markers are put there.
    Poison(PageRange),
    /// The pages are taken out of the host view, and not flushed.
    UnmapHost(PageRange),
    /// They are flushed there.
    FlushHost(PageRange),
    /// They are taken out of every process's page table; markers stay.
    UnmapProcesses(PageRange),
    /// They are taken out of stage 2, and flushed.
    ZapGuest(PageRange),
    /// Guest frames are taken out of stage 2, and flushed.
    ZapGfns(GfnRange),
    /// The same, and nothing is mapped there until the end.
    BeginZap(GfnRange),
    EndZap,
    Rmpupdate(Pfn, RmpUpdate),
    Psmash(Pfn),
    /// The firmware merges 4K entries, and gives the large one back.
    Unsmash(Pfn),
    /// It gives an entry back.
    Reclaim(Pfn, RmpSize),
    /// Another CPU has an entry in use, or no longer.
    Hold(Pfn, RmpSize),
    LetGo(Pfn),
    /// The kernel locks a folio, or no longer.
    Lock(Pfn),
    Unlock(Pfn),
    Split(PageIndex),
    Collapse(PageIndex),
    /// The driver has what a split of a folio takes, splits it, merges it, or gives that back.
    PrepareSplit(PageRange),
    SplitFolio(PageRange),
    MergeFolio(PageRange),
    ReleaseTables(PageRange),
    /// Their memory is freed.
    Punch(PageRange),
    /// What was resolved is mapped in stage 2; whether it is current.
    MapGuest(Resolved, Level, bool),
    /// GUP-fast goes on.
    Gup(GupFast),
    /// The kernel pins a page of the host view, the slow way.
    Pin(Vpn),
    /// It releases a pin.
    Unpin(PinId),
    /// The slot at a guest frame is made.
    Bind(Gfn, PageRange),
    /// The host donates the memory of a page to the guest, at a guest frame: cut off from every
    /// process first.
    Donate(PageIndex, Gfn),
    /// A guest asks that the host may reach a page, or no longer.
    Ask(Gfn, bool),
    /// The hypervisor does what the guest asked for about the first of these, or takes it back; and
    /// so on.
    Answer(GfnRange, bool),
    /// The guest goes on.
    Resume(GfnRange),
    /// The hypervisor runs out of memory, at so many entries from here.
    HypervisorFails(u8),
    /// The folios of pages move.
    Migrate(PageRange),
    /// Pages are pinned and mapped for the device.
    MapDevice(PageRange),
    /// They are taken out of its table.
    UnmapDevice(PageRange),
    /// They are flushed from its IOTLB, and unpinned; whether they are flushed.
    ReleaseDevice(PageRange, bool),
    /// The device writes a token.
    DeviceWrite(Gfn, u8),
    /// The kernel pins a page of the host view exclusively.
    PinExclusive(Vpn),
    /// The slot there is deleted; whether it is taken out of stage 2.
    Unbind(Gfn, bool),
}

/// What it came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Done {
    Well,
    /// The word that was read.
    Read(u64),
    /// The level that was mapped.
    Mapped(Level),
    Pinned(PinId),
    Gup(GupStep),
    Refused(Error),
    /// An instruction of the RMP did nothing.
    Rmp(RmpFail),
    /// The firmware did nothing.
    Firmware(FirmwareFail),
    HostExit(HostExit),
    GuestExit(Exit),
}

impl Done {
    pub(super) fn is_well(self) -> bool {
        self == Self::Well
    }

    /// For what can only go well.
    pub(super) fn well(self) {
        assert!(self.is_well(), "it can't fail: {self:?}");
    }

    fn of<T, E>(done: Result<T, E>, well: impl Fn(T) -> Self, ill: impl Fn(E) -> Self) -> Self {
        done.map_or_else(ill, well)
    }
}
