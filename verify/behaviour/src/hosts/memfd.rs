//! Host `memfd`: this machine's userfaultfd and KVM.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

use polder::units::{Gpa, PAGE_SIZE, PageIndex, PageRange};
use polder::{HostKind, Memory, MemoryFault, PageSize, Visibility, VmId};
use polder_require::Facility;
use polder_vmm::scenario::Op;
use polder_vmm::{End, Ended, Failure, IdleVcpu, Progress, RunError, Supervision, Vm};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{
    BROUGHT, EVERY_SIZE, HUGE, KERNEL_MOVES, LOGGED_BY_4K, LOOKS, NO_DEVICE, NO_FLAG, Reason,
    WRITES_ZEROS,
};
use crate::host::{Guest, Host, Trouble, Way, not_protected};
use crate::{Section, Skipped, cases};

/// The memfd host, with memory of pages of a size.
pub(super) struct Memfd {
    pub(super) size: PageSize,
}

pub(super) const MOVED: &str = "an access amid the change of a slot ends in the VMM by the time \
    the slot is there again; a VMM stops its vCPUs first";

const SAME_ACCESS: &str = "a guest of KVM's default VM type has one kind of access to memory, \
    neither private nor shared";

const EVERY: &[Reason] = &[
    (cases::IMPLICIT, SAME_ACCESS),
    (cases::MISMATCH, SAME_ACCESS),
    (
        cases::SPLIT_FOLIOS,
        "a part of the kernel's huge page is mapped, or shown by the API; none is split",
    ),
    (cases::LOST, "memory is converted in place: every treatment of contents is on offer"),
    (
        cases::REFERENCED,
        "a reference that the kernel took through the host view is not to be seen from \
         outside the kernel",
    ),
    (
        cases::FAILED,
        "failing memory for real (`MADV_HWPOISON`) takes a page of this machine out of \
         use for good; a page in quarantine takes the same road to the VMM",
    ),
    (
        cases::CHILD,
        "a fork needs `unsafe`, which `crates/linux` alone may have: \
         `a_child_has_no_view` in its `tests/views.rs`",
    ),
    (
        cases::OTHER,
        "the memfd is the VMM's alone: Polder neither hands out its descriptor nor lets a \
         child inherit it",
    ),
    (cases::GUP, "GUP-fast can't be stopped between two of its steps from outside the kernel"),
    (cases::MOVED, MOVED),
    (cases::MOVES, KERNEL_MOVES),
    (cases::MOVES_PINNED, KERNEL_MOVES),
    (cases::MOVES_UNTOLD, KERNEL_MOVES),
    (cases::MOVES_BUSY, KERNEL_MOVES),
    (cases::UNMOVABLE, KERNEL_MOVES),
    (cases::REACHES, NO_DEVICE),
    (cases::NO_PRELOAD, "the trusted view writes private pages, too"),
    (cases::AUDIT, "the kernel's counts are not to be seen from outside"),
    (
        cases::STRAY,
        "a touch by a plain pointer needs `unsafe`, which `crates/linux` alone may have: \
         `a_stray_touch_of_a_denied_page_ends_the_process` in its `tests/views.rs`",
    ),
];

/// What does not apply to transparent huge pages.
const THP: &[Reason] = &[(
    "while a guest runs and converts, it sees no wrong byte and the host no page late",
    WRITES_ZEROS,
)];

const AS_A_WHOLE: &str = "a hugetlb page is denied as a whole where one of its pages has failed";

/// What does not apply to hugetlb pages.
const HUGETLB: &[Reason] = &[
    ("a page that a source can't read is denied to all, and no other", AS_A_WHOLE),
    ("a source that panics, ends or lies fails in the same way", AS_A_WHOLE),
    ("who waits for a source longer than the deadline is denied", AS_A_WHOLE),
    (cases::MAPPED, "one touch brings all of a hugetlb page: a pin maps none ahead"),
];

const SEVERAL: &str = "the row takes more than one page of 1G, which few machines have to give: see \
    memfd 2m, whose view shows a huge page as a whole, too";

