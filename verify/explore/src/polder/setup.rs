//! What is searched: memory, a host, and who does what with it.

use polder_explored_engine::{Bug as EngineBug, Contents, NotLarge, Platform, Visibility};
use polder_machine::Plant;
use polder_units::Geometry;

/// A configuration of the product: its engine over a small machine.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Its name.
    pub name: &'static str,
    /// What it is for, in a line.
    pub about: &'static str,
    /// Whether all of its states can be looked at in some minutes.
    pub exhaustive: bool,
    /// Whose memory it is: a plain VM's, an SNP guest's, a protected one's of pKVM's.
    pub platform: Platform,
    /// The object's pages, at most 8.
    pub pages: u8,
    /// Pages a level.
    pub geometry: Geometry,
    /// Whether the object begins as one 2M folio, and not with a folio for each page.
    pub huge: bool,
    /// Whether that is of a pool, of the largest level that fits, and split by the engine.
    pub pooled: bool,
    /// What every page is at first.
    pub initial: Visibility,
    /// Whether its pages have memory at first that an SNP guest was given and has accepted.
    pub accepted: bool,
    /// How many pages, from the first on, a protected guest of pKVM's was donated at first.
    pub donated: u8,
    /// Whether a device is attached, which has what is shared mapped.
    pub device: bool,
    /// Whether another has the same pages, each copied when one of the two writes to it; the last
    /// one was never written.
    pub copied: bool,
    /// Whether contents are to come.
    pub owed: bool,
    /// Whether pages are taken off the kernel's direct map before anybody sees them.
    pub off_direct_map: bool,
    /// The slot's first guest frame, first page, and pages.
    pub first_gfn: u8,
    /// See above.
    pub first_page: u8,
    /// See above.
    pub slot_pages: u8,
    /// Who does what.
    pub actors: Vec<Actor>,
    /// How many steps of hosts may fail.
    pub failures: u8,
    /// How many threads may die at work.
    pub deaths: u8,
    /// Whether others go on only where a scenario can hold whoever is amid something.
    pub held: bool,
    /// What was planted.
    pub bug: Option<Bug>,
}

/// Somebody at work.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Actor {
    /// His name in traces.
    pub name: &'static str,
    /// What he is.
    pub role: Role,
    /// What he does, one thing after the other.
    pub tasks: Vec<Task>,
}

/// What an actor is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// A vCPU, by number.
    Vcpu(u16),
    /// A thread that touches the host view, on the CPU of this number.
    Thread(u16),
    /// Polder's fault thread.
    Faults,
    /// A thread that calls the library.
    Caller,
    /// A device's driver in the kernel, which pins pages of the host view.
    Pinner,
    /// The kernel's memory management, which splits folios and merges them.
    Kernel,
    /// A CPU that is at work on entries of the RMP.
    OtherCpu,
    /// Another process that has the memory's file mapped: the kernel answers its faults. One.
    Process,
    /// A device behind an IOMMU domain. One.
    Device,
}

/// A piece of work. Pages and guest frames are by number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Task {
    /// A guest reads the frame that shows a page.
    GuestRead(u8),
    /// A guest writes a token there.
    GuestWrite(u8, u8),
    /// A thread reads a page by the host view.
    HostRead(u8),
    /// A thread writes a token there.
    HostWrite(u8, u8),
    /// `Memory::convert` of pages.
    Convert {
        /// The first page.
        start: u8,
        /// The one after the last.
        end: u8,
        /// What they become.
        to: Visibility,
        /// What becomes of their bytes.
        contents: Contents,
    },
    /// `Memory::populate` of pages with a token.
    Populate {
        /// The first page.
        start: u8,
        /// The one after the last.
        end: u8,
        /// The token.
        value: u8,
    },
    /// `Memory::discard` of pages.
    Discard {
        /// The first page.
        start: u8,
        /// The one after the last.
        end: u8,
    },
    /// `Memory::read` of a page.
    CopyOut(u8),
    /// `Memory::write` of a token to a page.
    CopyIn(u8, u8),
    /// `Memory::pin` of a page, for a while.
    Pin(u8),
    /// `Pinner::pin` of a page, which takes no lock, for a while.
    PinUnlocked(u8),
    /// `Memory::pin` of a page exclusively, for a while.
    PinAlone(u8),
    /// The kernel pins a page of the host view, GUP-fast first, for a while.
    Gup(u8),
    /// `Memory::unbind` of the slot, and `Memory::bind` again.
    Rebind,
    /// `Memory::unbind` of the slot, for good.
    Unbind,
    /// `Memory::prefault` of the frames that show pages.
    Prefault {
        /// The first page.
        start: u8,
        /// The one after the last.
        end: u8,
    },
    /// Who has the same pages, each copied at the first write, writes a token to one.
    CopiedWrite(u8, u8),
    /// An SNP guest accepts a page: PVALIDATE of 4K.
    Accept(u8),
    /// PVALIDATE of the 2M page around a page.
    AcceptLarge(u8),
    /// It reads a page as its own.
    PrivateRead(u8),
    /// It writes a token there, which nobody else may ever see.
    PrivateWrite(u8, u8),
    /// `Memory::merge` of pages.
    Merge {
        /// The first page.
        start: u8,
        /// The one after the last.
        end: u8,
    },
    /// Another process writes a token to a page.
    OtherWrite(u8, u8),
    /// The folio around a page is split.
    Split(u8),
    /// The folios of the 2M page around a page are merged.
    Collapse(u8),
    /// The RMP entry of a page is in use for a while; whether that of its 2M page.
    Hold(u8, bool),
    /// `Memory::move_pages`.
    Move {
        /// The first page.
        start: u8,
        /// The one after the last.
        end: u8,
    },
    /// `Memory::want` of a page: the VMM wishes it to be so.
    Want(u8, Visibility),
    /// A device writes a token to a page.
    DmaWrite(u8, u8),
    /// The kernel pins a page of the host view exclusively, for a while.
    PinExclusive(u8),
    /// The hypervisor runs out of memory for a table, at so many entries from here.
    HypervisorFails(u8),
}

