//! Hosts: where the bytes live, and what cuts people off from them.

pub(crate) mod guest_memfd;
pub(crate) mod machine;
pub(crate) mod memfd;
pub(crate) mod views;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use polder_engine::pool::PoolCounts;
use polder_engine::{FolioCounts, GuestAccess, Slot, Step, Visibility, VmId};
use polder_linux::Errno;
use polder_units::{AddressSpace, Gfn, GfnRange, PageCount, PageIndex, PageRange};

use self::views::Views;
use crate::dirty::Marks;
use crate::explain::HostFacts;
use crate::prefault::Span;
use crate::{Error, Vcpu};

/// Which host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum HostKind {
    /// A memfd with three views, on any KVM. Protects private pages against stray pointers and
    /// bugs of the VMM, not against a hostile VMM.
    Memfd,
    /// The kernel's guest_memfd for private pages, a memfd for shared ones: the kernel keeps
    /// private pages from the VMM. A conversion loses their contents. Takes a VM whose memory can
    /// be private (`KVM_X86_SW_PROTECTED_VM`), and so a KVM with TDP.
    GuestMemfd,
    /// The simulated machine ([`polder_machine`]): needs nothing of the machine it runs on.
    Machine,
}

impl HostKind {
    /// Every host.
    pub const ALL: [Self; 3] = [Self::Memfd, Self::GuestMemfd, Self::Machine];

    /// Whether private and shared pages are the same memory, so that a conversion can keep what is
    /// in them ([`Contents::Preserve`](crate::Contents::Preserve)) where the platform can, too.
    ///
    /// ```
    /// # use polder::HostKind;
    /// assert!(HostKind::Memfd.is_in_place() && !HostKind::GuestMemfd.is_in_place());
    /// assert_eq!("machine".parse(), Ok(HostKind::Machine));
    /// ```
    pub const fn is_in_place(self) -> bool {
        match self {
            Self::Memfd | Self::Machine => true,
            Self::GuestMemfd => false,
        }
    }
}

impl fmt::Display for HostKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Memfd => "memfd",
            Self::GuestMemfd => "guest_memfd",
            Self::Machine => "machine",
        })
    }
}

impl FromStr for HostKind {
    type Err = UnknownHost;

    fn from_str(text: &str) -> Result<Self, UnknownHost> {
        Self::ALL.into_iter().find(|host| host.to_string() == text).ok_or(UnknownHost)
    }
}

/// A text that names no host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("expected a host: memfd, guest_memfd or machine")]
pub struct UnknownHost;

/// A VM, as its host knows it.
#[derive(Clone, Debug)]
pub enum Vm {
    /// A VM of KVM's, for a host of real memory.
    Kvm(Arc<VmFd>),
    /// A new VM of the simulated machine.
    Machine,
    /// The same on a CPU without two-dimensional paging: where its guest has page tables
    /// ([`MachineVcpu::carry_out`](crate::MachineVcpu::carry_out)), these are shadowed. Not of SNP.
    MachineWithoutTdp,
}

impl From<Arc<VmFd>> for Vm {
    fn from(vm: Arc<VmFd>) -> Self {
        Self::Kvm(vm)
    }
}

/// What a host does for the driver. All of it can be called from several threads at once; that
/// nothing overlaps that may not is the engine's affair.
pub(crate) trait Host: Send + Sync {
    /// Takes a step of an operation.
    fn take(&self, step: Step) -> Result<(), Error>;

    /// Whether there is anything to do for a step. Where there is not, it need not be taken.
    fn has_to_take(&self, _: Step) -> bool {
        true
    }

    /// How the bytes are reached, and who touches them.
    fn views(&self) -> &dyn Views;

    /// Makes a VM known under this name.
    fn attach(&self, id: VmId, vm: Vm) -> Result<(), Error>;

