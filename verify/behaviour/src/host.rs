//! What a host gives to the cases.

use polder::units::{GfnRange, Gpa, Level, PageIndex, PageRange};
use polder::{
    Error, HostKind, Memory, MemoryFault, PageSize, Platform, Prefaulted, Visibility, VmId,
};
use polder_require::{Facility, HugetlbPages, Thp};
use polder_vmm::scenario::Op;
use polder_vmm::{Ended, IdleVcpu};

use crate::{Section, Skipped};

/// A column of the table.
pub trait Host: Sync {
    /// Which host; memory of it is made by `Memory::builder(..).host(..)`.
    fn kind(&self) -> HostKind;

    /// For which kind of VM memory is, where a case doesn't say.
    fn platform(&self) -> Platform {
        Platform::Plain
    }

    /// What memory is made of, where a case doesn't say.
    fn page_size(&self) -> PageSize {
        PageSize::Small
    }

    /// Sets aside what the memory of a case is made of, until it is dropped.
    ///
    /// # Errors
    /// [`Skipped`] where this machine has none.
    fn set_aside(&self) -> Result<SetAside, Skipped> {
        match self.page_size() {
            // As many as the largest memory of a case has.
            PageSize::Huge2M => SetAside::of(self.kind(), PageSize::Huge2M, 8),
            size => SetAside::of(self.kind(), size, 1),
        }
    }

    /// The column's name.
    fn name(&self) -> String {
        match (self.platform(), self.page_size()) {
            (Platform::Plain, PageSize::Small) => self.kind().to_string(),
            (Platform::Plain, size) => format!("{} {size}", self.kind()),
            (platform, _) => format!("{} {platform}", self.kind()),
        }
    }

    /// Why a whole section does not apply to it.
    fn lacks(&self, section: Section) -> Option<&'static str> {
        not_protected(section)
    }

    /// The cases that do not apply to it, by name, each with the reason.
    fn not_applicable(&self) -> &'static [(&'static str, &'static str)];

    /// What memory of this host needs that this machine may lack.
    fn missing(&self, error: &polder::Error) -> Option<Skipped>;

    /// Does to memory what has to be done before a case has it.
    fn prepare(&self, _: &Memory) {}

    /// A new VM, without memory.
    ///
    /// # Errors
    /// [`Skipped`] where this machine can't run one.
    fn guest(&self) -> Result<Box<dyn Guest>, Skipped>;

    /// Calls `run`, while what it asks of the host goes wrong as `trouble` says.
    ///
    /// # Errors
    /// [`Skipped`] where this machine can't make it so; then `run` was not called.
    fn in_trouble(&self, trouble: Trouble, run: &mut (dyn FnMut() + Send)) -> Result<(), Skipped>;

    /// The pages of `range` that are mapped in the host view right now, by an account that is not
    /// Polder's.
    fn mapped(&self, memory: &Memory, range: PageRange) -> Vec<PageIndex>;

    /// How many pages of memory are taken up: by `memory`, and where the host can't tell that by
    /// itself, by others too, which stay as they are meanwhile.
    fn taken(&self, memory: &Memory) -> u64 {
        memory.resident().expect("the host counts them").get()
    }

    /// What a child process would inherit of the views of `memory`, and what a core dump would
    /// contain of them: a line for each.
    fn inherited(&self, memory: &Memory) -> Vec<String>;

    /// Whether a way leads to the bytes of a private page.
    fn reaches(&self, way: Way) -> bool;

    /// What only a host can do that has its kernel and hardware within reach. The cases that need
    /// it are not applicable to others.
    fn inside(&self) -> Option<&dyn Inside> {
        None
    }
}

/// Huge pages that are set aside for a case.
pub struct SetAside(
    #[expect(dead_code, reason = "held")] Option<HugetlbPages>,
    #[expect(dead_code, reason = "held")] Option<Thp>,
);

impl SetAside {
    /// Sets huge pages aside, `count` of them where they are reserved for a memory.
    ///
    /// # Errors
    /// [`Skipped`] where this machine has none.
    pub(crate) fn of(host: HostKind, size: PageSize, count: u64) -> Result<Self, Skipped> {
        let lacking = |facility| move |why| Skipped { facility, why };
        Ok(match (host, size) {
            (HostKind::Machine, _) | (_, PageSize::Small) => Self(None, None),
            (_, PageSize::Thp) => {
                Self(None, Some(Thp::allow().map_err(lacking(Facility::HugePages))?))
            }
            (_, PageSize::Huge2M) => {
                let pages = HugetlbPages::of_2m(count).map_err(lacking(Facility::HugePages))?;
                Self(Some(pages), None)
            }
            (_, PageSize::Huge1G) => {
                let pages = HugetlbPages::of_1g(count).map_err(lacking(Facility::GiganticPages))?;
                Self(Some(pages), None)
            }
        })
    }
}

/// Why a section does not apply to memory that no hardware protects.
pub(crate) fn not_protected(section: Section) -> Option<&'static str> {
    match section {
        Section::Rmp => Some("only memory of an SNP guest has an RMP"),
        Section::Pkvm => Some("only memory of a protected VM under pKVM is the guest's to share"),
        _ => None,
    }
}

/// A way by which somebody may try to reach a private page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Way {
    /// A touch of the host view.
    Pointer,
    /// A system call that is given a part of the host view.
    SystemCall,
    /// A read by the API.
    Api,
    /// `/proc/self/mem`.
    Mem {
        /// Where the host view is; else where any other mapping of the memory is.
        host_view: bool,
    },
    /// A second opening of the descriptors that are memory.
    Descriptor,
    /// `/proc/PID/mem`, by another process.
    Traced {
        /// As of [`Way::Mem`].
        host_view: bool,
    },
}

