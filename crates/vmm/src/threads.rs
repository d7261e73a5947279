//! The threads of a run: one for each vCPU, one for the intruder, and the caller as supervisor.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{Builder, Thread};
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use polder::guest_memory::GuestMemory;
use polder::units::{Gfn, GfnRange};
use polder::{MachineVcpu, Memory, VmId};
use polder_linux::Kicker;

use crate::RunError;
use crate::accesses::{Accepting, Accesses};
use crate::guest::Program;
use crate::intruder::Intruder;
use crate::machine::Interpreter;
use crate::machine_check::MachineChecks;
use crate::report::{End, Failure, Progress, Supervision};
use crate::requests::{Expected, Requests};
use crate::scenario::Op;
use crate::vcpu::{self, Ran};
use crate::virtqueue::VirtqueueStatistics;

/// How often a supervisor is asked.
const SUPERVISE: Duration = Duration::from_millis(50);

/// When dropped, stops every vCPU and waits until each has stopped.
struct Ending<'a, K: Fn()> {
    stop: &'a AtomicBool,
    running: &'a AtomicUsize,
    kick: &'a K,
}

impl<K: Fn()> Drop for Ending<'_, K> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        while self.running.load(Ordering::Acquire) > 0 {
            (self.kick)();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// When dropped, says that a vCPU's thread is at its end; at a panic, that all others are to end.
struct CountOut<'a> {
    stop: &'a AtomicBool,
    running: &'a AtomicUsize,
    supervisor: &'a Thread,
}

impl Drop for CountOut<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.stop.store(true, Ordering::Release);
        }
        self.running.fetch_sub(1, Ordering::Release);
        self.supervisor.unpark();
    }
}

/// A guest that runs on some memory.
pub(crate) struct Threads<'a> {
    memory: &'a Memory,
    vm: VmId,
    requests: Requests<'a>,
    intruder: Intruder<'a>,
    /// Pages that are private for good, which the host tries all the while.
    private: Option<GfnRange>,
    exits: AtomicU64,
    stop: AtomicBool,
    /// For guests on the simulated machine: [`Accesses`].
    accepting: Accepting,
}

impl<'a> Threads<'a> {
    pub(crate) fn new(
        memory: &'a Memory,
        vm: VmId,
        private: Option<GfnRange>,
    ) -> Result<Self, RunError> {
        let no_file = |source| RunError::File { path: "/dev/zero", source };
        Ok(Self {
            memory,
            vm,
            requests: Requests::new(memory, vm).map_err(no_file)?,
            intruder: Intruder::new(memory, vm).map_err(no_file)?,
            private,
            exits: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            accepting: Accepting::default(),
        })
    }

    /// With a device on a virtqueue in this guest memory.
    pub(crate) fn with_virtqueue(self, guest: GuestMemory) -> Self {
        Self { requests: self.requests.with_virtqueue(guest), ..self }
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &'a Memory {
        self.memory
    }

    /// What the device on the virtqueue has done.
    pub(crate) fn virtqueue(&self) -> Option<VirtqueueStatistics> {
        self.requests.virtqueue()
    }

    /// Has the digests that the guest tells compared with these.
    pub(crate) fn expect(mut self, expected: Expected<'a>) -> Self {
        self.requests.expect(expected);
        self
    }

    /// Has the guest take machine checks for pages that have failed.
    pub(crate) fn give_machine_checks(mut self) -> Self {
        self.requests.give_machine_checks();
        self
    }

    /// Those that it took.
    pub(crate) fn machine_checks(&self) -> Option<&MachineChecks> {
        self.requests.machine_checks()
    }