    /// Shows the pages to a VM.
    fn bind(&self, vm: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error>;

    /// Takes a slot away, and the guest's mappings with it. If that fails the slot is still there.
    fn unbind(&self, vm: VmId, slot: Slot) -> Result<(), Error>;

    /// Has what guests write logged from now on, or no longer: by the slots there are, and by those
    /// that come. No slot changes meanwhile. If it can't be turned on, it is off.
    fn log_dirty(&self, on: bool) -> Result<(), Error>;

    /// Notes the pages that guests have written since it was asked last: who writes to one from now
    /// on has it logged again. If it fails, what is not noted comes the next time. Also tells of a
    /// slot that can't log what its guest writes.
    fn take_dirty(&self, into: &Marks) -> Result<(), Error>;

    /// Maps the largest page around the frame accessed for the guest that the host can, all of it
    /// in `range`, whose pages are of the kind accessed. Whether it did: KVM maps by itself.
    fn map_guest(
        &self,
        _: VmId,
        _: GuestAccess,
        _: Option<Faulted>,
        _range: PageRange,
    ) -> Result<bool, Error> {
        Ok(false)
    }

    /// Where the first pages of a span are in the vCPU's guest-physical space, `most` at most: a
    /// run of frames, pages that its guest's tables do not map, or the frame of a table to read
    /// first.
    ///
    /// # Errors
    /// [`Error::OtherRoot`] for a space that the vCPU's root does not translate.
    fn translate(&self, _: Vcpu<'_>, span: Span, most: u64) -> Result<Translated, Error> {
        check_gpa(span.space)?;
        let end = span.end.min(span.start.saturating_add(most));
        let gfns = GfnRange::between(span.start, end).expect("some pages of the span");
        Ok(Translated::At(gfns))
    }

    /// Where the vCPU's root has guest frames: the space, and runs of them with the number of the
    /// first page that each shows at.
    ///
    /// # Errors
    /// [`Error::NotOffered`] if there is too much to look at.
    fn aliases(
        &self,
        _: Vcpu<'_>,
        gfns: GfnRange,
    ) -> Result<(AddressSpace, Vec<(u64, GfnRange)>), Error> {
        Ok((AddressSpace::Gpa, vec![(gfns.start().get(), gfns)]))
    }

    /// Has whole pages ready for a guest's touches of `shown`: in the guest view, in the tables of
    /// the vCPU's root. Returns the frame at which it stopped, by number, and how many before it it
    /// left out. Called with an answer in flight on `range`, which has the pages behind them and,
    /// with an RMP, perhaps more around them; and while no slot changes. If it fails it may have
    /// done a part.
    fn show(
        &self,
        vm: VmId,
        vcpu: Vcpu<'_>,
        shown: Shown,
        range: PageRange,
    ) -> Result<(u64, u64), Error>;

    /// Has pages with a guest's table ready to be read, with an answer in flight on them.
    fn ready(&self, _range: PageRange) -> Result<(), Error> {
        Ok(())
    }

    /// Does what is left to do for `gfns`, which were shown, once that answer is given back: what
    /// may have to wait for an answer itself. Returns the frame at which it stopped, by number.
    /// Called while no slot changes.
    fn shown(&self, _: VmId, _: Vcpu<'_>, gfns: GfnRange) -> Result<u64, Error> {
        Ok(gfns.end())
    }

    /// Smashes the large RMP entry behind `gfn`, and takes its 2M page out of stage 2, if it shows
    /// a page of `within`. KVM does so by itself.
    fn smash(&self, _: VmId, _: Gfn, _within: PageRange) -> Result<Smashed, Error> {
        Ok(Smashed::Spurious)
    }

    /// What became of RMP entries: (installed large, merged, left at 4K by a merge).
    fn rmp_counts(&self) -> [u64; 3] {
        [0; 3]
    }

    /// Keeps the guest view from being reclaimed.
    fn lock_memory(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Stops watching the guest's touches: nothing is owed any more but `failed`, for good.
    fn settle(&self, failed: &[PageRange]) -> Result<(), Error>;

    /// The runs of pages that take up memory.
    fn existing(&self) -> Result<Vec<PageRange>, Error>;

    /// How many pages of memory it takes up, on all sides.
    fn resident(&self) -> Result<PageCount, Error> {
        Ok(total(&self.existing()?))
    }

    /// What it has of a page.
    fn explain(&self, page: PageIndex) -> Result<HostFacts, Error> {
        let memory = self.existing()?.iter().any(|run| run.contains(page));
        Ok(HostFacts { memory, ..HostFacts::default() })
    }

    /// How many folios of each level there are, where the engine does not know: those that the
    /// kernel splits and collapses by itself.
    fn levels(&self) -> Option<FolioCounts> {
        None
    }

    /// What the pool has that its huge pages are of, if they are of one.
    fn pool(&self) -> Option<PoolCounts> {
        None
    }

    /// The 2M pages, of transparent huge ones, of which something exists: each may be in pieces,
    /// and [`Step::Move`] puts it into one.
    fn in_pieces(&self) -> Result<Vec<PageRange>, Error> {
        Ok(Vec::new())
    }

    /// The simulated machine, on that host.
    fn machine(&self) -> Option<&machine::MachineHost> {
        None
    }
}

/// Who faulted on the simulated machine, and how.
pub(crate) type Faulted = (polder_machine::VcpuId, polder_machine::GuestFault);

/// Guest frames that are to be shown, all of one kind, and at which page of the space that the
/// vCPU's root translates the first is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown {
    pub(crate) page: u64,
    pub(crate) gfns: GfnRange,
    pub(crate) visibility: Visibility,
}

/// Where pages of a vCPU's root are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Translated {
    /// In these frames, in order.
    At(GfnRange),
    /// So many of them nowhere.
    Nowhere(u64),
    /// The table in this frame has no memory yet.
    Table(Gfn),
}

/// Refuses other addresses than guest-physical ones.
fn check_gpa(asked: AddressSpace) -> Result<(), Error> {
    match asked {
        AddressSpace::Gpa => Ok(()),
        asked => {
            Err(Error::OtherRoot { asked, root: "kvm's".to_owned(), translates: AddressSpace::Gpa })
        }
    }
}

/// How many pages runs are of, counted as often as they occur.
fn total(runs: &[PageRange]) -> PageCount {
    let total = runs.iter().fold(0u64, |sum, run| sum.saturating_add(run.count().get()));
    PageCount::new(total).unwrap_or(PageCount::ZERO)
}

/// Has KVM map frames in stage 2. Returns the number of the first that it did not.
fn map_ahead(vcpu: Vcpu<'_>, gfns: GfnRange) -> Result<u64, Error> {
    let Vcpu::Kvm(vcpu) = vcpu else { return Err(Error::WrongVcpu) };
    match polder_linux::pre_fault(vcpu, gfns) {
        Ok(stopped) => Ok(stopped.gfn().get()),
        Err(error) if error.errno == Errno::INTR => Err(Error::Interrupted),
        Err(error) => Err(error.into()),
    }
}

/// What came of a guest's fault that named no size that fits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Smashed {
    /// The entry was large, and was smashed.
    Done,
    /// It was 4K already: somebody had smashed it by the time of the look.
    Spurious,
    /// It was large, and somebody else smashed it between the look and the PSMASH.
    Raced,
    /// Somebody else is at work on it: the guest may try again.
    Busy,
}

pub(crate) fn failed(call: &'static str, errno: Errno) -> Error {
    Error::Host(polder_linux::Error { call, range: None, errno })
}
