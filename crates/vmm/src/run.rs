//! A whole run: memory, VM, guest, intruder; supervised, ended, reported.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use polder::units::{ByteSize, Gfn, GfnRange, Gpa, PAGE_BYTES, PageRange};
use polder::{
    Contents, Delays, Holder, HostKind, Memory, OnBusy, PageSize, Platform, Visibility, VmId,
};

use crate::RunError;
use crate::guest::{Chunk, Image, Program, Transport};
use crate::kvm::{self, Conversion};
use crate::prefault::{self, Prefault};
use crate::report::{Accelerator, End, Failure, Progress, Report, Supervision};
use crate::scenario::{self, Conversions, Scenario, ScenarioError};
use crate::threads::Threads;
use crate::vcpu::Ran;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// On which host.
    pub host: HostKind,
    /// For which kind of VM; on a host of real memory, the one that it serves.
    pub platform: Platform,
    /// The guest's memory.
    pub memory: ByteSize,
    /// Made of which pages.
    pub page_size: PageSize,
    /// How many vCPUs.
    pub vcpus: u32,
    /// Decides the guest's patterns and ranges.
    pub seed: u64,
    /// What the guest does.
    pub program: Program,
    /// By how much each stage of an operation is held up, at most: [`polder::Delays`].
    pub delays: Option<Duration>,
    /// What is mapped ahead of the guest.
    pub prefault: Option<Prefault>,
    /// The guest is to have no fault after its start: all is mapped ahead, and checked, or the run
    /// is refused.
    pub no_faults: bool,
}

impl Config {
    /// What is mapped ahead: all of it, before the start, where no fault may come after that.
    fn ahead(&self) -> Option<Prefault> {
        let all = Prefault { gfns: None, running: false };
        if self.no_faults { Some(all) } else { self.prefault }
    }

    /// Where no fault may come: keeps the memory from being reclaimed, and looks whether all of it
    /// is mapped.
    fn check_mapped(
        &self,
        (memory, id): (&Memory, VmId),
        vcpu: Option<polder::Vcpu<'_>>,
    ) -> Result<(), RunError> {
        let (true, Some(vcpu)) = (self.no_faults, vcpu) else { return Ok(()) };
        memory.lock().map_err(RunError::Memory)?;
        // What is mapped already is done at once, and what is not would make a page.
        let again = Prefault { gfns: None, running: false };
        let mapped = again.map((memory, id), vcpu, |_| Supervision::GoOn)?;
        let resident = memory.resident().map_err(RunError::Memory)?;
        let all = mapped.is_ok_and(|ahead| ahead.done == ahead.of && ahead.skipped == 0);
        if all && resident >= memory.pages() {
            return Ok(());
        }
        Err(RunError::FaultsRemain {
            what: "some of its memory was not mapped, or not any more",
            way_out: "free memory, so that the kernel has no need to reclaim any",
        })
    }
}

/// Refuses a run in which the guest would have faults after its start, whatever is mapped before.
fn check_no_faults(config: &Config, vm: Option<&kvm_ioctls::VmFd>) -> Result<(), RunError> {
    let refused = |what, way_out| Err(RunError::FaultsRemain { what, way_out });
    let converts = matches!(config.program, Program::SelfTest | Program::Flood);
    match (config.host, vm) {
        (_, Some(vm)) if !polder_linux::can_pre_fault(vm) => refused(
            "this KVM can't map memory ahead (KVM_PRE_FAULT_MEMORY): each page's first touch costs \
             a fault of KVM's own",
            "use a KVM with TDP, Linux 6.11 or newer; or --prefault all, which leaves those faults",
        ),
        (HostKind::GuestMemfd | HostKind::Machine, _) if converts => refused(
            "it converts pages, and a conversion takes them out of stage 2 on this host",
            "use --guest spin, or --host memfd, where a conversion leaves the guest's mapping",
        ),
        _ => Ok(()),
    }
}

