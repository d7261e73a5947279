//! Host `machine`: the simulated one, with its kernel and hardware within reach.

mod inside;
mod reasons;

use std::collections::BTreeSet;

use polder::machine::{HostPte, Vpn};
use polder::units::{GfnRange, Gpa, PageIndex, PageRange};
use polder::{
    Error, GuestExit, HostKind, Memory, MemoryFault, PageSize, Platform, Prefaulted, Visibility,
    VmId,
};
use polder_vmm::scenario::Op;
use polder_vmm::{Accepting, Accesses, Ended, GuestRoot, IdleVcpu, Progress, Supervision, Vm};

use super::{EVERY_SIZE, LOGGED_BY_4K, LOOKS, NO_FLAG};
use crate::host::{Guest, Host, Inside, Trouble, Way};
use crate::{Section, Skipped};

use reasons::{GUEST_FREES, NO_SELFTESTS, SHARES_WHOLE};

/// The simulated machine, for a kind of VM, with a bug planted or without.
pub(super) struct Machine {
    pub(super) platform: Platform,
    pub(super) size: PageSize,
    pub(super) root: GuestRoot,
    /// Plants the bug into memory that was just made.
    pub(super) plant: Option<&'static (dyn Fn(&Memory) + Sync)>,
}

impl Machine {
    pub(super) const fn new(platform: Platform) -> Self {
        let size = PageSize::Small;
        Self { platform, size, root: GuestRoot::Tdp, plant: None }
    }

    /// A plain VM with memory of huge pages.
    pub(super) const fn of(size: PageSize) -> Self {
        Self { size, ..Self::new(Platform::Plain) }
    }

    /// A plain VM whose guests run on `root`.
    pub(super) const fn on(root: GuestRoot) -> Self {
        Self { root, ..Self::new(Platform::Plain) }
    }
}

/// Where the object's page 0 is in the host view: the 1 GiB page after the first.
const HOST_VIEW: u64 = 1 << 18;

fn vpn(page: PageIndex) -> Vpn {
    Vpn::new(HOST_VIEW + page.get()).expect("a page of a small object")
}

const ROOT: &str = "which addresses a root translates is no affair of this section: see machine";

impl Host for Machine {
    fn kind(&self) -> HostKind {
        HostKind::Machine
    }

    fn platform(&self) -> Platform {
        self.platform
    }

    fn page_size(&self) -> PageSize {
        self.size
    }

    fn name(&self) -> String {
        match (self.root, self.platform, self.size) {
            (GuestRoot::Shadow, ..) => "machine shadow".to_owned(),
            (GuestRoot::Nested, ..) => "machine nested".to_owned(),
            (GuestRoot::Tdp, Platform::Plain, PageSize::Small) => "machine".to_owned(),
            (GuestRoot::Tdp, Platform::Plain, size) => format!("machine {size}"),
            (GuestRoot::Tdp, platform, _) => format!("machine {platform}"),
        }
    }

