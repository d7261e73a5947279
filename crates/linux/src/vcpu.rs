//! A vCPU: run until it exits, answered, kicked from another thread.
//!
//! What `kvm-ioctls` returns of an exit borrows the vCPU, so that its registers can't be read
//! before the exit is answered. Here an exit is a value, and the answer is given afterwards.

use core::ptr::NonNull;
use std::sync::Arc;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};

use kvm_ioctls::{VcpuExit, VcpuFd};
use polder_units::Gpa;
use rustix::io::Errno;

use crate::Error;
use crate::call::{self, Call};
use crate::sigbus::in_guest;

/// Why a vCPU stopped running.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// An IN; [`Vcpu::answer`] gives the bytes.
    PortIn {
        /// The port.
        port: u16,
        /// Bytes in all.
        bytes: usize,
    },
    /// An OUT; the bytes are dropped.
    PortOut {
        /// The port.
        port: u16,
        /// Bytes in all.
        bytes: usize,
    },
    /// A load from where there is no memory; [`Vcpu::answer`] gives the bytes.
    MmioRead {
        /// The address.
        gpa: Gpa,
        /// Bytes.
        bytes: usize,
    },
    /// A store to where there is no memory; the bytes are dropped.
    MmioWrite {
        /// The address.
        gpa: Gpa,
        /// Bytes.
        bytes: usize,
    },
    /// A hypercall that the kernel leaves to us; [`Vcpu::answer`] gives RAX.
    Hypercall {
        /// Its number.
        number: u64,
        /// Its arguments.
        arguments: [u64; 6],
    },
    /// HLT, with no interrupt controller to wake it.
    Halt,
    /// A triple fault.
    Shutdown,
    /// An access that memory and its kind don't allow (`KVM_EXIT_MEMORY_FAULT`).
    MemoryFault {
        /// The first byte.
        gpa: Gpa,
        /// Bytes.
        bytes: u64,
        /// `KVM_MEMORY_EXIT_FLAG_*`.
        flags: u64,
    },
    /// The guest touched memory that has failed: a page that is poisoned in its view, or one that
    /// the hardware has lost (`EHWPOISON`).
    MemoryFailure(FailedAt),
    /// Kicked, or interrupted by another signal.
    Interrupted,
    /// KVM could not enter the guest.
    FailedEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// KVM gave up: an instruction that it can't emulate, as a rule.
    InternalError,
    /// Any other, in words of `kvm-ioctls`.
    Other(&'static str),
    /// One that `kvm-ioctls` doesn't know.
    Unknown {
        /// `KVM_EXIT_*`.
        reason: u32,
    },
}

/// Where a guest met memory that has failed, as far as KVM says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailedAt {
    /// At this host address, as the SIGBUS has it.
    Address(usize),
    /// At this guest-physical address.
    Gpa(Gpa),
    /// KVM does not say.
    Untold,
}

/// Where the answer to the last exit goes: into the page that KVM shares with us.
#[derive(Debug)]
enum Pending {
    Nothing,
    Bytes(NonNull<[u8]>),
    Word(NonNull<u64>),
}

/// A vCPU that is run by the thread that made this.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    pending: Pending,
    kicker: Kicker,
}

impl Vcpu {
    /// Takes a vCPU over, to be run by the calling thread. `kicker` kicks it from now on.
    pub fn new(fd: VcpuFd, kicker: &Kicker) -> Self {
        install_kick();
        kicker.0.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
        Self { fd, pending: Pending::Nothing, kicker: kicker.clone() }
    }

    /// The vCPU's descriptor, for everything but running it.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Runs the guest until it exits.
    ///
    /// # Errors
    /// Those of `KVM_RUN`, but for `EINTR`, which is [`Exit::Interrupted`], and what says that
    /// memory has failed.
    pub fn run(&mut self) -> Result<Exit, Error> {
        self.pending = Pending::Nothing;
        // Alone among exits, KVM_EXIT_MEMORY_FAULT comes with an errno, which `kvm-ioctls` drops;
        // nothing was called since. For every other exit it is of no meaning.
        let ((exit, errno), poisoned) = in_guest(|| (self.fd.run(), call::last()));
        match exit {
            Ok(exit) => {
                let (exit, pending) = sort(exit, errno);
                self.pending = pending;
                Ok(exit)
            }
            Err(error) => broke_off(call::of_kvm(error), poisoned),
        }
    }