/// What does not apply to pages of 1G.
const GIGANTIC: &[Reason] = &[
    ("several objects are independent of each other", SEVERAL),
    (cases::DROPPED, SEVERAL),
    ("a system call on a private page fails, and the process lives", SEVERAL),
    ("a touch that runs into a private page ends at its first byte", SEVERAL),
    ("what is so already is left as it is, mappings and all", SEVERAL),
    ("private pages are in no mapping of the host view", SEVERAL),
    ("the other pages convert singly, and all after the unpin", SEVERAL),
    (cases::QUARANTINE, SEVERAL),
    (cases::DENIED_WHILE_FAILING, SEVERAL),
    (cases::QUARANTINE_EXIT, SEVERAL),
    (cases::UNTOLD, SEVERAL),
    (cases::OWED_STOPS, SEVERAL),
    (cases::FAILED_STOPS, SEVERAL),
    (cases::STILL_OWED, SEVERAL),
    ("what is pinned exclusively stays shared, and is touched as ever", SEVERAL),
];

impl Host for Memfd {
    fn kind(&self) -> HostKind {
        HostKind::Memfd
    }

    fn not_applicable(&self) -> &'static [(&'static str, &'static str)] {
        static OF_THP: LazyLock<Vec<Reason>> = LazyLock::new(|| [EVERY, HUGE, THP].concat());
        static OF_HUGETLB: LazyLock<Vec<Reason>> =
            LazyLock::new(|| [EVERY, HUGE, HUGETLB].concat());
        static OF_GIGANTIC: LazyLock<Vec<Reason>> =
            LazyLock::new(|| [EVERY, HUGE, HUGETLB, GIGANTIC].concat());
        match self.size {
            PageSize::Small => EVERY,
            PageSize::Thp => &OF_THP,
            PageSize::Huge2M => &OF_HUGETLB,
            PageSize::Huge1G => &OF_GIGANTIC,
        }
    }

    fn lacks(&self, section: Section) -> Option<&'static str> {
        use Section::{Conversion, Discard, Exits, HostView, HugePages, KernelAccess};
        let unprotected = not_protected(section);
        match section {
            _ if self.size == PageSize::Small || unprotected.is_some() => unprotected,
            HugePages => Some(EVERY_SIZE),
            Section::Selftests if self.size != PageSize::Thp => Some(NO_FLAG),
            Section::Population | Section::Userfault if self.size == PageSize::Huge1G => {
                Some(BROUGHT)
            }
            Section::DirtyLog if self.size == PageSize::Huge1G => Some(LOGGED_BY_4K),
            KernelAccess | Section::Reach if self.size == PageSize::Huge1G => Some(SEVERAL),
            _ if self.size != PageSize::Thp => None,
            HostView | Discard | Conversion | Exits | KernelAccess => None,
            Section::Userfault | Section::Prefault | Section::DirtyLog => None,
            _ => Some("nothing of this section depends on how large its pages are: see memfd"),
        }
    }

    fn page_size(&self) -> PageSize {
        self.size
    }

    fn missing(&self, error: &polder::Error) -> Option<Skipped> {
        let why = error.to_string();
        matches!(error, polder::Error::Missing { .. })
            .then_some(Skipped { facility: Facility::Userfault, why })
    }

    fn guest(&self) -> Result<Box<dyn Guest>, Skipped> {
        match Vm::new(self.kind()) {
            Ok(vm) => Ok(Box::new(vm)),
            Err(RunError::Kvm(error)) => {
                Err(Skipped { facility: Facility::Kvm, why: error.to_string() })
            }
            Err(RunError::Memory(error)) => Err(self.missing(&error).expect("memory for a guest")),
            Err(error) => panic!("no VM: {error:?}"),
        }
    }

    fn in_trouble(&self, trouble: Trouble, run: &mut (dyn FnMut() + Send)) -> Result<(), Skipped> {
        std::thread::scope(|scope| {
            // A thread can't get rid of its filter: this one has it and ends.
            let ran = scope.spawn(move || {
                match seccompiler::apply_filter(&filter(trouble)) {
                    Err(seccompiler::Error::Seccomp(error))
                        if error.raw_os_error() == Some(libc::ENOSYS) =>
                    {
                        return Err(Skipped {
                            facility: Facility::Seccomp,
                            why: error.to_string(),
                        });
                    }
                    applied => applied.expect("a filter for our own thread"),
                }
                run();
                Ok(())
            });
            ran.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn mapped(&self, memory: &Memory, range: PageRange) -> Vec<PageIndex> {
        let first = address(memory) / PAGE_SIZE + range.start().get();
        let count = usize::try_from(range.count().get()).expect("pages of a small object");
        let mut entries = vec![0; 8 * count];
        let pagemap = File::open("/proc/self/pagemap").expect("procfs");
        pagemap.read_exact_at(&mut entries, first * 8).expect("pagemap of our own mapping");
        // Bit 63: the page is present (Documentation/admin-guide/mm/pagemap.rst).
        let present = entries.chunks_exact(8).map(|entry| entry[7] & 0x80 != 0);
        range.frames().zip(present).filter(|(_, present)| *present).map(|(page, _)| page).collect()
    }

    fn reaches(&self, way: Way) -> bool {
        match way {
            Way::Pointer | Way::SystemCall | Way::Api => false,
            Way::Mem { host_view } | Way::Traced { host_view } => !host_view,
            Way::Descriptor => true,
        }
    }

    fn inherited(&self, memory: &Memory) -> Vec<String> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").expect("procfs");
        let start = format!("{:x}-", address(memory));
        let mut mappings: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
        let mut host_view = None;
        let mut header = "";
        for line in smaps.lines() {
            match line.strip_prefix("VmFlags:") {
                Some(flags) => {
                    let inode = header.split_whitespace().nth(4).unwrap_or_default();
                    mappings.entry(inode).or_default().push((header, flags));
                    host_view = host_view.or(header.starts_with(&start).then_some(inode));
                }
                // A mapping begins with its addresses, all else with a name and a colon.
                None if !line.split(' ').next().unwrap_or_default().ends_with(':') => header = line,
                None => {}
            }
        }
        let views = host_view.and_then(|inode| mappings.remove(inode)).expect("the host view");
        assert!(views.len() >= 3, "guest, host and trusted view: {views:?}");
        // dc: not copied by a fork. dd: not dumped.
        let kept = |flags: &str| flags.contains(" dc") && flags.contains(" dd");
        let inherited = views.into_iter().filter(|(_, flags)| !kept(flags));
        inherited.map(|(header, flags)| format!("{header}:{flags}")).collect()
    }
}

/// Where the host view is.
fn address(memory: &Memory) -> u64 {
    memory.host_view().as_ptr().expect("memory of this process").addr() as u64
}

/// Has the system call that `trouble` is about fail in this thread, with `ENOMEM`.
fn filter(trouble: Trouble) -> BpfProgram {
    let when = |argument, value: i32| {
        let value = u64::from(value.cast_unsigned());
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .expect("a system call has six arguments")
    };
    let (call, rules) = match trouble {
        Trouble::Unmap => (libc::SYS_madvise, vec![when(2, libc::MADV_DONTNEED)]),
        Trouble::Free => (libc::SYS_fallocate, Vec::new()),
        Trouble::Continue => (libc::SYS_ioctl, Vec::new()),
    };
    let fail = SeccompAction::Errno(libc::ENOMEM.cast_unsigned());
    let rules = BTreeMap::from([(call, rules)]);
    SeccompFilter::new(rules, SeccompAction::Allow, fail, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .expect("a filter of one system call")
}

impl Guest for Vm {
    fn attach(&self, memory: &Memory) -> VmId {
        Self::attach(self, memory).expect("memory of this host")
    }

    fn fd(&self) -> polder::Vm {
        Self::fd(self)
    }

    fn slots(&self) -> u32 {
        Self::slots(self)
    }

    fn run(&self, memory: (&Memory, VmId), programs: &[Vec<Op>]) -> Ended {
        let mut looks = 0;
        let supervise = |_: Progress<'_>| {
            looks += 1;
            if looks < LOOKS { Supervision::GoOn } else { Supervision::TimeOut }
        };
        Self::run(self, memory, programs, supervise).expect("KVM runs the guest")
    }

    fn vcpu(&self, (memory, vm): (&Memory, VmId)) -> IdleVcpu {
        self.idle_vcpu(memory, vm).expect("KVM has vCPUs left")
    }

    fn access(
        &self,
        memory: (&Memory, VmId),
        gpa: Gpa,
        _: Visibility,
        value: Option<u64>,
    ) -> Result<u64, MemoryFault> {
        // What a guest finds it tells by failing: the word that it is to expect is not there.
        const UNLIKELY: u64 = 0x5eed_5eed_dead_dead;
        let store = value.map(|value| Op::Store { gpa, value });
        let load = Op::Load { gpa, expect: UNLIKELY };
        let ops: Vec<Op> = store.into_iter().chain([load, Op::Done]).collect();
        let ended = Guest::run(self, memory, &[ops]);
        match (ended.end, ended.faults.first()) {
            (_, Some(fault)) => Err(*fault),
            (End::Failed(Failure::Check { found, .. }), None) => Ok(found),
            (End::Failed(Failure::MemoryFault { fault, .. }), None) => Err(fault),
            (End::Ok, None) => Ok(UNLIKELY),
            (end, None) => panic!("an access at {gpa} ended in {end:?}"),
        }
    }
}
