//! Every way in which a call on [`crate::Memory`] fails.

use polder_engine::{Errno, Refusal};
use polder_machine::PkvmFail;
use polder_units::{Level, PageCount, PageRange};

/// A call that failed. It changed nothing, unless it says so.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// The engine refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The host could not do its part; what had been done was undone.
    #[error(transparent)]
    Host(#[from] polder_linux::Error),
    /// The host could not do its part, and neither could what had been done be undone. The pages
    /// are out of use from now on.
    #[error("a failed operation could not be undone: pages {pages:?} are in quarantine")]
    Quarantined {
        /// Those pages.
        pages: Vec<PageRange>,
        /// What failed first.
        #[source]
        source: Box<Self>,
    },
    /// The simulated machine refused what the host asked of it.
    #[error("the simulated machine refused")]
    Machine(#[source] polder_machine::Error),
    /// An RMP instruction of the simulated machine failed, and went on failing.
    #[error("the rmp entry of page {page} could not be changed")]
    Rmp {
        /// The page.
        page: polder_units::PageIndex,
        /// What the instruction said last.
        #[source]
        fail: polder_machine::RmpFail,
    },
    /// pKVM's hypervisor, on the simulated machine, refused a hypercall.
    #[error("the hypervisor did nothing about page {page}")]
    Pkvm {
        /// The page.
        page: polder_units::PageIndex,
        /// What it said.
        #[source]
        fail: polder_machine::PkvmFail,
    },
    /// A device could not do its part.
    #[error("{holder} could not {what} pages {pages}")]
    Device {
        /// The device's holder.
        holder: polder_engine::Holder,
        /// What it was to do.
        what: &'static str,
        /// The pages.
        pages: PageRange,
        /// What it said.
        #[source]
        source: Box<Self>,
    },
    /// The simulated machine's firmware refused to give an RMP entry back.
    #[error("the firmware keeps the rmp entry of page {page}")]
    Firmware {
        /// The page.
        page: polder_units::PageIndex,
        /// What the firmware said.
        #[source]
        fail: polder_machine::FirmwareFail,
    },
    /// A VM of another kind than the host can serve.
    #[error("a VM of this kind can't be attached to memory on host {host}")]
    WrongVm {
        /// The host.
        host: crate::HostKind,
    },
    /// A vCPU of another VM than named, or of another kind than the host can serve.
    #[error("the vCPU is not one of the VM's")]
    WrongVcpu,
    /// A signal, or a kick, came before a page was done.
    #[error("interrupted before a page was done; call again")]
    Interrupted,
    /// Pages of a space that the vCPU's root does not translate.
    #[error(
        "{asked} addresses were asked for, and the vCPU's root ({root}) translates {translates} ones"
    )]
    OtherRoot {
        /// The space that was asked for.
        asked: polder_units::AddressSpace,
        /// The root.
        root: String,
        /// The space that the root translates.
        translates: polder_units::AddressSpace,
    },
    /// The dirty log was to be started while it is on, or taken while it is off.
    #[error("the dirty log of this memory is {}", if *.on { "on already" } else { "off" })]
    DirtyLog {
        /// Whether it is on.
        on: bool,
    },
    /// A VM that was never attached to this memory.
    #[error("the VM is not attached to this memory")]
    NoSuchVm,
    /// What only the simulated machine has was asked of another host.
    #[error("this memory is not on the simulated machine")]
    NotSimulated,
    /// A copy met a page that could not be touched; bytes before it were copied.
    #[error(transparent)]
    Copy(#[from] polder_linux::Touched),
    /// More bytes than the pages they are for.
    #[error("{bytes} bytes do not fit pages {range}")]
    TooManyBytes {
        /// The pages.
        range: PageRange,
        /// How many bytes came.
        bytes: usize,
    },
    /// A ring has no place for another transfer.
    #[error("{in_flight} transfers are in flight, and the ring has no place for another")]
    RingFull {
        /// How many.
        in_flight: u32,
    },
    /// The host can't do this, on this machine or anywhere.
    #[error("{what}")]
    NotOffered {
        /// What it can't, and why.
        what: &'static str,
        /// What to do instead.
        way_out: &'static str,
    },
    /// The memory belongs to one VM, and this is another: so it is where kernel or hardware keeps
    /// private pages (guest_memfd, the RMP).
    #[error("this memory belongs to one VM: VM {} has it, and so VM {} can't", .owner.0, .vm.0)]
    OneVm {
        /// The VM that it belongs to.
        owner: polder_engine::VmId,
        /// The VM that it was to be bound to.
        vm: polder_engine::VmId,
    },
    /// Too few huge pages: free, and promised to nobody else.
    #[error(
        "huge pages of {level}: {asked} needed, {available} available{}",
        .pending.checked_sub(1).map_or(String::new(), |_| format!("; {pending} more are pending"))
    )]
    HugePages {
        /// Their size.
        level: Level,
        /// How many are needed.
        asked: u64,
        /// How many can be had.
        available: u64,
        /// How many come back when their last pin is released.
        pending: u64,
    },
    /// A size that is no multiple of the pages that the memory is to be made of.
    #[error("memory of {pages} can't be made of {level} pages: it is no multiple of them")]
    Unaligned {
        /// The size.
        pages: PageCount,
        /// The pages.
        level: Level,
    },
    /// A facility that the host needs is missing or not allowed.
    #[error("{what}")]
    Missing {
        /// What is missing, and why.
        what: &'static str,
        /// What to do about it.
        way_out: &'static str,
        /// What the kernel said.
        #[source]
        source: polder_linux::Error,
    },
}