    /// Answers the last exit: the value of an IN, a load or a hypercall, little-endian, as many
    /// bytes of it as were asked for. What asked for nothing takes no notice.
    pub fn answer(&mut self, value: u64) {
        match self.pending {
            Pending::Nothing => {}
            Pending::Bytes(mut data) => {
                // SAFETY: it points into the page that KVM shares with us, mapped as long as
                // `fd` lives; since the exit nobody else has had a reference to it, for `run` sets
                // it anew and `fd` is not lent mutably.
                let data = unsafe { data.as_mut() };
                let value = value.to_le_bytes();
                for chunk in data.chunks_mut(value.len()) {
                    chunk.copy_from_slice(&value[..chunk.len()]);
                }
            }
            Pending::Word(mut word) => {
                // SAFETY: as above.
                *unsafe { word.as_mut() } = value;
            }
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.kicker.0.store(0, Ordering::Release);
    }
}

/// What it means that KVM_RUN failed, after a SIGBUS perhaps for a poisoned address.
fn broke_off(errno: Errno, poisoned: Option<usize>) -> Result<Exit, Error> {
    match (errno, poisoned.map(FailedAt::Address)) {
        (Errno::INTR | Errno::AGAIN | Errno::HWPOISON, Some(at)) => Ok(Exit::MemoryFailure(at)),
        (Errno::HWPOISON, None) => Ok(Exit::MemoryFailure(FailedAt::Untold)),
        (Errno::INTR | Errno::AGAIN, None) => Ok(Exit::Interrupted),
        (errno, _) => Err(Call::new("KVM_RUN").error(errno)),
    }
}

/// An exit as a value, and where its answer goes. `errno` is that of `KVM_EXIT_MEMORY_FAULT`.
fn sort(exit: VcpuExit<'_>, errno: Errno) -> (Exit, Pending) {
    let nothing = |exit| (exit, Pending::Nothing);
    match exit {
        VcpuExit::IoIn(port, data) => {
            (Exit::PortIn { port, bytes: data.len() }, Pending::Bytes(data.into()))
        }
        VcpuExit::IoOut(port, data) => nothing(Exit::PortOut { port, bytes: data.len() }),
        VcpuExit::MmioRead(gpa, data) => {
            let exit = Exit::MmioRead { gpa: Gpa::new(gpa), bytes: data.len() };
            (exit, Pending::Bytes(data.into()))
        }
        VcpuExit::MmioWrite(gpa, data) => {
            nothing(Exit::MmioWrite { gpa: Gpa::new(gpa), bytes: data.len() })
        }
        VcpuExit::Hypercall(call) => {
            let exit = Exit::Hypercall { number: call.nr, arguments: call.args };
            (exit, Pending::Word(call.ret.into()))
        }
        VcpuExit::Hlt => nothing(Exit::Halt),
        VcpuExit::Shutdown => nothing(Exit::Shutdown),
        VcpuExit::MemoryFault { gpa, .. } if errno == Errno::HWPOISON => {
            nothing(Exit::MemoryFailure(FailedAt::Gpa(Gpa::new(gpa))))
        }
        VcpuExit::MemoryFault { flags, gpa, size } => {
            nothing(Exit::MemoryFault { gpa: Gpa::new(gpa), bytes: size, flags })
        }
        VcpuExit::FailEntry(reason, _) => nothing(Exit::FailedEntry { reason }),
        VcpuExit::InternalError => nothing(Exit::InternalError),
        VcpuExit::Intr => nothing(Exit::Interrupted),
        VcpuExit::Exception => nothing(Exit::Other("exception")),
        VcpuExit::Debug(_) => nothing(Exit::Other("debug")),
        VcpuExit::SystemEvent(..) => nothing(Exit::Other("system event")),
        VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_) => nothing(Exit::Other("MSR access")),
        VcpuExit::Unsupported(reason) => nothing(Exit::Unknown { reason }),
        _ => nothing(Exit::Other("of a kind that a PC doesn't have")),
    }
}