/// What goes wrong on the host.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Trouble {
    /// Pages can't be taken out of the host view.
    Unmap,
    /// Pages can't be freed.
    Free,
    /// Whoever waits for pages can't be let go on.
    Continue,
}

/// A VM, and the guest in it.
pub trait Guest: Sync {
    /// Makes the VM known to memory, to bind its pages to.
    fn attach(&self, memory: &Memory) -> VmId;

    /// The VM, as a host knows it.
    fn fd(&self) -> polder::Vm;

    /// How many slots the VM has: 0 to that less 1.
    fn slots(&self) -> u32;

    /// Runs a guest with a vCPU for each list of ops, each of which ends in [`Op::Done`]. What it
    /// asks for it asks of `memory`, which knows the VM as `vm`. Ops may name guest-physical memory
    /// from 2 MiB on.
    ///
    /// # Panics
    /// Where the guest can't be run; that it fails is an [`Ended`].
    fn run(&self, memory: (&Memory, VmId), programs: &[Vec<Op>]) -> Ended;

    /// A vCPU of the VM that runs no guest, to map memory ahead for.
    fn vcpu(&self, memory: (&Memory, VmId)) -> IdleVcpu;

    /// Has memory mapped ahead for a vCPU of the VM at the pages at which its guest has `gfns`.
    ///
    /// # Errors
    /// As [`Memory::prefault`].
    fn prefault(
        &self,
        (memory, vm): (&Memory, VmId),
        vcpu: &IdleVcpu,
        gfns: GfnRange,
    ) -> Result<Prefaulted, Error> {
        memory.prefault(vm, vcpu, gfns)
    }

    /// One access of the guest's to the word at `gpa`, as to private or to shared memory where the
    /// platform tells them apart: writes `value`, if there is one, and returns the word.
    ///
    /// # Errors
    /// The fault by which it came to the VMM instead.
    fn access(
        &self,
        memory: (&Memory, VmId),
        gpa: Gpa,
        visibility: Visibility,
        value: Option<u64>,
    ) -> Result<u64, MemoryFault>;
}

/// Inside a host whose kernel and hardware are simulated.
pub trait Inside {
    /// Takes a reference to a shared page that Polder is not told of, as `vmsplice` or direct I/O
    /// do; held until dropped.
    fn refer<'a>(&self, memory: &'a Memory, page: PageIndex) -> Box<dyn Send + 'a>;

    /// Has the hardware report that the page's memory failed.
    fn fail(&self, memory: &Memory, page: PageIndex);

    /// What a child of the VMM's process reads of a page by the addresses of the host view.
    fn touch_in_child(&self, memory: &Memory, page: PageIndex) -> Option<u8>;

    /// What a process reads of a page through a mapping of its own of the same object.
    fn touch_in_other(&self, memory: &Memory, page: PageIndex) -> Option<u8>;

    /// Whether a touch of a page through the host view, by code that does not expect to be denied,
    /// ends the process.
    fn stray_touch_ends(&self, memory: &Memory, page: PageIndex) -> bool;

    /// Has GUP-fast read the host view's entry of a page, then `between` happen, then GUP-fast go
    /// on to its end. Whether it has pinned the page; the pin is released.
    fn gup_fast_across(&self, memory: &Memory, page: PageIndex, between: &mut dyn FnMut()) -> bool;

    /// What the RMP has of a page with memory: whether it is assigned, and by a large entry.
    fn rmp(&self, memory: &Memory, page: PageIndex) -> (bool, bool);

    /// The level at which stage 2 has a page of the object, if it has.
    fn mapped_at(&self, memory: &Memory, page: PageIndex) -> Option<Level>;

    /// Gives memory to the 2M page at `page`, by one folio.
    fn huge_folio(&self, memory: &Memory, page: PageIndex);

    /// Gives memory to the first 1G, by one folio.
    fn gigabyte_folio(&self, memory: &Memory);

    /// Splits the folio of a page to the next level.
    fn split(&self, memory: &Memory, page: PageIndex);

    /// Makes one folio of the 2M page at `page`, as khugepaged does: nobody has it mapped then.
    fn collapse(&self, memory: &Memory, page: PageIndex);

    /// Calls `run` while another processor has the RMP entry of a page in use.
    fn while_in_use(&self, memory: &Memory, page: PageIndex, run: &mut dyn FnMut());

    /// Calls `run` while somebody has the folio of a page locked.
    fn while_locked(&self, memory: &Memory, page: PageIndex, run: &mut dyn FnMut());

    /// The frames of the pages of a range that have memory, in order.
    fn frames(&self, memory: &Memory, range: PageRange) -> Vec<u64>;

    /// Whether pKVM's hypervisor has given a page to its guest; `None` if it has no memory.
    fn is_donated(&self, memory: &Memory, page: PageIndex) -> Option<bool>;

    /// Has pKVM's hypervisor run out of memory for a table once, after so many entries more.
    fn fail_hypervisor(&self, memory: &Memory, nth: u64);

    /// Takes a reference to a page of the file that Polder is not told of, by no mapping; held
    /// until dropped.
    fn refer_to_file<'a>(&self, memory: &'a Memory, page: PageIndex) -> Box<dyn Send + 'a>;

    /// The numbers of the pages of a range that have memory off the kernel's direct map.
    fn off_direct_map(&self, memory: &Memory, range: PageRange) -> Vec<u64>;

    /// Whether all references, mappings and pins add up.
    ///
    /// # Errors
    /// What does not.
    fn audit(&self, memory: &Memory) -> Result<(), String>;
}