    /// Runs vCPUs of KVM.
    pub(crate) fn run_on_kvm(
        &self,
        vcpus: Vec<(u32, VcpuFd)>,
        supervise: impl FnMut(Progress<'_>) -> Supervision,
    ) -> Result<(End, Vec<Ran>), RunError> {
        let kickers: Vec<Kicker> = vcpus.iter().map(|_| Kicker::default()).collect();
        let jobs = vcpus.into_iter().zip(&kickers).map(|(vcpu, kicker)| {
            move || vcpu::run(vcpu, kicker, &self.requests, &self.exits, &self.stop)
        });
        self.go(jobs.collect(), || kickers.iter().for_each(Kicker::kick), supervise)
    }

    /// Runs vCPUs of the simulated machine, each with its ops.
    pub(crate) fn run_on_machine(
        &self,
        vcpus: Vec<MachineVcpu>,
        program: Program,
        programs: &[Vec<Op>],
        supervise: impl FnMut(Progress<'_>) -> Supervision,
    ) -> Result<(End, Vec<Ran>), RunError> {
        let kickers: Vec<Arc<AtomicBool>> = vcpus.iter().map(MachineVcpu::kicker).collect();
        let jobs = (0..).zip(vcpus).zip(programs).map(|((index, vcpu), ops)| {
            let accesses = Accesses::new(vcpu, self.requests.memory(), &self.accepting);
            let interpreter = Interpreter::new(
                (index, accesses),
                (program, ops),
                &self.requests,
                &self.exits,
                &self.stop,
            );
            move || interpreter.run()
        });
        let kick = || kickers.iter().for_each(|kicker| kicker.store(true, Ordering::Release));
        self.go(jobs.collect(), kick, supervise)
    }

    /// Starts a thread for each vCPU's job and one for the intruder, has them supervised, and ends
    /// them. `kick` makes every vCPU look whether it is to stop.
    fn go<J: FnOnce() -> Result<Ran, RunError> + Send>(
        &self,
        jobs: Vec<J>,
        kick: impl Fn(),
        mut supervise: impl FnMut(Progress<'_>) -> Supervision,
    ) -> Result<(End, Vec<Ran>), RunError> {
        let (running, supervisor) = (AtomicUsize::new(0), std::thread::current());
        let thread = |name: &str| Builder::new().name(name.to_owned());
        std::thread::scope(|scope| {
            let (running, supervisor) = (&running, &supervisor);
            // Ends all threads whatever happens here: one that can't be started, a panic.
            let ending = Ending { stop: &self.stop, running, kick: &kick };
            let mut intruder = None;
            if let Some(private) = self.private {
                let intrude = move || self.intrude(private);
                let started = thread("intruder").spawn_scoped(scope, intrude);
                intruder = Some(started.map_err(RunError::Thread)?);
            }
            let mut threads = Vec::with_capacity(jobs.len());
            for job in jobs {
                let work = move || {
                    let _counted = CountOut { stop: &self.stop, running, supervisor };
                    let ran = job();
                    self.stop_if(ran.as_ref().map_or(true, |ran| ran.failure.is_some()));
                    ran
                };
                running.fetch_add(1, Ordering::AcqRel);
                let started = thread("vcpu").spawn_scoped(scope, work).inspect_err(|_| {
                    running.fetch_sub(1, Ordering::AcqRel);
                });
                threads.push(started.map_err(RunError::Thread)?);
            }
            let mut end = End::Ok;
            while running.load(Ordering::Acquire) > 0 && !self.stop.load(Ordering::Acquire) {
                std::thread::park_timeout(SUPERVISE);
                match supervise(self.progress()) {
                    Supervision::GoOn => {}
                    Supervision::TimeOut => end = End::TimedOut,
                    Supervision::Interrupt => end = End::Interrupted,
                }
                self.stop_if(end != End::Ok);
            }
            drop(ending);
            let intrusion = match intruder {
                Some(intruder) => intruder.join().map_err(|_| RunError::Panicked)?,
                None => None,
            };
            let ran = threads
                .into_iter()
                .map(|thread| thread.join().map_err(|_| RunError::Panicked)?)
                .collect::<Result<Vec<Ran>, RunError>>()?;
            let failure = intrusion.or_else(|| ran.iter().find_map(|ran| ran.failure));
            Ok((failure.map_or(end, End::Failed), ran))
        })
    }

    fn stop_if(&self, stop: bool) {
        if stop {
            self.stop.store(true, Ordering::Release);
        }
    }

    pub(crate) fn progress(&self) -> Progress<'_> {
        Progress {
            exits: self.exits.load(Ordering::Relaxed),
            memory: self.memory.statistics(),
            source: self.memory.source_statistics(),
            of: self.memory,
            vm: self.vm,
            ahead: None,
        }
    }

    /// Tries pages that are private for good, one after the other, until the end.
    fn intrude(&self, private: GfnRange) -> Option<Failure> {
        let frames: Vec<Gfn> = private.frames().collect();
        for &gfn in frames.iter().cycle() {
            if self.stop.load(Ordering::Acquire) {
                break;
            }
            if let Some(way) = self.intruder.assault(gfn) {
                self.stop_if(true);
                return Some(Failure::Intrusion { gfn, way });
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        None
    }
}
