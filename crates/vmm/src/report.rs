//! What is told of a run: while it goes on, and in the end.

use std::fmt;

use polder::units::{Gfn, Gpa, Level, PageIndex, PageRange};
use polder::{
    FolioCounts, Memory, MemoryFault, PageFacts, PageSize, PoolCounts, ReshapeCounts,
    SourceStatistics, Statistics, VmId,
};
use polder_linux::Exit;

use crate::intruder::Way;
use crate::kvm::Conversion;
use crate::virtqueue::VirtqueueStatistics;

/// What a supervisor is told, some twenty times a second.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Exits of the guest that were handled.
    pub exits: u64,
    /// What happened to the memory.
    pub memory: Statistics,
    /// What came from its source.
    pub source: SourceStatistics,
    /// The memory, to be asked.
    pub of: &'a Memory,
    /// What it calls the guest's VM.
    pub vm: VmId,
    /// How far memory is mapped ahead, before the guest starts.
    pub ahead: Option<Ahead>,
}

/// How much memory was mapped ahead of a guest, in pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ahead {
    /// Those done.
    pub done: u64,
    /// Those that were to be.
    pub of: u64,
    /// Of those done, those that the guest's own tables do not map.
    pub skipped: u64,
}

/// What a supervisor says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Supervision {
    /// Go on.
    GoOn,
    /// Stop: it takes too long.
    TimeOut,
    /// Stop: the user has had enough.
    Interrupt,
}

/// How a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Every check passed.
    Ok,
    /// Something failed.
    Failed(Failure),
    /// It took too long.
    TimedOut,
    /// The user stopped it.
    Interrupted,
}

/// What failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// A check of the guest's.
    Check {
        /// On which vCPU.
        vcpu: u32,
        /// The op's index in that vCPU's program.
        op: u64,
        /// Where.
        gpa: Gpa,
        /// What should have been there, or have been answered; of a page that was kept after a
        /// refusal, a digest of what it held.
        expected: u64,
        /// What was.
        found: u64,
    },
    /// The guest took an exception that it should not have.
    Exception {
        /// On which vCPU.
        vcpu: u32,
        /// Its vector.
        vector: u64,
        /// At which instruction.
        rip: u64,
        /// The address of a page fault.
        cr2: u64,
        /// Its error code.
        error: u64,
    },
    /// A vCPU shut down.
    TripleFault {
        /// Which.
        vcpu: u32,
    },
    /// The guest touched a page that is out of use.
    MemoryFailure {
        /// On which vCPU.
        vcpu: u32,
        /// The page.
        page: Option<PageIndex>,
    },
    /// The guest was given a machine check, and did not say that it took it.
    MachineCheckLost {
        /// On which vCPU.
        vcpu: u32,
        /// The page.
        page: PageIndex,
    },
    /// Memory refused the guest what it is to have.
    MemoryFault {
        /// On which vCPU.
        vcpu: u32,
        /// What was refused.
        fault: MemoryFault,
    },
    /// The guest ended early: checks are missing.
    TooFewChecks {
        /// How many passed.
        passed: u64,
        /// How many there are at least.
        least: u64,
    },
    /// The host reached a private page.
    Intrusion {
        /// The page.
        gfn: Gfn,
        /// How.
        way: Way,
    },
    /// A vCPU exited in a way that nothing was expected to cause.
    Exit {
        /// Which.
        vcpu: u32,
        /// How.
        exit: Exit,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Check { vcpu, op, gpa, expected, found } => {
                write!(f, "vCPU {vcpu}, op {op}: at {gpa} expected {expected:#x}, found {found:#x}")
            }
            Self::Exception { vcpu, vector, rip, cr2, error } => write!(
                f,
                "vCPU {vcpu}: exception {vector} at {rip:#x} (error {error:#x}, cr2 {cr2:#x})"
            ),
            Self::TripleFault { vcpu } => write!(f, "vCPU {vcpu}: triple fault"),
            Self::MemoryFailure { vcpu, page: Some(page) } => {
                write!(f, "vCPU {vcpu}: touched page {page}, which is out of use")
            }
            Self::MemoryFailure { vcpu, page: None } => {
                write!(f, "vCPU {vcpu}: memory failed, and no page of this memory is named")
            }
            Self::MachineCheckLost { vcpu, page } => {
                write!(f, "vCPU {vcpu}: was given a machine check for page {page}, and took none")
            }
            Self::MemoryFault { vcpu, fault } => write!(f, "vCPU {vcpu}: {fault}"),
            Self::TooFewChecks { passed, least } => {
                write!(f, "the guest ended after {passed} checks of at least {least}")
            }
            Self::Intrusion { gfn, way } => {
                let way = match way {
                    Way::Api => "the API",
                    Way::RawTouch => "a raw touch",
                    Way::SystemCall => "a system call",
                };
                write!(f, "the host reached private frame {gfn} by {way}")
            }
            Self::Exit { vcpu, exit } => write!(f, "vCPU {vcpu}: unexpected exit {exit:x?}"),
        }
    }
}

/// What runs a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accelerator {
    /// KVM.
    Kvm,
    /// The simulated machine.
    Machine,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kvm => "kvm",
            Self::Machine => "machine",
        })
    }
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Report {
    /// What ran the guest.
    pub accelerator: Accelerator,
    /// How requests to convert came.
    pub conversion_by: Conversion,
    /// Whether the host can keep memory private; else all of it was shared.
    pub private_memory: bool,
    /// How it ended.
    pub end: End,
    /// The guest's checks that passed.
    pub checks_passed: u64,
    /// Those that failed; the first ends the run.
    pub checks_failed: u64,
    /// What happened to the memory.
    pub memory: Statistics,
    /// What the device on the virtqueue did, where there is one.
    pub virtqueue: Option<VirtqueueStatistics>,
    /// What every page is in the end.
    pub facts: Vec<(PageRange, PageFacts)>,
    /// The pages that were touched.
    pub touched: Vec<PageRange>,
    /// What the memory was made of in fact.
    pub page_size: PageSize,
    /// How many folios of each level there were in the end.
    pub levels: FolioCounts,
    /// Where they are, in runs of one level; empty where the kernel alone knows.
    pub folios: Vec<(PageRange, Level)>,
    /// How often they were split and merged.
    pub reshaped: ReshapeCounts,
    /// What their pool had in the end, while the guest's memory was held.
    pub pool: Option<PoolCounts>,
    /// What was mapped ahead.
    pub ahead: Option<Ahead>,
}
