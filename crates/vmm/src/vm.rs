//! [`Vm`]: a guest that does what it is told, on memory that somebody else made and bound.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use polder::units::{Gfn, Gpa, PAGE_SIZE, PageCount, PageRange};
use polder::{
    Contents, HostKind, MachineVcpu, Memory, MemoryFault, OnBusy, Slot, Visibility, VmId,
};

use crate::guest::{Chunk, Image, Program, Transport};
use crate::machine_check::{MachineCheck, MachineChecks, OnFailedPage};
use crate::requests::Expected;
use crate::roots::GuestRoot;
use crate::scenario::{BOOT_END, Op, ScenarioError, VCPUS_MAX};
use crate::threads::Threads;
use crate::vcpu::Ran;
use crate::{End, Progress, RunError, Supervision, kvm};

/// A VM whose guest runs lists of ops, on KVM or on the simulated machine.
///
/// On KVM the guest's own image lies in memory of its own, in the VM's last slot, at
/// guest-physical 0 to [`Vm::RAM`]. What lies from there on is the caller's: memory of any size,
/// in any slots.
#[derive(Debug)]
pub struct Vm(Kind);

enum Kind {
    Kvm(Box<KvmVm>),
    Machine(GuestRoot),
}

struct KvmVm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    transport: Transport,
    /// Held while a guest runs.
    boot: Mutex<Boot>,
    /// KVM gives a vCPU's number once in a VM's life.
    next_vcpu: AtomicU32,
}

/// The memory that an image is in.
struct Boot {
    memory: Memory,
    /// The VM's name there.
    id: VmId,
    slot: Slot,
    /// The guest's page tables, as they were written last.
    tables: Option<Vec<u8>>,
}

/// What became of a guest's programs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ended {
    /// How it ended.
    pub end: End,
    /// The checks that passed, on all vCPUs.
    pub checks_passed: u64,
    /// The first accesses that memory did not let through: loads gave all ones, stores were
    /// dropped. In the order of vCPUs, and of each one's accesses.
    pub faults: Vec<MemoryFault>,
}

/// A vCPU of a [`Vm`] that runs no guest: memory can be mapped ahead for it.
#[derive(Debug)]
pub enum IdleVcpu {
    /// One of KVM's.
    Kvm(VcpuFd),
    /// One of the simulated machine.
    Machine(MachineVcpu),
}

impl<'a> From<&'a IdleVcpu> for polder::Vcpu<'a> {
    fn from(vcpu: &'a IdleVcpu) -> Self {
        match vcpu {
            IdleVcpu::Kvm(vcpu) => vcpu.into(),
            IdleVcpu::Machine(vcpu) => vcpu.into(),
        }
    }
}

impl Vm {
    /// Where the caller's guest-physical memory may begin: 2 MiB.
    pub const RAM: Gpa = Gpa::new(BOOT_END);

    /// A VM for memory of `host`.
    ///
    /// # Errors
    /// [`RunError::Kvm`] where a host of real memory finds no usable KVM, [`RunError::Memory`]
    /// where the host can't be used, and others of [`RunError`].
    pub fn new(host: HostKind) -> Result<Self, RunError> {
        Ok(Self(match host {
            HostKind::Memfd | HostKind::GuestMemfd => Kind::Kvm(Box::new(KvmVm::new(host)?)),
            HostKind::Machine => Kind::Machine(GuestRoot::Tdp),
        }))
    }

    /// A VM for memory on the simulated machine, whose guests run on `root`.
    pub const fn on(root: GuestRoot) -> Self {
        Self(Kind::Machine(root))
    }

    /// Makes the VM known to memory, to bind its pages to. On the simulated machine each memory
    /// has a machine of its own, and so knows the VM apart from others.
    ///
    /// # Errors
    /// [`polder::Error::WrongVm`] for memory of another kind of host.
    pub fn attach(&self, memory: &Memory) -> Result<VmId, polder::Error> {
        let id = memory.attach(self.fd())?;
        match &self.0 {
            Kind::Kvm(_) => {}
            Kind::Machine(root) => root.set_up(memory, id)?,
        }
        Ok(id)
    }

    /// The VM, as a host knows it.
    pub fn fd(&self) -> polder::Vm {
        match &self.0 {
            Kind::Kvm(vm) => Arc::clone(&vm.fd).into(),
            Kind::Machine(root) => root.vm(),
        }
    }

