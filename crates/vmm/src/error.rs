//! Why a guest could not be run.

use polder::units::GfnRange;

use crate::guest::ImageError;
use crate::scenario::ScenarioError;

/// A run that could not begin, or that the kernel broke off. A guest that fails its checks is no
/// error: it is a [`Report`](crate::Report).
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The guest asked for can't be.
    #[error("there is no such guest")]
    Scenario(#[from] ScenarioError),
    /// The guest does not assemble.
    #[error("the guest's image can't be made")]
    Image(#[from] ImageError),
    /// Memory of Polder's could not be made or bound.
    #[error("the guest's memory can't be made")]
    Memory(#[source] polder::Error),
    /// KVM can't be used.
    #[error("KVM can't be used")]
    Kvm(#[source] std::io::Error),
    /// KVM refused a part of the VM.
    #[error("{call} failed")]
    Vm {
        /// The ioctl.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// KVM broke off a vCPU.
    #[error("vCPU {vcpu} can't go on")]
    Vcpu {
        /// Which.
        vcpu: u32,
        /// What the kernel said.
        #[source]
        source: polder_linux::Error,
    },
    /// This KVM has no machine checks to give a guest.
    #[error("this KVM gives a guest no machine checks")]
    NoMachineChecks(#[source] polder_linux::Error),
    /// This KVM makes no VM whose memory can be private.
    #[error("this KVM offers no VM with private memory: that needs TDP (EPT or NPT)")]
    NoPrivateMemory,
    /// A thread could not be started.
    #[error("a thread can't be started")]
    Thread(#[source] std::io::Error),
    /// A file that the VMM needs can't be opened.
    #[error("{path} can't be opened")]
    File {
        /// Which.
        path: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file that memory is compared with can't be opened.
    #[error("{path} can't be opened", path = .path.display())]
    Source {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// More memory than the guest can read.
    #[error("the guest that reads all of its memory reads up to {most}")]
    TooLarge {
        /// So much.
        most: polder::units::ByteSize,
    },
    /// Memory is to be mapped ahead where the VM has none.
    #[error("the guest has no memory at some of guest frames {gfns}")]
    NoMemoryThere {
        /// The frames.
        gfns: GfnRange,
    },
    /// The guest was to have no fault after its start, and would have some.
    #[error("the guest can't be kept from faults after its start: {what}")]
    FaultsRemain {
        /// Why.
        what: &'static str,
        /// What to do about it.
        way_out: &'static str,
    },
    /// A thread of the VMM panicked: a fault of ours.
    #[error("a thread of the VMM panicked")]
    Panicked,
}

impl RunError {
    /// What the user can do about it.
    pub fn way_out(&self) -> Option<&'static str> {
        match self {
            Self::Scenario(ScenarioError::Vcpus { .. }) => Some("give --vcpus 1 to 4"),
            Self::Scenario(_) => {
                Some("give --memory a whole number of 4K pages from 16M to 1T, such as 512M")
            }
            Self::Kvm(error) | Self::Vm { source: error, .. } if is_out_of_files(error) => {
                Some(MORE_FILES)
            }
            Self::Kvm(error) => Some(match error.kind() {
                std::io::ErrorKind::NotFound => {
                    "enable virtualisation in the firmware and load the module kvm_intel or kvm_amd"
                }
                std::io::ErrorKind::PermissionDenied => {
                    "run as root, or add yourself to the group that owns /dev/kvm \
                     (sudo usermod -aG kvm $USER) and log in again"
                }
                _ => "check that /dev/kvm is KVM's and that no other hypervisor holds the CPU",
            }),
            Self::Memory(error) => error.way_out(),
            Self::NoMemoryThere { .. } => {
                Some("name memory that the guest has, or all of it: --prefault all")
            }
            Self::FaultsRemain { way_out, .. } => Some(way_out),
            Self::NoMachineChecks(_) => Some("have the guest stopped: --on-failed-page stop"),
            Self::NoPrivateMemory => {
                Some("use --host memfd, or a kernel with CONFIG_KVM_SW_PROTECTED_VM and TDP")
            }
            Self::Image(_) | Self::Panicked => Some("report it: this is a bug in Polder"),
            Self::Vm { .. } => Some("try less --memory, or fewer --vcpus"),
            Self::Thread(_) => {
                Some("raise the limits of processes and memory (ulimit -u, ulimit -v)")
            }
            Self::File { source, .. } if is_out_of_files(source) => Some(MORE_FILES),
            Self::Source { .. } => Some("check the path"),
            Self::TooLarge { .. } => Some("give a smaller file"),
            Self::File { .. } => Some("mount a devtmpfs on /dev"),
            Self::Vcpu { .. } => Some("see the kernel's log (dmesg) for what KVM says"),
        }
    }

    /// Wraps an error of `kvm-ioctls`.
    pub(crate) fn vm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Vm { call, source: os(error) }
    }
}

const MORE_FILES: &str = "raise the limit of open files (ulimit -n)";

/// Whether this process, or the machine, may have no more files.
fn is_out_of_files(error: &std::io::Error) -> bool {
    use polder_linux::Errno;
    [Errno::MFILE, Errno::NFILE]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// An error of `kvm-ioctls` in the standard library's words.
pub(crate) fn os(error: kvm_ioctls::Error) -> std::io::Error {
    std::io::Error::from_raw_os_error(error.errno())
}
