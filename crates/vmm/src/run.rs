//! A whole run: memory, VM, guest, intruder; supervised, ended, reported.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use polder::units::{ByteSize, Gfn, GfnRange, Gpa, PAGE_BYTES, PageIndex, PageRange};
use polder::{HostKind, Memory, MemoryFault, PageFacts, Statistics, VmId};
use polder_linux::Exit;

use crate::RunError;
use crate::guest::{Chunk, Image, Program, Transport};
use crate::intruder::Way;
use crate::kvm::{self, Conversion};
use crate::scenario::{self, Scenario, ScenarioError};
use crate::threads::Threads;
use crate::vcpu::Ran;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// On which host.
    pub host: HostKind,
    /// The guest's memory.
    pub memory: ByteSize,
    /// How many vCPUs.
    pub vcpus: u32,
    /// Decides the guest's patterns and ranges.
    pub seed: u64,
    /// What the guest does.
    pub program: Program,
}

/// What a supervisor is told, some twenty times a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Exits of the guest that were handled.
    pub exits: u64,
    /// What happened to the memory.
    pub memory: Statistics,
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
        /// What should have been there, or have been answered.
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
                write!(f, "vCPU {vcpu}: memory failed outside the guest's")
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
    /// How it ended.
    pub end: End,
    /// The guest's checks that passed.
    pub checks_passed: u64,
    /// Those that failed; the first ends the run.
    pub checks_failed: u64,
    /// What happened to the memory.
    pub memory: Statistics,
    /// What every page is in the end.
    pub facts: Vec<(PageRange, PageFacts)>,
    /// The pages that were touched.
    pub touched: Vec<PageRange>,
}

/// Runs a guest to its end, or until the supervisor has it stopped.
///
/// # Errors
/// A [`RunError`] with a way out, before the guest starts as a rule.
pub fn run(
    config: &Config,
    supervise: impl FnMut(Progress) -> Supervision,
) -> Result<Report, RunError> {
    let vcpus =
        u8::try_from(config.vcpus).map_err(|_| ScenarioError::Vcpus { vcpus: config.vcpus })?;
    let scenario = Scenario::generate(&scenario::Config {
        memory: config.memory.get(),
        vcpus,
        seed: config.seed,
    })?;
    match config.host {
        HostKind::Memfd => run_on_kvm(config, &scenario, supervise),
        HostKind::Machine => run_on_machine(config, &scenario, supervise),
    }
}

fn run_on_kvm(
    config: &Config,
    scenario: &Scenario,
    supervise: impl FnMut(Progress) -> Supervision,
) -> Result<Report, RunError> {
    let kvm = kvm::open()?;
    let transport = kvm::transport(&kvm)?;
    let image = Image::new(scenario, config.program, transport)?;
    let (vm, _) = kvm::create_vm(&kvm)?;
    let (memory, id) = bound(config, Arc::clone(&vm).into()).map_err(RunError::Memory)?;
    load(&memory, id, &image.chunks).and_then(|()| memory.settle()).map_err(RunError::Memory)?;

    let vcpus = (0..)
        .zip(&image.vcpus)
        .map(|(index, start)| Ok((index, kvm::create_vcpu(&kvm, &vm, index, start)?)));
    let vcpus = vcpus.collect::<Result<Vec<_>, RunError>>()?;
    let threads = Threads::new(&memory, id, Some(scenario.layout().churn))?;
    let ended = threads.run_on_kvm(vcpus, supervise)?;
    let conversion_by = match transport {
        Transport::Port => Conversion::Port,
        Transport::Vmcall | Transport::Vmmcall => Conversion::Hypercall,
    };
    report(&memory, (Accelerator::Kvm, conversion_by), ended, least_checks(config, scenario))
}

fn run_on_machine(
    config: &Config,
    scenario: &Scenario,
    supervise: impl FnMut(Progress) -> Supervision,
) -> Result<Report, RunError> {
    let (memory, id) = bound(config, polder::Vm::Machine).map_err(RunError::Memory)?;
    memory.settle().map_err(RunError::Memory)?;
    let vcpus = (0..config.vcpus).map(|_| memory.machine_vcpu(id));
    let vcpus = vcpus.collect::<Result<Vec<_>, _>>().map_err(RunError::Memory)?;
    let threads = Threads::new(&memory, id, Some(scenario.layout().churn))?;
    let programs = scenario.programs();
    let ended = threads.run_on_machine(vcpus, config.program, programs, supervise)?;
    let by = (Accelerator::Machine, Conversion::Hypercall);
    report(&memory, by, ended, least_checks(config, scenario))
}

/// Memory as the scenario has it, owed, bound to a VM.
fn bound(config: &Config, vm: polder::Vm) -> Result<(Memory, VmId), polder::Error> {
    let pages = config.memory.pages().expect("the scenario's memory is whole pages");
    let memory = Memory::builder(pages).host(config.host).owed().build()?;
    let id = memory.attach(vm)?;
    let ram = scenario::ram(config.memory.get()).into_iter().flatten();
    kvm::bind(&memory, id, ram)?;
    Ok((memory, id))
}

/// How many checks have to pass, if the guest comes to its end.
fn least_checks(config: &Config, scenario: &Scenario) -> u64 {
    match config.program {
        Program::SelfTest => scenario.least_checks(),
        Program::TripleFault | Program::Spin | Program::Flood => 0,
    }
}

fn report(
    memory: &Memory,
    (accelerator, conversion_by): (Accelerator, Conversion),
    (mut end, ran): (End, Vec<Ran>),
    least: u64,
) -> Result<Report, RunError> {
    // The guest says how many, and may say anything.
    let passed = ran.iter().fold(0u64, |sum, ran| sum.saturating_add(ran.checks_passed));
    if end == End::Ok && passed < least {
        end = End::Failed(Failure::TooFewChecks { passed, least });
    }
    let all = PageRange::between(0, memory.pages().get()).expect("memory has pages");
    Ok(Report {
        accelerator,
        conversion_by,
        end,
        checks_passed: passed,
        checks_failed: u64::from(matches!(end, End::Failed(Failure::Check { .. }))),
        memory: memory.statistics(),
        facts: memory.facts(all).map_err(RunError::Memory)?,
        touched: memory.existing().map_err(RunError::Memory)?,
    })
}

/// Populates the pages of an image, each with all its bytes at once.
fn load(memory: &Memory, vm: VmId, chunks: &[Chunk]) -> Result<(), polder::Error> {
    let mut pages: BTreeMap<Gfn, Vec<u8>> = BTreeMap::new();
    for chunk in chunks {
        let mut gpa = chunk.gpa;
        let mut left = chunk.bytes.as_slice();
        while !left.is_empty() {
            let at = usize::try_from(gpa.page_offset()).expect("below 4096");
            let page = pages.entry(gpa.gfn()).or_insert_with(|| vec![0; PAGE_BYTES]);
            let (now, rest) = left.split_at(left.len().min(page.len() - at));
            page[at..at + now.len()].copy_from_slice(now);
            gpa = Gpa::new(gpa.get() + now.len() as u64);
            left = rest;
        }
    }
    for (gfn, bytes) in pages {
        for run in memory.pages_of(vm, GfnRange::one(gfn))? {
            memory.populate(run, &bytes)?;
        }
    }
    Ok(())
}
