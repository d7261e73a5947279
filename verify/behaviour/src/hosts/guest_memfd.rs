//! Host `guest_memfd`: a kernel that keeps private memory from its VMM.
//!
//! Guest, trouble, and what is mapped are as on host `memfd`, whose code is used.

use std::sync::LazyLock;

use polder::units::{PageIndex, PageRange};
use polder::{HostKind, Memory};
use polder_require::Facility;
use polder_vmm::{RunError, Vm};

use super::memfd::MOVED;
use super::{KERNEL_MOVES, MEMFD, NO_DEVICE, no_dirty_log};
use crate::host::{Guest, Host, Trouble, Way};
use crate::{Section, Skipped, cases};

/// The guest_memfd host.
pub(super) struct GuestMemfd;

const LOST: &str = "two pools: a conversion loses contents, and this case is about contents kept";
const OWED: &str = "no kernel lets a userfaultfd watch a guest_memfd, or the host write its \
    private pages: contents can't be owed";
const ONE_VM: &str = "a guest_memfd belongs to one VM: a second one's bind is refused";

const KIND: &str = "a software-protected VM's access is of the kind that its frame is, and never of \
    the other";
const OUTSIDE: &str = "it is not to be done or seen from outside the kernel, as on host memfd";

const DROPPED_FIRST: &str = "two pools: contents are dropped before a device is told, and that it \
    fails then leaves the pages in quarantine";

/// Cases with a reason of their own.
const REASONS: &[(&str, &str)] = &[
    ("shared first: what the host wrote stays when it becomes private", LOST),
    ("contents preserved, of a plain VM", LOST),
    ("contents preserved, of a software-protected VM", LOST),
    ("a guest at work on the pages loses none of its words", LOST),
    ("an overlap in guest frames is refused, in another VM it is not", ONE_VM),
    ("an overlap in pages is refused, in another VM it is not", ONE_VM),
    ("two VMs see one object, and a conversion holds for both", ONE_VM),
    (cases::UNTOLD, OWED),
    (cases::OWED_STOPS, OWED),
    (cases::PART_STOPS, OWED),
    (cases::FAILED_STOPS, OWED),
    (cases::STILL_OWED, OWED),
    (cases::MOVED, MOVED),
    (cases::MOVES, KERNEL_MOVES),
    (cases::MOVES_PINNED, KERNEL_MOVES),
    (cases::MOVES_UNTOLD, KERNEL_MOVES),
    (cases::MOVES_BUSY, KERNEL_MOVES),
    (cases::UNMOVABLE, KERNEL_MOVES),
    (cases::REACHES, NO_DEVICE),
    (cases::FAILS, DROPPED_FIRST),
    (cases::PRELOADED, OWED),
    (cases::LAUNCHED, OWED),
    (cases::NOT_PRELOADED, OWED),
    (cases::DISAGREE, ONE_VM),
    (cases::IMPLICIT, KIND),
    (cases::MISMATCH, KIND),
    (cases::REFERENCED, OUTSIDE),
    (cases::FAILED, OUTSIDE),
    (cases::CHILD, OUTSIDE),
    (cases::OTHER, OUTSIDE),
    (cases::GUP, OUTSIDE),
    (cases::AUDIT, OUTSIDE),
    (cases::STRAY, OUTSIDE),
];

impl Host for GuestMemfd {
    fn kind(&self) -> HostKind {
        HostKind::GuestMemfd
    }

    fn lacks(&self, section: Section) -> Option<&'static str> {
        match section {
            Section::Rmp => Some("only memory of an SNP guest has an RMP"),
            Section::Userfault | Section::KernelAccess => Some(OWED),
            Section::HugePages => Some("the kernel's guest_memfd has pages of 4K only"),
            Section::Pkvm => {
                Some("only memory of a protected VM under pKVM is the guest's to share")
            }
            _ => None,
        }
    }

    fn not_applicable(&self) -> &'static [(&'static str, &'static str)] {
        static ALL: LazyLock<Vec<(&str, &str)>> = LazyLock::new(|| {
            let owed = cases().filter(|case| case.section == Section::Population);
            let owed = owed.map(|case| (case.name, OWED));
            REASONS.iter().copied().chain(owed).chain(no_dirty_log()).collect()
        });
        &ALL
    }

    fn missing(&self, error: &polder::Error) -> Option<Skipped> {
        MEMFD.missing(error)
    }

    fn guest(&self) -> Result<Box<dyn Guest>, Skipped> {
        match Vm::new(self.kind()) {
            Ok(vm) => Ok(Box::new(vm)),
            Err(RunError::Kvm(error)) => {
                Err(Skipped { facility: Facility::Kvm, why: error.to_string() })
            }
            Err(error @ RunError::NoPrivateMemory) => {
                Err(Skipped { facility: Facility::PrivateMemory, why: error.to_string() })
            }
            Err(RunError::Memory(error)) => Err(self.missing(&error).expect("memory for a guest")),
            Err(error) => panic!("no VM: {error:?}"),
        }
    }

    fn in_trouble(&self, trouble: Trouble, run: &mut (dyn FnMut() + Send)) -> Result<(), Skipped> {
        MEMFD.in_trouble(trouble, run)
    }

    /// Nobody: the kernel keeps private pages from the process, and shows them by no descriptor.
    fn reaches(&self, _: Way) -> bool {
        false
    }

    fn mapped(&self, memory: &Memory, range: PageRange) -> Vec<PageIndex> {
        MEMFD.mapped(memory, range)
    }

    fn taken(&self, memory: &Memory) -> u64 {
        match memory.resident() {
            Ok(pages) => pages.get(),
            // By the kernel's own account of all there are: a guest_memfd's can't be evicted.
            Err(_) => {
                // Each CPU's part of it is added up, if we may ask for that.
                let _ = std::fs::write("/proc/sys/vm/stat_refresh", "1");
                let meminfo = std::fs::read_to_string("/proc/meminfo").expect("procfs");
                let counted = |line: &&str| {
                    ["Unevictable:", "Shmem:"].iter().any(|name| line.starts_with(name))
                };
                let number = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
                meminfo.lines().filter(counted).filter_map(number).sum::<u64>() / 4
            }
        }
    }

    fn inherited(&self, memory: &Memory) -> Vec<String> {
        MEMFD.inherited(memory)
    }
}