    /// The VM, on KVM: for who shows it memory that is not Polder's.
    pub fn kvm(&self) -> Option<&Arc<VmFd>> {
        match &self.0 {
            Kind::Kvm(vm) => Some(&vm.fd),
            Kind::Machine(_) => None,
        }
    }

    /// How many slots the VM has for the caller: 0 to that less 1.
    pub fn slots(&self) -> u32 {
        match &self.0 {
            Kind::Kvm(vm) => slots(&vm.kvm) - 1,
            Kind::Machine(_) => u32::MAX,
        }
    }

    /// A new vCPU that runs no guest.
    ///
    /// # Errors
    /// [`RunError::Vm`], [`RunError::Memory`] for memory that does not know the VM as `id`.
    pub fn idle_vcpu(&self, memory: &Memory, id: VmId) -> Result<IdleVcpu, RunError> {
        match &self.0 {
            Kind::Kvm(vm) => {
                let fresh = vm.next_vcpu.fetch_add(1, Ordering::Relaxed);
                Ok(IdleVcpu::Kvm(kvm::idle_vcpu(&vm.kvm, &vm.fd, fresh)?))
            }
            Kind::Machine(root) => {
                Ok(IdleVcpu::Machine(vcpu_on(*root, memory, id).map_err(RunError::Memory)?))
            }
        }
    }