/// Makes a vCPU stop running, from any thread.
///
/// A kick that comes just before the vCPU enters its guest is lost: who wants it to stop says so
/// where its thread looks between exits, and kicks again until it has stopped.
#[derive(Clone, Default, Debug)]
pub struct Kicker(Arc<AtomicI32>);

impl Kicker {
    /// Kicks once. Does nothing before the vCPU is taken over and after it is gone.
    pub fn kick(&self) {
        let thread = self.0.load(Ordering::Acquire);
        if thread != 0 {
            let process = rustix::process::getpid().as_raw_nonzero().get();
            // SAFETY: the signal's handler is installed and does nothing. Should the thread have
            // ended since the load, the call fails.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, kick_signal()) };
        }
    }
}

/// A signal of the kind that libraries leave to applications.
fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 2
}

fn install_kick() {
    extern "C" fn nothing(_: i32) {}
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let mut action = core::mem::MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: all zeros is a sigaction: no flags (so KVM_RUN is not restarted), empty mask.
        let action = unsafe { action.assume_init_mut() };
        action.sa_sigaction = nothing as *const () as usize;
        // SAFETY: `action` is valid, and its handler does nothing.
        let done = unsafe { libc::sigaction(kick_signal(), action, core::ptr::null_mut()) };
        assert_eq!(done, 0, "sigaction of a real-time signal with valid arguments can't fail");
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(exit: VcpuExit<'_>, errno: Errno) -> Exit {
        sort(exit, errno).0
    }

    #[test]
    fn a_memory_fault_keeps_every_flag_known_or_not() {
        for flags in [0, 1 << 3, 1 << 3 | 1 << 62, u64::MAX] {
            let fault = VcpuExit::MemoryFault { flags, gpa: 0x5000, size: 0x1000 };
            let expected = Exit::MemoryFault { gpa: Gpa::new(0x5000), bytes: 0x1000, flags };
            assert_eq!(sorted(fault, Errno::FAULT), expected);
        }
    }

    #[test]
    fn memory_that_hardware_has_lost_is_no_fault_of_the_guests_and_its_place_is_told() {
        let fault = VcpuExit::MemoryFault { flags: 1 << 3, gpa: 0x5000, size: 0x1000 };
        let at = FailedAt::Gpa(Gpa::new(0x5000));
        assert_eq!(sorted(fault, Errno::HWPOISON), Exit::MemoryFailure(at));
        let untold = Exit::MemoryFailure(FailedAt::Untold);
        assert_eq!(broke_off(Errno::HWPOISON, None), Ok(untold));
        let address = Exit::MemoryFailure(FailedAt::Address(0x7000));
        for errno in [Errno::HWPOISON, Errno::INTR, Errno::AGAIN] {
            assert_eq!(broke_off(errno, Some(0x7000)), Ok(address));
        }
    }

    #[test]
    fn an_errno_or_an_exit_that_nobody_knows_is_reported_as_it_is() {
        assert_eq!(broke_off(Errno::INTR, None), Ok(Exit::Interrupted));
        // EFAULT without a memory fault; one that no kernel gives; one beside a SIGBUS.
        for (errno, poisoned) in
            [(Errno::FAULT, None), (Errno::from_raw_os_error(4000), None), (Errno::IO, Some(1))]
        {
            let error = Error { call: "KVM_RUN", range: None, errno };
            assert_eq!(broke_off(errno, poisoned), Err(error));
        }
        let unknown = Exit::Unknown { reason: 4711 };
        assert_eq!(sorted(VcpuExit::Unsupported(4711), Errno::HWPOISON), unknown);
    }
}