/// Runs a guest to its end, or until the supervisor has it stopped.
///
/// # Errors
/// A [`RunError`] with a way out, before the guest starts as a rule.
pub fn run(
    config: &Config,
    supervise: impl FnMut(Progress<'_>) -> Supervision,
) -> Result<Report, RunError> {
    match config.host {
        HostKind::Memfd | HostKind::GuestMemfd => run_on_kvm(config, supervise),
        HostKind::Machine => run_on_machine(config, supervise),
    }
}

fn scenario(
    config: &Config,
    conversions: Conversions,
    virtqueue: bool,
) -> Result<Scenario, ScenarioError> {
    let vcpus =
        u8::try_from(config.vcpus).map_err(|_| ScenarioError::Vcpus { vcpus: config.vcpus })?;
    let (memory, seed) = (config.memory.get(), config.seed);
    Scenario::generate(&scenario::Config { memory, vcpus, seed, conversions, virtqueue })
}

fn run_on_kvm(
    config: &Config,
    supervise: impl FnMut(Progress<'_>) -> Supervision,
) -> Result<Report, RunError> {
    // What can't be is told before anything is asked of KVM.
    scenario(config, Conversions::KeepContents, true)?;
    let kvm = kvm::open()?;
    let transport = kvm::transport(&kvm)?;
    let (vm, conversions) = kvm::create_vm_for(&kvm, config.host)?;
    let scenario = &scenario(config, conversions, true)?;
    let image = Image::new(scenario, config.program, transport)?;
    let vm_of_memory = Arc::clone(&vm).into();
    let (memory, id) = bound(config, conversions, vm_of_memory).map_err(RunError::Memory)?;
    match config.host {
        HostKind::Memfd | HostKind::Machine => load(&memory, id, &image.chunks),
        HostKind::GuestMemfd => load_shared(&memory, id, scenario.layout().boot, &image.chunks),
    }
    .and_then(|()| memory.settle())
    .map_err(RunError::Memory)?;

    let vcpus = (0..)
        .zip(&image.vcpus)
        .map(|(index, start)| Ok((index, kvm::create_vcpu(&kvm, &vm, index, start)?)));
    let vcpus = vcpus.collect::<Result<Vec<_>, RunError>>()?;
    let churn = scenario.layout().churn;
    let private = (conversions.initial() == Visibility::Private).then_some(churn);
    let device = memory.guest_memory(id, Holder::new("the device on a virtqueue"), OnBusy::Wait);
    let threads = Threads::new(&memory, id, private)?;
    let threads = threads.with_virtqueue(device.map_err(RunError::Memory)?);
    if config.no_faults {
        check_no_faults(config, Some(&vm))?;
    }
    // KVM's number of it is the next one.
    let idle = config.ahead().map(|_| kvm::idle_vcpu(&kvm, &vm, config.vcpus)).transpose()?;
    let idle = idle.as_ref().map(polder::Vcpu::from);
    let of = ((&*memory, id), &threads);
    let (ended, ahead) = prefault::run(config.ahead(), of, idle, supervise, |supervise| {
        config.check_mapped((&memory, id), idle)?;
        threads.run_on_kvm(vcpus, supervise)
    })?;
    let conversion_by = match transport {
        Transport::Port => Conversion::Port,
        Transport::Vmcall | Transport::Vmmcall => Conversion::Hypercall,
    };
    let least = least_checks(config, scenario);
    let by = (Accelerator::Kvm, conversion_by);
    Ok(Report { ahead, ..report(&threads, by, ended, (scenario, least))? })
}

fn run_on_machine(
    config: &Config,
    supervise: impl FnMut(Progress<'_>) -> Supervision,
) -> Result<Report, RunError> {
    // A conversion of an SNP guest's memory loses what is in it.
    let conversions = match config.platform {
        Platform::Snp => Conversions::LoseContents,
        Platform::Plain | Platform::SwProtected | Platform::Pkvm => Conversions::KeepContents,
    };
    let scenario = &scenario(config, conversions, false)?;
    let (memory, id) = bound(config, conversions, polder::Vm::Machine).map_err(RunError::Memory)?;
    memory.settle().map_err(RunError::Memory)?;
    let vcpus = (0..config.vcpus).map(|_| memory.machine_vcpu(id));
    let vcpus = vcpus.collect::<Result<Vec<_>, _>>().map_err(RunError::Memory)?;
    let threads = Threads::new(&memory, id, Some(scenario.layout().churn))?;
    let programs = scenario.programs();
    if config.no_faults {
        check_no_faults(config, None)?;
    }
    let idle = memory.machine_vcpu(id).map_err(RunError::Memory)?;
    let idle = Some(polder::Vcpu::from(&idle));
    let of = ((&*memory, id), &threads);
    let (ended, ahead) = prefault::run(config.ahead(), of, idle, supervise, |supervise| {
        config.check_mapped((&memory, id), idle)?;
        threads.run_on_machine(vcpus, config.program, programs, supervise)
    })?;
    let by = (Accelerator::Machine, Conversion::Hypercall);
    let told = (scenario, least_checks(config, scenario));
    Ok(Report { ahead, ..report(&threads, by, ended, told)? })
}

/// Memory as the scenario has it, bound to a VM; its contents are owed where a host can have that.
fn bound(
    config: &Config,
    conversions: Conversions,
    vm: polder::Vm,
) -> Result<(Arc<Memory>, VmId), polder::Error> {
    let pages = config.memory.pages().expect("the scenario's memory is whole pages");
    let memory = Memory::builder(pages).host(config.host).platform(config.platform);
    let memory = memory.page_size(config.page_size);
    let memory = match conversions {
        Conversions::KeepContents => memory.owed().build()?,
        Conversions::LoseContents => memory.build()?,
        Conversions::Refused => memory.shared().build()?,
    };
    if let Some(most) = config.delays {
        memory.watch(Arc::new(Delays::new(config.seed, most)));
    }
    let memory = Arc::new(memory);
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
    threads: &Threads<'_>,
    (accelerator, conversion_by): (Accelerator, Conversion),
    (mut end, ran): (End, Vec<Ran>),
    (scenario, least): (&Scenario, u64),
) -> Result<Report, RunError> {
    let memory = threads.memory();
    // The guest says how many, and may say anything.
    let passed = ran.iter().fold(0u64, |sum, ran| sum.saturating_add(ran.checks_passed));
    if end == End::Ok && passed < least {
        end = End::Failed(Failure::TooFewChecks { passed, least });
    }
    let all = PageRange::between(0, memory.pages().get()).expect("memory has pages");
    Ok(Report {
        accelerator,
        conversion_by,
        private_memory: scenario.config().conversions.initial() == Visibility::Private,
        end,
        checks_passed: passed,
        checks_failed: u64::from(matches!(end, End::Failed(Failure::Check { .. }))),
        memory: memory.statistics(),
        virtqueue: threads.virtqueue(),
        facts: memory.facts(all).map_err(RunError::Memory)?,
        touched: memory.existing().map_err(RunError::Memory)?,
        page_size: memory.page_size(),
        levels: memory.levels(),
        folios: memory.folios(),
        reshaped: memory.reshape_counts(),
        pool: memory.pool(),
        ahead: None,
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

/// Shares the boot area and writes an image there. KVM reads a guest's memory by the shared side
/// alone: what it emulates (an access to a device, a hypercall where the CPU does not say how long
/// the instruction is) has its code and page tables there, or ends in an internal error.
fn load_shared(
    memory: &Memory,
    vm: VmId,
    boot: GfnRange,
    chunks: &[Chunk],
) -> Result<(), polder::Error> {
    memory.convert_gfns(vm, boot, Visibility::Shared, Contents::Zero, OnBusy::Wait)?;
    chunks.iter().try_for_each(|chunk| memory.write(vm, chunk.gpa, &chunk.bytes))
}