    /// Runs a guest with a vCPU for each list of ops, each of which ends in [`Op::Done`], to its
    /// end, or until the supervisor has it stopped. What it asks for, it asks of `memory`, which
    /// knows this VM as `vm`. One guest runs at a time.
    ///
    /// # Errors
    /// A [`RunError`]; that the guest fails is none.
    pub fn run(
        &self,
        (memory, id): (&Memory, VmId),
        programs: &[Vec<Op>],
        supervise: impl FnMut(Progress<'_>) -> Supervision,
    ) -> Result<Ended, RunError> {
        let threads = Threads::new(memory, id, None)?;
        self.go((memory, id), &threads, programs, supervise)
    }

    /// The same, of a guest that tells [digests](Op::Digest), which have to be as expected, and
    /// what becomes of it when it touches a page that has failed; also returns its machine checks.
    ///
    /// # Errors
    /// As [`Vm::run`].
    pub fn run_expecting(
        &self,
        (memory, id): (&Memory, VmId),
        programs: &[Vec<Op>],
        (expected, on_failed_page): (Expected<'_>, OnFailedPage),
        supervise: impl FnMut(Progress) -> Supervision,
    ) -> Result<(Ended, Vec<MachineCheck>), RunError> {
        let mut threads = Threads::new(memory, id, None)?.expect(expected);
        if on_failed_page == OnFailedPage::MachineCheck {
            threads = threads.give_machine_checks();
        }
        let ended = self.go((memory, id), &threads, programs, supervise)?;
        Ok((ended, threads.machine_checks().map(MachineChecks::all).unwrap_or_default()))
    }

    fn go(
        &self,
        (memory, id): (&Memory, VmId),
        threads: &Threads<'_>,
        programs: &[Vec<Op>],
        supervise: impl FnMut(Progress) -> Supervision,
    ) -> Result<Ended, RunError> {
        if !(1..=usize::from(VCPUS_MAX)).contains(&programs.len()) {
            let vcpus = u32::try_from(programs.len()).unwrap_or(u32::MAX);
            return Err(ScenarioError::Vcpus { vcpus }.into());
        }
        let (end, ran) = match &self.0 {
            Kind::Kvm(vm) => vm.run(threads, programs, supervise)?,
            Kind::Machine(root) => {
                let vcpus = programs.iter().map(|_| vcpu_on(*root, memory, id));
                let vcpus = vcpus.collect::<Result<Vec<_>, _>>().map_err(RunError::Memory)?;
                threads.run_on_machine(vcpus, Program::SelfTest, programs, supervise)?
            }
        };
        Ok(Ended {
            end,
            checks_passed: ran.iter().fold(0, |sum, ran| sum.saturating_add(ran.checks_passed)),
            faults: ran.into_iter().flat_map(|ran| ran.faults).collect(),
        })
    }
}

/// A vCPU of the simulated machine that runs on `root`.
fn vcpu_on(root: GuestRoot, memory: &Memory, id: VmId) -> Result<MachineVcpu, polder::Error> {
    let vcpu = memory.machine_vcpu(id)?;
    root.load(&vcpu)?;
    Ok(vcpu)
}

impl KvmVm {
    fn new(host: HostKind) -> Result<Self, RunError> {
        let kvm = kvm::open()?;
        let transport = transport(&kvm)?;
        let (fd, _) = kvm::create_vm(&kvm, host)?;
        let pages = boot_pages();
        // The image is written anew for each run, and so shared: on any host that is a memfd.
        let memory = Memory::builder(pages.count()).build().map_err(RunError::Memory)?;
        let id = memory.attach(Arc::clone(&fd)).map_err(RunError::Memory)?;
        let last = Slot(slots(&kvm) - 1);
        memory
            .convert(pages, Visibility::Shared, Contents::Preserve, OnBusy::Wait)
            .and_then(|_: PageCount| memory.bind(id, last, Gfn::from(0), pages))
            .map_err(RunError::Memory)?;
        Ok(Self {
            kvm,
            fd,
            transport,
            boot: Mutex::new(Boot { memory, id, slot: last, tables: None }),
            next_vcpu: 0.into(),
        })
    }

    fn run(
        &self,
        threads: &Threads<'_>,
        programs: &[Vec<Op>],
        supervise: impl FnMut(Progress<'_>) -> Supervision,
    ) -> Result<(End, Vec<Ran>), RunError> {
        let image = Image::of_programs(programs, Program::SelfTest, self.transport)?;
        let mut boot = self.boot.lock().unwrap_or_else(PoisonError::into_inner);
        boot.write(&image).map_err(RunError::Memory)?;
        // KVM's number of a vCPU is a fresh one; ours is that of its program.
        let vcpus = (0..).zip(&image.vcpus).map(|(index, start)| {
            let fresh = self.next_vcpu.fetch_add(1, Ordering::Relaxed);
            let vcpu = kvm::create_vcpu(&self.kvm, &self.fd, fresh, start)?;
            if threads.machine_checks().is_some() {
                polder_linux::set_up_machine_checks(&self.kvm, &vcpu)
                    .map_err(RunError::NoMachineChecks)?;
            }
            Ok((index, vcpu))
        });
        let vcpus = vcpus.collect::<Result<Vec<_>, RunError>>()?;
        threads.run_on_kvm(vcpus, supervise)
    }
}

impl Boot {
    /// Writes an image. Without TDP, KVM shadows the guest's page tables, and sees no change of
    /// them that the host makes: what it has of others is zapped, with the slot.
    fn write(&mut self, image: &Image) -> Result<(), polder::Error> {
        let tables = image.vcpus.first().map(|vcpu| vcpu.page_tables);
        for Chunk { gpa, bytes } in &image.chunks {
            if Some(*gpa) == tables {
                let are_others = self.tables.as_ref().is_some_and(|written| written != bytes);
                if are_others && !self.memory.bindings().is_empty() {
                    self.memory.unbind(self.id, self.slot)?;
                }
                if self.memory.bindings().is_empty() {
                    self.memory.bind(self.id, self.slot, Gfn::from(0), boot_pages())?;
                }
                self.tables = Some(bytes.clone());
            }
        }
        for Chunk { gpa, bytes } in &image.chunks {
            self.memory.write(self.id, *gpa, bytes)?;
        }
        Ok(())
    }
}

fn boot_pages() -> PageRange {
    PageRange::between(0, BOOT_END / PAGE_SIZE).expect("2 MiB are pages")
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm(_) => "kvm",
            Self::Machine(_) => "machine",
        })
    }
}

fn slots(kvm: &Kvm) -> u32 {
    u32::try_from(kvm.get_nr_memslots()).expect("KVM numbers slots in 16 bits")
}

/// By which instruction this KVM completes hypercalls: tried once, for it takes a while.
fn transport(kvm: &Kvm) -> Result<Transport, RunError> {
    static FOUND: OnceLock<Transport> = OnceLock::new();
    match FOUND.get() {
        Some(&found) => Ok(found),
        None => Ok(*FOUND.get_or_init({
            let found = kvm::transport(kvm)?;
            move || found
        })),
    }
}