impl Error {
    /// What the user can do about it, where the message does not say so itself, as that of a
    /// [`Refusal`] does.
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Platform, units::PageCount};
    /// let builder = Memory::builder(PageCount::from(1u32)).platform(Platform::Snp);
    /// let refused = builder.host(HostKind::Memfd).build().unwrap_err();
    /// assert_eq!(refused.way_out(), Some("use HostKind::Machine (--host machine), or another platform"));
    /// ```
    pub fn way_out(&self) -> Option<&'static str> {
        match self {
            Self::Missing { way_out, .. } | Self::NotOffered { way_out, .. } => Some(way_out),
            Self::HugePages { level: Level::Size1G, .. } => Some(
                "reserve some: echo N > /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages, \
                 or at boot, when memory is in one piece (hugepagesz=1G hugepages=N); or use \
                 PageSize::Huge2M (--page-size 2m)",
            ),
            Self::HugePages { .. } => Some(
                "reserve some: echo N > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages; or \
                 use PageSize::Thp (--page-size thp)",
            ),
            Self::RingFull { .. } => {
                Some("take completions first (Ring::complete), or make the ring larger")
            }
            Self::DirtyLog { on: true } => Some(
                "have whoever started it stop it (Memory::stop_dirty_log): what one takes, another \
                 does not get",
            ),
            Self::DirtyLog { on: false } => Some("start it (Memory::start_dirty_log)"),
            Self::Unaligned { .. } => {
                Some("ask for a multiple of the page size, or for smaller pages")
            }
            Self::OtherRoot { .. } => Some(
                "name pages of the space that the root translates, or have its tables searched \
                 (Memory::prefault_reverse)",
            ),
            Self::Host(error) if error.call == "mlock" => {
                Some("raise the limit of locked memory (ulimit -l), or run as root")
            }
            Self::Host(error) => match error.errno {
                polder_linux::Errno::NOMEM | polder_linux::Errno::FBIG => {
                    Some("ask for less memory, free some, or raise the limit (ulimit -v)")
                }
                polder_linux::Errno::MFILE | polder_linux::Errno::NFILE => {
                    Some("raise the limit of open files (ulimit -n)")
                }
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether what is in the way may pass by itself, so that another try is worth the while: what
    /// others hold, memory that has run out, a signal.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self.errno(), Errno::EAGAIN | Errno::ENOMEM | Errno::EINTR)
            || matches!(self, Self::Host(error) if
                [polder_linux::Errno::BUSY, polder_linux::Errno::INTR].contains(&error.errno))
    }

    /// The error code for a guest or a kernel-shaped interface.
    ///
    /// ```
    /// assert_eq!(polder::Error::Interrupted.errno(), polder::Errno::EINTR);
    /// assert_eq!(polder::Errno::EINTR as i32, 4);
    /// ```
    pub fn errno(&self) -> Errno {
        match self {
            Self::Refused(refusal) => refusal.errno(),
            Self::Quarantined { .. } | Self::Copy(_) => Errno::EHWPOISON,
            Self::TooManyBytes { .. } | Self::WrongVm { .. } => Errno::EINVAL,
            Self::NotSimulated | Self::NoSuchVm | Self::OneVm { .. } => Errno::EINVAL,
            Self::WrongVcpu => Errno::EINVAL,
            Self::Unaligned { .. } | Self::DirtyLog { on: false } => Errno::EINVAL,
            Self::DirtyLog { on: true } => Errno::EEXIST,
            Self::HugePages { .. } => Errno::ENOMEM,
            Self::Interrupted => Errno::EINTR,
            Self::RingFull { .. } => Errno::EAGAIN,
            Self::Missing { .. } | Self::NotOffered { .. } | Self::OtherRoot { .. } => {
                Errno::EOPNOTSUPP
            }
            Self::Rmp { fail: polder_machine::RmpFail::InUse, .. } => Errno::EAGAIN,
            Self::Pkvm { fail, .. } => match fail {
                PkvmFail::Busy => Errno::EAGAIN,
                PkvmFail::NoMemory => Errno::ENOMEM,
                PkvmFail::Permission | PkvmFail::NotAsked => Errno::EPERM,
                PkvmFail::NotFound => Errno::ENOENT,
                PkvmFail::Input => Errno::EINVAL,
                PkvmFail::Undefined => Errno::EOPNOTSUPP,
            },
            Self::Device { source, .. } => source.errno(),
            Self::Machine(
                polder_machine::Error::Locked { .. } | polder_machine::Error::Mapped { .. },
            ) => Errno::EAGAIN,
            // Entries of the wrong size stay so.
            Self::Machine(_) | Self::Rmp { .. } | Self::Firmware { .. } => Errno::EIO,
            Self::Host(error) => match error.errno {
                polder_linux::Errno::NOMEM => Errno::ENOMEM,
                polder_linux::Errno::INVAL => Errno::EINVAL,
                polder_linux::Errno::EXIST => Errno::EEXIST,
                polder_linux::Errno::AGAIN => Errno::EAGAIN,
                polder_linux::Errno::NOENT => Errno::ENOENT,
                polder_linux::Errno::OPNOTSUPP => Errno::EOPNOTSUPP,
                polder_linux::Errno::HWPOISON => Errno::EHWPOISON,
                _ => Errno::EIO,
            },
        }
    }
}