/// A mistake in the order in which the driver does things.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Slip {
    /// References are looked for once; one that GUP-fast is about to drop counts.
    NoRetry,
    /// A page is published, and shown, before its bytes are written.
    PublishBeforeBytes,
    /// A touch is lost with the fault thread that took it from its queue: who touched sleeps on.
    TouchForgotten,
    /// Pages are taken off the direct map once they were shown.
    DirectMapLate,
    /// The host view is watched for missing pages only: what is in the page cache the kernel maps.
    MissingOnly,
    /// An answer is given back first and carried out then.
    AnswerAfterGivenBack,
    /// Bytes are copied without a claim.
    CopyUnclaimed,
    /// A slot that is deleted stays in stage 2.
    SlotNotZapped,
    /// A guest's fault is answered, and its page not mapped.
    NeverMapped,
    /// A step of a way back that was done is reported as one that failed.
    UndoneDoubted,
    /// A copy's claim is not given back if nobody else is at work any more.
    LastCopyKept,
    /// A fault for its size smashes nothing.
    SmashForgotten,
    /// What PSMASH refuses because somebody was faster ends the vCPU.
    SmashErrorFatal,
    /// Whatever PSMASH refuses is taken for a fault that somebody else has solved.
    SmashErrorSpurious,
    /// After a PSMASH stage 2 stays as it is.
    SmashNotZapped,
    /// A large RMP entry is made without this clause of its predicate.
    Clause(NotLarge),
    /// Stage 2 maps as large as folio and slot allow, whatever the RMP has.
    MappedAboveRmp,
    /// A large entry is taken away as 4K.
    UnassignedSmall,
    /// Pages are assigned, and nobody is cut off from them at the same time.
    AssignedUncut,
    /// Entries are merged while stage 2 has them.
    MergedUnzapped,
    /// A device's pages are taken out of its table, and its IOTLB keeps them.
    IotlbNotFlushed,
    /// A prefault has pages copied that others have, too, as a write would.
    PrefaultCopies,
    /// A prefault that stops early says that all it had claimed is done.
    ProgressBeyond,
    /// A prefault does not keep slots from changing, and tries again where one has gone.
    DeletedSlotSpins,
    /// Who pins without the lock looks first and counts afterwards.
    LooksBeforeCounting,
}

/// A planted bug.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Bug {
    /// In the engine.
    Engine(EngineBug),
    /// In the driver's order.
    Driver(Slip),
    /// In the kernel or the hardware.
    Machine(Plant),
}

impl Setup {
    /// The same with a bug planted.
    #[must_use]
    pub fn with(&self, bug: Bug) -> Self {
        Self { bug: Some(bug), ..self.clone() }
    }

    pub(super) fn slips(&self, slip: Slip) -> bool {
        self.bug == Some(Bug::Driver(slip))
    }

    /// Whether it is an SNP guest's memory.
    pub(super) fn is_snp(&self) -> bool {
        self.platform == Platform::Snp
    }

    /// Whether it is a protected guest's memory under pKVM.
    pub(super) fn is_pkvm(&self) -> bool {
        self.platform == Platform::Pkvm
    }

    /// Whether pages are mapped ahead: only then is it noted what was accessed.
    pub(super) fn maps_ahead(&self) -> bool {
        let ahead = |task: &Task| matches!(task, Task::Prefault { .. });
        self.actors.iter().any(|actor| actor.tasks.iter().any(ahead))
    }

    /// Whether references that are the device's own count for none: only then is it noticed that
    /// they were there too long.
    pub(super) fn overlooks_dma(&self) -> bool {
        let bugs = [EngineBug::DmaUnmappedLate, EngineBug::DmaForgotten];
        bugs.into_iter().any(|bug| self.bug == Some(Bug::Engine(bug)))
    }

    /// Whether one table says what is wished and what is granted.
    pub(super) fn one_table(&self) -> bool {
        let bugs = [EngineBug::OneTable, EngineBug::OneTableUnclaimed];
        bugs.into_iter().any(|bug| self.bug == Some(Bug::Engine(bug)))
    }

    /// Whether a request that is to wait may be answered otherwise, because of what is planted.
    pub(super) fn asks_while_busy(&self) -> bool {
        let asks = [
            EngineBug::ExistsWhileClaimed,
            EngineBug::DeniedWhileClaimed,
            EngineBug::OwedShown,
            EngineBug::OneTableUnclaimed,
        ];
        asks.into_iter().any(|bug| self.bug == Some(Bug::Engine(bug)))
    }
}