    fn lacks(&self, section: Section) -> Option<&'static str> {
        let of_roots = [Section::Prefault, Section::DirtyLog].contains(&section);
        if self.root != GuestRoot::Tdp && !of_roots {
            return Some(ROOT);
        }
        if self.size != PageSize::Small {
            match section {
                Section::HugePages => return Some(EVERY_SIZE),
                Section::Selftests => return Some(NO_FLAG),
                Section::DirtyLog if self.size == PageSize::Huge1G => return Some(LOGGED_BY_4K),
                _ => {}
            }
        }
        match (section, self.platform) {
            (Section::Selftests, Platform::Pkvm) => Some(NO_SELFTESTS),
            (Section::Population | Section::Userfault, Platform::Pkvm) => Some(SHARES_WHOLE),
            (Section::Discard, Platform::Pkvm) => Some(GUEST_FREES),
            (Section::Rmp, Platform::Snp) | (Section::Pkvm, Platform::Pkvm) => None,
            (Section::Rmp, _) => Some("only memory of an SNP guest has an RMP"),
            (Section::Pkvm, _) => {
                Some("only memory of a protected VM under pKVM is the guest's to share")
            }
            (Section::HugePages, Platform::Snp) => {
                Some("its contents are not preserved; its large entries are in section rmp")
            }
            (Section::HugePages, Platform::Pkvm) => {
                Some("pKVM's tables have entries of 4K only here, and such memory is refused")
            }
            (Section::KernelAccess, _) => {
                Some("these accesses are KVM's, and here KVM is simulated")
            }
            _ => None,
        }
    }

    fn not_applicable(&self) -> &'static [(&'static str, &'static str)] {
        reasons::reasons(self.platform, self.size)
    }

    fn missing(&self, _: &polder::Error) -> Option<Skipped> {
        None
    }

    fn prepare(&self, memory: &Memory) {
        if let Some(plant) = self.plant {
            plant(memory);
        }
    }

    fn guest(&self) -> Result<Box<dyn Guest>, Skipped> {
        Ok(Box::new(MachineGuest(Vm::on(self.root), self.root)))
    }

    fn in_trouble(&self, trouble: Trouble, _: &mut (dyn FnMut() + Send)) -> Result<(), Skipped> {
        panic!("{trouble:?} is not applicable to the machine, and declared so");
    }

    fn mapped(&self, memory: &Memory, range: PageRange) -> Vec<PageIndex> {
        let mapped = memory.simulated(|machine, _, process| {
            let is_mapped = |&page: &PageIndex| {
                matches!(machine.host_pte(process, vpn(page)), Ok(HostPte::Mapped { .. }))
            };
            range.frames().filter(is_mapped).collect()
        });
        mapped.expect("memory of this host")
    }

    fn inherited(&self, memory: &Memory) -> Vec<String> {
        let inherited = memory.simulated(|machine, object, process| {
            let child = machine.fork(process).expect("a process");
            let all = PageRange::between(0, 1).expect("a page");
            let views: BTreeSet<_> = machine.views_of(object, all).map(|(id, _)| id).collect();
            machine.exit_process(child).expect("the child");
            views.contains(&child).then(|| "the host view".to_owned())
        });
        Vec::from_iter(inherited.expect("memory of this host"))
    }

    fn reaches(&self, _: Way) -> bool {
        false
    }

    fn inside(&self) -> Option<&dyn Inside> {
        Some(self)
    }
}

/// A guest whose accesses the cases make one by one, as private or as shared.
struct MachineGuest(Vm, GuestRoot);

impl Guest for MachineGuest {
    fn attach(&self, memory: &Memory) -> VmId {
        self.0.attach(memory).expect("memory of this host")
    }

    fn fd(&self) -> polder::Vm {
        self.0.fd()
    }

    fn slots(&self) -> u32 {
        self.0.slots()
    }

    fn run(&self, memory: (&Memory, VmId), programs: &[Vec<Op>]) -> Ended {
        let mut looks = 0;
        let supervise = |_: Progress<'_>| {
            looks += 1;
            if looks < LOOKS { Supervision::GoOn } else { Supervision::TimeOut }
        };
        self.0.run(memory, programs, supervise).expect("the machine runs the guest")
    }

    fn vcpu(&self, (memory, vm): (&Memory, VmId)) -> IdleVcpu {
        self.0.idle_vcpu(memory, vm).expect("memory of this host")
    }

    fn prefault(
        &self,
        of: (&Memory, VmId),
        vcpu: &IdleVcpu,
        gfns: GfnRange,
    ) -> Result<Prefaulted, Error> {
        self.1.prefault(of, vcpu, gfns)
    }

    fn access(
        &self,
        (memory, vm): (&Memory, VmId),
        gpa: Gpa,
        visibility: Visibility,
        value: Option<u64>,
    ) -> Result<u64, MemoryFault> {
        let vcpu = memory.machine_vcpu(vm).expect("memory of this host");
        let accepting = Accepting::default();
        let guest = Accesses::new(vcpu, (memory, vm), &accepting);
        let refused = |exit| match exit {
            GuestExit::MemoryFault(fault) => fault,
            other => panic!("{other}"),
        };
        if let Some(value) = value {
            guest.write_as(gpa, visibility, &value.to_le_bytes()).map_err(refused)?;
        }
        let mut word = [0; 8];
        guest.read_as(gpa, visibility, &mut word).map_err(refused)?;
        Ok(u64::from_le_bytes(word))
    }
}
